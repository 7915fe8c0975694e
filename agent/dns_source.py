"""The catalog as DNS sees it: `dns.source.Source` on the agent's shared watches.

One watch tells which services exist, one the nodes, and one per service asked for its instances. One more tells the
addresses of instances, from the first question about an address that no node has. Rows that did not change are not
converted again, and the first conversion of a large service is done in slices.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rostra.agent.definition import SIDECAR_SUFFIX
from rostra.dns.source import AddressesView, Instance, Node, NodesView, Status, pack_address
from rostra.server.state.catalog import Nodes, ServiceAddresses, ServiceNames
from rostra.server.state.health import ConnectInstances, ServiceInstances
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow, read_row
from rostra.wire.errors import RostraError

if TYPE_CHECKING:
    from rostra.agent.results import Live, Results

SLICE_ROWS = 100


class CatalogSource:
    """`start()` begins to watch, `close()` ends it. `token` is the agent's DNS token."""

    def __init__(self, results: Results, *, datacenter: str = "dc1", token: str = "") -> None:
        self._results = results
        self._datacenter = datacenter
        self._token = token
        self._names: Live | None = None
        self._spelling: _Spelling | None = None
        self._nodes: _Nodes | None = None
        self._removers: list[Callable[[], None]] = []
        self.prepare: Callable[[str, Sequence[Instance]], None] = _nothing

    def start(self) -> None:
        if self._names is not None:
            return
        names = self._names = self._results.live(ServiceNames(), token=self._token)
        nodes = self._results.live(Nodes(), token=self._token)
        self._spelling = _Spelling(names)
        self._nodes = _Nodes(nodes, self._datacenter)
        self._removers = [live.on_change(_nothing) for live in (names, nodes)]  # held: they are always in use

    def close(self) -> None:
        for remove in self._removers:
            remove()
        self._removers.clear()

    @property
    def is_ready(self) -> bool:
        return self._names is not None and self._names.is_ready

    @property
    def age_s(self) -> float:
        return self._names.age_s if self._names is not None else 0.0

    @property
    def nodes(self) -> NodesView:
        if self._nodes is None:
            raise RuntimeError("CatalogSource.start() was not called")
        return self._nodes

    @property
    def addresses(self) -> AddressesView:
        return _Addresses(self._results.live(ServiceAddresses(), token=self._token))

    def connect(self, name: str) -> _Service | None:
        # A service that is reached through a proxy is in the catalog itself, or its sidecar under its usual name.
        if self._spelling is None or not (self._spelling.all_of(name) or self._spelling.all_of(name + SIDECAR_SUFFIX)):
            return None
        return _Service(self._results.live(ConnectInstances(name), token=self._token), self._datacenter)

    def service(self, name: str) -> _Service | None:
        if self._spelling is None or not self._spelling.all_of(name):
            return None
        # The query pays no regard to case either, so one watch covers every spelling.
        live = self._results.live(ServiceInstances(name), token=self._token)
        return _Service(live, self._datacenter, lambda instances: self.prepare(name, instances))


def _nothing(*_: object) -> None:
    pass


class _Spelling:
    """The keys of a watch by their lower-case form. Nearly all keys are lower case, so only the others are kept."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._version = -1
        self._known: set[Any] = set()
        self._others: dict[str, list[str]] = {}

    def all_of(self, lower: str) -> list[str]:
        live = self._live
        if self._version != live.version:
            self._update()
        exact = [lower] if lower in live.rows else []
        return exact + self._others[lower] if lower in self._others else exact

    def _update(self) -> None:
        keys = self._live.rows.keys()
        if any(_is_other(key) for key in keys ^ self._known):
            self._others = {}
            for key in filter(_is_other, keys):
                self._others.setdefault(str(key).lower(), []).append(str(key))
        self._known = set(keys)
        self._version = self._live.version


def _is_other(key: Any) -> bool:
    return bool(key != key.lower())


class _Watched:
    """What all views have of the watch that they show."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._version = -1  # of the watch, as it was looked at last

    @property
    def is_ready(self) -> bool:
        return self._live.is_ready

    async def ready(self, timeout_s: float) -> bool:
        """Whether it arrived in time; a refusal (a token without the right) counts as not."""
        try:
            return await self._live.ready(timeout_s)
        except RostraError:
            return self._live.is_ready

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._live.on_change(callback)


