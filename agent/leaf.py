"""Leaf certificates of this host's services: fetched once, renewed in time, shared by all who ask.

A leaf belongs to (service, token), for a token decides who may have the key. Its key is made here and never leaves the
host; the servers sign a request. It is renewed at a random point between 60 % and 90 % of its life, and when the
active root changes. After that point it is renewed at once, and also when the clock is set to before its life. A leaf
that nobody asked for since its last renewal is forgotten, not renewed.
"""

from __future__ import annotations

import asyncio
import math
import random as _random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rostra.acl.identity import BadIdentity, ServiceIdentity
from rostra.agent.servers_port import Servers
from rostra.runtime import log as _log
from rostra.runtime.service import Tasks, backoff
from rostra.runtime.wall import Wall
from rostra.server.state.ca import Roots
from rostra.wire.caller import Caller
from rostra.wire.errors import BadRequest, Internal, NoLeader, RostraError, Timeout

if TYPE_CHECKING:
    from rostra.agent.results import Live, Results

#: How far the renewals of one host are spread after a change of root; the old root stays trusted for longer.
ROOT_CHANGE_SPREAD_S = 30.0
ROOTS_TIMEOUT_S = 10.0
_LEAVES_MAX = 4096

log = _log.get("agent.leaf")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate chain with its key. `index` grows with each renewal: blocking queries wait for it."""

    service: str
    uri: str
    serial: str  # hex pairs with colons
    cert_pem: str
    key_pem: str
    valid_after_ms: int
    valid_before_ms: int
    root_id: str
    index: int


def renewal_at_ms(leaf: Leaf, chance: float) -> int:
    """When to renew, with `chance` from [0, 1): between 60 % and 90 % of the leaf's life."""
    life_ms = leaf.valid_before_ms - leaf.valid_after_ms
    return leaf.valid_after_ms + int(life_ms * (0.6 + 0.3 * chance))


