"""DNS of a dev agent, asked by dig over UDP and TCP."""

from __future__ import annotations

import re
from functools import partial

import pytest

from tests.support.processes import Agent, HealthPage, Processes, dig, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
both = pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    agent = module_processes.dev("dns-node")
    for n in (1, 2):
        service = {
            "ID": f"web-{n}",
            "Name": "web",
            "Address": f"10.0.0.{n}",
            "Port": 8000 + n,
            "Tags": [f"v{n}"],
            "Weights": {"Passing": n, "Warning": 1},
        }
        agent.api.done("/v1/agent/service/register", service)
    agent.api.done("/v1/agent/service/register", {"Name": "six", "Address": "fd00::6", "Port": 6})
    agent.api.done("/v1/agent/service/register", {"Name": "here", "Port": 7})
    eventually("all are in the catalog", lambda: {"web", "six", "here"} <= set(_names(agent)), 5)
    eventually("DNS has both", lambda: len(agent.dig("web.service.consul")) == 2, 5)
    return agent


def _names(agent: Agent) -> list[str]:
    return list(agent.api.get("/v1/catalog/services").json())


def _finds(agent: Agent, name: str, expected: list[str]) -> bool:
    return agent.dig(name) == expected


def _status(text: str) -> str:
    found = re.search(r"status: (\w+)", text)
    return found[1] if found else text


@both
def test_a_lists_the_addresses_of_all_instances(agent: Agent, tcp: bool) -> None:
    assert agent.dig("web.service.consul", "A", tcp=tcp) == ["10.0.0.1", "10.0.0.2"]
    assert agent.dig("web.service.dc1.consul", "A", tcp=tcp) == ["10.0.0.1", "10.0.0.2"]
    assert agent.dig("v2.web.service.consul", "A", tcp=tcp) == ["10.0.0.2"]
    assert agent.dig("WEB.Service.CONSUL", "A", tcp=tcp) == ["10.0.0.1", "10.0.0.2"]


@both
def test_aaaa_lists_version_6_addresses_only(agent: Agent, tcp: bool) -> None:
    assert agent.dig("six.service.consul", "AAAA", tcp=tcp) == ["fd00::6"]
    assert agent.dig("web.service.consul", "AAAA", tcp=tcp) == []
    text = dig(agent.host, agent.ports.dns, "web.service.consul", "AAAA", tcp=tcp)
    assert _status(text) == "NOERROR"
    assert "SOA" in text


@both
def test_srv_names_ports_weights_and_targets_that_can_be_looked_up(agent: Agent, tcp: bool) -> None:
    rows = agent.dig("web.service.consul", "SRV", tcp=tcp)
    assert [row.split()[:3] for row in rows] == [["1", "1", "8001"], ["1", "2", "8002"]]
    for n, row in enumerate(rows, start=1):
        assert agent.dig(row.split()[3], "A", tcp=tcp) == [f"10.0.0.{n}"]
    assert [row.split()[2] for row in agent.dig("_web._v2.service.consul", "SRV", tcp=tcp)] == ["8002"]
    assert agent.dig("here.service.consul", "SRV", tcp=tcp) == ["1 1 7 dns-node.node.dc1.consul."]


@both
def test_a_node_is_found_by_name(agent: Agent, tcp: bool) -> None:
    assert agent.dig("dns-node.node.consul", tcp=tcp) == [agent.host]
    assert agent.dig("dns-node.node.dc1.consul", tcp=tcp) == [agent.host]


@both
@pytest.mark.parametrize("name", ["nothing.service.consul", "nobody.node.consul", "v9.web.service.consul"])
def test_a_name_that_is_not_there_is_nxdomain_with_the_soa(agent: Agent, name: str, tcp: bool) -> None:
    text = dig(agent.host, agent.ports.dns, name, tcp=tcp)
    assert _status(text) == "NXDOMAIN"
    assert "flags: qr aa" in text
    assert re.search(r"^consul\.\s+0\s+IN\s+SOA\s", text, re.MULTILINE)


def test_another_datacenter_is_not_answered_with_our_instances(agent: Agent) -> None:
    text = dig(agent.host, agent.ports.dns, "web.service.dc9.consul")
    assert _status(text) in ("NXDOMAIN", "SERVFAIL")


def test_answers_say_that_they_are_authoritative_and_may_not_be_cached(agent: Agent) -> None:
    text = dig(agent.host, agent.ports.dns, "web.service.consul")
    assert "flags: qr aa" in text
    assert re.search(r"^web\.service\.consul\.\s+0\s+IN\s+A\s+10\.0\.0\.1$", text, re.MULTILINE)


def test_another_domain_is_refused_and_never_answered(agent: Agent) -> None:
    assert _status(dig(agent.host, agent.ports.dns, "example.org")) == "REFUSED"


def test_the_order_of_answers_changes(agent: Agent) -> None:
    firsts = {dig(agent.host, agent.ports.dns, "+short", "web.service.consul").split()[0] for _ in range(25)}
    assert firsts == {"10.0.0.1", "10.0.0.2"}


def test_each_change_of_health_shows_in_dns(agent: Agent) -> None:
    page = HealthPage(agent.host)
    check = {"HTTP": page.url, "Interval": "1s", "Timeout": "1s"}
    try:
        agent.api.done("/v1/agent/service/register", {"Name": "flip", "Port": page.port, "Check": check})
        eventually("found", lambda: agent.dig("flip.service.consul") == [agent.host], 5)
        changes: list[tuple[int, list[str]]] = [(500, []), (200, [agent.host])]
        for status, expected in changes:
            page.status = status
            eventually(f"DNS follows {status}", partial(_finds, agent, "flip.service.consul", expected), 5)
    finally:
        page.close()


def test_a_registration_shows_in_dns_at_once_and_is_gone_at_once(agent: Agent) -> None:
    agent.api.done("/v1/agent/service/register", {"Name": "quick", "Port": 1})
    eventually("found", lambda: agent.dig("quick.service.consul") == [agent.host], 1.5)
    agent.api.done("/v1/agent/service/deregister/quick")
    eventually("gone", lambda: agent.dig("quick.service.consul") == [], 1.5)
