"""A catalog in memory behind the DNS port, and questions and answers read by an independent library (dnslib)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import dnslib
import pytest

from rostra.dns.answer import DnsConfig
from rostra.dns.resolver import Resolver
from rostra.dns.source import Instance, Node


class FakeView:
    def __init__(self) -> None:
        self.is_ready = True
        self.arrived = asyncio.Event()
        self.rows: list[Instance] = []
        self.nodes: dict[str, Node] = {}
        self.services: dict[bytes, str] = {}
        self.callbacks: list[Callable[[], None]] = []

    async def ready(self, timeout_s: float) -> bool:
        if self.is_ready:
            return True
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_s)
        except TimeoutError:
            return False
        return self.is_ready

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def instances(self) -> Sequence[Instance]:
        return self.rows

    def get(self, name: str) -> Node | None:
        return self.nodes.get(name)

    def has_below(self, name: str) -> bool:
        return any(node.endswith("." + name) for node in self.nodes)

    def service_at(self, ip: bytes) -> str:
        return self.services.get(ip, "")

    def by_address(self, ip: bytes) -> Node | None:
        return next((n for n in self.nodes.values() if n.ip == ip), None)

    def changed(self) -> None:
        for callback in list(self.callbacks):
            callback()


class FakeCatalog:
    """`dns.source.Source`; `asked` lists every service whose watch DNS started."""

    def __init__(self) -> None:
        self.is_ready = True
        self.age_s = 0.0
        self.services: dict[str, FakeView] = {}
        self.meshed: dict[str, FakeView] = {}
        self.addresses = FakeView()
        self.nodes = FakeView()
        self.asked: list[str] = []
        self.prepare: Callable[[str, Sequence[Instance]], None] = lambda name, instances: None

    def service(self, name: str) -> FakeView | None:
        view = self.services.get(name)
        if view is not None:
            self.asked.append(name)
        return view

    def connect(self, name: str) -> FakeView | None:
        return self.meshed.get(name)

    def add(self, service: str, node: str, node_address: str, **fields: Any) -> Instance:
        view = self.services.setdefault(service.lower(), FakeView())
        instance = Instance(node, "dc1", node_address, **fields)
        view.rows = [*view.rows, instance]
        view.changed()
        return instance

    def set(self, service: str, rows: Sequence[Instance]) -> None:
        view = self.services.setdefault(service, FakeView())
        view.rows = list(rows)
        view.changed()

    def add_node(self, name: str, address: str, **meta: str) -> None:
        self.nodes.nodes[name.lower()] = Node(name, "dc1", address, meta)
        self.nodes.changed()


class Asker:
    """Asks a resolver over packets. `ask` gives a dnslib record, or the resolver's word for it."""

    def __init__(self, catalog: FakeCatalog, **config: Any) -> None:
        self.counts: dict[str, int] = {}
        options = {k: config.pop(k) for k in list(config) if k in ("watched_max", "kept_max", "hot_bytes_max")}
        self.resolver = Resolver(
            DnsConfig(**config), catalog, count=self._count, clock=lambda: 1_700_000_000.0, **options
        )

    def _count(self, name: str, n: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + n

    def packet(self, name: str, qtype: str = "A", *, edns: int | None = None, version: int = 0, rd: int = 1) -> bytes:
        record = dnslib.DNSRecord.question(name, qtype)
        record.header.rd = rd
        if edns is not None:
            record.add_ar(dnslib.EDNS0(udp_len=edns, version=version))
        return bytes(record.pack())

    def raw(self, packet: bytes, *, tcp: bool = False) -> Any:
        return self.resolver.resolve(packet, tcp=tcp)

    def ask(self, name: str, qtype: str = "A", *, edns: int | None = None, tcp: bool = False, **more: Any) -> Any:
        packet = self.packet(name, qtype, edns=edns, **more)
        reply = self.raw(packet, tcp=tcp)
        if not isinstance(reply, bytes):
            return reply
        assert reply[:2] == packet[:2]
        return dnslib.DNSRecord.parse(reply)

    def answers(self, name: str, qtype: str = "A", **more: Any) -> list[str]:
        """The answers' data, sorted."""
        return sorted(str(rr.rdata) for rr in self.ask(name, qtype, **more).rr)

    def rcode(self, name: str, qtype: str = "A", **more: Any) -> str:
        return str(dnslib.RCODE[self.ask(name, qtype, **more).header.rcode])


@pytest.fixture
def catalog() -> FakeCatalog:
    return FakeCatalog()


@pytest.fixture
def web(catalog: FakeCatalog) -> FakeCatalog:
    """One service in every shape that matters."""
    catalog.add("web", "n1", "10.0.0.1", port=80, tags=["v1", "Prim"], weight_passing=5, weight_warning=2)
    catalog.add("web", "n2", "10.0.0.2", address="10.1.1.2", port=81, tags=["v2"], status="warning", weight_warning=2)
    catalog.add("web", "n3", "10.0.0.3", port=82, status="critical")
    catalog.add("web", "n4", "10.0.0.4", address="fd00::4", port=83)
    catalog.add("dead", "n3", "10.0.0.3", port=82, status="critical")
    catalog.add("ext", "n5", "10.0.0.5", address="www.example.com", port=443)
    catalog.add("consul", "o", "127.0.0.36", port=8300)
    catalog.add_node("n1", "10.0.0.1", a="b")
    catalog.add_node("n7", "fd00::7")
    catalog.add_node("n6", "host6.example.com")
    catalog.add_node("o", "127.0.0.36", role="oracle", **{"rfc1035-x": "plain"})
    return catalog


@pytest.fixture
def asking() -> Callable[..., Asker]:
    """`asking(catalog, **config)` → Asker."""
    return Asker