class _Nodes(_Watched):
    def __init__(self, live: Live, datacenter: str) -> None:
        super().__init__(live)
        self._datacenter = datacenter
        self._spelling = _Spelling(live)
        self._by_address: dict[bytes, str] = {}
        self._above: set[str] = set()  # "b.c" for a node "a.b.c"

    def get(self, name: str) -> Node | None:
        found = self._spelling.all_of(name)
        if not found:
            return None
        row = read_row(NodeRow, self._live.rows[found[0]])
        return Node(row.name, row.datacenter or self._datacenter, row.address, row.meta)

    def has_below(self, name: str) -> bool:
        self._update()
        return name in self._above

    def _update(self) -> None:
        if self._version == self._live.version:
            return
        rows = [read_row(NodeRow, row) for row in self._live.rows.values()]
        self._by_address = {pack_address(row.address): row.name.lower() for row in rows}
        self._above = set()
        for name in (row.name.lower() for row in rows if "." in row.name):
            while "." in name:
                name = name.partition(".")[2]
                self._above.add(name)
        self._version = self._live.version

    def by_address(self, ip: bytes) -> Node | None:
        self._update()
        name = self._by_address.get(ip)
        return self.get(name) if name else None


class _Addresses(_Watched):
    """Which service an address of its own belongs to: of several, the one whose name comes first."""

    def __init__(self, live: Live) -> None:
        super().__init__(live)
        self._by_address: dict[bytes | str, str] = {}  # version 6 packed, version 4 as it is written

    def service_at(self, ip: bytes) -> str:
        if self._version != self._live.version:
            found: dict[bytes | str, str] = {}
            for address, name in self._live.rows.values():
                key = pack_address(address) if ":" in address else address
                if key not in found or name < found[key]:
                    found[key] = name
            self._by_address = found
            self._version = self._live.version
        return self._by_address.get(ip if len(ip) == 16 else socket.inet_ntoa(ip), "").lower()


class _Service(_Watched):
    """The instances of one service."""

    def __init__(self, live: Live, datacenter: str, prepare: Callable[[Sequence[Instance]], None] = _nothing) -> None:
        super().__init__(live)
        self._datacenter = datacenter
        self._prepare = prepare
        self._made: dict[Any, tuple[Any, Instance]] = {}
        self._instances: list[Instance] = []
        self._is_sliced = False

    @property
    def is_ready(self) -> bool:
        return self._live.is_ready and (self._is_sliced or len(self._live.rows) <= SLICE_ROWS)

    async def ready(self, timeout_s: float) -> bool:
        if not await super().ready(timeout_s):
            return False
        rows = list(self._live.rows.items())
        for at in range(0, len(rows), SLICE_ROWS):
            part = rows[at : at + SLICE_ROWS]
            for key, row in part:
                self._convert(key, row)
            self._prepare([self._made[key][1] for key, _ in part])
            await asyncio.sleep(0)
        self._is_sliced = True
        return True

    def instances(self) -> Sequence[Instance]:
        live = self._live
        if self._version != live.version or not self._is_sliced:
            old, self._made = self._made, {}
            for key, row in live.rows.items():
                known = old.get(key)
                if known is not None and known[0] is row:
                    self._made[key] = known
                else:
                    self._convert(key, row)
            self._instances = [instance for _, instance in self._made.values()]
            self._version = live.version
            self._is_sliced = True
        return self._instances

    def _convert(self, key: Any, row: Any) -> None:
        self._made[key] = (row, make_instance(row, self._datacenter))


def make_instance(row: Any, datacenter: str) -> Instance:
    """An instance from a row of `health.service`: (node, service, checks of both)."""
    node, service = read_row(NodeRow, row[0]), read_row(ServiceRow, row[1])
    return Instance(
        node.name,
        node.datacenter or datacenter,
        node.address,
        address=service.address,
        port=service.port,
        tags=service.tags,
        status=worst_status(row[2]),
        weight_passing=service.weight_passing,
        weight_warning=service.weight_warning,
    )


_STATUS_AT = CheckRow._fields.index("status")


def worst_status(checks: Sequence[Sequence[Any]]) -> Status:
    """Critical if any check is, else warning if any is, else passing. An unknown status counts as critical."""
    found = {check[_STATUS_AT] for check in checks}
    if found <= {"passing"}:
        return "passing"
    return "warning" if found <= {"passing", "warning"} else "critical"
