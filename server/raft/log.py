"""RaftLog: the replicated log as the rest of the server sees it. Propose bytes; they are applied everywhere, in order.

Everything here runs on one event loop: the core, the journal's memory, the links and `apply`. `_pump` is the heartbeat
of it all: it is coalesced, and runs after each message, proposal, finished sync and change of a link, and on a timer.
Apply and replay are cut into slices, so that no turn of the loop is long. A failed disk, an exception out of `apply` or
a contradiction in the log stops the process through `fail_stop`: it retries and serves nothing after that.

Proposals: one Raft entry at a time is on its way; those that arrive meanwhile go into the next (group commit). A
proposal fails with NoLeader where it was certainly not done, and with Timeout where only the next leader knows.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgpack

from rostra.runtime import log as logging
from rostra.server.raft.core import BATCH, LEADER, NO_OP, Core, Timing, check_library, server
from rostra.server.raft.disk import DirectoryDisk, Disk
from rostra.server.raft.elections import LEASE, Elections, boottime_ns
from rostra.server.raft.guard import Guard
from rostra.server.raft.journal import BEGINNING_PLACE, Journal, Place
from rostra.server.raft.members import MEMBERS_MAX, MEMBERSHIP, Member, Members, check_change, encode_members, voters
from rostra.server.raft.membership import Membership
from rostra.server.raft.messages import BadMessage, Message
from rostra.server.raft.metrics import Durations
from rostra.server.raft.replication import Replication
from rostra.server.raft.snapshots import Snapshot
from rostra.server.raft.snapshotting import Limits, Snapshots, StateMachine
from rostra.server.raft.transport import Dial, Links
from rostra.server.raft.witness import Witness
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Conflict, Internal, NoLeader, RostraError, Timeout, TooLarge

log = logging.get("raft")

#: One Raft entry carries up to this many proposals and bytes; a single larger proposal has an entry of its own.
BATCH_ENTRIES_MAX, BATCH_BYTES_MAX = 1024, 512 << 10
PROPOSAL_BYTES_MAX = 2 << 20
#: So much may wait for its turn; beyond that, proposals are refused.
PENDING_BYTES_MAX = 64 << 20

#: A turn of applying ends after this long (looked at after every so many proposals); the rest follows next turn.
APPLY_TURN_S, APPLY_SLICE = 0.001, 16

#: A follower that writes first applies after this long, if the write has not ended by then.
APPLY_LATE_S = 0.001

#: The leader takes no more into the log while it has this many entries to apply.
UNAPPLIED_MAX = 4

#: A disk that has ended no write for this long hangs. (One that stalls for some 100 ms is only slow.)
HUNG_DISK_S = 3.0

#: How often it is told how far the journal is on the disk.
PLACE_EVERY_S = 5.0

#: Messages that count only from a server that this one leads.
_ANSWERS = frozenset({"next_node_idx", "snapshot_answer"})

#: Followers hear of a commit at the latest after this long, unless the next batch tells them or one of them asks. Under
#: load the next batch is there first; a message of its own would cost as much as the write did.
COMMIT_NOTICE_S = 0.004


class Outcome(Protocol):
    """Who waits for the result of a proposal; a Future is one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


