"""One server: the log, the state, and the three things that are asked of them: write, read, how new is new enough.

What an entry is, barriers and lock-delay are decided here, once, for every command and query. `writes.py` brings a
write to the leader, `endpoint.py` brings requests in, `raft/` makes entries durable, `state/` says what they mean. Runs
on one loop; no step of it may take longer than 2 ms.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rostra.acl.authorizer import DENIED, EVERYTHING, Authorizer
from rostra.runtime.log import get
from rostra.server.raft.log import Outcome, RaftLog
from rostra.server.state.capture import Loader
from rostra.server.state.commands import COMMAND_VOCABULARY
from rostra.server.state.entry import FORMAT as ENTRY_FORMAT
from rostra.server.state.entry import pack_entry
from rostra.server.state.store import Store
from rostra.server.watches import Watches
from rostra.server.writes import HOLD_S, AwaitedWrite, Origin, Writes
from rostra.wire.caller import Caller
from rostra.wire.codec import encode_value
from rostra.wire.errors import BadRequest, Denied, NoLeader, Timeout
from rostra.wire.rounds import Rounds

log = get("server")

#: So many lock-delays are noted before those that are over are looked for.
LOCK_DELAYS_MIN = 1024


class ServerNode:
    """The state machine of one server behind its log."""

    def __init__(
        self,
        *,
        node_id: str,
        name: str,
        datacenter: str,
        spawn: Callable[..., asyncio.Task[Any]],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        client_id: str = "",
        authorize: Callable[[Caller], Authorizer] = lambda caller: EVERYTHING,
    ) -> None:
        """`clock` gives monotonic seconds, `wall` what an entry shows as its time; `client_id` names this process.

        `authorize(caller)` is what that caller may do.
        """
        self._authorize = authorize
        self.node_id, self.name, self.datacenter = node_id, name, datacenter
        self.clock, self._wall = clock, wall
        self.store = Store()
        #: What entries are proposed under: from the bootstrap on disk, before the state knows it.
        self.cluster_id = ""
        self.watches = Watches(self.store, spawn)
        self.raft: RaftLog | None = None
        #: (server id) -> caller to that server, or None while it is down. Set by the composition root.
        self.peer: Callable[[str], Any] = lambda server_id: None
        self.on_effects: Callable[[Sequence[tuple[Any, ...]]], None] = lambda effects: None
        self.writes = Writes(spawn)
        self._client_id = client_id or str(uuid.uuid4())
        self._sequence = 0
        self._outstanding: dict[int, None] = {}
        self._leader_changed = asyncio.Event()
        #: who waits until the state has come to an index, and the first of these indexes
        self._ahead: dict[asyncio.Future[None], int] = {}
        self._ahead_first: float = math.inf
        self._default_round: Rounds[None] = Rounds(lambda _: self._round("default"), spawn)
        self._consistent_round: Rounds[None] = Rounds(lambda _: self._round("consistent"), spawn)
        #: key -> monotonic time until which it may not be acquired again; outside the state, see architecture 'Time'
        self.lock_delays: dict[str, float] = {}
        self._lock_delays_room = LOCK_DELAYS_MIN
        #: session id -> monotonic time of its creation or last renewal as this server saw it applied
        self.session_seen: dict[str, float] = {}
        self.counts = {
            "writes": 0,
            "writes_forwarded": 0,
            "reads": 0,
            "barriers": 0,
            "barrier_rounds": 0,
            "watches_opened": 0,
        }

    # -- the log calls ----------------------------------------------------------------------------------------

    def apply(self, entries: Sequence[bytes]) -> list[Any]:
        """Apply one Raft entry's commands in order; called by the log, also for what it replays at the start."""
        results, touches, effects = self.store.apply_all(entries)
        if touches:
            self.watches.applied(touches)
        if effects:
            self._note(effects)
        if self.store.index >= self._ahead_first:
            self._reached()
        return results

    def capture(self) -> Iterator[bytes | None]:
        """The state for a snapshot, see `capture.py`: None means that the log must apply nothing yet."""
        return self.store.capture()

    def loader(self) -> Loading:
        """Takes the chunks of a snapshot and then puts its state in the place of this one."""
        return Loading(self)

    def adopt(self, loaded: Loader) -> None:
        """Go on from the state of a snapshot. Clocks start again, which is late perhaps and early never."""
        self.store.adopt(loaded)
        now = self.clock()
        self.session_seen = dict.fromkeys(self.store.tables.sessions.rows, now)
        self.lock_delays.clear()
        self.watches.touch_all()
        self._reached()
        self.on_effects([("adopted",)])

    def _note(self, effects: Sequence[tuple[Any, ...]]) -> None:
        now = self.clock()
        for effect in effects:
            what = effect[0]
            if what in ("session-renewed", "session-created"):
                self.session_seen[effect[1]] = now
            elif what == "session-gone":
                self.session_seen.pop(effect[1], None)
            elif what == "lock-released" and effect[2]:
                if len(self.lock_delays) >= self._lock_delays_room:
                    self.lock_delays = {key: until for key, until in self.lock_delays.items() if until > now}
                    self._lock_delays_room = 2 * len(self.lock_delays) + LOCK_DELAYS_MIN
                self.lock_delays[effect[1]] = now + effect[2] / 1000
            elif what == "state-differs":
                log.err(
                    "this server's state differs from the leader's: stop it and keep its data directory for whoever"
                    " looks into it; a majority of the others goes on without it",
                    index=effect[1],
                    leader=f"{effect[2]:016x}",
                    here=f"{effect[3]:016x}",
                )
        self.on_effects(effects)

    def role_changed(self, is_leader: bool, leader_id: str | None, term: int) -> None:
        self._leader_changed.set()
        self._leader_changed = asyncio.Event()
        self.writes.leader_changed()
        if not is_leader:
            self.store.expect_nothing()
        else:
            # Never expire early: a session's clock starts again when leadership does.
            now = self.clock()
            for session_id in self.session_seen:
                self.session_seen[session_id] = now

    # -- who leads --------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self.raft is not None and self.raft.is_leader

    @property
    def leader_id(self) -> str | None:
        return self.raft.leader_id if self.raft is not None else None

    def _running(self) -> RaftLog:
        if self.raft is None:
            raise NoLeader("No cluster leader: this server has not joined a cluster yet")
        return self.raft

    async def _leader_settled(self, deadline: float) -> None:
        """Wait until the picture of who leads may have changed; NoLeader at the deadline."""
        left = deadline - self.clock()
        if left <= 0:
            raise NoLeader
        try:
            async with asyncio.timeout(min(left, 0.1)):
                await self._leader_changed.wait()
        except TimeoutError:
            pass

    # -- who may do what --------------------------------------------------------------------------------------

    def can(self, caller: Caller | None) -> Authorizer:
        """What the caller may do; None is a server of this cluster, on its own behalf."""
        return EVERYTHING if caller is None else self._authorize(caller)

    def check_query(self, query: Any, caller: Caller | None) -> Authorizer:
        """What the caller may see of the rows. Raises Denied where it may not ask at all."""
        can = self.can(caller)
        if can is not EVERYTHING and not query.allowed(can, self.store.tables):
            raise Denied(f"{DENIED}: {query.kind}")
        return can

    # -- writes -----------------------------------------------------------------------------------------------

    async def write(
        self,
        origin: Origin,
        kind: str,
        args: dict[str, Any],
        *,
        actor: str = "",
        source: str = "",
        caller: Caller | None = None,
        hold_s: float = HOLD_S,
    ) -> Any:
        """The value that applying the command gave, once for each `origin`. Raises as `Write` in writes.py says."""
        write = AwaitedWrite(self, origin, kind, args, actor, source, caller, hold_s)
        write.submit()
        return await write.result

    async def own_write(self, command: Any, *, hold_s: float = HOLD_S) -> Any:
        """A write of this server itself (leader duties, enrolment)."""
        self._sequence += 1
        sequence = self._sequence
        self._outstanding[sequence] = None
        kind, args = encode_value(command)
        try:
            first = next(iter(self._outstanding))
            return await self.write(
                (self._client_id, sequence, first), kind, args, actor="server", source=self.name, hold_s=hold_s
            )
        finally:
            del self._outstanding[sequence]

    def append(
        self,
        outcome: Outcome,
        origin: Origin,
        kind: str,
        args: dict[str, Any],
        actor: str,
        source: str,
        caller: Caller | None,
    ) -> None:
        """On the leader: validate, decide what must be decided before the log, append. `outcome` gets a result tuple.

        Raises NoLeader, or the refusal of what must not get into the log.
        """
        raft, store = self.raft, self.store
        if raft is None or not raft.is_leader or not (store.cluster_id or kind == "cluster.bootstrap"):
            raise NoLeader
        command = COMMAND_VOCABULARY.decode(kind, args)
        can = self.can(caller)
        if can is not EVERYTHING and not command.allowed(can, store.tables):
            raise Denied(f"{DENIED}: {kind}")
        if (before_log := getattr(command, "before_log", None)) is not None:
            logged = before_log(self)
            if logged is not command:
                command, args = logged, encode_value(logged)[1]
        cluster_id, at_ms = self.cluster_id, int(self._wall() * 1000)
        entry = pack_entry((ENTRY_FORMAT, cluster_id, origin, at_ms, actor, source, kind, args))
        raft.propose_for(outcome, entry)
        store.expect(entry, cluster_id, origin, at_ms, actor, kind, command)

    def is_lock_delayed(self, key: str) -> bool:
        """Whether the lock-delay of the session that held `key` is not over."""
        until = self.lock_delays.get(key)
        if until is None:
            return False
        if self.clock() >= until:
            del self.lock_delays[key]
            return False
        return True

    # -- reads ------------------------------------------------------------------------------------------------

    async def at_least(self, min_index: int, timeout_s: float = HOLD_S) -> None:
        """Wait until the state's index is at least `min_index`. Raises Timeout."""
        if self.store.index >= min_index:
            return
        self._running()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ahead[waiter] = min_index
        self._ahead_first = min(self._ahead_first, min_index)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            raise Timeout(f"this server is at index {self.store.index}, {min_index} was asked for") from None
        finally:
            del self._ahead[waiter]

    def _reached(self) -> None:
        """The state has come to an index that somebody may wait for."""
        index, ahead = self.store.index, self._ahead
        for waiter, min_index in ahead.items():
            if min_index <= index and not waiter.done():
                waiter.set_result(None)
        self._ahead_first = min((i for i in ahead.values() if i > index), default=math.inf)

    async def barrier(self, mode: str) -> int:
        """The index that an answer must have now to be as new as `mode` promises. See architecture, 'tracked reads'."""
        self.counts["barriers"] += 1
        raft = self._running()
        if mode == "stale":
            return self.store.index
        if mode == "default":
            if raft.is_leader and raft.lease_valid() and raft.applied_all:
                return self.store.index
            await self._default_round.join()
        elif mode == "consistent":
            await self._consistent_round.join()
        else:
            raise BadRequest(f"unknown consistency mode {mode!r}")
        return self.store.index

    async def _round(self, mode: str) -> None:
        """One question to the leader (or to the followers, if this is it), then wait until it is applied here."""
        self.counts["barrier_rounds"] += 1
        deadline = self.clock() + HOLD_S
        while True:
            raft = self._running()
            try:
                if raft.is_leader:
                    await raft.wait_applied(await self.leader_index(mode), max(0.05, deadline - self.clock()))
                    return
                leader_id = self.leader_id
                peer = self.peer(leader_id) if leader_id else None
                if peer is not None and peer.open:
                    index = await self._while_leader(peer.call("index", mode), leader_id, deadline)
                    await raft.wait_applied(index, max(0.05, deadline - self.clock()))
                    return
            except (NoLeader, Timeout):
                pass
            await self._leader_settled(deadline)

    async def _while_leader(self, call: asyncio.Future[Any], leader_id: str | None, deadline: float) -> Any:
        """What the leader answers. NoLeader as soon as it does not lead any more, for it may never answer."""
        try:
            while True:
                changed = asyncio.ensure_future(self._leader_changed.wait())
                try:
                    left = max(0.0, deadline - self.clock())
                    await asyncio.wait((call, changed), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if call.done():
                    return call.result()
                if self.clock() >= deadline:
                    raise Timeout("the leader did not answer in time: a write may or may not have been done")
                if self.leader_id != leader_id:
                    raise NoLeader
        finally:
            call.cancel()

    async def leader_index(self, mode: str) -> int:
        """On the leader: the Raft index that a read of `mode` must have seen."""
        raft = self._running()
        if not raft.is_leader:
            raise NoLeader
        raft.tell_commit()
        if mode == "default" and raft.lease_valid():
            return raft.commit_index  # and not what is applied here: a follower may have shown more already
        return await raft.read_index()

    # -- about itself -----------------------------------------------------------------------------------------

    def contact(self) -> tuple[bool, int]:
        """(a leader is known, milliseconds since this server heard from it)."""
        raft = self.raft
        if raft is None:
            return False, 0
        if raft.is_leader:
            return True, 0
        return raft.leader_id is not None, int(raft.last_heard_age_s() * 1000)


class Loading:
    """A snapshot on its way into a server's state."""

    def __init__(self, node: ServerNode) -> None:
        self._node = node
        self._loader = Loader()

    def feed(self, chunk: bytes) -> None:
        """Take one chunk. Raises ValueError."""
        self._loader.feed(chunk)

    def finish(self) -> Callable[[], None]:
        """The short step that swaps the states. Raises ValueError where the end is missing."""
        self._loader.finish()
        return lambda: self._node.adopt(self._loader)
