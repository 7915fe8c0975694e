"""Between the wire and pysyncobj's core: every rule that keeps the core from losing acknowledged writes.

The core trusts messages to be fresh, in order, unique and of this term. The guard makes it so. It drops what is stale,
and rewrites an append so that only a real conflict truncates the log. It clamps commit indexes to what was proved
equal, and adds term and round to answers. Sans-IO: messages are dicts, sending and the core's door are callables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pysyncobj.node import Node

from rostra.server.raft.core import BATCH, Core, server
from rostra.server.raft.elections import Elections
from rostra.server.raft.journal import Journal
from rostra.server.raft.membership import Membership
from rostra.server.raft.messages import BadMessage, Message
from rostra.server.raft.replication import Replication

#: No cluster holds so many elections while one of its servers is away.
TERMS_AHEAD_MAX = 1 << 32

#: A follower whose log is full asks for the entries that it lacks after so many heartbeats only.
FULL_ASKS_EVERY = 20


class BrokenInvariant(Exception):
    """Something that Raft rules out has happened: the process must stop before it spreads."""


class Guard:
    def __init__(
        self,
        core: Core,
        journal: Journal,
        elections: Elections,
        replication: Replication,
        membership: Membership,
        *,
        snapshot: Callable[[str, Message], None],
        snapshot_answer: Callable[[str, Message], None],
        has_room: Callable[[], bool],
        send: Callable[[str, Message], None],
        deliver: Callable[[Node, Message], None],
    ) -> None:
        self._core, self._journal = core, journal
        self._elections, self._replication, self._membership = elections, replication, membership
        self._has_room, self._send, self._deliver = has_room, send, deliver
        self._handlers: dict[str, Callable[[str, Message], None]] = {
            "append_entries": self._on_append,
            "next_node_idx": self._on_answer,
            "request_vote": self._on_request_vote,
            "response_vote": self._on_vote,
            "pre_vote": elections.on_pre_vote,
            "pre_vote_reply": elections.on_pre_vote_reply,
            "stale": self._on_stale,
            "timeout_now": elections.on_timeout_now,
            "snapshot": partial(self._on_piece, snapshot),
            "snapshot_answer": partial(self._on_piece_answer, snapshot_answer),
        }
        # About the append that is being handled: its round, and what the answer must say instead of the core's opinion.
        self._round = 0
        self._answer_next: int | None = None
        self._is_news = False
        self._is_beyond = False  # it begins behind our last entry
        self._asked_full = 0
        self.dropped = 0

    # -- in

    def inbound(self, peer_id: str, message: Message) -> None:
        """One checked message of a member. Raises BadMessage (close the link) or BrokenInvariant (stop)."""
        if max(message.get("term", 0), message.get("current", 0)) > self._core.term() + TERMS_AHEAD_MAX:
            raise BadMessage("a term from the far future")  # it would be on disk for ever, and use terms up
        handle = self._handlers.get(message["type"])
        if handle is None:  # H17 H20: apply_command, utility lists and the like are not in this house
            self.dropped += 1
            return
        handle(peer_id, message)

    def _on_append(self, peer_id: str, message: Message) -> None:
        core = self._core
        if message["term"] < core.term():  # H13: the core would ignore it without a word
            self._reply_stale(peer_id)
            return
        if message["term"] == core.term() and (core.is_leader() or core.leader_id() not in (None, peer_id)):
            if not self._may_lead(peer_id):
                raise BadMessage("a server that cannot lead speaks as a leader")
            raise BrokenInvariant(
                f"two leaders in term {core.term()}: {peer_id} and {core.leader_id()}. "
                "Is the data directory of a server in use twice?"
            )
        self._elections.heard_leader()
        self._round, self._answer_next = message["r"], None
        fits = False
        self._is_beyond = message.get("prevLogIdx", 0) > self._journal.last_index
        if "prevLogIdx" in message:
            fits = self._journal.term_at(message["prevLogIdx"]) == message["prevLogTerm"]
            message = self._only_conflicts(message)
        else:  # H1: nothing in it says that our log is the leader's, so it proves no commit
            message = {**message, "commit_index": min(message["commit_index"], core.commit_index())}
        entries = message.get("entries")
        self._is_news = bool(entries)
        self._deliver(server(peer_id), message)
        self._answer_next = None
        if entries and fits:  # else the core has asked for an earlier one
            self._membership.truncated(entries[0][1])
            self._membership.appended(entries)

    def _may_lead(self, peer_id: str) -> bool:
        """Whether our list, which may be old, has it as a voter."""
        return any(member.id == peer_id and member.votes for member in self._membership.members)

    def _only_conflicts(self, message: Message) -> Message:
        """The same append without what we have. H2: the core truncates after `prevLogIdx`, whatever comes."""
        journal = self._journal
        first, last = journal.first_index, journal.last_index
        prev, entries = message["prevLogIdx"], message["entries"]
        if journal.term_at(prev) != message["prevLogTerm"]:
            if first <= prev <= self._core.commit_index():
                raise BrokenInvariant(f"committed entry {prev} differs from the leader's")
            return message  # the core asks for an earlier one
        known = 0
        while known < len(entries) and journal.term_at(entries[known][1]) == entries[known][2]:
            known += 1
        # The log in memory must not grow without end while apply falls behind: the leader will send it again. No-ops
        # and lists of members always fit: without them nobody could lead.
        new = entries[known : known + 1]
        is_full = new and prev + known == last and new[0][0][:1] == BATCH and not self._has_room()
        if known == len(entries) or is_full:
            end = prev + known
            self._answer_next = end + 1
            return {
                **message,
                "entries": (),
                "prevLogIdx": last,
                "prevLogTerm": journal.term_at(last),
                "commit_index": min(message["commit_index"], end),
            }
        start = entries[known][1]
        if start <= self._core.commit_index():
            raise BrokenInvariant(f"committed entry {start} differs from the leader's")
        return {
            **message,
            "entries": entries[known:],
            "prevLogIdx": start - 1,
            "prevLogTerm": journal.term_at(start - 1),
        }

    def _on_answer(self, peer_id: str, message: Message) -> None:
        if message["term"] != self._core.term() or not self._core.is_leader():  # H10: the core would count it
            self.dropped += 1
            return
        if not 1 <= message["next_node_idx"] <= self._journal.last_index + 1 or message["r"] > self._replication.round:
            raise BadMessage("an answer to something that was never sent")
        self._replication.on_answer(peer_id, message)

    def _on_request_vote(self, peer_id: str, message: Message) -> None:
        if message["term"] < self._core.term():
            self._reply_stale(peer_id)
        elif self._elections.takes_request_vote(message):
            self._deliver(server(peer_id), message)
        else:
            self.dropped += 1

    def _on_piece(self, take: Callable[[str, Message], None], peer_id: str, message: Message) -> None:
        """A piece of a snapshot. Heartbeats tell who leads; this only tells that it lives."""
        if message["term"] < self._core.term():
            self._reply_stale(peer_id)
        elif message["term"] == self._core.term() and self._core.leader_id() == peer_id:
            self._elections.heard_leader()
            take(peer_id, message)
        else:
            self.dropped += 1

    def _on_piece_answer(self, take: Callable[[str, Message], None], peer_id: str, message: Message) -> None:
        if message["term"] != self._core.term() or not self._core.is_leader():  # H10
            self.dropped += 1
            return
        if message["r"] > self._replication.round or message["index"] > self._core.commit_index():
            raise BadMessage("an answer to something that was never sent")
        self._replication.heard(peer_id, message["r"])
        take(peer_id, message)

    def _on_vote(self, peer_id: str, message: Message) -> None:
        if self._elections.takes_vote(peer_id, message):  # the core counts votes, not voters
            self._deliver(server(peer_id), message)

    def _on_stale(self, peer_id: str, message: Message) -> None:
        if message["term"] > self._core.term():
            self._core.adopt_term(message["term"])

    def _reply_stale(self, peer_id: str) -> None:
        """The core would say nothing, and the sender never learn of the newer term."""
        self._send(peer_id, {"type": "stale", "term": self._core.term()})

    # -- out

    def outbound(self, message: Message) -> Message:
        """What the core wants to say, made fit for the wire."""
        if message["type"] == "request_vote":
            return self._elections.about_request_vote(message)
        if message["type"] != "next_node_idx":
            return message
        next_index = message["next_node_idx"]
        if message["success"]:
            next_index = self._answer_next or next_index
        elif message["reset"] and self._is_beyond and not self._has_room() and self._asked_full % FULL_ASKS_EVERY:
            self._asked_full += 1
            message = {**message, "reset": False}  # it would be sent again at once, for nothing
        elif message["reset"]:
            self._asked_full += self._is_beyond and not self._has_room()
            # H11: what is committed here is the leader's for certain: one round trip instead of a search.
            next_index = min(next_index, self._core.commit_index() + 1)
        return {**message, "next_node_idx": next_index, "term": self._core.term(), "r": self._round}

    @property
    def answers_news(self) -> bool:
        """Whether the append being handled had entries that were new to this server."""
        return self._is_news
