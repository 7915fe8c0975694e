"""Servers over a plain Store, for tests of the agent's own parts: real commands, queries and mesh CA, no network.

Every answer goes through msgpack, so that rows are the plain tuples that an agent gets. `refuse` makes writes, acts and
watches of a kind fail, `cut` takes the servers away and `heal` brings them back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack

from rostra.agent.servers_port import Barrier, Delta, Mode, ReadAnswer
from rostra.server.ca.issue import create_root, sign_leaf
from rostra.server.state.ca import SetRoot
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_entry
from rostra.server.state.granules import granule_hash
from rostra.server.state.store import Store
from rostra.wire.caller import ANONYMOUS, Caller
from rostra.wire.errors import NoLeader, from_wire

CLUSTER = "11111111-2222-3333-4444-555555555555"
TRUST_DOMAIN = f"{CLUSTER}.consul"


class LocalServers:
    def __init__(self, *, leaf_ttl_s: int = 72 * 3600) -> None:
        self.store = Store()
        self.written: list[Any] = []
        self.refuse: dict[str, Exception] = {}
        self.signed = self.acts = 0
        self.leaf_ttl_s = leaf_ttl_s
        self._changed = asyncio.Event()
        self._connected = True
        self._touched: list[Callable[[int, frozenset[int] | None], None]] = []
        self._serial = 100
        self.apply(Bootstrap(CLUSTER, (("id", "s1", "127.0.0.1", "key"),), "dc1", "cert", "key"))
        self.rotate_root()

    # -- what a test does to them ---------------------------------------------------------------------------------

    def apply(self, command: Any) -> Any:
        applied = self.store.apply(encode_entry(command, cluster_id=CLUSTER, at_ms=1))
        touched = frozenset(granule_hash(granule) for granule, _ in applied.touched)
        for callback in self._touched:
            callback(applied.index, touched)
        self._wake()
        if applied.result[0] == "err":
            raise from_wire(applied.result[1], applied.result[2])
        return applied.result[1]

    def rotate_root(self) -> None:
        self._serial += 1
        root, key_pem = create_root(TRUST_DOMAIN, int(time.time() * 1000), self._serial)
        self.apply(SetRoot(root, key_pem))

    def rows(self, query: Any) -> dict[Any, Any]:
        """The present answer to `query`."""
        return dict(self.store.evaluate(query).rows())

    def cut(self) -> None:
        self._connected = False
        self._wake()

    def heal(self) -> None:
        self._connected = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- the port -------------------------------------------------------------------------------------------------

    async def write(self, command: Any, *, caller: Caller = ANONYMOUS, timeout_s: float = 10.0) -> Any:
        await asyncio.sleep(0)
        if not self._connected:
            raise NoLeader
        if command.kind in self.refuse:
            raise self.refuse[command.kind]
        self.written.append(command)
        return self.apply(command)

    async def read(self, query: Any, *, min_index: int = 0, token: str = "") -> ReadAnswer:
        await asyncio.sleep(0)
        if not self._connected:
            raise NoLeader
        return self._answer(query)

    async def barrier(self, mode: Mode) -> Barrier:
        await asyncio.sleep(0)
        if not self._connected:
            raise NoLeader
        return Barrier(self.store.index, True, 0)

    async def watch(self, query: Any, *, token: str = "") -> AsyncIterator[Delta]:
        known: dict[Any, Any] | None = None
        while True:
            if query.kind in self.refuse:
                raise self.refuse[query.kind]
            changed = self._changed
            if self._connected:
                answer = self._answer(query)
                rows = dict(answer.rows)
                if known is None:
                    yield Delta(answer.index, True, True, answer.granules, answer.rows, [])
                elif rows != known:
                    new = [(k, r) for k, r in answer.rows if known.get(k) != r]
                    gone = [k for k in known if k not in rows]
                    yield Delta(answer.index, False, True, answer.granules, new, gone)
                known = rows
            else:
                known = None
            await changed.wait()

    async def act(
        self,
        kind: str,
        args: dict[str, Any],
        *,
        caller: Caller = ANONYMOUS,
        timeout_s: float = 10.0,
        once: bool = False,
    ) -> Any:
        if not self._connected:
            raise NoLeader
        self.acts += 1
        if kind in self.refuse:
            raise self.refuse[kind]
        if kind != "connect.sign":
            return {"status.leader": "127.0.0.1:8300", "server.metrics": {}}[kind]
        self.signed += 1
        self._serial += 1
        root = next(r for r in self.store.tables.roots.rows.values() if r.active)
        key_pem = self.store.secret(f"root:{root.id}") or ""
        uri = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{args['service']}"
        now_ms = int(time.time() * 1000)
        leaf = sign_leaf(
            root, key_pem, args["csr_pem"], uri=uri, now_ms=now_ms, serial=self._serial, ttl_s=self.leaf_ttl_s
        )
        return {
            "cert_pem": leaf.cert_pem,
            "serial": leaf.serial_hex,
            "valid_after_ms": leaf.valid_after_ms,
            "valid_before_ms": leaf.valid_before_ms,
            "root_id": root.id,
            "uri": leaf.uri,
        }

    def on_touched(self, callback: Callable[[int, frozenset[int] | None], None]) -> None:
        self._touched.append(callback)

    @property
    def connected(self) -> bool:
        return self._connected

    def _answer(self, query: Any) -> ReadAnswer:
        evaluation = self.store.evaluate(query)
        rows = msgpack.unpackb(msgpack.packb(evaluation.rows()), use_list=False, strict_map_key=False)
        granules = tuple(granule_hash(granule) for granule in evaluation.granules)
        return ReadAnswer(evaluation.index, granules, list(rows))
