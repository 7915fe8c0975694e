"""The leader's side of replication: rounds, windows, and what the followers' answers are worth.

Every append carries a round, which is the leader's clock (CLOCK_BOOTTIME, ns) when it was *sent*, made strictly
growing; followers echo it. So one number per follower does three things. It gives the lease (a majority's echo plus the
lease's length), proves that a read was ordered after it arrived (ReadIndex), and tells answers to old messages from
those to new ones. An answer for entries that are not yet on this server's own disk is kept until they are: the core
counts the leader as having them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pysyncobj.node import Node

from rostra.server.raft.core import Core, server
from rostra.server.raft.journal import Journal
from rostra.server.raft.messages import Message

#: One append carries up to this much (at least one entry), and this much is on its way unanswered per follower.
MESSAGE_BYTES, WINDOW_BYTES = 128 << 10, 512 << 10

NEVER = -1


@dataclass(slots=True)
class Follower:
    """What the leader knows of one of the others, in this term."""

    node: Node
    up: bool = False
    echoed: int = NEVER  # the latest round that it has answered
    reset_floor: int = NEVER  # resets in answer to rounds up to this one are about the past
    votes: bool = True
    told_commit: int = 0
    streaming: str = ""  # id of the snapshot that it is being sent; until it has it, entries are of no use to it
    flight: deque[tuple[int, int]] = field(default_factory=deque)  # (last index, bytes) of unanswered messages
    flight_bytes: int = 0
    held: deque[Message] = field(default_factory=deque)  # answers that wait for our own disk

    def forget_flight(self) -> None:
        self.flight.clear()
        self.flight_bytes = 0
        self.held.clear()


class Replication:
    """`send(peer_id, message)` queues, `deliver(node, message)` is the core's inbound door."""

    def __init__(
        self,
        core: Core,
        journal: Journal,
        *,
        clock: Callable[[], int],
        send: Callable[[str, Message], None],
        deliver: Callable[[Node, Message], None],
        needs_snapshot: Callable[[str], None],
    ) -> None:
        self._core, self._journal, self._clock, self._send, self._deliver = core, journal, clock, send, deliver
        self._needs_snapshot = needs_snapshot
        self.followers: dict[str, Follower] = {}
        self._other_voters = 0
        self._begun_lsn: int | None = None  # of the journal, at the first message of this leadership
        self._began_alone = False
        self.round = 0
        #: Set when a message should go out without waiting for the next heartbeat.
        self.is_due = False

    def set_members(self, others: Iterable[tuple[str, bool]]) -> None:
        """Replicate to these, (id, whether it votes), and to nobody else."""
        old = self.followers
        self.followers = {}
        for peer_id, votes in others:
            follower = self.followers[peer_id] = old.get(peer_id) or Follower(server(peer_id))
            follower.votes = votes
        self._other_voters = sum(follower.votes for follower in self.followers.values())
        self.is_due = True

    @property
    def has_other_voters(self) -> bool:
        return self._other_voters > 0

    # -- the life of a leadership and of a link

    def lead(self) -> None:
        """This server has become leader: nothing that was answered before counts."""
        self._begun_lsn = None
        self._began_alone = not self._other_voters
        for follower in self.followers.values():
            follower.echoed = follower.reset_floor = NEVER
            follower.told_commit, follower.streaming = 0, ""
            follower.forget_flight()

    def link_up(self, peer_id: str) -> None:
        follower = self.followers.get(peer_id)
        if follower is None:  # a stranger, see `RaftLog.introduce`
            return
        follower.up = True
        follower.told_commit, follower.streaming = 0, ""
        follower.forget_flight()
        if self._core.is_leader():
            matched = self._core.match_index(follower.node)
            if matched:  # what was on its way is lost; what was answered stays true
                self._core.set_next_index(follower.node, matched + 1)
            self.is_due = True

    def link_down(self, peer_id: str) -> None:
        follower = self.followers.get(peer_id)
        if follower is not None:
            follower.up, follower.streaming = False, ""
            follower.forget_flight()

    # -- sending

    def new_round(self) -> int:
        self.round = max(self._clock(), self.round + 1)
        return self.round

    def send_appends(self) -> int:
        """One message, or as many as the window admits, to every follower that can be reached. The round."""
        if self._begun_lsn is None:
            self._begun_lsn = self._journal.lsn  # the term and its no-op are among the records up to here
        if self._began_alone and self._journal.durable_lsn < self._begun_lsn:
            # No vote was asked for, so nothing has waited for the disk yet. If the power went now, this server would
            # lead the same term again and fill it with other entries.
            self.is_due = True
            return self.round
        self.is_due = False
        current = self.new_round()
        for peer_id, follower in self.followers.items():
            if follower.up:
                self._send_to(peer_id, follower, current)
        return current

    def _send_to(self, peer_id: str, follower: Follower, current: int) -> None:
        core, journal = self._core, self._journal
        last = journal.last_index
        next_index = core.next_index(follower.node)
        if 1 < journal.first_index >= next_index and not follower.streaming:
            self._needs_snapshot(peer_id)  # what it lacks is below the log's beginning
        # H12: whatever a follower lacks, it gets one message for each call, not as many as fit into a heartbeat.
        next_index = min(max(next_index, journal.first_index + 1), last + 1)
        is_first = True
        while True:
            entries = []
            if next_index <= last and follower.flight_bytes < WINDOW_BYTES and not follower.streaming:
                entries = journal.entries_from(next_index, MESSAGE_BYTES)
            if not entries and not is_first:
                break
            self._send(
                peer_id,
                {
                    "type": "append_entries",
                    "term": core.term(),
                    "commit_index": core.commit_index(),
                    "prevLogIdx": next_index - 1,
                    "prevLogTerm": journal.term_at(next_index - 1),
                    "r": current,
                    "entries": entries,
                },
            )
            is_first = False
            if not entries:
                break
            next_index = entries[-1][1] + 1
            size = sum(len(entry[0]) for entry in entries)
            follower.flight.append((next_index - 1, size))
            follower.flight_bytes += size
        core.set_next_index(follower.node, next_index)
        follower.told_commit = core.commit_index()

    def is_news(self) -> bool:
        """Whether some reachable follower has not been told the commit index."""
        commit = self._core.commit_index()
        return any(follower.up and follower.told_commit < commit for follower in self.followers.values())

    # -- answers

    def on_answer(self, peer_id: str, message: Message) -> None:
        """An answer of this term, and this server leads it."""
        follower = self.followers[peer_id]
        follower.echoed = max(follower.echoed, message["r"])
        if message["reset"]:
            # H11: one reset is honoured per flight. The others answer messages that were sent before it was known.
            if message["r"] <= follower.reset_floor:
                return
            follower.reset_floor = self.round
            follower.forget_flight()
            self.is_due = not follower.streaming
            self._deliver(follower.node, message)
            return
        # H19: the core counts this server as having its own log; until its disk has it, the answer must not count.
        if message["success"] and message["next_node_idx"] - 1 > self._journal.durable_index:
            follower.held.append(message)
            # The core still learns that the follower lives, or a slow disk would cost the leadership.
            message = {**message, "success": False}
        self._accept(follower, message)

    def release_held(self) -> None:
        """Own disk has caught up, perhaps: count the answers that waited for it."""
        if not self._core.is_leader():
            return
        durable = self._journal.durable_index
        for follower in self.followers.values():
            while follower.held and follower.held[0]["next_node_idx"] - 1 <= durable:
                message = follower.held.popleft()
                if message["term"] == self._core.term():
                    self._accept(follower, message)

    def _accept(self, follower: Follower, message: Message) -> None:
        before = self._core.next_index(follower.node)
        self._deliver(follower.node, message)
        if not message["success"] or not self._core.is_leader():
            return
        # The core moves `next` back to what was answered, and would send again what is on its way.
        self._core.set_next_index(follower.node, max(before, self._core.next_index(follower.node)))
        while follower.flight and follower.flight[0][0] < message["next_node_idx"]:
            follower.flight_bytes -= follower.flight.popleft()[1]
        if self._core.next_index(follower.node) <= self._journal.last_index:
            self.is_due = True

    def heard(self, peer_id: str, round_: int) -> None:
        """It has answered something of `round_` in this term, if only a piece of a snapshot."""
        follower = self.followers[peer_id]
        follower.echoed = max(follower.echoed, round_)

    def has_snapshot(self, peer_id: str, index: int) -> None:
        """Everything up to `index` is on its disk, from a snapshot; entries go on from there."""
        follower = self.followers[peer_id]
        follower.streaming = ""
        follower.forget_flight()
        self._core.set_match_index(follower.node, index)
        self._core.set_next_index(follower.node, index + 1)
        self.is_due = True

    # -- what a majority has answered

    def quorum_round(self) -> int:
        """The latest round that a majority of the voters, this server one of them, has answered. Alone: now."""
        needed = (self._other_voters + 1) // 2
        if needed == 0:
            return self._clock()
        echoes = sorted((f.echoed for f in self.followers.values() if f.votes), reverse=True)
        return echoes[needed - 1]
