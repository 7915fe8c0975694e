"""Everything a proxy needs to know, in one JSON object that is kept current and served with its hash.

Built from watches that the whole host shares: roots, the intentions of the destination, the instances of each
upstream, and the leaf of `agent/leaf.py`. A change of any of them makes a new snapshot in the same turn of the loop, so
a denied source is known to the proxy at once. `connect_proxy/snapshot.py` reads the object; the two share no code, only
this shape.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from rostra.acl.identity import BadIdentity, ServiceIdentity
from rostra.acl.intention import precedence
from rostra.agent.leaf import Leaf, Leaves
from rostra.agent.local import LocalAgent, LocalService, listener_address
from rostra.agent.servers_port import Key, Row
from rostra.runtime import log as _log
from rostra.runtime.service import Tasks
from rostra.server.state.ca import Roots
from rostra.server.state.health import ConnectInstances
from rostra.server.state.intention import IntentionsFor
from rostra.server.state.rows import CheckRow, IntentionRow, NodeRow, RootRow, ServiceRow, read_row
from rostra.wire.errors import BadRequest, Internal, NotFound, RostraError, Timeout

if TYPE_CHECKING:
    from rostra.agent.results import Live, Results

CONNECT_TIMEOUT_MS = 5000
CONNECT_TIMEOUT_MS_MAX = 600_000
ENDPOINTS_MAX = 4096

# By position: a thousand instances have thousands of rows, and all of them are looked at after each change.
_STATUS = CheckRow._fields.index("status")
_PORT = ServiceRow._fields.index("port")
_WEIGHT = ServiceRow._fields.index("weight_passing")
_SERVICE_ADDRESS = ServiceRow._fields.index("address")
_NODE_ADDRESS = NodeRow._fields.index("address")

log = _log.get("agent.proxycfg")


def intentions_in_order(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Highest precedence first, a deny before an allow."""
    intentions = [read_row(IntentionRow, row) for row in rows]
    ranked = sorted(intentions, key=lambda i: (-precedence(i.source, i.destination), i.action == "allow", i.source))
    return [
        {
            "Source": i.source,
            "Destination": i.destination,
            "Action": i.action,
            "Precedence": precedence(i.source, i.destination),
            "ID": i.id,
        }
        for i in ranked
    ]


def endpoints(rows: Mapping[Key, Row], keys: Iterable[Key]) -> list[dict[str, Any]]:
    """Where the healthy instances of an upstream listen. An instance with any check that is not passing is left out."""
    found: list[dict[str, Any]] = []
    for key in keys:
        node, service, checks = rows[key]
        if any(check[_STATUS] != "passing" for check in checks):
            continue
        port = service[_PORT]
        if not 0 < port <= 65535 or len(found) == ENDPOINTS_MAX:
            continue  # a proxy would refuse the whole snapshot
        address = service[_SERVICE_ADDRESS] or node[_NODE_ADDRESS]
        found.append({"Address": address, "Port": port, "Weight": service[_WEIGHT]})
    return found


def upstreams_of(row: ServiceRow) -> list[Mapping[str, Any]]:
    """The upstreams that name a service; prepared queries cannot be followed yet."""
    upstreams = (row.proxy or {}).get("upstreams", ())
    return [u for u in upstreams if u.get("destination_type", "service") == "service"]


