"""RaftLog: the replicated log as the rest of the server sees it. Propose bytes; they are applied everywhere, in order.

Everything here runs on one event loop: the core, the journal's memory, the links and `apply`. `_pump` is the
heartbeat of it all: it is coalesced, and runs after each message, proposal, finished sync and change of a link, and
on a timer. Apply and replay are cut into slices, so that no turn of the loop is long. What must not happen (a failed
disk, an exception out of `apply`, a contradiction in the log) stops the process through `fail_stop`; nothing is
retried, nothing is served after it.

Proposals: one Raft entry at a time is on its way; what arrives meanwhile goes into the next (group commit). A
proposal fails with NoLeader where it was certainly not done, and with Timeout where only the next leader knows.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgpack

from rostra.runtime import log as logging
from rostra.server.raft.core import BATCH, LEADER, NO_OP, Core, Timing, check_library
from rostra.server.raft.elections import LEASE, Elections, boottime_ns
from rostra.server.raft.guard import Guard
from rostra.server.raft.journal import Journal
from rostra.server.raft.messages import BadMessage, Message
from rostra.server.raft.metrics import Durations
from rostra.server.raft.replication import Replication
from rostra.server.raft.transport import Dial, Links, Member
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Internal, NoLeader, RostraError, Timeout, TooLarge

log = logging.get("raft")

#: One Raft entry carries up to this many proposals and bytes; a single larger proposal has an entry of its own.
BATCH_ENTRIES_MAX, BATCH_BYTES_MAX = 1024, 512 << 10
PROPOSAL_BYTES_MAX = 2 << 20
#: What waits for its turn is bounded: beyond it, proposals are refused.
PENDING_BYTES_MAX = 64 << 20

#: A turn of applying ends after this long (looked at after every so many proposals); the rest follows next turn.
APPLY_TURN_S, APPLY_SLICE = 0.001, 16

#: The leader takes no more into the log while it has this many entries to apply.
UNAPPLIED_MAX = 4

#: Followers hear of a commit at the latest after this long, unless the next batch tells them.
COMMIT_NOTICE_S = 0.001


@dataclass(slots=True)
class _Batch:
    """Proposals in one Raft entry of this leadership."""

    term: int
    futures: list[asyncio.Future[Any]]
    started_s: float


@dataclass(slots=True)
class _Counters:
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


class RaftLog:
    """One server's end of the replicated log.

    `apply(entries)` is called with proposals in log order, on every server and again on restart, and returns one
    result for each. `dial(member)` returns an authenticated connection. `on_role_change(is_leader, leader_id, term)`
    runs on the loop. Without a directory (`-dev`, one server only) nothing is kept, a server's own vote included.
    `fail_stop(reason)` must end the process (exit 70). `start` raises DamagedJournal or NewerFormat (exit 78).
    """

    def __init__(
        self,
        *,
        directory: Path | None,
        node_id: str,
        cluster_id: str,
        members: Sequence[Member],
        apply: Callable[[Sequence[bytes]], list[Any]],
        dial: Dial,
        timing: Timing = Timing(),  # noqa: B008 (frozen)
        on_role_change: Callable[[bool, str | None, int], None],
        fail_stop: Callable[[str], NoReturn],
        sync_inline: bool = False,
        clock: Callable[[], int] = boottime_ns,
    ) -> None:
        if node_id not in {member.id for member in members}:
            raise Internal(f"this server ({node_id}) is not in the member list")
        self._directory, self._node_id, self._cluster_id = directory, node_id, cluster_id
        self._members = list(members)
        self._apply, self._dial, self._timing, self._clock = apply, dial, timing, clock
        self._on_role_change, self._fail_stop, self._sync_inline = on_role_change, fail_stop, sync_inline
        self._lease_ns = int(timing.election_min_s * LEASE * 1e9)

        self._is_running = self._is_started = False
        self._failed: str | None = None
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._notice: asyncio.TimerHandle | None = None
        self._pumped_s = 0.0
        self._led_ns = -(1 << 62)  # when this server last led
        self._role: tuple[bool, str | None, int] = (False, None, 0)

        self._pending: deque[tuple[bytes, asyncio.Future[Any]]] = deque()
        self._pending_bytes = 0
        self._batches: dict[int, _Batch] = {}  # by index, this leadership's
        self._partly: tuple[int, list[bytes], int, list[Any]] | None = None  # (index, proposals, done, results)
        self._reads: list[asyncio.Future[int]] = []  # for the next round
        self._rounds: deque[tuple[int, int, list[asyncio.Future[int]]]] = deque()  # (round, index, waiters)
        self._applied_waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()
        self.counters = _Counters()

    # -- start and stop

    async def start(self) -> None:
        """Returns when what this server knows to be committed has been applied; alone, also when it leads."""
        check_library()
        self._loop = asyncio.get_running_loop()
        if self._directory is None:
            self._journal = Journal.memory()
        else:
            open_it = partial(
                Journal.open,
                self._directory,
                cluster_id=self._cluster_id,
                node_id=self._node_id,
                inline=self._sync_inline,
            )
            self._journal = await self._loop.run_in_executor(None, open_it)
        journal = self._journal
        journal.on_durable, journal.on_failed = self._on_durable, self._fail
        if journal.wiped_bytes:
            log.warn("journal had a torn tail, which nobody was told of; wiped", bytes=journal.wiped_bytes)

        peer_ids = [member.id for member in self._members if member.id != self._node_id]
        self._links = Links(
            node_id=self._node_id,
            cluster_id=self._cluster_id,
            members=self._members,
            journal=journal,
            timing=self._timing,
            dial=self._dial,
            on_message=self._on_message,
            on_link=self._on_link,
            rewrite=self._rewrite,
        )
        self._core = Core(
            self._node_id, peer_ids, journal=journal, transport=self._links, timing=self._timing, owner=self
        )
        self._replication = Replication(
            self._core,
            journal,
            peer_ids=peer_ids,
            clock=self._clock,
            send=self._links.post,
            deliver=self._links._onMessageReceived,
        )
        self._elections = Elections(
            self._core,
            journal,
            node_id=self._node_id,
            peer_ids=peer_ids,
            timing=self._timing,
            clock=self._clock,
            send=self._links.post,
            lease_valid=self.lease_valid,
        )
        self._guard = Guard(
            self._core,
            journal,
            self._elections,
            self._replication,
            send=self._links.post,
            deliver=self._links._onMessageReceived,
        )
        self._is_running = self._is_started = True
        self._pumped_s = self._loop.time()
        committed = self._core.commit_index()
        if not peer_ids:
            self._core.campaign_in(-1.0)
        self._links.start()
        self._pump()
        self._on_timer()
        if not peer_ids:
            committed = max(committed, self._core.noop_index() or 0)
        while self.applied_index < committed and self._is_running:
            await self._applied_future(committed)

    async def stop(self) -> None:
        """Blocks new work, says goodbye to the peers, and returns when the journal is closed."""
        if not self._is_started:
            return
        self._is_running = self._is_started = False
        for handle in (self._timer, self._notice):
            if handle is not None:
                handle.cancel()
        await self._links.stop()
        self._abandon("this server stops")
        for _, _, waiter in self._applied_waiters:
            if not waiter.done():
                waiter.set_exception(NoLeader("this server stops"))
        self._applied_waiters.clear()
        await self._loop.run_in_executor(None, self._journal.close)

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
        if not self._is_running or not self._core.is_leader():
            future.set_exception(NoLeader())
        elif len(entry) > PROPOSAL_BYTES_MAX:
            future.set_exception(
                TooLarge(f"a log entry of {len(entry)} bytes; at most {PROPOSAL_BYTES_MAX} are allowed")
            )
        elif self._pending_bytes > PENDING_BYTES_MAX:
            future.set_exception(NoLeader("too many writes are waiting for the disk or the followers"))
        else:
            self._pending.append((entry, future))
            self._pending_bytes += len(entry)
            self._schedule()
        return future

    def _has_room(self) -> bool:
        """Whether the batch before is committed, and apply is not left behind: what waits meanwhile shares an entry."""
        commit = self._core.commit_index()
        return commit >= self._journal.last_index and commit - self._core.applied_index() < UNAPPLIED_MAX

    def _submit(self) -> None:
        """The next batch into the log."""
        entries: list[bytes] = []
        futures: list[asyncio.Future[Any]] = []
        size = 0
        while self._pending and len(entries) < BATCH_ENTRIES_MAX:
            entry, future = self._pending[0]
            if entries and size + len(entry) > BATCH_BYTES_MAX:
                break
            self._pending.popleft()
            self._pending_bytes -= len(entry)
            if future.done():  # given up before it was in the log
                continue
            entries.append(entry)
            futures.append(future)
            size += len(entry)
        if entries:
            index, term = self._journal.last_index + 1, self._core.term()
            self._journal.add(BATCH + msgpack.packb(entries), index, term)
            self._batches[index] = _Batch(term, futures, time.perf_counter())
            self.counters.batches += 1
            self.counters.proposals += len(entries)

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

    def applied_is_at(self, index: int) -> bool:
        return self.applied_index >= index

    def lease_valid(self) -> bool:
        """Whether no other server can lead now, and all that was acknowledged before this leadership is applied."""
        return self._is_established() and self._clock() < self._replication.quorum_round() + self._lease_ns

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
            "members": len(self._members),
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

    def _pump(self) -> None:
        self._pump_scheduled = False
        if not self._is_running:
            return
        started = time.perf_counter()
        try:
            self._turn()
        except Exception as e:
            self._fail_with(e)
        self.counters.turn.note(time.perf_counter() - started)

    def _turn(self) -> None:
        if self._was_paused():
            self._loop.call_later(self._timing.heartbeat_s / 5, self._schedule)
            return
        core, journal, replication = self._core, self._journal, self._replication
        replication.release_held()
        commit, last = core.commit_index(), journal.last_index
        # Alone, the core would commit at append: it may look only when the disk has everything.
        if replication.followers or journal.is_durable or not core.is_leader():
            core.doTick(0)
        else:
            self.apply_committed()
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

    def _was_paused(self) -> bool:
        """Whether this process stood still. What has arrived meanwhile is read before judging who is silent."""
        now = self._loop.time()
        since_s, self._pumped_s = now - self._pumped_s, now
        if since_s < self._timing.election_min_s / 2:
            return False
        self.counters.pauses += 1
        self._links.forgive_silence()
        return True

    def _on_timer(self) -> None:
        if not self._is_running:
            return
        self._timer = self._loop.call_later(self._timing.heartbeat_s / 3, self._on_timer)
        if not self._was_paused():
            self._links.check()
            self._pump()

    def _tell_commit(self) -> None:
        self._notice = None
        if self.is_leader and self._replication.is_news():
            self._core.send_heartbeat()
            self._links.flush()

    def _on_message(self, peer_id: str, message: Message) -> None:
        if not self._is_running:
            return
        try:
            self._guard.inbound(peer_id, message)
        except BadMessage:
            raise
        except Exception as e:
            self._fail_with(e)
        else:
            self._schedule()

    def _on_link(self, peer_id: str, is_up: bool) -> None:
        if not self._is_running:
            return
        if is_up:
            self._replication.link_up(peer_id)
        else:
            self._replication.link_down(peer_id)
            if self._core.leader_id() == peer_id:
                self._elections.leader_link_lost()
        self._schedule()

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
        allowed: bool = self._elections.may_campaign()
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
            self._abandon("the leader has changed")

    def apply_committed(self) -> None:
        """Apply what is committed, for about APPLY_TURN_S; what is left is for the next turn of the loop."""
        core = self._core
        until = time.perf_counter() + APPLY_TURN_S
        while core.applied_index() < core.commit_index():
            index = core.applied_index() + 1
            if self._apply_some(index, until):
                core.set_applied_index(index)
            if time.perf_counter() >= until:
                break
        if core.applied_index() < core.commit_index():
            self._schedule()
        while self._applied_waiters and self._applied_waiters[0][0] <= core.applied_index():
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
            if kind != BATCH:
                raise Internal(f"log entry {index} is of kind {command[0]}, which this release does not know")
            self._partly = (index, _unpack_batch(index, command), 0, [])
        index, proposals, done, results = self._partly
        while done < len(proposals):
            part = proposals[done : done + APPLY_SLICE]
            outcome = self._apply(part)
            if len(outcome) != len(part):
                raise Internal(f"apply of {len(part)} proposals returned {len(outcome)} results")
            results += outcome
            done += len(part)
            if done < len(proposals) and time.perf_counter() >= until:
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
        self.counters.commit.note(time.perf_counter() - batch.started_s)
        for future, result in zip(batch.futures, results):
            if not future.done():
                future.set_result(result)

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
        pending, self._pending, self._pending_bytes = self._pending, deque(), 0
        for batch in batches.values():
            _fail_all(batch.futures, partial(Timeout, f"{why}: the write may or may not have been done"))
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
        """Stop the process. What is in memory may not be what is on disk: nothing more is said or applied."""
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


def _fail_all(futures: Any, error: Callable[[], RostraError]) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error())


__all__ = ["Member", "RaftLog", "Timing"]