class _Held:
    """One (service, token): its leaf, who waits for it, and the task that keeps it fresh."""

    def __init__(self) -> None:
        self.leaf: Leaf | None = None
        self.error: RostraError | None = None
        self.wanted = True  # asked for since the last renewal
        self.holders = 0
        self.task: asyncio.Task[None] | None = None
        self.waiters: set[asyncio.Future[None]] = set()
        self.callbacks: list[Callable[[], None]] = []
        self.hurry = asyncio.Event()

    def tell(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        for callback in list(self.callbacks):
            callback()


class Leaves:
    """Constructed without IO; the first `get` starts what it needs. `stop` ends it."""

    def __init__(
        self,
        servers: Servers,
        results: Results,
        *,
        datacenter: str,
        wall: Wall | None = None,
        random: Callable[[], float] = _random.random,
        root_change_spread_s: float = ROOT_CHANGE_SPREAD_S,
    ) -> None:
        self._servers = servers
        self._results = results
        self._datacenter = datacenter
        self._wall = wall or Wall()
        self._random = random
        self._root_change_spread_s = root_change_spread_s
        self._held: dict[tuple[str, str], _Held] = {}
        self._tasks = Tasks("agent.leaf")
        self._roots: Live | None = None
        self._root_id = ""
        self._clocks = _log.RateLimited(log, 600.0)

    async def stop(self) -> None:
        await self._tasks.stop()

    async def get(self, service: str, *, token: str = "", timeout_s: float = 10.0) -> Leaf:
        """A valid leaf for `service`; the first call has it signed. Raises RostraError."""
        return await self.wait(service, 0, timeout_s, token=token)

    async def wait(self, service: str, index: int, timeout_s: float, *, token: str = "") -> Leaf:
        """The leaf as soon as its index is above `index`, or as it is after `timeout_s`. Raises RostraError."""
        held = self._hold(service, token)
        held.holders += 1
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            while held.leaf is None or held.leaf.index <= index:
                if held.leaf is None and held.error is not None:
                    raise held.error
                waiter = asyncio.get_running_loop().create_future()
                held.waiters.add(waiter)
                try:
                    async with asyncio.timeout_at(deadline):
                        await waiter
                except TimeoutError:
                    break
                finally:
                    held.waiters.discard(waiter)
        finally:
            held.holders -= 1
        if held.leaf is None:
            raise Timeout(f"no leaf certificate for {service} within {timeout_s:g}s")
        return held.leaf

    def current(self, service: str, *, token: str = "") -> Leaf | None:
        """The leaf if it is there now. Starts to fetch it otherwise."""
        return self._hold(service, token).leaf

    def follow(self, service: str, callback: Callable[[], None], *, token: str = "") -> Callable[[], None]:
        """Keep the leaf fresh and call back after each change, until the function returned is called."""
        held = self._hold(service, token)
        held.holders += 1
        held.callbacks.append(callback)

        def stop() -> None:
            if callback in held.callbacks:
                held.callbacks.remove(callback)
                held.holders -= 1

        return stop

    # -- renewal --------------------------------------------------------------------------------------------------

    def _hold(self, service: str, token: str) -> _Held:
        key = (service, token)
        held = self._held.get(key)
        if held is None:
            if len(self._held) >= _LEAVES_MAX:
                raise BadRequest(f"this agent holds {_LEAVES_MAX} leaf certificates, which is its limit")
            held = self._held[key] = _Held()
        held.wanted = True
        if held.task is None or held.task.done():
            held.error = None
            held.task = self._tasks.start(f"leaf {service}", self._keep(key, held))
        return held

    async def _keep(self, key: tuple[str, str], held: _Held) -> None:
        """Sign, wait until it is time, sign again; ends when nobody wants it, or when the first attempt failed."""
        delays = backoff(1.0, 60.0)
        while True:
            try:
                roots = await self._watch_roots()
                held.leaf = await self._sign(key, held.leaf, roots)
            except Exception as e:  # what fails once must not end the renewals: nobody would ask for them again
                error = e if isinstance(e, RostraError) else Internal(repr(e))
                if held.leaf is None or self._now_ms() >= held.leaf.valid_before_ms:
                    held.leaf, held.error = None, error
                    self._held.pop(key, None) if not held.callbacks else None
                    held.tell()
                    if not held.callbacks:
                        return
                log.warn("cannot renew a leaf certificate, trying again", service=key[0], error=error.message)
                await asyncio.sleep(next(delays))
                continue
            held.error = None
            held.wanted = False
            held.tell()
            due_ms = renewal_at_ms(held.leaf, self._random())
            if self._now_ms() < due_ms:
                delays = backoff(1.0, 60.0)
                await self._until_due(held, held.leaf, due_ms)
            else:
                self._clocks.warn(
                    "a new leaf is past its renewal already: the clocks of this host and of the servers differ",
                    service=key[0],
                )
                await asyncio.sleep(next(delays))
            if not held.wanted and not held.holders:
                self._held.pop(key, None)
                return

    async def _until_due(self, held: _Held, leaf: Leaf, due_ms: int) -> None:
        """Sleep to the renewal point; a new root makes it sooner, or a clock that is set back to before the leaf."""
        begin_s = leaf.valid_after_ms / 1000 if self._now_ms() >= leaf.valid_after_ms else -math.inf
        while True:
            held.hurry.clear()
            if self._root_id and leaf.root_id and leaf.root_id != self._root_id:
                if self._roots is not None and leaf.root_id in self._roots.rows:
                    spread_ms = int(self._root_change_spread_s * 1000 * self._random())
                    due_ms = min(due_ms, self._now_ms() + spread_ms)
                else:
                    return
            if await self._wall.until(due_ms / 1000, held.hurry, begin=begin_s):
                return

    def _now_ms(self) -> int:
        return int(self._wall.now() * 1000)

    async def _sign(self, key: tuple[str, str], before: Leaf | None, roots: Live) -> Leaf:
        from rostra.runtime.tls import create_csr

        service, token = key
        uri = self._uri(service, roots)
        key_pem, csr_pem = await asyncio.to_thread(create_csr, uri)
        signed: dict[str, Any] = await self._servers.act(
            "connect.sign", {"csr_pem": csr_pem, "service": service}, caller=Caller(token)
        )
        return Leaf(
            service=service,
            uri=signed.get("uri") or uri,
            serial=str(signed["serial"]),
            cert_pem=signed["cert_pem"],
            key_pem=key_pem,
            valid_after_ms=signed["valid_after_ms"],
            valid_before_ms=signed["valid_before_ms"],
            root_id=signed.get("root_id", ""),
            index=max(roots.index, before.index + 1 if before is not None else 1),
        )

    def _uri(self, service: str, roots: Live) -> str:
        trust = roots.rows.get("")
        if not trust or not trust[0]:
            raise NoLeader("the mesh has no certificate authority yet: the leader makes it after its election")
        try:
            return ServiceIdentity(trust[0], self._datacenter, service).uri
        except BadIdentity as error:
            raise BadRequest(f"{service!r} cannot have a leaf certificate: {error}") from None

    async def _watch_roots(self) -> Live:
        if self._roots is None:
            self._roots = self._results.live(Roots())
            self._roots.on_change(self._roots_changed)
        deadline = asyncio.get_running_loop().time() + ROOTS_TIMEOUT_S
        if not await self._roots.ready(ROOTS_TIMEOUT_S):
            raise Timeout("the roots of the mesh did not arrive")
        # Right after the first start the answer can be empty: the leader is making the CA.
        while "" not in self._roots.rows:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0 or not await self._roots.wait_change(self._roots.version, left_s):
                break
        self._roots_changed()
        return self._roots

    def _roots_changed(self) -> None:
        trust = self._roots.rows.get("") if self._roots is not None else None
        root_id = trust[1] if trust else ""
        if root_id != self._root_id:
            self._root_id = root_id
            for held in self._held.values():
                held.hurry.set()