@dataclass(slots=True)
class _Batch:
    """Proposals in one Raft entry of this leadership."""

    term: int
    entries: list[bytes]
    futures: list[Outcome]
    started_s: float


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What the leader knows of another server."""

    id: str
    suffrage: str
    is_up: bool
    match_index: int
    lag_entries: int
    last_contact_s: float
    snapshot_progress: float | None  # 0 to 1 while it is sent a snapshot


@dataclass(slots=True)
class _Counters:
    transfers: int = 0
    elections: int = 0
    leaderships: int = 0
    step_downs: int = 0
    proposals: int = 0
    batches: int = 0
    read_rounds: int = 0
    pauses: int = 0
    commit: Durations = field(default_factory=Durations)
    sync: Durations = field(default_factory=Durations)
    turn: Durations = field(default_factory=Durations)


def _or_stop(method: Callable[..., None]) -> Callable[..., None]:
    """H8: whatever goes wrong inside leaves core, journal and memory half-changed, so the process ends with it.

    BadMessage is the peer's fault and costs the peer its link.
    """

    @wraps(method)
    def run(self: RaftLog, *args: Any) -> None:
        try:
            method(self, *args)
        except BadMessage:
            raise
        except Exception as e:
            self._fail_with(e)

    return run


class RaftLog:
    """One server's end of the replicated log.

    `members` counts where neither log nor snapshot says otherwise. `dial(member)` returns an authenticated connection.
    `on_role_change(is_leader, leader_id, term)` and `on_members(members)` run on the loop; `on_opened()` when the
    journal is on the disk, before a word is said to anyone. `starts`: how many-th start of this server this is, from 1
    on; `lineage`: names of its latest processes, this one last; `reached`: a place of the journal that was on the disk
    once; `on_reached(place)` on the loop, now and then, and last at the end of `stop`. Without a directory or disk
    (`-dev`, one server only) nothing is kept, a server's own vote included. `fail_stop(reason)` must end the process
    (exit 70); so must `on_outlived(reason)`, for good (exit 78): the others know that this server has lost what it
    promised. `start` raises DamagedJournal or NewerFormat (exit 78). `clock` (ns), `perf` (s) and `chance` are given by
    the simulator.
    """

    def __init__(
        self,
        *,
        directory: Path | None,
        node_id: str,
        cluster_id: str,
        members: Members,
        state: StateMachine,
        dial: Dial,
        timing: Timing = Timing(),  # noqa: B008 (frozen)
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        on_role_change: Callable[[bool, str | None, int], None],
        on_members: Callable[[Members], None] = lambda _members: None,
        on_opened: Callable[[], None] = lambda: None,
        starts: int = 0,
        lineage: tuple[str, ...] = (),
        reached: Place = BEGINNING_PLACE,
        on_reached: Callable[[Place], None] = lambda _place: None,
        fail_stop: Callable[[str], NoReturn],
        on_outlived: Callable[[str], None] | None = None,
        sync_inline: bool = False,
        disk: Disk | None = None,
        clock: Callable[[], int] = boottime_ns,
        perf: Callable[[], float] = time.perf_counter,
        chance: random.Random | None = None,
    ) -> None:
        self._directory, self._disk, self._node_id, self._cluster_id = directory, disk, node_id, cluster_id
        self._membership = Membership(0, tuple(members))
        self._strangers: Members = ()
        self._state, self._apply, self._dial, self._timing = state, state.apply, dial, timing
        self._limits, self._clock, self._perf = limits, clock, perf
        self._chance = chance or random.Random()  # noqa: S311
        self._on_role_change, self._on_members, self._on_opened = on_role_change, on_members, on_opened
        self._fail_stop, self._sync_inline = fail_stop, sync_inline
        self._reached, self._on_reached, self._reach_s = reached, on_reached, 0.0
        self._on_outlived = on_outlived or fail_stop
        self._starts, self._lineage = starts, lineage
        self._outlived: set[str] = set()  # the others that have lost their log: they are not heard
        self._lease_ns = int(timing.election_min_s * LEASE * 1e9)

        self._is_running = self._is_started = False
        self._failed: str | None = None
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._notice: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._pumped_s = 0.0
        self._stood_still = self._disk_first = False
        self._disk_lsn, self._disk_moved_s = 0, 0.0  # what the disk has done last, and when that was noticed
        self._led_ns = -(1 << 62)  # when this server last led
        self._role: tuple[bool, str | None, int] = (False, None, 0)

        self._pending: deque[tuple[bytes, Outcome]] = deque()
        self._pending_bytes = 0
        self._batches: dict[int, _Batch] = {}  # by index, this leadership's
        self._partly: tuple[int, list[bytes], int, list[Any]] | None = None  # (index, proposals, done, results)
        self._reads: list[asyncio.Future[int]] = []  # for the next round
        self._rounds: deque[tuple[int, int, list[asyncio.Future[int]]]] = deque()  # (round, index, waiters)
        self._applied_waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._changes: dict[int, asyncio.Future[None]] = {}  # by index, changes of members that wait for their commit
        self._offers: dict[str, tuple[int, int]] = {}  # leadership: to whom -> (in which term, after which round)
        self._handing_over = False  # nothing new goes into the log, so that the successor can be level
        self._log_bytes_peak = 0
        self._sequence = itertools.count()
        self.counters = _Counters()

    # -- start and stop

    async def start(self) -> None:
        """Returns when what this server knows to be committed has been applied; alone, also when it leads."""
        check_library()
        self._loop = asyncio.get_running_loop()
        self._journal = await self._open_journal()
        await self._restore()
        self._make_core()
        self._snapshots.attach(self._core, self._replication)
        self._membership.on_change = self._members_changed
        self._is_running = self._is_started = True
        self._members_changed()
        self._pumped_s = self._disk_moved_s = self._loop.time()
        committed = self._core.commit_index()
        alone = voters(self.members) == {self._node_id}
        if alone:
            self._core.campaign_in(-1.0)
        self._links.start()
        self._pump()
        self._on_timer()
        while self._is_running and voters(self.members) == {self._node_id} and not self._is_established():
            await asyncio.sleep(self._timing.heartbeat_s / 10)  # for its own disk
        while self.applied_index < committed and self._is_running:
            await self._applied_future(committed)

    async def _open_journal(self) -> Journal:
        if self._directory is not None and self._disk is None:
            make = partial(DirectoryDisk, self._directory, inline=self._sync_inline)
            self._disk = await self._loop.run_in_executor(None, make)
        disk = self._disk
        if disk is None:
            journal = Journal.memory()
        else:
            open_it = partial(
                Journal.open,
                disk,
                cluster_id=self._cluster_id,
                node_id=self._node_id,
                segment_bytes=self._limits.segment_bytes,
                allocate_bytes=min(4 << 20, self._limits.segment_bytes),
                reached=self._reached,
            )
            # The simulator's disk is no thread's business.
            journal = open_it() if self._directory is None else await self._loop.run_in_executor(None, open_it)
        journal.on_durable, journal.on_failed = self._on_durable, self._fail
        if journal.wiped_bytes:
            log.warn("journal had a torn tail, which nobody was told of; wiped", bytes=journal.wiped_bytes)
        return journal

    async def _restore(self) -> None:
        """The newest snapshot, and which members the log behind it names."""
        journal = self._journal
        self._snapshots = Snapshots(
            self._disk,
            journal=journal,
            membership=self._membership,
            state=self._state,
            cluster_id=self._cluster_id,
            node_id=self._node_id,
            limits=self._limits,
            send=self._post,
            schedule=self._schedule,
            is_idle=lambda: self._partly is None,
            installed=self._on_installed,
            failed=self._fail_with,
        )
        self._on_opened()
        self._witness = Witness(self._disk)
        await self._snapshots.restore()
        if len(journal):
            first = max(journal.first_index, self._membership.index) + 1
            self._membership.appended(journal.entry(i) for i in range(first, journal.last_index + 1))

    def _make_core(self) -> None:
        journal = self._journal
        self._links = Links(
            node_id=self._node_id,
            cluster_id=self._cluster_id,
            journal=journal,
            timing=self._timing,
            dial=self._dial,
            chance=self._chance,
            on_message=self._on_message,
            on_link=self._on_link,
            rewrite=self._rewrite,
        )
        self._core = Core(self._node_id, [], journal=journal, transport=self._links, timing=self._timing, owner=self)
        self._replication = Replication(
            self._core,
            journal,
            clock=self._clock,
            send=self._links.post,
            deliver=self._links._onMessageReceived,
            needs_snapshot=self._snapshots.send_to,
        )
        self._elections = Elections(
            self._core,
            journal,
            node_id=self._node_id,
            timing=self._timing,
            clock=self._clock,
            chance=self._chance,
            send=self._links.post,
            lease_valid=self.lease_valid,
        )
        self._guard = Guard(
            self._core,
            journal,
            self._elections,
            self._replication,
            self._membership,
            snapshot=self._snapshots.on_piece,
            snapshot_answer=self._snapshots.on_answer,
            has_room=lambda: self._snapshots.has_room,
            send=self._links.post,
            deliver=self._links._onMessageReceived,
        )

    async def stop(self) -> None:
        """Blocks new work, says goodbye to the peers, and returns when the journal is closed."""
        if not self._is_started:
            return
        self._is_running = self._is_started = False
        for handle in (self._timer, self._notice, self._late):
            if handle is not None:
                handle.cancel()
        await self._snapshots.stop()
        await self._links.stop()
        self._abandon("this server stops")
        for _, _, waiter in self._applied_waiters:
            if not waiter.done():
                waiter.set_exception(NoLeader("this server stops"))
        self._applied_waiters.clear()
        if self._directory is None:
            self._close()
        else:
            await self._loop.run_in_executor(None, self._close)
        self._on_reached(self._journal.place)

    def _close(self) -> None:
        self._journal.close()
        if self._disk is not None:
            self._disk.close()

    def accept(self, peer_id: str, connection: FrameConnection) -> None:
        """An inbound connection, authenticated as `peer_id` by the caller. Its frames are this log's from now on."""
        if not self._is_running:
            connection.abort("raft is not running")
            return
        self._links.accept(peer_id, connection)

    # -- writing

    def propose(self, entry: bytes) -> asyncio.Future[Any]:
        """The result of `entry`'s apply. Fails with NoLeader (not done, never will be), Timeout (unknown), TooLarge."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.propose_for(future, entry)
        return future

    def propose_for(self, outcome: Outcome, entry: bytes) -> None:
        """As `propose`, for someone who is told at once, in the middle of applying: it must be short."""
        if not self._is_running or not self._core.is_leader():
            outcome.set_exception(NoLeader())
        elif len(entry) > PROPOSAL_BYTES_MAX:
            outcome.set_exception(
                TooLarge(f"a log entry of {len(entry)} bytes; at most {PROPOSAL_BYTES_MAX} are allowed")
            )
        elif self._pending_bytes > PENDING_BYTES_MAX:
            outcome.set_exception(NoLeader("too many writes are waiting for the disk or the followers"))
        else:
            self._pending.append((entry, outcome))
            self._pending_bytes += len(entry)
            if not self._pump_scheduled:
                self._pump_scheduled = True
                self._loop.call_soon(self._pump)

    def _has_room(self) -> bool:
        """Whether the batch before is committed, and apply is not left behind: what waits meanwhile shares an entry."""
        commit = self._core.commit_index()
        return (
            commit >= self._journal.last_index
            and commit - self._core.applied_index() < UNAPPLIED_MAX
            and self._snapshots.has_room
            and not self._handing_over
        )

    def _submit(self) -> None:
        """The next batch into the log."""
        pending, entries, outcomes, size = self._pending, list[bytes](), list[Outcome](), 0
        while pending and len(entries) < BATCH_ENTRIES_MAX:
            entry, outcome = pending[0]
            size += len(entry)
            if entries and size > BATCH_BYTES_MAX:
                break
            pending.popleft()
            self._pending_bytes -= len(entry)
            if not outcome.done():  # else it was given up in time
                entries.append(entry)
                outcomes.append(outcome)
        if entries:
            index, term = self._journal.last_index + 1, self._core.term()
            self._journal.add(BATCH + msgpack.packb(entries), index, term)
            self._batches[index] = _Batch(term, entries, outcomes, self._perf())
            self.counters.batches += 1
            self.counters.proposals += len(entries)

    # -- members and leadership

    @property
    def members(self) -> Members:
        """The servers of the cluster as this one knows them, committed or not."""
        return self._membership.members

    @property
    def heard(self) -> Members:
        """The members, and the servers that this one listens to besides, whose votes count for nothing.

        These are the members of the list before, until the list in force is committed: it may never be, and then only
        they can say so. The servers that were introduced are heard, too.
        """
        before = () if self.members_settled else self._membership.before
        return _latest((*self._strangers, *before, *self.members))

    @property
    def members_index(self) -> int:
        return self._membership.index

    @property
    def members_settled(self) -> bool:
        """Whether the list in force is committed."""
        return self._is_running and self._membership.index <= self._core.commit_index()

    @property
    def suffrage(self) -> str:
        """This server's own; "" where it is not a member (not yet, or not any more)."""
        return next((m.suffrage for m in self.members if m.id == self._node_id), "")

    def change_members(self, new: Members) -> asyncio.Future[None]:
        """Another list of members; done when it is committed.

        Fails with NoLeader (not done), Timeout (unknown), and BadRequest or Conflict for a change that is not allowed:
        more than one voter at once, the leader itself, or before the change before is committed.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._check_change(new)
        except RostraError as e:
            future.set_exception(e)
            return future
        self._put_members(new, future)
        return future

    @_or_stop
    def _put_members(self, new: Members, future: asyncio.Future[None]) -> None:
        index = self._journal.last_index + 1
        entry = (encode_members(new), index, self._core.term())
        self._changes[index] = future
        self._journal.add(*entry)
        self._membership.appended([entry])
        self._core.send_heartbeat()
        self._schedule()

    def _check_change(self, new: Members) -> None:
        if not self.is_leader or self._handing_over:
            raise NoLeader
        check_change(self.members, new)
        if new == self.members:
            raise Conflict("the list of servers is that already")
        # Raft §4.1 and the erratum to it: one change at a time, and none before an entry of this term is committed.
        if not self._is_established() or self._journal.durable_index < (self._core.noop_index() or 0):
            raise NoLeader("the leader has only just been elected")
        if not self.members_settled:
            raise Conflict("another change of the servers is on its way: try again when it is done")
        if self._node_id not in voters(new):
            raise Conflict("the leader cannot take its own vote: transfer leadership first")

    def peers(self) -> list[PeerStatus]:
        """On the leader: how the others are. Elsewhere: who they are."""
        if not self._is_running:
            return []
        found = []
        for member in self.members:
            follower = self._replication.followers.get(member.id)
            if follower is None:
                continue
            match = self._core.match_index(follower.node)
            found.append(
                PeerStatus(
                    id=member.id,
                    suffrage=member.suffrage,
                    is_up=follower.up,
                    match_index=match,
                    lag_entries=max(0, self._journal.last_index - match),
                    last_contact_s=self._core.last_response_age_s(follower.node) if self.is_leader else 0.0,
                    snapshot_progress=self._snapshots.progress(member.id),
                )
            )
        return found

    async def transfer(self, to: str = "") -> str:
        """Leadership to voter `to`, or to the one that is most up to date: its id, when this server does not lead.

        Raises NoLeader, Conflict (no such voter, or it cannot be reached), Timeout (it did not happen).
        """
        if not self.is_leader or self._handing_over:
            raise NoLeader
        able = [peer for peer in self.peers() if peer.suffrage == "voter" and peer.is_up]
        if to:
            able = [peer for peer in able if peer.id == to]
        if not able:
            raise Conflict(f"leadership cannot go to {to or 'anyone'}: no such voting server can be reached")
        heir, term = max(able, key=lambda peer: peer.match_index).id, self.term
        deadline = self._loop.time() + 2 * self._timing.election_max_s
        node = self._replication.followers[heir].node
        self._handing_over, offer_at = True, 0.0
        try:
            while self._loop.time() < deadline and self.is_leader and self.term == term:
                last = self._journal.last_index
                is_level = self._core.commit_index() == last and self._core.match_index(node) == last
                if is_level and self._loop.time() >= offer_at:
                    # From here on another leader may be elected at any moment, see `lease_valid`.
                    self._offers[heir] = (term, self._replication.round)
                    self.counters.transfers += offer_at == 0.0
                    self._links.post(heir, {"type": "timeout_now", "term": term})
                    self._links.flush()
                    offer_at = self._loop.time() + self._timing.election_min_s
                await asyncio.sleep(self._timing.heartbeat_s / 10)
        finally:
            self._handing_over = False
            self._schedule()
        if self.is_leader and self.term == term:
            raise Timeout(f"leadership was offered to {heir}, which did not take it")
        return heir

    def take_snapshot(self) -> asyncio.Future[Snapshot | None]:
        """A snapshot of what is applied now. None: it could not be written, the log says why."""
        return self._snapshots.take()

    def introduce(self, strangers: Members) -> None:
        """Hear these as well: a server named them, and this one's list may be old. They count for nothing.

        A server that was away while the others changed could not hear a leader that came meanwhile without this. It
        goes on hearing servers that were introduced before. Empty `strangers` end that: it hears the members only.
        """
        known = self.heard
        self._strangers = _latest((*self._strangers, *strangers))[-MEMBERS_MAX:] if strangers else ()
        heard = self.heard
        if set(heard) != set(known) and self._is_running:
            unlisted = [f"{m.name} ({m.host}:{m.port})" for m in heard if m not in self.members]
            log.warn("who is heard besides the listed servers has changed", servers=unlisted)
            self._members_changed()

    def _members_changed(self) -> None:
        """Another list is in force: everyone who counts or talks follows it at once."""
        members = self.members
        others = [m for m in members if m.id != self._node_id]
        deciding = [m.id for m in others if m.votes]
        self._core.set_peers(deciding, [m.id for m in others if not m.votes])
        self._replication.set_members((m.id, m.votes) for m in others)
        self._elections.set_voters(m.id for m in members if m.votes)
        self._links.set_members(self.heard)
        self._witness.forget_all_but({m.key_hash for m in self.heard})
        for follower_id, follower in self._replication.followers.items():
            follower.up = self._links.links[follower_id].is_up
        self._on_members(members)
        if self._is_running:
            self._schedule()

    def _on_installed(self, index: int) -> None:
        """A snapshot took the place of the state: what was awaited of its past is over."""
        self._wake_applied()

    def _post(self, peer_id: str, message: Message) -> None:
        self._links.post(peer_id, message)

    # -- reading

    @property
    def is_leader(self) -> bool:
        return self._is_running and self._core.is_leader()

    @property
    def leader_id(self) -> str | None:
        """The leader as far as this server knows; None while it looks for one."""
        return self._core.leader_id() if self._is_running else None

    @property
    def term(self) -> int:
        return self._core.term() if self._is_running else 0

    @property
    def commit_index(self) -> int:
        return self._core.commit_index() if self._is_running else 0

    @property
    def applied_index(self) -> int:
        return self._core.applied_index() if self._is_running else 0

    def last_heard_age_s(self) -> float:
        """Seconds since the leader was heard; 0 on the leader. Counts from the start where none has been heard."""
        if self.is_leader:
            return 0.0
        return min(self._elections.heard_age_s(), (self._clock() - self._led_ns) / 1e9)

    @property
    def place(self) -> Place:
        """How far the journal is on the disk."""
        return self._journal.place

    def lease_valid(self) -> bool:
        """Whether no other server can lead now, and all that was acknowledged before this leadership is applied."""
        if not self._is_established():
            return False
        if self._offers and not self._are_declined():
            return False
        return self._clock() < self._replication.quorum_round() + self._lease_ns

    def _are_declined(self) -> bool:
        """Whether no election can come any more of any leadership that was offered.

        Within a link messages are in order, and an heir that stands for election answers nothing of the old term. So
        one that answers, in this term, what was sent after the offer has let it pass.
        """
        for heir, (term, round_) in list(self._offers.items()):
            follower = self._replication.followers.get(heir)
            if term != self.term or (follower is not None and follower.echoed > round_):
                del self._offers[heir]
        return not self._offers

    @property
    def applied_all(self) -> bool:
        """Whether everything that this server knows to be committed shows in the state."""
        return self.applied_index >= self.commit_index

    async def read_index(self) -> int:
        """An index applied here that covers all writes acknowledged before the call. Leader only, else NoLeader."""
        if not self.is_leader:
            raise NoLeader
        waiter: asyncio.Future[int] = self._loop.create_future()
        self._reads.append(waiter)
        self._schedule()
        return await waiter

    async def wait_applied(self, index: int, timeout_s: float) -> None:
        """Returns when entry `index` has been applied here. Raises Timeout."""
        if self.applied_index >= index:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._applied_future(index)
        except TimeoutError:
            raise Timeout(
                f"this server has applied {self.applied_index} of the log, not {index}, after {timeout_s:g} s"
            ) from None

    def _applied_future(self, index: int) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = self._loop.create_future()
        heapq.heappush(self._applied_waiters, (index, next(self._sequence), waiter))
        return waiter

    def metrics(self) -> dict[str, Any]:
        """Numbers for operators; plain values and dicts."""
        counters = self.counters
        return {
            "is_leader": self.is_leader,
            "leader": self.leader_id or "",
            "term": self.term,
            "commit_index": self.commit_index,
            "applied_index": self.applied_index,
            "last_index": self._journal.last_index,
            "durable_index": self._journal.durable_index,
            "journal_bytes": self._journal.bytes,
            "last_heard_age_s": self.last_heard_age_s(),
            "lease_valid": self.lease_valid(),
            "links_up": sum(link.is_up for link in self._links.links.values()),
            "members": len(self.members),
            "suffrage": self.suffrage,
            "first_index": self._journal.first_index,
            "log_bytes": self._journal.log_bytes,
            "log_bytes_peak": self._log_bytes_peak,
            "log_bytes_max": self._limits.log_bytes_max,
            "snapshot_index": self._snapshots.newest.index if self._snapshots.newest else 0,
            "snapshot_bytes": self._snapshots.newest.size if self._snapshots.newest else 0,
            "snapshots_taken": self._snapshots.taken,
            "snapshots_sent": self._snapshots.sent,
            "snapshots_installed": self._snapshots.received,
            "transfers": counters.transfers,
            "link_ups": self._links.reconnects,
            "answers_waiting_for_disk": self._links.waiting,
            "dropped_messages": self._guard.dropped,
            "pending": len(self._pending),
            "pre_votes": self._elections.pre_votes,
            "elections": counters.elections,
            "leaderships": counters.leaderships,
            "step_downs": counters.step_downs,
            "proposals": counters.proposals,
            "batches": counters.batches,
            "read_rounds": counters.read_rounds,
            "pauses": counters.pauses,
            "commit": counters.commit.as_dict(),
            "sync": counters.sync.as_dict(),
            "turn": counters.turn.as_dict(),
        }

    def _is_established(self) -> bool:
        """Whether the no-op with which this leadership began is committed and applied."""
        if not self.is_leader:
            return False
        noop = self._core.noop_index()
        return noop is not None and self._core.applied_index() >= noop

    # -- the pump

    def _schedule(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    @_or_stop
    def _pump(self) -> None:
        self._pump_scheduled = False
        if not self._is_running:
            return
        started = self._perf()
        self._turn()
        self.counters.turn.note(self._perf() - started)

    def _turn(self) -> None:
        if self._was_paused():
            self._loop.call_later(self._timing.heartbeat_s / 5, self._schedule)
            return
        core, journal, replication = self._core, self._journal, self._replication
        # A follower writes to its disk before it applies: the leader waits for the disk, nobody for the applying.
        # It does so in every other turn at most.
        self._disk_first = not self._disk_first and not core.is_leader() and journal.start_sync()
        if self._disk_first:
            self._links.flush()
            self._report_role()
            if core.applied_index() < core.commit_index():
                self._late = self._loop.call_later(APPLY_LATE_S, self._schedule)
            return  # the end of the sync brings the next turn
        if self._late is not None:
            self._late.cancel()
            self._late = None
        replication.release_held()
        commit, last = core.commit_index(), journal.last_index
        # Alone, the core would commit at append: it may look only when the disk has everything.
        if replication.has_other_voters or journal.is_durable:
            core.doTick(0)
        else:
            self.apply_committed()
            replication.is_due |= core.heartbeat_is_due()
        if core.is_leader():
            while self._pending and self._has_room():
                self._submit()
            if self._reads:
                self._begin_round()
            elif journal.last_index != last or replication.is_due:
                core.send_heartbeat()
            elif core.commit_index() != commit and self._notice is None and replication.followers:
                self._notice = self._loop.call_later(COMMIT_NOTICE_S, self._tell_commit)
        self._links.release()
        self._links.flush()
        journal.start_sync()  # inline, this calls _on_durable, which schedules another turn
        self._settle_rounds()
        self._report_role()
        self._log_bytes_peak = max(self._log_bytes_peak, journal.log_bytes)
        self._snapshots.take_if_due()

    def _was_paused(self) -> bool:
        """Whether this process stood still. Messages that arrived meanwhile are read before anybody is judged silent.

        Never twice on end: where every turn of the loop takes so long, its work has to be done all the same.
        """
        now = self._loop.time()
        since_s, self._pumped_s = now - self._pumped_s, now
        self._stood_still = since_s >= self._timing.election_min_s / 2 and not self._stood_still
        if self._stood_still:
            self.counters.pauses += 1
            self._links.forgive_silence()
            self._disk_moved_s += since_s  # the disk had no chance to say so
        return self._stood_still

    @_or_stop
    def _on_timer(self) -> None:
        if not self._is_running:
            return
        self._timer = self._loop.call_later(self._timing.heartbeat_s / 3, self._on_timer)
        if not self._was_paused():
            self._watch_disk()
            self._links.check()
            self._snapshots.check()
            self._note_place()
            self._pump()

    def _note_place(self) -> None:
        now = self._loop.time()
        if now >= self._reach_s and self._journal.place != self._reached:
            self._reached, self._reach_s = self._journal.place, now + PLACE_EVERY_S
            self._on_reached(self._reached)

    def _watch_disk(self) -> None:
        """A leader counts itself only with what its disk has: while that hangs, another server should lead."""
        journal, elections, now = self._journal, self._elections, self._loop.time()
        still_s = now - self._disk_moved_s
        if journal.is_durable or journal.durable_lsn != self._disk_lsn:
            self._disk_lsn, self._disk_moved_s = journal.durable_lsn, now
            if elections.disk_hangs:
                log.warn("the disk of the log is back", seconds=round(still_s, 1))
            elections.disk_hangs = False
        elif still_s > HUNG_DISK_S and not elections.disk_hangs:
            meanwhile = " and leaves leadership to the others" if self._replication.has_other_voters else ""
            log.err(
                f"the disk of the log hangs: until it is back, this server acknowledges nothing{meanwhile}",
                seconds=round(still_s, 1),
            )
            elections.disk_hangs = True
        if elections.disk_hangs and self._core.is_leader() and self._replication.has_other_voters:
            self._core.step_down()

    def tell_commit(self) -> None:
        """A follower waits for what is committed: it should hear of it now."""
        if self._notice is not None:
            self._notice.cancel()
            self._tell_commit()

    @_or_stop
    def _tell_commit(self) -> None:
        self._notice = None
        if self.is_leader and self._replication.is_news():
            self._core.send_heartbeat()
            self._links.flush()

    @_or_stop
    def _on_message(self, peer_id: str, message: Message) -> None:
        if self._is_running:
            if message["type"] in _ANSWERS and peer_id not in self._replication.followers:
                return  # of a stranger, see `introduce`
            if peer_id in self._outlived:
                return
            if message["type"] in ("lived", "outlived"):
                self._on_life(peer_id, message)
                return
            self._guard.inbound(peer_id, message)
            self._schedule()

    @_or_stop
    def _on_link(self, peer_id: str, is_up: bool) -> None:
        if not self._is_running:
            return
        if is_up:
            if self._lineage:
                last = self._journal.durable_index
                lived = {"type": "lived", "starts": self._starts, "lineage": self._lineage, "last_index": last}
                self._links.post(peer_id, lived)
            self._replication.link_up(peer_id)
        else:
            self._outlived.discard(peer_id)
            if self._core.is_leader():
                self._note_acknowledged(peer_id)
            self._replication.link_down(peer_id)
            self._snapshots.stop_sending(peer_id)
            if self._core.leader_id() == peer_id:
                self._elections.leader_link_lost()
        self._schedule()

    def _on_life(self, peer_id: str, message: Message) -> None:
        """What the other one says of its life, or of ours: always the first word on a connection."""
        member = self._links.links[peer_id].member
        if message["type"] == "outlived":
            if any(m.id == peer_id for m in self.members):  # a stranger's word is not enough to end a server
                self._is_running = False
                self._on_outlived(f"{member.name} says: {message['reason']}")
            return
        if self._core.is_leader():
            self._note_acknowledged(peer_id)
        problem = self._witness.problem(member.key_hash, message)
        if problem:
            log.err(
                "a server has lost what it promised: it is not heard, and is told to stop",
                server=member.name,
                reason=problem,
                hint=f"replace it: `rostra operator raft remove-peer -id={peer_id}`, and an empty data directory there",
            )
            self._links.post(peer_id, {"type": "outlived", "reason": problem})
            self._links.flush()
            self._outlived.add(peer_id)
            self._core.forget_match(server(peer_id))

    def _note_acknowledged(self, *peer_ids: str) -> None:
        """What followers have acknowledged to this leader and can never lose rightly, since it is committed."""
        for peer_id in peer_ids:
            link = self._links.links.get(peer_id)
            if link is not None and peer_id in self._replication.followers:
                index = min(self._core.match_index(link.node), self._core.commit_index())
                self._witness.acknowledged(link.member.key_hash, index)

    @_or_stop
    def _on_durable(self, seconds: float) -> None:
        self.counters.sync.note(seconds)
        if self._is_running:
            self._links.release()
            self._links.flush()
            self._schedule()

    def _rewrite(self, message: Message) -> tuple[Message, bool]:
        """What the core says, fit for the wire; and whether the leader should hear something at once."""
        message = self._guard.outbound(message)
        return message, message["type"] == "next_node_idx" and not self._guard.answers_news

    # -- what the core asks (core.Owner)

    def may_campaign(self) -> bool:
        allowed = self._elections.may_campaign()
        self.counters.elections += allowed
        return allowed

    def send_appends(self) -> None:
        self._replication.send_appends()

    def state_changed(self, old: int, new: int) -> None:
        if new == LEADER:
            self.counters.leaderships += 1
            self._replication.lead()
        elif old == LEADER:
            self.counters.step_downs += 1
            self._led_ns = self._clock()
            self._note_acknowledged(*self._replication.followers)
            self._snapshots.stop_sending()
            self._abandon("the leader has changed")

    def apply_committed(self) -> None:
        """Apply committed entries for about APPLY_TURN_S; the next turn of the loop takes the rest."""
        core = self._core
        if self._snapshots.holds_apply:  # its end schedules another turn
            return
        until = self._perf() + APPLY_TURN_S
        while core.applied_index() < core.commit_index():
            index = core.applied_index() + 1
            if self._apply_some(index, until):
                core.set_applied_index(index)
                self._snapshots.note_applied(self._journal.cost(index))
            if self._perf() >= until:
                break
        if core.applied_index() < core.commit_index():
            self._schedule()
        self._wake_applied()

    def _wake_applied(self) -> None:
        applied = self._core.applied_index()
        while self._applied_waiters and self._applied_waiters[0][0] <= applied:
            waiter = heapq.heappop(self._applied_waiters)[2]
            if not waiter.done():
                waiter.set_result(None)

    def _apply_some(self, index: int, until: float) -> bool:
        """Apply entry `index` or a part of it. True when it is done. A snapshot may be taken only between entries."""
        if self._partly is None:
            command = self._journal.entry(index)[0]
            kind = command[:1]
            if kind == NO_OP:
                return True
            if kind == MEMBERSHIP:
                if index == self._membership.index:
                    self._members_changed()  # the list before is not heard any more
                change = self._changes.pop(index, None)
                if change is not None and not change.done():
                    change.set_result(None)
                return True
            if kind != BATCH:
                raise Internal(f"log entry {index} is of kind {command[0]}, which this release does not know")
            batch = self._batches.get(index)
            if batch is not None and batch.term == self._journal.term_at(index):
                proposals = batch.entries
            else:
                proposals = _unpack_batch(index, command)
            self._partly = (index, proposals, 0, [])
        index, proposals, done, results = self._partly
        while done < len(proposals):
            part = proposals[done : done + APPLY_SLICE]
            outcome = self._apply(part)
            if len(outcome) != len(part):
                raise Internal(f"apply of {len(part)} proposals returned {len(outcome)} results")
            results += outcome
            done += len(part)
            if done < len(proposals) and self._perf() >= until:
                self._partly = (index, proposals, done, results)
                return False
        self._partly = None
        batch = self._batches.pop(index, None)
        if batch is not None:
            self._answer(index, batch, results)
        return True

    def _answer(self, index: int, batch: _Batch, results: list[Any]) -> None:
        if self._journal.term_at(index) != batch.term:
            raise Internal(f"entry {index} was replaced while this server led term {batch.term}")
        self.counters.commit.note(self._perf() - batch.started_s)
        for future, result in zip(batch.futures, results):
            if not future.done():
                try:
                    future.set_result(result)
                except Exception as e:  # H15: who waits for a result must not disturb the applying of it
                    log.err("the result of a write could not be told", exc_info=e)

    # -- reads

    def _begin_round(self) -> None:
        waiters, self._reads = self._reads, []
        index = max(self._core.commit_index(), self._core.noop_index() or 0)
        self._core.send_heartbeat()
        self.counters.read_rounds += 1
        self._rounds.append((self._replication.round, index, waiters))

    def _settle_rounds(self) -> None:
        if not self._rounds:
            return
        answered, applied = self._replication.quorum_round(), self._core.applied_index()
        while self._rounds and self._rounds[0][0] <= answered and self._rounds[0][1] <= applied:
            _, index, waiters = self._rounds.popleft()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(index)

    # -- changes of role, and the end

    def _report_role(self) -> None:
        role = (self._core.is_leader(), self._core.leader_id(), self._core.term())
        if role != self._role:
            self._role = role
            log.debug("raft role", is_leader=role[0], leader=role[1], term=role[2])
            self._on_role_change(*role)

    def _abandon(self, why: str) -> None:
        """Leadership is over: nobody here will learn what becomes of the entries on their way."""
        batches, self._batches = self._batches, {}
        changes, self._changes = self._changes, {}
        pending, self._pending, self._pending_bytes = self._pending, deque(), 0
        for batch in batches.values():
            _fail_all(batch.futures, partial(Timeout, f"{why}: the write may or may not have been done"))
        _fail_all(changes.values(), partial(Timeout, f"{why}: the servers may or may not have been changed"))
        _fail_all((future for _, future in pending), NoLeader)
        _fail_all(self._reads, NoLeader)
        for _, _, waiters in self._rounds:
            _fail_all(waiters, NoLeader)
        self._reads = []
        self._rounds.clear()

    def _fail_with(self, error: Exception) -> None:
        log.err("raft cannot go on", exc_info=error)
        self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        """Stop the process. Memory and disk may differ now: this server says and applies nothing more."""
        if self._failed is not None:
            return
        self._failed = reason
        self._is_running = False
        self._fail_stop(reason)


def _unpack_batch(index: int, command: bytes) -> list[bytes]:
    proposals: Any = msgpack.unpackb(memoryview(command)[1:])
    if not isinstance(proposals, list) or not all(type(proposal) is bytes for proposal in proposals):
        raise Internal(f"log entry {index} is not a batch of proposals")
    return proposals


def _latest(members: Sequence[Member]) -> Members:
    """Each once, as it was named last, and in that order."""
    found: dict[str, Member] = {}
    for member in members:
        found.pop(member.id, None)
        found[member.id] = member
    return tuple(found.values())


def _fail_all(futures: Any, error: Callable[[], RostraError]) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error())


__all__ = ["Limits", "Member", "Members", "PeerStatus", "RaftLog", "StateMachine", "Timing"]
