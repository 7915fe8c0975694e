"""The hazards of pysyncobj's core that lose acknowledged writes, each tried on the core behind the guard."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pysyncobj import syncobj as library
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from rostra.server.raft.core import CANDIDATE, FOLLOWER, LEADER, Core, Timing
from rostra.server.raft.disk import DirectoryDisk, Done
from rostra.server.raft.elections import LEASE, Elections
from rostra.server.raft.guard import BrokenInvariant, Guard
from rostra.server.raft.journal import Journal
from rostra.server.raft.members import Member, encode_members
from rostra.server.raft.membership import Membership
from rostra.server.raft.messages import BadMessage, Message
from rostra.server.raft.replication import Replication
from rostra.wire.errors import Internal
from tests.support.rpc_attack import Bomb

TIMING = Timing(heartbeat_s=0.05, election_min_s=0.3, election_max_s=0.6)


class PatientDisk(DirectoryDisk):
    """A real directory; what is handed to a lane is done when the test says so."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.waiting: list[tuple[Callable[[], Any], Done]] = []

    def submit(self, lane: str, work: Callable[[], Any], done: Done) -> None:
        self.waiting.append((work, done))

    def finish(self) -> None:
        while self.waiting:
            work, done = self.waiting.pop(0)
            done(work(), None)


class Server(Transport):  # type: ignore[misc]
    """The core, its guard and a clock; what it says is in `sent`."""

    def __init__(self, node_id: str = "a", others: tuple[str, ...] = ("b", "c"), *, journal: Journal | None = None):
        super().__init__(None, None, [])
        self.now_ns = 10**12
        self.sent: list[tuple[str, Message]] = []
        self.applied: list[int] = []
        self.needing: list[str] = []  # followers that only a snapshot can help
        self.journal = Journal.memory() if journal is None else journal
        peers = list(others)
        self.core = Core(node_id, [], journal=self.journal, transport=self, timing=TIMING, owner=self)
        self.replication = Replication(
            self.core,
            self.journal,
            clock=self.clock,
            send=self.post,
            deliver=self._onMessageReceived,
            needs_snapshot=self.needing.append,
        )
        self.elections = Elections(
            self.core,
            self.journal,
            node_id=node_id,
            timing=TIMING,
            clock=self.clock,
            chance=random.Random(1),
            send=self.post,
            lease_valid=self.lease_valid,
        )
        self.membership = Membership(0, tuple(Member(each, "127.0.0.1", 0, each, each) for each in (node_id, *peers)))
        self.guard = Guard(
            self.core,
            self.journal,
            self.elections,
            self.replication,
            self.membership,
            snapshot=lambda peer_id, message: self.pieces.append(message),
            snapshot_answer=lambda peer_id, message: self.pieces.append(message),
            has_room=lambda: True,
            send=self.post,
            deliver=self._onMessageReceived,
        )
        self.pieces: list[Message] = []
        self.core.set_peers(peers, [])
        self.replication.set_members((peer, True) for peer in peers)
        self.elections.set_voters((node_id, *peers))
        for peer in peers:
            self._onNodeConnected(Node(peer))
            self.replication.link_up(peer)

    # what the core and the guard ask
    def clock(self) -> int:
        return self.now_ns

    def post(self, peer_id: str, message: Message) -> None:
        self.sent.append((peer_id, message))

    def send(self, node: Node, message: Message) -> None:
        self.post(node.id, self.guard.outbound(message))

    def lease_valid(self) -> bool:
        return self.clock() < self.replication.quorum_round() + int(TIMING.election_min_s * LEASE * 1e9)

    def may_campaign(self) -> bool:
        return self.elections.may_campaign()

    def send_appends(self) -> None:
        self.replication.send_appends()

    def state_changed(self, old: int, new: int) -> None:
        if new == LEADER:
            self.replication.lead()

    def apply_committed(self) -> None:
        while self.core.applied_index() < self.core.commit_index():
            self.core.set_applied_index(self.core.applied_index() + 1)
            self.applied.append(self.core.applied_index())

    # what the tests say
    def wait(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)

    def hear(self, peer_id: str, **message: Any) -> list[Message]:
        """The message, then a tick; what was said in answer to that peer."""
        before = len(self.sent)
        self.guard.inbound(peer_id, message)
        self.core.doTick(0)
        return [said for to, said in self.sent[before:] if to == peer_id]

    def append(self, peer_id: str, term: int, prev: int, prev_term: int, entries: Any = (), **more: Any) -> Message:
        message = {"term": term, "commit_index": 1, "r": 1, "prevLogIdx": prev, "prevLogTerm": prev_term} | more
        return self.hear(peer_id, type="append_entries", entries=tuple(entries), **message)[0]

    def answer(self, peer_id: str, next_index: int, **more: Any) -> list[Message]:
        message = {"term": self.core.term(), "r": self.replication.round, "reset": False, "success": True} | more
        return self.hear(peer_id, type="next_node_idx", next_node_idx=next_index, **message)

    def lead(self) -> None:
        """Win an election with b's vote."""
        self.wait(1.0)
        self.core.campaign_in(-1.0)
        self.core.doTick(0)
        term = self.core.term() + 1
        self.hear("b", type="pre_vote_reply", term=term, current=term - 1, granted=True)
        assert self.core.state() == CANDIDATE
        self.hear("b", type="response_vote", term=term)
        assert self.core.is_leader()

    def log(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self.journal[:]]