class _Proxy:
    """The snapshot of one proxy and the watches that it is made from."""

    def __init__(self, owner: ProxyConfigs, service: LocalService) -> None:
        self._owner = owner
        self.row = service.row
        self.token = service.token
        self._removers: list[Callable[[], None]] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self._dirty = False
        self._closed = False
        self._started = False
        self.snapshot: dict[str, Any] | None = None
        self.encoded = b""
        self.hash = ""
        self.failure: RostraError | None = None  # why it was closed, if not for a change of the registration
        proxy = self.row.proxy or {}
        self._destination = str(proxy.get("destination_service_name", ""))
        results, token = owner.results, self.token
        self._roots: Live = results.live(Roots(), token=token)
        self._intentions: Live = results.live(IntentionsFor(self._destination), token=token)
        names = {str(u["destination_name"]) for u in upstreams_of(self.row) if owner.is_local(u)}
        self._instances: dict[str, Live] = {n: results.live(ConnectInstances(n), token=token) for n in sorted(names)}
        self._endpoints: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    async def start(self) -> None:
        """Follow everything. The snapshot is there once each watch has answered and the leaf is signed."""
        lives = (self._roots, self._intentions, *self._instances.values())
        self._removers += [live.on_change(self.changed) for live in lives]
        self._removers.append(self._owner.leaves.follow(self._destination, self.changed, token=self.token))
        for live in lives:
            while not self._closed and not await live.ready(60.0):
                pass
        self._started = True
        self.changed()

    def changed(self) -> None:
        """One build per turn of the loop, whatever changed in it."""
        if not self._dirty and not self._closed and self._started:
            self._dirty = True
            asyncio.get_running_loop().call_soon(self._build)

    def close(self) -> None:
        self._closed = True
        for remove in self._removers:
            remove()
        self._wake()

    @property
    def closed(self) -> bool:
        return self._closed

    async def wait(self, known_hash: str, deadline: float) -> None:
        """Until the hash differs from `known_hash`, the proxy is gone, or the time is over."""
        while not self._closed and (self.snapshot is None or self.hash == known_hash):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                return
            finally:
                self._waiters.discard(waiter)

    def _build(self) -> None:
        self._dirty = False
        if self._closed:
            return
        leaf = self._owner.leaves.current(self._destination, token=self.token)
        if leaf is None or "" not in self._roots.rows:
            return  # the next change brings it
        snapshot = self._assemble(leaf)
        encoded = orjson.dumps(snapshot)
        digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
        if digest != self.hash:
            self.snapshot, self.encoded, self.hash = snapshot, encoded, digest
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _assemble(self, leaf: Leaf) -> dict[str, Any]:
        owner, row = self._owner, self.row
        proxy = row.proxy or {}
        config = proxy.get("config") or {}
        trust_domain = self._roots.rows[""][0]
        roots = [read_row(RootRow, self._roots.rows[key]) for key in self._roots.keys if key != ""]
        return {
            "ProxyID": row.id,
            "Service": self._destination,
            "TrustDomain": trust_domain,
            "Datacenter": owner.datacenter,
            "Public": {
                "Address": listener_address(row, owner.bind_address),
                "Port": int(config.get("bind_port") or row.port),
            },
            "Local": {
                "Address": proxy.get("local_service_address") or "127.0.0.1",
                "Port": int(proxy.get("local_service_port") or 0),
            },
            "Leaf": {
                "CertPEM": leaf.cert_pem,
                "KeyPEM": leaf.key_pem,
                "SerialNumber": leaf.serial,
                "ValidAfterMs": leaf.valid_after_ms,
                "ValidBeforeMs": leaf.valid_before_ms,
            },
            "Roots": [root.cert_pem for root in sorted(roots, key=lambda r: not r.active)],
            "DefaultAllow": owner.default_allow,
            "Intentions": intentions_in_order(self._intentions.rows[key] for key in self._intentions.keys),
            "Upstreams": [u for u in (self._upstream(u, trust_domain) for u in upstreams_of(row)) if u],
        }

    def _upstream(self, upstream: Mapping[str, Any], trust_domain: str) -> dict[str, Any] | None:
        name = str(upstream["destination_name"])
        config = upstream.get("config") or {}
        datacenter = upstream.get("datacenter") or self._owner.datacenter
        timeout_ms = config.get("connect_timeout_ms")
        if not isinstance(timeout_ms, int | float) or timeout_ms < 1:
            timeout_ms = CONNECT_TIMEOUT_MS
        try:
            identity = ServiceIdentity(trust_domain, datacenter, name).uri
        except BadIdentity as error:
            log.warn("an upstream cannot be a service of the mesh", upstream=name, error=str(error))
            return None
        return {
            "Name": name,
            "BindAddress": upstream.get("local_bind_address") or "127.0.0.1",
            "BindPort": upstream["local_bind_port"],
            "Datacenter": datacenter,
            "ConnectTimeoutMs": int(min(timeout_ms, CONNECT_TIMEOUT_MS_MAX)),
            "Identity": identity,
            "Endpoints": self._endpoints_of(name) if self._owner.is_local(upstream) else [],
        }

    def _endpoints_of(self, name: str) -> list[dict[str, Any]]:
        live = self._instances[name]
        version, found = self._endpoints.get(name, (-1, []))
        if version != live.version:
            found = endpoints(live.rows, live.keys)
            self._endpoints[name] = (live.version, found)
        return found


