"""Who may disturb whom: pre-vote, loyalty to a leader that was heard lately, one vote per voter.

Rules about time: a server that heard the leader less than LOYALTY × the shortest election timeout ago votes for nobody,
not even itself. A leader's lease is LEASE × that timeout from when it *sent* what a majority answered. As LEASE <
LOYALTY and clocks are those that run through a suspend, no other leader exists while a lease is valid. A restarted
server knows nothing of what it promised, so it counts as having heard the leader when it started.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

from rostra.server.raft.core import Core, Timing
from rostra.server.raft.journal import Journal
from rostra.server.raft.messages import Message

LOYALTY, LEASE = 0.9, 0.8

#: A server that lets another one try waits this long before it asks for itself: two elections at once split the votes,
#: and a split costs a whole election timeout.
YIELD_S = 0.08

#: Between two servers that lose their leader at the same moment: which of them asks first.
RANK_S = 0.015


def boottime_ns() -> int:
    """The clock of leases: monotonic, and it runs on while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Elections:
    """This server's part in elections. `send(peer_id, message)` and `lease_valid()` are the owner's."""

    def __init__(
        self,
        core: Core,
        journal: Journal,
        *,
        node_id: str,
        timing: Timing,
        clock: Callable[[], int],
        chance: random.Random,
        send: Callable[[str, Message], None],
        lease_valid: Callable[[], bool],
    ) -> None:
        self._core, self._journal = core, journal
        self._node_id = node_id
        self._timing, self._clock, self._send, self._lease_valid = timing, clock, send, lease_valid
        self._chance = chance
        self._voters: list[str] = []
        self._loyal_ns = int(timing.election_min_s * LOYALTY * 1e9)
        self._heard_ns = clock()
        self._asked_term = 0
        self._grants: set[str] = set()
        self._ask_again_ns = 0
        self._votes: set[tuple[int, str]] = set()
        self._transfer_term = -1  # the leader of this term asked this server to follow it
        self.disk_hangs = False  # told by the owner
        self.pre_votes = 0

    def set_voters(self, voters: Iterable[str]) -> None:
        """Who decides, this server perhaps among them."""
        self._voters = sorted(voters)
        self._grants &= set(self._voters)

    @property
    def _votes_itself(self) -> bool:
        return self._node_id in self._voters

    def _rank(self, server_id: str) -> int:
        return self._voters.index(server_id) if server_id in self._voters else len(self._voters)

    # -- the leader

    def heard_leader(self) -> None:
        self._heard_ns = self._clock()
        self._grants.clear()

    def heard_age_s(self) -> float:
        return (self._clock() - self._heard_ns) / 1e9

    def is_loyal(self) -> bool:
        return self._clock() - self._heard_ns < self._loyal_ns

    def leader_link_lost(self) -> None:
        """Its process has probably ended: campaign as soon as loyalty allows, one server a little before the other."""
        loyal_s = max(0.0, self._timing.election_min_s * LOYALTY - self.heard_age_s())
        wait_s = loyal_s + 0.002 + self._rank(self._node_id) * RANK_S + self._chance.random() * RANK_S / 2
        if wait_s < self._core.campaigns_in():
            self._core.campaign_in(wait_s)

    # -- pre-vote

    def may_campaign(self) -> bool:
        """Asked by the core whenever the election deadline is past. True starts an election with a new term."""
        if not self._votes_itself or self.disk_hangs:  # H21: a learner, a replica, or removed
            if not self.is_loyal():
                self._core.forget_leader()  # so that it is seen to have none, and asks around
            return False
        if len(self._voters) == 1:
            return True
        if self._transfer_term == self._core.term():
            return True  # its leader has given up its lease
        if self.is_loyal():
            return False
        term = self._core.term() + 1
        if self._asked_term == term and 2 * (len(self._grants) + 1) > len(self._voters):
            self._grants.clear()
            self._asked_term = 0
            return True
        now = self._clock()
        if now >= self._ask_again_ns:
            self._ask_again_ns = now + int(self._timing.election_min_s * self._chance.uniform(0.15, 0.3) * 1e9)
            self._asked_term = term
            self._grants.clear()
            self._core.forget_leader()
            self.pre_votes += 1
            for peer_id in self._voters:
                if peer_id != self._node_id:
                    self._send(peer_id, self._about_log({"type": "pre_vote", "term": term}))
        return False

    def _about_log(self, message: Message) -> Message:
        last = self._journal[-1]
        return {**message, "last_log_index": last[1], "last_log_term": last[2]}

    def on_pre_vote(self, peer_id: str, message: Message) -> None:
        last = self._journal[-1]
        granted = (
            message["term"] > self._core.term()
            and (message["last_log_term"], message["last_log_index"]) >= (last[2], last[1])
            and not self._core.is_leader()
            and not self.is_loyal()
        )
        if granted:
            now = self._clock()
            asking = self._asked_term == message["term"] and now < self._ask_again_ns
            equal = (message["last_log_term"], message["last_log_index"]) == (last[2], last[1])
            if asking and equal and self._rank(self._node_id) < self._rank(peer_id):
                granted = False  # it asked at the same moment, and will grant ours by the same rule
            else:
                self._asked_term = 0
                self._grants.clear()
                self._ask_again_ns = now + int(YIELD_S * (1 + self._chance.random() / 2) * 1e9)
        reply = {"type": "pre_vote_reply", "term": message["term"], "current": self._core.term(), "granted": granted}
        self._send(peer_id, reply)

    def on_pre_vote_reply(self, peer_id: str, message: Message) -> None:
        if message["current"] > self._core.term():
            self._core.adopt_term(message["current"])
        elif message["granted"] and message["term"] == self._asked_term and peer_id in self._voters:
            self._grants.add(peer_id)

    # -- transfer

    def on_timeout_now(self, peer_id: str, message: Message) -> None:
        """The leader asks this server to take over: stand for election now, whatever was heard lately."""
        core = self._core
        if message["term"] == core.term() and core.leader_id() == peer_id and self._votes_itself:
            # Now or never: the leader takes an answer to what it sent later for a sign that this offer has passed.
            self._transfer_term = core.term()
            core.campaign_in(-1.0)
            core.doTick(0)
            self._transfer_term = -1

    def about_request_vote(self, message: Message) -> Message:
        """The core's request for a vote, with what the voters have to know."""
        return {**message, "transfer": self._transfer_term == message["term"] - 1}

    # -- votes

    def takes_request_vote(self, message: Message) -> bool:
        """Whether the core may see this request for a vote. The asker need not vote in our list: ours may be old."""
        if message["transfer"]:  # the leader that we may have heard just now has given up its lease for this
            return True
        if self._core.is_leader():
            return not self._lease_valid()
        return not self.is_loyal()

    def takes_vote(self, peer_id: str, message: Message) -> bool:
        """Whether this vote counts: of this term, of a voter, and its first (H18: the core only counts)."""
        vote = (message["term"], peer_id)
        if message["term"] != self._core.term() or peer_id not in self._voters or vote in self._votes:
            return False
        self._votes = {old for old in self._votes if old[0] == message["term"]} | {vote}
        return True