def entry(index: int, term: int) -> tuple[bytes, int, int]:
    return (b"\0e%d" % index, index, term)


def entries(start: int, end: int, term: int) -> list[tuple[bytes, int, int]]:
    return [entry(index, term) for index in range(start, end + 1)]


# -- what a follower believes ---------------------------------------------------------------------------------------


def test_h1_an_append_without_a_place_in_the_log_commits_nothing() -> None:
    server = Server()
    server.lead()
    for index in range(3, 8):
        server.journal.add(b"\0mine", index, 1)  # never left this server
    server.hear("b", type="append_entries", term=2, commit_index=6, r=1, serialized=None)
    assert server.core.state() == FOLLOWER
    assert server.core.commit_index() == 1
    assert server.applied == []


def test_h2_a_late_heartbeat_truncates_nothing() -> None:
    server = Server()
    assert server.append("b", 1, 1, 0, entries(2, 7, 1), commit_index=7)["next_node_idx"] == 8
    assert server.applied == [2, 3, 4, 5, 6, 7]
    late = server.append("b", 1, 3, 1, commit_index=2)
    assert server.log()[-1] == (7, 1)
    assert late == {"type": "next_node_idx", "term": 1, "r": 1, "next_node_idx": 4, "reset": False, "success": True}


def test_h2_entries_sent_twice_in_other_batches_truncate_nothing() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 11, 1))
    assert server.append("b", 1, 1, 0, entries(2, 5, 1))["next_node_idx"] == 6
    assert server.log()[-1] == (11, 1)
    assert server.append("b", 1, 3, 1, entries(4, 12, 1), commit_index=12)["next_node_idx"] == 13
    assert server.log() == [(1, 0), *((index, 1) for index in range(2, 13))]
    assert server.core.commit_index() == 12


def test_h2_a_known_prefix_proves_no_more_than_itself() -> None:
    """Entries behind it may be another leader's: they are neither acknowledged nor committed."""
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 6, 1))
    answer = server.append("c", 2, 1, 0, entries(2, 3, 1), commit_index=6)
    assert answer["next_node_idx"] == 4
    assert server.core.commit_index() == 3


def test_h2_entries_that_come_again_commit_no_more_than_the_leader_says() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 6, 1))
    server.append("b", 1, 1, 0, entries(2, 6, 1), commit_index=3)
    assert server.core.commit_index() == 3


def test_h2_a_real_conflict_replaces_the_tail() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 6, 1))
    answer = server.append("c", 3, 2, 1, [entry(3, 1), entry(4, 3)])
    assert server.log() == [(1, 0), (2, 1), (3, 1), (4, 3)]
    assert answer["next_node_idx"] == 5


