"""DNS over the agent's shared watches: real queries on a real Store, real packets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import dnslib
import pytest

from rostra.agent.dns_source import SLICE_ROWS, CatalogSource, make_instance, worst_status
from rostra.agent.results import Results
from rostra.dns.answer import DnsConfig
from rostra.dns.resolver import Resolver, Wait
from rostra.dns.source import Instance
from rostra.server.state.catalog import Deregister, Register
from tests.support.local_servers import LocalServers
from tests.support.waiting import eventually


class Dns:
    def __init__(self, servers: LocalServers, results: Results) -> None:
        self.servers = servers
        self.results = results
        self.source = CatalogSource(results)
        self.source.start()
        self.resolver = Resolver(DnsConfig(), self.source)

    async def started(self) -> Dns:
        await eventually(lambda: self.source.is_ready)
        return self

    def register(self, node: str, service: str, status: str = "passing", **fields: Any) -> None:
        spec = {"id": service, "name": service, "port": 80, **fields}
        check = {"id": "c:" + spec["id"], "name": "c", "status": status, "service_id": spec["id"]}
        number = int("".join(filter(str.isdigit, node)) or 0)
        address = f"10.0.{number >> 8}.{number & 255}"
        self.servers.apply(Register(node=node, address=address, service=spec, checks=(check,)))

    async def ask(self, name: str, qtype: str = "A", tcp: bool = False) -> dnslib.DNSRecord:
        packet = bytes(dnslib.DNSRecord.question(name, qtype).pack())
        reply = self.resolver.resolve(packet, tcp=tcp)
        if isinstance(reply, Wait):
            assert await reply.view.ready(2.0)
            reply = self.resolver.resolve(packet, tcp=tcp)
        assert isinstance(reply, bytes)
        return dnslib.DNSRecord.parse(reply)

    async def addresses(self, name: str) -> list[str]:
        return sorted(str(rr.rdata) for rr in (await self.ask(name)).rr)


def instances_of(dns: Dns, service: str) -> Sequence[Instance]:
    view = dns.source.service(service)
    assert view is not None
    return view.instances()


@pytest.fixture
async def dns() -> AsyncIterator[Dns]:
    servers = LocalServers()
    results = Results(servers)
    yield await Dns(servers, results).started()
    await results.close()


async def test_a_registered_service_and_its_node_are_found(dns: Dns) -> None:
    dns.register("n1", "web")
    await eventually(lambda: dns.source.service("web"))
    assert await dns.addresses("web.service.consul") == ["10.0.0.1"]
    assert await dns.addresses("n1.node.consul") == ["10.0.0.1"]
    reply = await dns.ask("1.0.0.10.in-addr.arpa", "PTR")
    assert str(reply.rr[0].rdata) == "n1.node.dc1.consul."


async def test_each_change_of_health_is_in_the_answer(dns: Dns) -> None:
    dns.register("n1", "web")
    dns.register("n2", "web")
    await eventually(lambda: dns.source.service("web"))
    assert await dns.addresses("web.service.consul") == ["10.0.0.1", "10.0.0.2"]
    for n in range(10):
        dns.register("n1", "web", status="critical" if n % 2 == 0 else "passing")
        expected = 1 if n % 2 == 0 else 2
        while len(await dns.addresses("web.service.consul")) != expected:
            await asyncio.sleep(0)


async def test_a_service_is_found_whatever_its_spelling(dns: Dns) -> None:
    dns.register("n1", "WebApp")
    dns.register("n2", "web")
    await eventually(lambda: dns.source.service("webapp"))
    assert await dns.addresses("webapp.service.consul") == ["10.0.0.1"]
    assert await dns.addresses("WEB.service.consul") == ["10.0.0.2"]


async def test_a_node_is_found_whatever_its_spelling(dns: Dns) -> None:
    dns.register("Node1", "web")
    await eventually(lambda: dns.source.nodes.get("node1"))
    assert await dns.addresses("node1.node.consul") == ["10.0.0.1"]


async def test_unknown_names_start_no_watch(dns: Dns) -> None:
    before = len(dns.results._lives)
    for n in range(100):
        assert (await dns.ask(f"r{n}.service.consul")).header.rcode == 3
    assert len(dns.results._lives) == before


async def test_answers_go_on_without_servers_and_their_age_is_known(dns: Dns) -> None:
    dns.register("n1", "web")
    await eventually(lambda: dns.source.service("web"))
    assert await dns.addresses("web.service.consul") == ["10.0.0.1"]
    assert dns.source.age_s == 0
    dns.servers.cut()
    assert await dns.addresses("web.service.consul") == ["10.0.0.1"]
    await eventually(lambda: dns.source.age_s > 0)
    dns.servers.heal()
    dns.register("n1", "web", status="critical")
    await eventually(lambda: instances_of(dns, "web")[0].status != "passing")
    assert (await dns.ask("web.service.consul")).header.rcode == 3


async def test_nothing_is_known_before_the_first_server() -> None:
    servers = LocalServers()
    servers.cut()
    results = Results(servers)
    dns = Dns(servers, results)
    await asyncio.sleep(0)
    assert not dns.source.is_ready
    assert (await dns.ask("web.service.consul")).header.rcode == 2
    await results.close()


async def test_a_deregistered_service_does_not_exist_and_its_watch_is_let_go(dns: Dns) -> None:
    dns.register("n1", "web")
    await eventually(lambda: dns.source.service("web"))
    await dns.ask("web.service.consul")
    dns.servers.apply(Deregister("n1", "web"))
    await eventually(lambda: dns.source.service("web") is None)
    assert (await dns.ask("web.service.consul")).header.rcode == 3
    assert not dns.resolver._watched


async def test_a_large_service_is_converted_in_slices_and_then_only_where_it_changed(dns: Dns) -> None:
    count = SLICE_ROWS * 3
    for n in range(1, count + 1):
        dns.register(f"n{n}", "web")
    view = await eventually(lambda: dns.source.service("web"))
    assert await view.ready(2.0)
    before = {i.node: i for i in view.instances()}
    assert len(before) == count
    dns.register("n7", "web", status="critical")
    await eventually(lambda: sum(i.status == "critical" for i in view.instances()) == 1)
    after = {i.node: i for i in view.instances()}
    assert [n for n in after if after[n] is not before[n]] == ["n7"]
    assert len((await dns.ask("web.service.consul", "SRV", tcp=True)).rr) == count - 1


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        ((), "passing"),
        (("passing",), "passing"),
        (("passing", "warning"), "warning"),
        (("warning", "critical"), "critical"),
        (("maintenance",), "critical"),
    ],
)
def test_the_worst_check_decides(statuses: Any, worst: Any) -> None:
    assert worst_status([("n", "id", "name", status) for status in statuses]) == worst


def test_a_row_of_an_older_server_makes_an_instance() -> None:
    instance = make_instance((("n1", "", "10.0.0.1", ""), ("n1", "web", "web", "", 80, ("A",)), ()), "dc9")
    assert (instance.node, instance.datacenter, instance.port, instance.tags) == ("n1", "dc9", 80, frozenset({"a"}))


async def test_an_address_of_their_own_leads_to_services_and_follows_changes(dns: Dns) -> None:
    dns.register("n1", "Web", address="10.9.9.9")
    dns.register("n2", "api", address="10.9.9.9")
    dns.register("n2", "six", address="FD00::0099")
    await eventually(lambda: dns.source.service("six"))

    async def name_of(reverse: str) -> list[str]:
        return [str(rr.rdata) for rr in (await dns.ask(reverse, "PTR")).rr]

    assert await name_of("9.9.9.10.in-addr.arpa") == ["web.service.dc1.consul."]
    assert await name_of("9.9." + "0." * 28 + "d.f.ip6.arpa") == ["six.service.dc1.consul."]
    assert await name_of("2.0.0.10.in-addr.arpa") == ["n2.node.dc1.consul."]
    assert await name_of("7.7.7.10.in-addr.arpa") == []
    dns.register("n1", "Web", address="10.7.7.7")
    await eventually(lambda: dns.source.addresses.service_at(bytes([10, 7, 7, 7])) == "web")
    assert await name_of("7.7.7.10.in-addr.arpa") == ["web.service.dc1.consul."]
    assert await name_of("9.9.9.10.in-addr.arpa") == ["api.service.dc1.consul."]
    dns.servers.apply(Deregister("n2"))
    await eventually(lambda: not dns.source.addresses.service_at(bytes([10, 9, 9, 9])))
    assert await name_of("9.9.9.10.in-addr.arpa") == []


async def test_what_speaks_for_a_service_in_the_mesh_is_found_under_connect(dns: Dns) -> None:
    dns.register("n1", "web")
    proxy = {"destination_service_name": "web"}
    dns.register("n2", "web-sidecar-proxy", kind="connect-proxy", proxy=proxy, address="10.5.5.5")
    await eventually(lambda: dns.source.service("web-sidecar-proxy"))
    assert await dns.addresses("web.connect.consul") == ["10.5.5.5"]
    assert dns.source.connect("none") is None


async def test_nodes_with_dots_in_their_names_make_names_above_them(dns: Dns) -> None:
    dns.register("a.B.c", "web")
    await eventually(lambda: dns.source.service("web"))
    await dns.ask("x.node.consul")
    assert [dns.source.nodes.has_below(name) for name in ("b.c", "c", "a.b.c", "a")] == [True, True, False, False]
