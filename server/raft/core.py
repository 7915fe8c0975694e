"""pysyncobj's consensus core, and the only module that knows its private names.

The core (0.3.17) decides elections and commits. It gets our journal and transport, and loses its own snapshots, pickle,
thread and sockets. It asks its `Owner` whether it may campaign, how to replicate and how to apply. Because this stands
on private names, `check_library` compares the library's source with the one that was tested.

The callers rely on facts of the library. The log is never empty (entry 1 of term 0 is a no-op on every server). A
leader counts itself at append, not at durability. `_onTick` does elections, commit, apply and heartbeats in that order.
Its clock is CLOCK_MONOTONIC_RAW.
"""

from __future__ import annotations

import _socket
import functools
import hashlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pysyncobj.syncobj as library
from pysyncobj.config import SyncObjConf
from pysyncobj.journal import Journal as CoreJournal
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from rostra.wire.errors import Internal

# The library replaces this by a function for Windows, whatever the platform; others in this process use it.
socket.inet_ntop = _socket.inet_ntop

LIBRARY_SHA256 = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"

# First byte of a log entry's command, as the core writes them; members.py has MEMBERSHIP (2). H16: VERSION (3) is
# applied twice by the core and never written by us.
BATCH, NO_OP = b"\x00", b"\x01"

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2


def check_library() -> None:
    """Raises Internal unless the installed pysyncobj is the one that this code was tested with."""
    found = hashlib.sha256(Path(str(library.__file__)).read_bytes()).hexdigest()
    if found != LIBRARY_SHA256:
        raise Internal(
            f"the installed pysyncobj is not the tested one: sha256 of {library.__file__} is {found}, expected "
            f"{LIBRARY_SHA256}. Install pysyncobj==0.3.17 as in constraints.txt"
        )


def _create_journal(journal: Any = None, _original: Any = library.createJournal) -> Any:
    """The library makes a journal from a file name; ours is made already."""
    return journal if isinstance(journal, CoreJournal) else _original(journal)


library.createJournal = _create_journal


@dataclass(frozen=True, slots=True)
class Timing:
    """The raft clockwork. The core demands election_min_s > 3 heartbeat_s."""

    heartbeat_s: float = 0.05
    election_min_s: float = 0.4
    election_max_s: float = 0.7


class Server(str, Node):  # type: ignore[misc]
    """One of the servers, as the core names it.

    The library's nodes hash and compare their ids in Python, dozens of times for each entry; a text does it in C.
    """

    def __new__(cls, node_id: str) -> Server:
        return str.__new__(cls, node_id)


@functools.cache
def server(node_id: str) -> Server:
    return Server(node_id)


class _NoPoller:
    """The core has no sockets; asking about none would cost a system call, and the interpreter's lock, each turn."""

    def subscribe(self, *_: Any) -> None: ...
    def unsubscribe(self, *_: Any) -> None: ...
    def poll(self, _timeout: float) -> None: ...


class Owner(Protocol):
    """What the core asks of the code around it."""

    def may_campaign(self) -> bool:
        """The election deadline has passed: is it right to disturb the others?"""

    def send_appends(self) -> None:
        """A heartbeat is due, or this server has just become leader."""

    def apply_committed(self) -> None:
        """The commit index may have grown."""

    def state_changed(self, old: int, new: int) -> None: ...


