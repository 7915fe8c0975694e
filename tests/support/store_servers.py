"""The agent's `Servers` port over a plain Store: what a server would answer, without a network.

Rows go through msgpack, so they arrive as the plain tuples of the wire. Watches send row deltas. `read_gate` holds
reads back after they were evaluated, `barrier_gate` holds barriers back, `disconnect` loses the session and `reconnect`
starts another one, as the real port does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack

from rostra.agent.servers_port import Barrier, Delta, Mode, ReadAnswer
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_entry
from rostra.server.state.granules import granule_hash
from rostra.server.state.session import SessionInfo
from rostra.server.state.store import Applied, Store
from rostra.wire.caller import ANONYMOUS, Caller
from rostra.wire.errors import NoLeader, from_wire

CLUSTER = "8f1e3539-aec1-4049-8b70-66476138fab1"


def over_the_wire(value: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(value, use_bin_type=True), use_list=False, strict_map_key=False)


class _Watch:
    def __init__(self, query: Any) -> None:
        self.query = query
        self.granules: frozenset[str] = frozenset()
        self.events: asyncio.Queue[Delta | None] = asyncio.Queue()


class StoreServers:
    def __init__(self, *, chunk_rows: int = 200) -> None:
        self.store = Store()
        self.reads = 0
        self.barriers = 0
        self.watches_started = 0
        self.read_gate: asyncio.Event | None = None
        self.barrier_gate: asyncio.Event | None = None
        self.leader = "127.0.0.1:8300"
        self.last_contact_ms = 0
        self.acts: dict[str, Any] = {}  # kind -> its answer or error, or what makes one of its arguments
        self.write_errors: list[Exception | None] = []  # what the next writes raise
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._chunk_rows = chunk_rows
        self._connected = True
        self._since: int | None = None
        self._callbacks: list[Callable[[int, frozenset[int] | None], None]] = []
        self._watches: list[_Watch] = []
        self.apply(Bootstrap(CLUSTER, (("id", "s1", "127.0.0.1", "key"),), "dc1", "cert", "key"))

    # -- for tests ------------------------------------------------------------------------------------------------

    def apply(self, command: Any) -> Any:
        """The result of the command, now. Raises RostraError."""
        entry = encode_entry(command, cluster_id=CLUSTER, at_ms=1_700_000_000_000)
        applied: Applied = self.store.apply(entry)
        self._tell_watches(applied)
        if applied.result[0] == "err":
            raise from_wire(applied.result[1], applied.result[2])
        return over_the_wire(applied.result[1])

    def disconnect(self) -> None:
        self._connected = False

    def reconnect(self) -> None:
        """Another session: everything cached is forgotten and watches start again."""
        self._connected = True
        self._since = None
        for watch in list(self._watches):
            watch.events.put_nowait(None)

    # -- the port -------------------------------------------------------------------------------------------------

    async def write(self, command: Any, *, caller: Caller = ANONYMOUS, timeout_s: float = 10.0) -> Any:
        self._check()
        error = self.write_errors.pop(0) if self.write_errors else None
        if error is not None:
            raise error
        return self.apply(command)

    async def read(self, query: Any, *, min_index: int = 0, token: str = "") -> ReadAnswer:
        self._check()
        self.reads += 1
        evaluation = self.store.evaluate(query)
        rows = over_the_wire([(key, row) for key, row in evaluation.rows()])
        answer = ReadAnswer(evaluation.index, tuple(map(granule_hash, evaluation.granules)), list(rows))
        if self.read_gate is not None:
            await self.read_gate.wait()
        return answer

    async def barrier(self, mode: Mode) -> Barrier:
        self._check()
        self.barriers += 1
        await asyncio.sleep(0)
        if self.barrier_gate is not None:
            await self.barrier_gate.wait()
        self._check()
        index = self.store.index
        touched = None if self._since is None else self.store.touched_since(self._since)
        self._since = index
        for callback in self._callbacks:
            callback(index, touched)
        return Barrier(index, True, self.last_contact_ms)

    async def watch(self, query: Any, *, token: str = "") -> AsyncIterator[Delta]:
        watch = _Watch(query)
        self.watches_started += 1
        self._watches.append(watch)
        try:
            while True:
                evaluation = self.store.evaluate(query)
                watch.granules = frozenset(evaluation.granules)
                granules = tuple(map(granule_hash, evaluation.granules))
                rows = list(over_the_wire([(key, row) for key, row in evaluation.rows()]))
                full = True
                while full or rows:
                    chunk, rows = rows[: self._chunk_rows], rows[self._chunk_rows :]
                    yield Delta(evaluation.index, full, not rows, granules, chunk, [])
                    full = False
                while (delta := await watch.events.get()) is not None:
                    yield delta
        finally:
            self._watches.remove(watch)

    async def act(
        self,
        kind: str,
        args: dict[str, Any],
        *,
        caller: Caller = ANONYMOUS,
        timeout_s: float = 10.0,
        once: bool = False,
    ) -> Any:
        self._check()
        self.asked.append((kind, args))
        if kind in self.acts:
            said = self.acts[kind]
            said = said(args) if callable(said) else said
            if isinstance(said, Exception):
                raise said
            return over_the_wire(said)
        if kind == "status.leader":
            return self.leader
        if kind == "status.peers":
            return (self.leader,)
        if kind == "session.renew":
            rows = self.store.evaluate(SessionInfo(args["id"])).rows()
            return over_the_wire(rows[0][1]) if rows else None
        raise AssertionError(kind)

    def on_touched(self, callback: Callable[[int, frozenset[int] | None], None]) -> None:
        self._callbacks.append(callback)

    @property
    def connected(self) -> bool:
        return self._connected

    def _check(self) -> None:
        if not self._connected:
            raise NoLeader

    def _tell_watches(self, applied: Applied) -> None:
        for watch in self._watches:
            keys = dict.fromkeys(key for granule, key in applied.touched if granule in watch.granules)
            if not keys:
                continue
            view = self.store.view()
            now = dict.fromkeys(watch.query.keys(view))
            rows, removed = [], []
            for key in keys if None not in keys else now:
                row = watch.query.row(view, key) if key in now else None
                if row is None:
                    removed.append(over_the_wire(key))
                else:
                    rows.append(over_the_wire((key, row)))
            watch.events.put_nowait(
                Delta(applied.index, False, True, tuple(map(granule_hash, watch.granules)), rows, removed)
            )