class ProxyConfigs:
    """The snapshots of this agent's proxies. A proxy's watches start with the first question about it."""

    def __init__(
        self,
        local: LocalAgent,
        leaves: Leaves,
        results: Results,
        *,
        datacenter: str,
        bind_address: str,
        default_allow: bool = True,
    ) -> None:
        self.leaves = leaves
        self.results = results
        self.datacenter = datacenter
        self.bind_address = bind_address
        self.default_allow = default_allow
        self._local = local
        self._proxies: dict[str, _Proxy] = {}
        self._tasks = Tasks("agent.proxycfg")
        self._remover: Callable[[], None] | None = None
        self._stopped = False

    async def start(self) -> None:
        self._remover = self._local.on_change(self._compare)

    async def stop(self) -> None:
        self._stopped = True
        if self._remover is not None:
            self._remover()
        for proxy in self._proxies.values():
            proxy.close()
        self._proxies.clear()
        await self._tasks.stop()

    def is_local(self, upstream: Mapping[str, Any]) -> bool:
        return upstream.get("datacenter", "") in ("", self.datacenter)

    async def snapshot(self, proxy_id: str, timeout_s: float = 10.0) -> tuple[dict[str, Any], str]:
        """The proxy's snapshot as it is now, with its hash. Raises NotFound, BadRequest, Timeout, or why no leaf."""
        return await self.wait(proxy_id, "", timeout_s)

    async def wait(self, proxy_id: str, known_hash: str, timeout_s: float) -> tuple[dict[str, Any], str]:
        """The snapshot once its hash differs from `known_hash`, or as it is after `timeout_s`. Raises as `snapshot`."""
        proxy = await self._answered(proxy_id, known_hash, timeout_s)
        assert proxy.snapshot is not None
        return proxy.snapshot, proxy.hash

    async def wait_encoded(self, proxy_id: str, known_hash: str, timeout_s: float) -> tuple[bytes, str]:
        """As `wait`, as the bytes that HTTP sends."""
        proxy = await self._answered(proxy_id, known_hash, timeout_s)
        return proxy.encoded, proxy.hash

    async def _answered(self, proxy_id: str, known_hash: str, timeout_s: float) -> _Proxy:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            proxy = self._of(proxy_id)
            if proxy.snapshot is None:  # the reason why there is no leaf is better than silence
                await self.leaves.get(str((proxy.row.proxy or {})["destination_service_name"]), token=proxy.token)
            await proxy.wait(known_hash, deadline)
            if proxy.failure is not None:
                raise proxy.failure
            if proxy.closed:
                continue  # registered anew meanwhile, or gone: then this raises
            if proxy.snapshot is None:
                raise Timeout(f"the configuration of {proxy_id} is not complete yet")
            return proxy

    def _of(self, proxy_id: str) -> _Proxy:
        if self._stopped:  # a proxy that waited is told so; it asks again, and goes on with what it has
            raise Timeout("this agent is stopping")
        service = self._local.services.get(proxy_id)
        if service is None:
            raise NotFound(f"unknown service ID: {proxy_id}")
        if service.row.kind != "connect-proxy":
            raise BadRequest(f"{proxy_id} is not a connect-proxy")
        proxy = self._proxies.get(proxy_id)
        if proxy is None:
            proxy = self._proxies[proxy_id] = _Proxy(self, service)
            self._tasks.start(f"snapshot of {proxy_id}", self._start(proxy_id, proxy))
        return proxy

    async def _start(self, proxy_id: str, proxy: _Proxy) -> None:
        try:
            await proxy.start()
        except Exception as error:
            failure = error if isinstance(error, RostraError) else Internal(repr(error))
            log.warn("cannot follow what a proxy needs", proxy=proxy_id, error=failure.message)
            proxy.failure = failure
            if self._proxies.get(proxy_id) is proxy:
                self._end(proxy_id)  # the next question starts anew

    def _compare(self) -> None:
        """Proxies that are gone or were registered differently lose their watches."""
        for proxy_id, proxy in list(self._proxies.items()):
            service = self._local.services.get(proxy_id)
            if service is None or service.row != proxy.row or service.token != proxy.token:
                self._end(proxy_id)

    def _end(self, proxy_id: str) -> None:
        proxy = self._proxies.pop(proxy_id, None)
        if proxy is not None:
            proxy.close()
