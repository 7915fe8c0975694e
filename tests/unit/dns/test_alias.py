"""Host names for addresses: what stands behind them is in the same answer, from our zone and from recursors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dnslib
import pytest

from rostra.dns.alias import NAMES_MAX
from rostra.dns.message import read_answers
from rostra.dns.resolver import Look
from rostra.dns.source import Instance


def shown(reply: Any) -> list[str]:
    return [f"{str(rr.rname).rstrip('.')} {dnslib.QTYPE[rr.rtype]} {str(rr.rdata).rstrip('.')}" for rr in reply.rr]


class Recursing:
    """Asks a resolver and, of this table, whatever it wants to know from recursors; counts what was asked of them."""

    def __init__(self, asker: Any, answers: Mapping[str, Sequence[str]]) -> None:
        self.asker, self.answers = asker, answers
        self.asked: list[tuple[str, str]] = []

    def _answer(self, name: bytes, qtype: int) -> Any:
        question = dnslib.DNSRecord(q=dnslib.DNSQuestion(dnslib.DNSLabel(_labels(name)), qtype))
        reply = question.reply()
        self.asked.append((str(question.q.qname).rstrip("."), dnslib.QTYPE[qtype]))
        for zone in self.answers.get(str(question.q.qname).rstrip("."), ()):
            reply.add_answer(*dnslib.RR.fromZone(zone))
        return read_answers(bytes(reply.pack()))

    def ask(self, name: str, qtype: str = "A", *, tcp: bool = True, **more: Any) -> Any:
        packet = self.asker.packet(name, qtype, **more)
        known: dict[Any, Any] = {}
        found = self.asker.resolver.resolve(packet, tcp=tcp)
        for _ in range(10):
            if isinstance(found, bytes):
                return dnslib.DNSRecord.parse(found)
            assert isinstance(found, Look)
            known.update({ask: self._answer(*ask) for ask in found.asks})
            found = self.asker.resolver.resolve(packet, tcp=tcp, known=known)
        raise AssertionError("asks for ever")


def _labels(name: bytes) -> list[bytes]:
    out, at = [], 0
    while name[at]:
        out.append(name[at + 1 : at + 1 + name[at]])
        at += 1 + name[at]
    return out


WORLD = {
    "www.example.com": ["www.example.com. 77 A 192.0.2.7"],
    "alias.example.com": ["alias.example.com. 77 CNAME www.example.com.", "www.example.com. 77 A 192.0.2.7"],
    "half.example.com": ["half.example.com. 77 CNAME www.example.com."],
    "home.example.com": ["home.example.com. 77 CNAME web.service.consul."],
    "loop1.example.com": ["loop1.example.com. 77 CNAME loop2.example.com."],
    "loop2.example.com": ["loop2.example.com. 77 CNAME loop1.example.com."],
    "round.example.com": [
        "round.example.com. 77 CNAME turn.example.com.",
        "turn.example.com. 77 CNAME round.example.com.",
    ],
    "liar.example.com": ["www.bank.example. 77 A 203.0.113.66", "liar.example.com. 77 A 192.0.2.8"],
    **{f"c{n}.example.com": [f"c{n}.example.com. 77 CNAME c{n + 1}.example.com."] for n in range(100)},
}


@pytest.fixture
def world(web: Any, asking: Any) -> Recursing:
    for name in ("alias", "half", "home", "loop1", "round", "liar", "c0", "nothing"):
        web.add(f"to-{name}", "n1", "10.0.0.1", address=f"{name}.example.com", port=80)
    web.add("inner", "n1", "10.0.0.1", address="n1.node.consul", port=81)
    web.add("inner2", "n1", "10.0.0.1", address="Inner.service.consul", port=81)
    web.add("self", "n1", "10.0.0.1", address="self.service.consul", port=81)
    web.add("gone", "n1", "10.0.0.1", address="none.service.consul", port=81)
    return Recursing(asking(web, recursors=("192.0.2.53",)), WORLD)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ext.service.consul", ["ext.service.consul CNAME www.example.com", "www.example.com A 192.0.2.7"]),
        (
            "to-alias.service.consul",
            [
                "to-alias.service.consul CNAME alias.example.com",
                "alias.example.com CNAME www.example.com",
                "www.example.com A 192.0.2.7",
            ],
        ),
        (
            "to-half.service.consul",
            [
                "to-half.service.consul CNAME half.example.com",
                "half.example.com CNAME www.example.com",
                "www.example.com A 192.0.2.7",
            ],
        ),
        (
            "to-home.service.consul",
            [
                "to-home.service.consul CNAME home.example.com",
                "home.example.com CNAME web.service.consul",
                "web.service.consul A 10.0.0.1",
                "web.service.consul A 10.1.1.2",
            ],
        ),
        ("to-liar.service.consul", ["to-liar.service.consul CNAME liar.example.com", "liar.example.com A 192.0.2.8"]),
        ("to-nothing.service.consul", ["to-nothing.service.consul CNAME nothing.example.com"]),
        ("inner.service.consul", ["inner.service.consul CNAME n1.node.consul", "n1.node.consul A 10.0.0.1"]),
        (
            "inner2.service.consul",
            [
                "inner2.service.consul CNAME Inner.service.consul",
                "Inner.service.consul CNAME n1.node.consul",
                "n1.node.consul A 10.0.0.1",
            ],
        ),
        ("gone.service.consul", ["gone.service.consul CNAME none.service.consul"]),
        ("n6.node.consul", ["n6.node.consul CNAME host6.example.com"]),
    ],
)
def test_an_alias_is_answered_with_what_stands_behind_it(name: str, expected: list[str], world: Recursing) -> None:
    reply = world.ask(name)
    found = shown(reply)
    aliases = [row for row in found if " CNAME " in row]
    assert found[: len(aliases)] == aliases
    assert aliases + sorted(found[len(aliases) :]) == expected
    assert reply.header.rcode == 0


@pytest.mark.parametrize("name", ["to-loop1", "to-round", "self", "to-c0"])
def test_aliases_that_lead_nowhere_come_to_an_end(name: str, world: Recursing) -> None:
    reply = world.ask(f"{name}.service.consul")
    assert 1 <= len(reply.rr) <= NAMES_MAX + 1
    assert all(dnslib.QTYPE[rr.rtype] == "CNAME" for rr in reply.rr)
    assert len(set(map(str, reply.rr))) == len(reply.rr)
    assert len(world.asked) == len(set(world.asked)) <= NAMES_MAX


@pytest.mark.parametrize("qtype", ["AAAA", "MX", "TXT"])
def test_the_type_that_was_asked_is_asked_of_the_recursor(qtype: str, world: Recursing) -> None:
    assert shown(world.ask("ext.service.consul", qtype)) == ["ext.service.consul CNAME www.example.com"]
    assert world.asked == [("www.example.com", qtype)]


def test_whoever_asks_for_the_alias_itself_gets_nothing_else(world: Recursing) -> None:
    assert shown(world.ask("ext.service.consul", "CNAME")) == ["ext.service.consul CNAME www.example.com"]
    assert not world.asked


@pytest.mark.parametrize("qtype", ["MX", "AAAA", "TXT", "CNAME", "A"])
def test_without_recursors_every_type_gets_the_alias_of_a_host_name_outside(qtype: str, web: Any, asking: Any) -> None:
    asker = asking(web)
    assert shown(asker.ask("ext.service.consul", qtype)) == ["ext.service.consul CNAME www.example.com"]
    assert shown(asker.ask("n6.node.consul", qtype)) == ["n6.node.consul CNAME host6.example.com"]


def test_the_targets_of_srv_records_bring_their_addresses(world: Recursing, web: Any) -> None:
    for name, expected in (
        ("ext", ["www.example.com. A 192.0.2.7"]),
        ("to-alias", ["alias.example.com. CNAME www.example.com.", "www.example.com. A 192.0.2.7"]),
        ("inner", ["n1.node.consul. A 10.0.0.1"]),
        ("gone", []),
    ):
        reply = world.ask(f"{name}.service.consul", "SRV")
        assert len(reply.rr) == 1
        assert [f"{rr.rname} {dnslib.QTYPE[rr.rtype]} {rr.rdata}" for rr in reply.ar] == expected
    many = [Instance(f"m{i}", "dc1", "10.0.0.1", address=f"h{i}.example.com", port=1) for i in range(500)]
    web.set("many", many)
    world.asked.clear()
    assert len(world.ask("many.service.consul", "SRV").rr) == 500
    assert 1 <= len(world.asked) <= 8


def test_a_change_behind_an_alias_shows_at_once(world: Recursing, web: Any) -> None:
    assert len(world.ask("to-home.service.consul").rr) == 4
    web.set("web", [Instance("n9", "dc1", "10.0.0.9")])
    assert shown(world.ask("to-home.service.consul"))[-1] == "web.service.consul A 10.0.0.9"


def test_an_alias_and_its_records_keep_to_the_size_that_the_client_takes(world: Recursing) -> None:
    world.answers = {"www.example.com": [f"www.example.com. 1 A 192.0.2.{n}" for n in range(200)]}
    small = world.ask("ext.service.consul", tcp=False)
    assert (len(small.rr), small.header.tc) == (1 + 3, 0)
    large = world.ask("ext.service.consul", tcp=False, edns=1232)
    assert large.header.tc == 1
    assert len(bytes(large.pack())) <= 1232
    assert len(world.ask("ext.service.consul").rr) == 201