def test_a_leader_that_contradicts_a_committed_entry_stops_the_process() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 4, 1), commit_index=4)
    with pytest.raises(BrokenInvariant, match="committed entry 3"):
        server.append("c", 3, 2, 1, [entry(3, 3)])
    with pytest.raises(BrokenInvariant, match="committed entry 4"):
        server.append("c", 3, 4, 2)


def test_two_leaders_of_one_term_stop_the_process() -> None:
    server = Server()
    server.append("b", 4, 1, 0)
    with pytest.raises(BrokenInvariant, match="two leaders in term 4"):
        server.append("c", 4, 1, 0)


def test_h11_a_follower_that_misses_entries_asks_for_what_follows_its_commit_index() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 9, 1), commit_index=4)
    answer = server.append("c", 2, 300, 2)
    assert (answer["reset"], answer["success"], answer["next_node_idx"]) == (True, False, 5)
    answer = server.append("c", 2, 8, 2)
    assert (answer["reset"], answer["next_node_idx"]) == (True, 5)


def test_h13_a_leader_of_the_past_is_told_the_term() -> None:
    server = Server()
    server.append("b", 68, 1, 0)
    assert server.append("c", 5, 1, 0) == {"type": "stale", "term": 68}
    assert server.core.leader_id() == "b"


def test_h13_a_candidate_of_the_past_is_told_the_term() -> None:
    server = Server()
    server.append("b", 68, 1, 0)
    asked = server.hear("c", type="request_vote", term=5, last_log_index=9, last_log_term=5, transfer=False)
    assert asked == [{"type": "stale", "term": 68}]
    server.wait(1.0)
    asked = server.hear("c", type="pre_vote", term=5, last_log_index=9, last_log_term=5)
    assert (asked[0]["granted"], asked[0]["current"]) == (False, 68)


def test_h13_terms_never_fall() -> None:
    server = Server()
    server.lead()
    for term in (0, 1):
        server.hear("c", type="stale", term=term)
        assert (server.core.is_leader(), server.core.term()) == (True, 1)
    server.hear("c", type="pre_vote_reply", term=9, current=1, granted=False)
    assert (server.core.is_leader(), server.core.term()) == (True, 1)
    server.hear("c", type="pre_vote_reply", term=9, current=7, granted=False)
    assert (server.core.state(), server.core.term()) == (FOLLOWER, 7)


def test_h13_a_leader_follows_a_higher_term_so_that_the_other_can_rejoin() -> None:
    server = Server()
    server.lead()
    server.hear("c", type="stale", term=68)
    assert (server.core.state(), server.core.term(), server.journal.getCurrentTerm()) == (FOLLOWER, 68, 68)


# -- what a leader believes -----------------------------------------------------------------------------------------


def test_h10_an_answer_of_an_earlier_term_counts_for_nothing() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3, term=server.core.term() - 1)
    assert server.core.match_index(Node("b")) == 0
    assert server.replication.followers["b"].echoed < 0
    server.answer("b", 3)
    assert server.core.match_index(Node("b")) == 2


def test_h10_an_answer_to_a_leader_that_is_none_any_more_counts_for_nothing() -> None:
    server = Server()
    server.append("b", 3, 1, 0)
    dropped = server.guard.dropped
    about = {"term": 3, "r": 0}
    assert server.hear("b", type="next_node_idx", next_node_idx=2, reset=False, success=True, **about) == []
    assert server.hear("b", type="snapshot_answer", id="x", index=1, offset=9, done=True, **about) == []
    assert server.guard.dropped == dropped + 2
    assert (server.core.match_index(Node("b")), server.pieces) == (0, [])


def test_an_answer_for_what_was_never_sent_closes_the_link() -> None:
    server = Server()
    server.lead()
    with pytest.raises(BadMessage):
        server.answer("b", 99)
    with pytest.raises(BadMessage):
        server.answer("b", 2, r=server.replication.round + 1)


def test_h11_one_reset_is_honoured_per_flight() -> None:
    server = Server()
    server.lead()
    for index in range(3, 20):
        server.journal.add(b"\0", index, 1)
    first_flight = server.replication.send_appends()
    server.answer("b", 5, r=first_flight, reset=True, success=False)
    assert server.core.next_index(Node("b")) == 5
    server.replication.send_appends()
    sent = server.core.next_index(Node("b"))
    server.answer("b", 3, r=first_flight, reset=True, success=False)
    assert server.core.next_index(Node("b")) == sent == 20