class Core(library.SyncObj):  # type: ignore[misc]
    """One server's consensus state."""

    def __init__(
        self,
        node_id: str,
        peer_ids: Iterable[str],
        *,
        journal: CoreJournal,
        transport: Transport,
        timing: Timing,
        owner: Owner,
    ) -> None:
        self._owner = owner
        conf = SyncObjConf(
            autoTick=False,
            appendEntriesUseBatch=True,  # so the core makes no pipe and sends nothing by itself but heartbeats
            commandsWaitLeader=False,
            dynamicMembershipChange=False,
            raftMinTimeout=timing.election_min_s,
            raftMaxTimeout=timing.election_max_s,
            appendEntriesPeriod=timing.heartbeat_s,
            connectionTimeout=timing.election_max_s + 1,
            leaderFallbackTimeout=timing.election_min_s,
            journalFile=journal,
            fullDumpFile=None,
            pollerType="poll",  # until it is replaced below: epoll would have a descriptor
            onStateChanged=owner.state_changed,
        )
        super().__init__(server(node_id), [server(peer) for peer in peer_ids], conf, transport=transport)
        self._poller = _NoPoller()

    # -- what the core would do, and we do instead (the names are the library's, mangled)

    def _SyncObj__connectedToAnyone(self) -> bool:
        return self._owner.may_campaign()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._SyncObj__newAppendEntriesTime = library.monotonicTime() + self.conf.appendEntriesPeriod
        self._owner.send_appends()

    def _SyncObj__applyLogEntries(self) -> bool:
        self._owner.apply_committed()
        return False

    def _checkCommandsToApply(self) -> None:
        """Entries go straight into the journal; the core's own queue stays empty."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """H3 H4 H22: the core's own snapshots can lose acknowledged entries, so it takes none."""

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        raise Internal("the core tried to load a snapshot of its own")  # H9: it would swallow a failure

    def _SyncObj__doApplyCommand(self, command: bytes) -> None:
        raise Internal("the core tried to apply an entry by itself")  # H15 H16

    def _SyncObj__parseChangeClusterRequest(self, command: bytes) -> None:
        """H20 H21: would unpickle. membership.py decides who the members are, and tells it by `set_peers`."""

    # -- its state, under names that can be spoken

    def term(self) -> int:
        return self._SyncObj__raftCurrentTerm  # type: ignore[no-any-return]

    def state(self) -> int:
        return self._SyncObj__raftState  # type: ignore[no-any-return]

    def is_leader(self) -> bool:
        return self._SyncObj__raftState == LEADER  # type: ignore[no-any-return]

    def leader_id(self) -> str | None:
        leader = self._SyncObj__raftLeader
        return leader.id if leader is not None else None

    def forget_leader(self) -> None:
        """The leader is believed lost: name none until another one speaks."""
        self._SyncObj__raftLeader = None

    def adopt_term(self, term: int) -> None:
        """Someone knows a higher term: follow it, without a vote and without a leader."""
        self._SyncObj__setCurrentTerm(term, None)
        self.step_down()

    def step_down(self) -> None:
        """Lead no more, in the same term; the vote of this term stays given."""
        self._SyncObj__setState(FOLLOWER)
        self._SyncObj__raftLeader = None

    def commit_index(self) -> int:
        return self._SyncObj__raftCommitIndex  # type: ignore[no-any-return]

    def applied_index(self) -> int:
        return self._SyncObj__raftLastApplied

    def set_applied_index(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index

    def set_commit_index(self, index: int) -> None:
        """Only for what is known to be committed: a snapshot's index."""
        self._SyncObj__raftCommitIndex = index
        self._SyncObj__raftLog.setRaftCommitIndex(index)

    def noop_index(self) -> int | None:
        """The entry with which this server's last leadership began."""
        return self._SyncObj__noopIDx  # type: ignore[no-any-return]

    def next_index(self, node: Node) -> int:
        return self._SyncObj__raftNextIndex[node]  # type: ignore[no-any-return]

    def set_next_index(self, node: Node, index: int) -> None:
        self._SyncObj__raftNextIndex[node] = index

    def match_index(self, node: Node) -> int:
        return self._SyncObj__raftMatchIndex.get(node, 0)  # type: ignore[no-any-return]

    def set_match_index(self, node: Node, index: int) -> None:
        """`node` has everything up to `index` on its disk. Never falls."""
        if self._SyncObj__raftMatchIndex[node] < index:
            self._SyncObj__raftMatchIndex[node] = index

    def forget_match(self, node: Node) -> None:
        """`node` has lost what it acknowledged."""
        if node in self._SyncObj__raftMatchIndex:
            self._SyncObj__raftMatchIndex[node] = 0

    def campaign_in(self, seconds: float) -> None:
        """Move the election deadline."""
        self._SyncObj__raftElectionDeadline = library.monotonicTime() + seconds

    def campaigns_in(self) -> float:
        """Seconds to the election deadline."""
        return self._SyncObj__raftElectionDeadline - library.monotonicTime()  # type: ignore[no-any-return]

    def heartbeat_is_due(self) -> bool:
        return library.monotonicTime() > self._SyncObj__newAppendEntriesTime  # type: ignore[no-any-return]

    def send_heartbeat(self) -> None:
        self._SyncObj__sendAppendEntries()

    def set_peers(self, voters: Iterable[str], others: Iterable[str]) -> None:
        """Who else decides (`voters`), and who is only told (`others`: learners and replicas)."""
        deciding, told = {server(each) for each in voters}, {server(each) for each in others}
        now, last = library.monotonicTime(), self._SyncObj__raftLog[-1][1]
        present = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        for node in (deciding | told) - present:
            self._SyncObj__raftNextIndex[node] = last + 1
            self._SyncObj__raftMatchIndex[node] = 0
        for node in (deciding | told) - set(self._SyncObj__lastResponseTime):
            self._SyncObj__lastResponseTime[node] = now  # it has a whole timeout to be heard
        for node in present - (deciding | told):
            for indexed in ("NextIndex", "MatchIndex"):
                getattr(self, f"_SyncObj__raft{indexed}").pop(node, None)
            self._SyncObj__lastResponseTime.pop(node, None)
        self._SyncObj__otherNodes: set[Node] = deciding
        self._SyncObj__readonlyNodes: set[Node] = told

    def last_response_age_s(self, node: Node) -> float:
        """Seconds since `node` answered this leader."""
        return library.monotonicTime() - self._SyncObj__lastResponseTime.get(node, 0.0)  # type: ignore[no-any-return]