def test_h19_an_answer_counts_when_the_leaders_own_disk_has_the_entry(tmp_path: Path) -> None:
    disk = PatientDisk(tmp_path)
    journal = Journal.open(disk, cluster_id="c1", node_id="a")
    server = Server(journal=journal)
    server.lead()
    noop = journal.last_index
    server.answer("b", noop + 1)
    assert server.core.commit_index() < noop
    server.replication.release_held()
    server.core.doTick(0)
    assert server.core.commit_index() < noop
    journal.start_sync()
    server.core.doTick(0)
    assert server.core.commit_index() < noop
    disk.finish()
    server.replication.release_held()
    server.core.doTick(0)
    assert server.core.commit_index() == noop


def test_h19_who_elected_itself_alone_tells_nobody_before_its_disk_has_the_term(tmp_path: Path) -> None:
    """No vote was asked for, so nothing waited for the disk; after a power cut it could lead the same term again."""
    disk = PatientDisk(tmp_path)
    server = Server(others=(), journal=Journal.open(disk, cluster_id="c1", node_id="a"))
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert server.core.is_leader()
    server.core.set_peers([], ["b"])
    server.replication.set_members((("b", False),))
    server.replication.link_up("b")
    server.replication.send_appends()
    server.journal.start_sync()
    server.replication.send_appends()
    assert to_b(server) == []
    disk.finish()
    server.replication.send_appends()
    assert to_b(server) == [(0, 0)]


def to_b(server: Server) -> list[tuple[int, int]]:
    """(first, last) of the entries in each append to b since the last time; (0, 0) for an empty one."""
    said = [message for to, message in server.sent if to == "b" and message["type"] == "append_entries"]
    server.sent.clear()
    return [(m["entries"][0][1], m["entries"][-1][1]) if m["entries"] else (0, 0) for m in said]


def test_the_window_is_filled_at_once_and_freed_by_what_is_answered_and_nothing_is_sent_twice() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3)
    server.sent.clear()
    for index in range(3, 203):
        server.journal.add(b"\0" * 20_000, index, 1)
    server.replication.send_appends()
    flight = to_b(server)
    assert flight == [(3, 9), (10, 16), (17, 23), (24, 30)]
    server.replication.is_due = False
    server.answer("b", 10)
    assert server.replication.is_due, "the next entries leave with this turn, and not with the next heartbeat"
    server.replication.send_appends()
    assert to_b(server) == [(31, 37)]
    server.replication.send_appends()
    assert to_b(server) == [(0, 0)], "a heartbeat"


def test_h12_an_answer_to_a_heartbeat_causes_no_message() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3)
    server.replication.send_appends()
    server.sent.clear()
    server.answer("b", 3)
    assert not server.replication.is_due
    assert server.sent == []


def test_after_a_lost_link_what_was_on_its_way_is_sent_again() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3)
    for index in range(3, 9):
        server.journal.add(b"\0", index, 1)
    server.replication.send_appends()
    server.replication.link_down("b")
    server.sent.clear()
    server.replication.send_appends()
    assert to_b(server) == []
    server.replication.link_up("b")
    server.replication.send_appends()
    assert to_b(server) == [(3, 8)]


def test_rounds_grow_although_the_clock_stands_still() -> None:
    """A read must never be answered by a round that began before it."""
    server = Server()
    server.lead()
    rounds = [server.replication.send_appends() for _ in range(5)]
    assert len(set(rounds)) == 5
    server.now_ns -= 10**9
    assert server.replication.send_appends() > max(rounds)


def test_whoever_answers_for_a_snapshot_is_heard() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3)
    server.wait(1.0)
    assert not server.lease_valid()
    about = {"r": server.replication.send_appends(), "id": "x", "index": 1, "offset": 9, "done": False}
    server.hear("b", type="snapshot_answer", term=server.core.term(), **about)
    assert server.lease_valid()
    server.hear("b", type="snapshot_answer", term=server.core.term(), **{**about, "r": 0})
    assert server.lease_valid()


def test_a_window_bounds_what_is_on_its_way_to_a_silent_follower() -> None:
    server = Server()
    server.lead()
    server.sent.clear()
    for index in range(3, 203):
        server.journal.add(b"\0" * 20_000, index, 1)
    for _ in range(50):
        server.replication.send_appends()
    sent = sum(len(e[0]) for to, said in server.sent if to == "b" for e in said["entries"])
    assert sent < 700_000
    server.answer("b", server.core.next_index(Node("b")))
    server.sent.clear()
    server.replication.send_appends()
    assert server.sent[0][1]["entries"][0][1] > 20


# -- elections ------------------------------------------------------------------------------------------------------


def test_h18_a_vote_that_comes_twice_is_one_vote() -> None:
    server = Server(others=("b", "c", "d", "e"))
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    for peer in ("b", "c"):
        server.hear(peer, type="pre_vote_reply", term=1, current=0, granted=True)
    assert server.core.state() == CANDIDATE
    server.hear("b", type="response_vote", term=1)
    server.hear("b", type="response_vote", term=1)
    assert server.core.state() == CANDIDATE
    server.hear("c", type="response_vote", term=1)
    assert server.core.is_leader()


def test_an_isolated_server_asks_but_never_raises_its_term() -> None:
    server = Server()
    for _ in range(50):
        server.wait(0.5)
        server.core.campaign_in(-1.0)
        server.core.doTick(0)
    assert server.core.term() == 0
    assert server.journal.getCurrentTerm() == 0


def test_who_heard_the_leader_lately_grants_nothing_and_does_not_campaign() -> None:
    server = Server()
    server.append("b", 1, 1, 0)
    ask = {"last_log_index": 50, "last_log_term": 1}
    server.wait(0.2)
    assert server.hear("c", type="pre_vote", term=2, **ask)[0]["granted"] is False
    assert server.hear("c", type="request_vote", transfer=False, term=2, **ask) == []
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert (server.core.term(), server.core.leader_id()) == (1, "b")
    server.wait(0.1)
    assert server.hear("c", type="pre_vote", term=2, **ask)[0]["granted"] is True
    assert server.hear("c", type="request_vote", transfer=False, term=2, **ask) == [
        {"type": "response_vote", "term": 2}
    ]


def test_a_restarted_server_counts_as_having_heard_the_leader() -> None:
    server = Server()
    ask = {"term": 1, "last_log_index": 1, "last_log_term": 0}
    assert server.hear("c", type="pre_vote", **ask)[0]["granted"] is False
    server.wait(0.28)
    assert server.hear("c", type="pre_vote", **ask)[0]["granted"] is True


def test_a_pre_vote_is_refused_to_a_shorter_log_and_a_known_term() -> None:
    server = Server()
    server.append("b", 3, 1, 0, entries(2, 5, 3))
    server.wait(1.0)
    for term, index, log_term in ((4, 4, 3), (4, 9, 2), (3, 5, 3)):
        reply = server.hear("c", type="pre_vote", term=term, last_log_index=index, last_log_term=log_term)[0]
        assert (reply["granted"], reply["current"]) == (False, 3)
    assert server.hear("c", type="pre_vote", term=4, last_log_index=5, last_log_term=3)[0]["granted"] is True


def test_the_lease_ends_before_its_followers_may_elect_another() -> None:
    leader, follower = Server("a"), Server("b", ("a", "c"))
    leader.lead()
    sent = leader.replication.send_appends()
    leader.wait(0.01)
    leader.answer("b", leader.journal.last_index + 1, r=sent)
    follower.append("a", leader.core.term(), 1, 0, r=sent)
    ask = {"term": 9, "last_log_index": 99, "last_log_term": 9}
    for _ in range(60):
        leader.wait(0.01)
        follower.wait(0.01)
        granted = follower.hear("c", type="pre_vote", **ask)[0]["granted"]
        assert not (granted and leader.lease_valid())
    assert granted


def test_what_was_answered_in_a_leadership_before_is_no_lease() -> None:
    server = Server()
    server.lead()
    server.answer("b", 3)
    assert server.lease_valid()
    server.hear("c", type="stale", term=5)
    server.core.campaign_in(-1.0)
    server.wait(1.0)
    server.core.doTick(0)
    server.hear("b", type="pre_vote_reply", term=6, current=5, granted=True)
    server.now_ns -= int(1.0 * 1e9)  # as if all of that had taken no time
    server.hear("c", type="response_vote", term=6)
    assert server.core.is_leader()
    assert not server.lease_valid()


def test_a_leader_grants_nobody_a_pre_vote() -> None:
    server = Server()
    server.lead()
    server.wait(1.0)
    reply = server.hear("c", type="pre_vote", term=9, last_log_index=99, last_log_term=9)[0]
    assert (reply["granted"], server.core.is_leader()) == (False, True)


def test_refusals_and_grants_for_another_term_are_no_grants() -> None:
    server = Server()
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    for refusal in ({"term": 1, "granted": False}, {"term": 2, "granted": True}):
        server.hear("b", type="pre_vote_reply", current=0, **refusal)
        server.hear("c", type="pre_vote_reply", current=0, **refusal)
        assert (server.core.term(), server.core.state()) == (0, FOLLOWER)


def test_what_was_granted_for_another_term_is_no_grant() -> None:
    server = Server()
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    server.elections.on_pre_vote_reply("b", {"term": 1, "current": 0, "granted": True})
    server.hear("c", type="stale", term=4)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert server.core.term() == 4


def test_a_vote_is_given_at_once_where_the_leader_has_asked_for_the_election() -> None:
    server = Server()
    server.append("b", 1, 1, 0)
    asked = {"last_log_index": 50, "last_log_term": 1}
    assert server.hear("c", type="request_vote", transfer=False, term=2, **asked) == []
    assert server.hear("c", type="request_vote", transfer=True, term=2, **asked) == [
        {"type": "response_vote", "term": 2}
    ]


def test_an_offer_of_leadership_of_another_term_is_none() -> None:
    server = Server()
    server.append("b", 3, 1, 0)
    for term in (2, 4):
        server.hear("b", type="timeout_now", term=term)
        assert (server.core.term(), server.core.state()) == (3, FOLLOWER)
    server.hear("b", type="timeout_now", term=3)
    assert (server.core.term(), server.core.state()) == (4, CANDIDATE)


def test_an_offer_of_leadership_is_taken_at_once_or_never() -> None:
    """The leader takes an answer of this term, to what it said after the offer, for a refusal."""
    server = Server()
    server.append("b", 3, 1, 0)
    server.guard.inbound("b", {"type": "timeout_now", "term": 3})
    assert (server.core.term(), server.core.state()) == (4, CANDIDATE)  # before anything else is read
    assert [said["transfer"] for _, said in server.sent if said["type"] == "request_vote"] == [True, True]
    server.append("b", 5, 1, 0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert server.core.term() == 5, "the offer was for that election only"


def test_who_loses_the_link_to_the_leader_campaigns_when_loyalty_is_over_and_never_later_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = library.monotonicTime()
    monkeypatch.setattr(library, "monotonicTime", lambda: now)
    server = Server()
    server.append("b", 1, 1, 0)
    server.core.campaign_in(0.6)
    server.elections.leader_link_lost()
    assert 0.27 <= server.core.campaigns_in() < 0.32
    server.wait(1.0)
    server.elections.leader_link_lost()
    assert 0.0 <= server.core.campaigns_in() < 0.05
    server.core.campaign_in(0.001)
    server.elections.leader_link_lost()
    assert server.core.campaigns_in() == pytest.approx(0.001)


# -- who counts -----------------------------------------------------------------------------------------------------


def with_learners() -> Server:
    """a and b vote, and c and d are only told."""
    server = Server(others=("b", "c", "d"))
    server.core.set_peers(["b"], ["c", "d"])
    server.replication.set_members((("b", True), ("c", False), ("d", False)))
    server.elections.set_voters(("a", "b"))
    return server


def test_h21_learners_are_told_everything_and_count_for_nothing() -> None:
    server = with_learners()
    server.lead()
    for learner in ("c", "d"):
        assert any(to == learner and said["type"] == "append_entries" for to, said in server.sent)
        server.answer(learner, 3)
    assert server.core.match_index(Node("c")) == 2
    assert server.core.commit_index() == 1
    assert not server.lease_valid()
    server.answer("b", 3)
    assert server.core.commit_index() == 2
    assert server.lease_valid()


def test_h21_the_vote_of_a_learner_is_none() -> None:
    server = with_learners()
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert [to for to, said in server.sent if said["type"] == "pre_vote"] == ["b"]
    server.hear("c", type="pre_vote_reply", term=1, current=0, granted=True)
    server.core.doTick(0)
    assert server.core.term() == 0
    server.hear("b", type="pre_vote_reply", term=1, current=0, granted=True)
    assert server.core.state() == CANDIDATE
    server.hear("c", type="response_vote", term=1)
    server.hear("d", type="response_vote", term=1)
    assert server.core.state() == CANDIDATE
    server.hear("b", type="response_vote", term=1)
    assert server.core.is_leader()


def test_h21_a_server_that_is_not_in_our_list_is_answered_and_may_win_the_votes_of_its_own() -> None:
    """Ours may be old."""
    server = Server()
    server.wait(1.0)
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    asked = {"term": 1, "last_log_index": 1, "last_log_term": 0}
    server.guard.inbound("z", {"type": "pre_vote", **asked})
    server.guard.inbound("z", {"type": "request_vote", "transfer": False, **asked})
    answers = [(said["type"], said.get("granted")) for to, said in server.sent if to == "z"]
    assert answers == [("pre_vote_reply", False), ("response_vote", None)]


def test_h21_entries_that_do_not_fit_change_no_members() -> None:
    server = Server()
    listed = encode_members((Member("b", "127.0.0.1", 0, "b", "b"),))
    server.append("b", 1, 50, 1, [(listed, 51, 1)])
    assert [m.id for m in server.membership.members] == ["a", "b", "c"]
    server.append("b", 1, 1, 0, [(listed, 2, 1)])
    assert [m.id for m in server.membership.members] == ["b"]


def test_h21_who_does_not_vote_never_campaigns() -> None:
    server = Server()
    server.elections.set_voters(("b", "c"))
    for _ in range(5):
        server.wait(1.0)
        server.core.campaign_in(-1.0)
        server.core.doTick(0)
    assert (server.core.term(), server.sent) == (0, [])
    server.elections.set_voters("b")  # alone, and not this one
    server.core.campaign_in(-1.0)
    server.core.doTick(0)
    assert server.core.term() == 0


# -- what the core would do by itself -------------------------------------------------------------------------------


def test_h3_h4_h22_the_core_never_drops_entries_for_a_snapshot_of_its_own() -> None:
    server = Server()
    server.append("b", 1, 1, 0, entries(2, 40, 1), commit_index=40)
    server.core.forceLogCompaction()
    for _ in range(5):
        server.core.doTick(0)
    assert server.log()[0] == (1, 0)
    assert server.log()[-1] == (40, 1)


def test_h9_the_core_never_loads_a_snapshot_of_its_own() -> None:
    """It would swallow a failure and go on with an empty state."""
    server = Server()
    with pytest.raises(Internal, match="snapshot of its own"):
        server.core._SyncObj__loadDumpFile(clearJournal=True)


def test_h15_h16_the_core_never_applies_an_entry_by_itself() -> None:
    server = Server()
    server.append("b", 1, 1, 0, [(b"\3version", 2, 1)], commit_index=2)
    assert server.applied == [2]  # by its owner
    with pytest.raises(Internal, match="apply an entry by itself"):
        server.core._SyncObj__doApplyCommand(b"\3version")


def test_h20_a_pickle_in_the_log_is_never_loaded(tmp_path: Path) -> None:
    server, mark = Server(), tmp_path / "taken-over"
    bomb = pickle.dumps(Bomb(mark))
    server.append("b", 1, 1, 0, [(b"\0" + bomb, 2, 1), (b"\3" + bomb, 3, 1)], commit_index=3)
    with pytest.raises(Internal, match="cannot be read"):
        server.append("b", 1, 3, 1, [(b"\2" + bomb, 4, 1)], commit_index=4)
    server.core.doTick(0)
    assert not mark.exists()


# -- what a follower gets that is far behind ------------------------------------------------------------------------


def test_h12_who_waits_for_a_snapshot_gets_one_message_a_round_and_its_answers_cause_none() -> None:
    server = Server()
    server.lead()
    for index in range(3, 60):
        server.journal.add(b"\0", index, 1)
    server.journal.set_base(40)
    server.core.set_next_index(Node("b"), 5)
    server.replication.send_appends()
    assert "b" in server.needing
    server.needing.clear()
    server.replication.followers["b"].streaming = "the snapshot"
    server.sent.clear()
    for _ in range(20):
        server.replication.send_appends()
        server.answer("b", 2, reset=True, success=False)
        assert not server.replication.is_due
    said = [message for to, message in server.sent if to == "b"]
    assert len(said) == 20
    assert all(message["entries"] == [] for message in said)
    assert "b" not in server.needing


def test_after_a_snapshot_entries_go_on_behind_it() -> None:
    server = Server()
    server.lead()
    for index in range(3, 60):
        server.journal.add(b"\0", index, 1)
    server.journal.set_base(40)
    server.replication.followers["b"].streaming = "the snapshot"
    server.replication.has_snapshot("b", 50)
    assert server.core.match_index(Node("b")) == 50
    server.sent.clear()
    server.replication.send_appends()
    (append,) = (message for to, message in server.sent if to == "b")
    assert (append["prevLogIdx"], append["entries"][0][1], append["entries"][-1][1]) == (50, 51, 59)


def test_h10_an_answer_about_a_snapshot_of_an_earlier_term_counts_for_nothing() -> None:
    server = Server()
    server.lead()
    done = {"r": 0, "id": "x", "index": 2, "offset": 9, "done": True}
    server.hear("b", type="snapshot_answer", term=server.core.term() - 1, **done)
    assert server.pieces == []
    server.answer("b", 3)
    server.hear("b", type="snapshot_answer", term=server.core.term(), **done)
    assert len(server.pieces) == 1


def test_h10_a_follower_cannot_have_a_snapshot_beyond_what_is_committed() -> None:
    server = Server()
    server.lead()
    with pytest.raises(BadMessage):
        server.hear("b", type="snapshot_answer", term=server.core.term(), r=0, id="x", index=99, offset=9, done=True)


def test_a_piece_of_a_snapshot_counts_from_the_leader_of_this_term_only() -> None:
    server = Server()
    server.append("b", 3, 1, 0)
    piece = {"r": 1, "id": "x", "index": 9, "snap_term": 1, "size": 4, "offset": 0, "data": b"1234"}
    assert server.hear("c", type="snapshot", term=2, **piece) == [{"type": "stale", "term": 3}]
    server.hear("c", type="snapshot", term=3, **piece)
    server.hear("b", type="snapshot", term=4, **piece)
    assert (server.core.term(), server.pieces) == (3, [])
    server.hear("b", type="snapshot", term=3, **piece)
    assert len(server.pieces) == 1


@pytest.mark.parametrize(
    "message",
    [
        {"type": "stale", "term": 1 << 40},
        {"type": "pre_vote_reply", "term": 1, "current": 1 << 40, "granted": False},
        {"type": "request_vote", "term": 1 << 40, "last_log_index": 1, "last_log_term": 0, "transfer": True},
    ],
    ids=lambda message: message["type"],
)
def test_h20_a_term_from_the_far_future_is_not_written_down(message: Message) -> None:
    server = Server()
    with pytest.raises(BadMessage, match="far future"):
        server.guard.inbound("b", message)
    assert server.journal.getCurrentTerm() == 0


def test_messages_that_this_house_does_not_speak_are_dropped() -> None:
    server = Server()
    server.append("b", 1, 1, 0)
    for kind in ("serialized", "apply_command", "apply_command_response", "add"):
        assert server.hear("b", type=kind, term=1, command=b"\0", request_id=1) == []
    assert server.guard.dropped == 4
    assert server.core.term() == 1
