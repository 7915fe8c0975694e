"""Packets to packets over a catalog in memory: what is answered, what is kept, and when it is forgotten."""

from __future__ import annotations

from collections import Counter
from typing import Any

import dnslib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rostra.dns.resolver import Forward, Wait
from rostra.dns.source import Instance


def many(count: int, **fields: Any) -> list[Instance]:
    return [
        Instance(f"m{i}", "dc1", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", port=9000, **fields) for i in range(count)
    ]


def test_the_question_is_echoed_as_it_was_spelled(web: Any, asking: Any) -> None:
    reply = asking(web).ask("wEb.SERVICE.consul")
    assert str(reply.q.qname) == "wEb.SERVICE.consul."
    assert str(reply.rr[0].rname) == "wEb.SERVICE.consul."


def test_rd_is_copied_and_ra_is_set_only_with_recursors(web: Any, asking: Any) -> None:
    assert asking(web).ask("web.service.consul", rd=1).header.rd == 1
    assert asking(web).ask("web.service.consul", rd=0).header.rd == 0
    assert asking(web).ask("web.service.consul").header.ra == 0
    assert asking(web, recursors=("192.0.2.1",)).ask("web.service.consul").header.ra == 1


def test_the_answer_follows_health_at_once(web: Any, asking: Any) -> None:
    asker = asking(web)
    for _ in range(40):  # until it is served from the innermost cache
        assert asker.answers("web.service.consul") == ["10.0.0.1", "10.1.1.2"]
    web.set("web", [Instance("n1", "dc1", "10.0.0.1", status="critical"), Instance("n9", "dc1", "10.0.0.9")])
    assert not asker.resolver.hot
    assert asker.answers("web.service.consul") == ["10.0.0.9"]


def test_a_service_whose_instances_are_all_critical_does_not_exist(web: Any, asking: Any) -> None:
    reply = asking(web).ask("dead.service.consul")
    assert dnslib.RCODE[reply.header.rcode] == "NXDOMAIN"
    soa = reply.auth[0]
    assert (str(soa.rname), str(soa.rdata.mname), str(soa.rdata.rname)) == (
        "consul.",
        "ns.consul.",
        "hostmaster.consul.",
    )
    assert soa.rdata.times == (1_700_000_000, 3600, 600, 86400, 0)


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        ("web.service.consul", "TXT"),
        ("web.service.consul", "SOA"),
        ("consul", "A"),
        ("service.consul", "A"),
        ("dc1.consul", "A"),
        ("n1.node.consul", "AAAA"),
        ("0a000001.addr.dc1.consul", "AAAA"),
    ],
)
def test_a_name_without_that_type_is_nodata_with_the_soa(name: str, qtype: str, web: Any, asking: Any) -> None:
    reply = asking(web).ask(name, qtype)
    assert (reply.header.rcode, len(reply.rr), [rr.rtype for rr in reply.auth]) == (0, 0, [6])


@pytest.mark.parametrize(
    ("name", "qtype", "rcode"),
    [
        ("example.com", "A", "REFUSED"),
        ("consul", "AXFR", "REFUSED"),
        ("99.0.0.10.in-addr.arpa", "PTR", "REFUSED"),
        ("none.service.consul", "A", "NXDOMAIN"),
    ],
)
def test_what_is_not_ours_is_refused(name: str, qtype: str, rcode: str, web: Any, asking: Any) -> None:
    assert asking(web).rcode(name, qtype) == rcode


def test_another_class_than_in_is_refused(web: Any, asking: Any) -> None:
    asker = asking(web)
    packet = asker.packet("web.service.consul")
    assert asker.raw(packet[:-1] + b"\x03")[3] & 15 == 5
    assert asker.raw(packet[:-1] + b"\xff")[3] & 15 == 0


def test_an_unknown_edns_version_is_told_so(web: Any, asking: Any) -> None:
    reply = asking(web).ask("web.service.consul", edns=4096, version=1)
    assert reply.header.rcode == 0
    assert reply.ar[0].ttl >> 24 == 1  # BADVERS is 16: the upper bits stand in the OPT


def test_before_the_first_server_every_service_and_node_is_servfail(web: Any, asking: Any) -> None:
    web.is_ready = False
    web.services.clear()
    asker = asking(web)
    assert asker.rcode("web.service.consul") == "SERVFAIL"
    assert asker.rcode("n1.node.consul") == "SERVFAIL"
    assert asker.rcode("consul", "SOA") == "NOERROR"


def test_a_service_asked_for_the_first_time_waits_for_its_instances(web: Any, asking: Any) -> None:
    asker = asking(web)
    web.services["web"].is_ready = False
    found = asker.ask("web.service.consul")
    assert isinstance(found, Wait)
    web.services["web"].is_ready = True
    assert asker.answers("web.service.consul") == ["10.0.0.1", "10.1.1.2"]


def test_random_names_start_no_watch_and_fill_no_cache(web: Any, asking: Any) -> None:
    asker = asking(web)
    for n in range(500):
        assert asker.rcode(f"r{n}.service.consul") == "NXDOMAIN"
        assert asker.rcode(f"r{n}.web.service.consul") == "NXDOMAIN"
        assert asker.rcode(f"r{n}.node.consul") == "NXDOMAIN"
    assert set(web.asked) == {"web"}
    assert len(asker.resolver._kept) == len(asker.resolver.hot) == 0


def test_caches_are_bounded_by_count_and_bytes(catalog: Any, asking: Any) -> None:
    catalog.set("web", [Instance("n", "dc1", "10.0.0.1", tags=[f"t{n}" for n in range(300)]), *many(50)])
    asker = asking(catalog, kept_max=100, hot_bytes_max=20_000)
    for _ in range(20):
        for n in range(300):
            asker.ask(f"t{n}.web.service.consul")
        asker.ask("web.service.consul", edns=4096)
    assert len(asker.resolver._kept) <= 100
    assert len(asker.resolver.hot) < 300


def test_watches_are_bounded_and_the_least_used_is_let_go(catalog: Any, asking: Any) -> None:
    for n in range(10):
        catalog.set(f"s{n}", many(1))
    asker = asking(catalog, watched_max=4)
    for n in range(10):
        asker.resolver.tick()
        assert asker.rcode(f"s{n}.service.consul") == "NOERROR"
    assert sum(bool(view.callbacks) for view in catalog.services.values()) == 4


def test_a_watch_nobody_asks_for_ends_and_one_in_use_stays(catalog: Any, asking: Any) -> None:
    catalog.set("idle", many(1))
    catalog.set("busy", many(1))
    asker = asking(catalog)
    asker.ask("idle.service.consul")
    for _ in range(1300):
        packet = asker.packet("busy.service.consul")
        if packet[2:] not in asker.resolver.hot:
            asker.raw(packet)
        asker.resolver.tick()
    assert not catalog.services["idle"].callbacks
    assert catalog.services["busy"].callbacks


def test_a_deregistered_service_is_let_go_and_found_again(catalog: Any, asking: Any) -> None:
    catalog.set("web", many(1))
    asker = asking(catalog)
    assert asker.rcode("web.service.consul") == "NOERROR"
    view = catalog.services.pop("web")
    view.rows = []
    view.changed()
    assert asker.rcode("web.service.consul") == "NXDOMAIN"
    assert not view.callbacks
    catalog.set("web", many(2))
    assert len(asker.answers("web.service.consul")) == 2


def test_close_ends_every_watch(web: Any, asking: Any) -> None:
    asker = asking(web)
    asker.ask("web.service.consul")
    asker.ask("n1.node.consul")
    asker.resolver.close()
    assert not web.services["web"].callbacks
    assert not web.nodes.callbacks


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edns", "tcp", "answers"),
    [(None, False, 3), (512, False, 3), (1232, False, 74), (4096, False, 100), (65535, False, 100), (None, True, 100)],
)
def test_a_hundred_addresses_fill_what_the_client_takes(
    edns: int | None, tcp: bool, answers: int, catalog: Any, asking: Any
) -> None:
    catalog.set("big", many(100))
    reply = asking(catalog).ask("big.service.consul", edns=edns, tcp=tcp)
    assert len(reply.rr) == answers
    assert reply.header.tc == (answers == 74)
    assert len(reply.pack()) <= 65535


def test_tc_tells_of_records_cut_by_size_and_not_of_the_answer_limit_unless_asked_to(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(100))
    name = "big.service.consul"
    assert [asking(catalog, truncation_flag=f).ask(name, edns=1232).header.tc for f in ("size", "always", "never")] == [
        1,
        1,
        0,
    ]
    assert [asking(catalog, truncation_flag=f).ask(name).header.tc for f in ("size", "always", "never")] == [0, 1, 0]


def test_no_reply_over_udp_exceeds_the_clients_size(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(300))
    asker = asking(catalog, udp_answer_limit=0)
    for edns in (None, 0, 100, 512, 700, 1232, 1300, 1500, 4096, 9000):
        for qtype in ("A", "SRV", "ANY"):
            reply = asker.raw(asker.packet("big.service.consul", qtype, edns=edns))
            assert len(reply) <= min(max(edns or 512, 512), 4096)


def test_over_tcp_a_thousand_instances_come_whole(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(1000))
    reply = asking(catalog).ask("big.service.consul", "SRV", tcp=True)
    assert (len(reply.rr), reply.header.tc) == (1000, 0)
    assert len(reply.ar) > 900  # what glue does not fit is asked for separately


def test_the_a_record_limit_holds_for_addresses_on_every_transport_and_not_for_srv(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(30))
    asker = asking(catalog, a_record_limit=5)
    assert len(asker.ask("big.service.consul", edns=4096).rr) == 5
    assert len(asker.ask("big.service.consul", tcp=True).rr) == 5
    assert len(asker.ask("big.service.consul", "SRV", edns=4096).rr) == 30


def test_the_a_record_limit_never_sets_tc(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(30))
    asker = asking(catalog, a_record_limit=2, truncation_flag="always")
    for more in ({}, {"edns": 4096}, {"tcp": True}):
        reply = asker.ask("big.service.consul", **more)
        assert (len(reply.rr), reply.header.tc) == (2, 0)
    assert asking(catalog, a_record_limit=9, truncation_flag="always").ask("big.service.consul").header.tc == 1
    assert asking(catalog, truncation_flag="always").ask("big.service.consul").header.tc == 1


@pytest.mark.parametrize("qtype", ["TXT", "ANY"])
def test_the_metadata_of_a_node_is_limited_by_bytes_only(qtype: str, catalog: Any, asking: Any) -> None:
    catalog.add_node("m", "10.0.0.1", **{f"key{n}": "a value of some length" for n in range(60)})
    asker = asking(catalog, a_record_limit=1)
    count = 60 + (qtype == "ANY")
    assert len(asker.ask("m.node.consul", qtype, edns=4096).rr) == count
    assert len(asker.ask("m.node.consul", qtype, tcp=True).rr) == count
    small = asker.ask("m.node.consul", qtype)
    assert small.header.tc == 1  # the rest is had over TCP
    assert len(small.rr) > 3
    assert qtype == "TXT" or str(small.rr[0].rdata) == "10.0.0.1"


# -- order --------------------------------------------------------------------------------------------------------


def test_every_instance_gets_its_turn_where_a_reply_holds_only_some(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(48))
    asker = asking(catalog)
    seen = Counter(a for _ in range(16) for a in asker.answers("big.service.consul"))
    assert set(seen.values()) == {1}


def test_orders_are_drawn_anew_every_second(catalog: Any, asking: Any) -> None:
    catalog.set("big", many(100))
    asker = asking(catalog)
    firsts = set()
    for _ in range(40):
        firsts |= {str(asker.ask("big.service.consul", edns=4096).rr[0].rdata) for _ in range(20)}
        asker.resolver.tick()
    assert len(firsts) > 90


def test_the_heavier_instance_stands_first_more_often(catalog: Any, asking: Any) -> None:
    catalog.set("w", [*many(1, weight_passing=9), Instance("light", "dc1", "10.9.9.9", weight_passing=1)])
    asker = asking(catalog)
    first: Counter[str] = Counter()
    for _ in range(100):
        first.update(str(asker.ask("w.service.consul").rr[0].rdata) for _ in range(10))
        asker.resolver.tick()
    assert 800 < first["10.0.0.0"] < 970


def test_the_same_query_again_is_answered_from_its_bytes(web: Any, asking: Any) -> None:
    asker = asking(web)
    packet = asker.packet("web.service.consul")
    for _ in range(17):
        asker.raw(packet)
    draw = asker.resolver.hot[packet[2:]]
    for _ in range(20):
        reply = dnslib.DNSRecord.parse(packet[:2] + draw())
        assert sorted(str(rr.rdata) for rr in reply.rr) == ["10.0.0.1", "10.1.1.2"]
    asker.resolver.tick()
    assert not asker.resolver.hot


def test_a_cname_stands_alone(catalog: Any, asking: Any) -> None:
    catalog.add("ext", "n1", "10.0.0.1", address="one.example.com")
    catalog.add("ext", "n2", "10.0.0.2", address="two.example.com")
    asker = asking(catalog)
    assert len(asker.ask("ext.service.consul", edns=4096).rr) == 1
    catalog.add("ext", "n3", "10.0.0.3")
    assert asker.answers("ext.service.consul") == ["10.0.0.3"]


def test_targets_are_named_in_the_domain_that_was_asked(web: Any, asking: Any) -> None:
    asker = asking(web, domain="consul", alt_domain="corp.example")
    assert str(asker.ask("ext.service.corp.example", "SRV").rr[0].rdata.target) == "www.example.com."
    targets = {str(rr.rdata.target) for rr in asker.ask("web.service.corp.example", "SRV").rr}
    assert "n1.node.dc1.corp.example." in targets
    assert str(asker.ask("nope.service.corp.example").auth[0].rname) == "corp.example."


def test_a_name_for_an_address_is_in_the_domain_and_not_in_the_other_one(web: Any, asking: Any) -> None:
    asker = asking(web, domain="corp.example", alt_domain="zz")
    assert asker.answers("1.0.0.10.in-addr.arpa", "PTR") == ["n1.node.dc1.corp.example."]
    asker = asking(web, domain="a", alt_domain="much.longer.example")
    assert asker.answers("1.0.0.10.in-addr.arpa", "PTR") == ["n1.node.dc1.a."]


def test_an_address_that_no_node_has_is_a_services(web: Any, asking: Any) -> None:
    web.addresses.services = {
        bytes([10, 9, 9, 9]): "sa",
        bytes([10, 0, 0, 1]): "no",
        b"\xfd" + b"\0" * 14 + b"\x09": "sa6",
    }
    asker = asking(web)
    assert asker.answers("9.9.9.10.in-addr.arpa", "PTR") == ["sa.service.dc1.consul."]
    assert asker.answers("1.0.0.10.in-addr.arpa", "PTR") == ["n1.node.dc1.consul."]
    six = "9." + "0." * 29 + "d.f.ip6.arpa"
    assert asker.answers(six, "PTR") == ["sa6.service.dc1.consul."]
    assert asker.rcode("8.9.9.10.in-addr.arpa", "PTR") == "REFUSED"
    web.addresses.is_ready = False
    assert isinstance(asker.ask("9.9.9.10.in-addr.arpa", "PTR"), Wait)


def test_connect_names_what_speaks_for_a_service_in_the_mesh(web: Any, asking: Any) -> None:
    view = web.meshed["web"] = type(web.services["web"])()
    view.rows = [Instance("n1", "dc1", "10.0.0.1", port=21000), Instance("n2", "dc1", "10.0.0.2", status="critical")]
    asker = asking(web)
    assert asker.answers("web.connect.consul") == ["10.0.0.1"]
    assert asker.answers("web.connect.dc1.consul", "SRV") == ["1 1 21000 n1.node.dc1.consul."]
    assert asker.rcode("none.connect.consul") == "NXDOMAIN"
    view.rows = []
    view.changed()
    assert asker.rcode("web.connect.consul") == "NXDOMAIN"


def test_the_name_server_that_the_soa_names_has_an_address(web: Any, asking: Any) -> None:
    asker = asking(web)
    name = str(asker.ask("consul", "SOA").rr[0].rdata.mname)
    assert asker.answers(name) == ["127.0.0.36"]
    assert str(asker.ask(name, "SOA").rr[0].rname) == "consul."
    assert [str(rr.rname) for rr in asker.ask(name, "NS").rr] == ["consul."]
    assert asker.rcode(name, "TXT") == "NOERROR"


def test_a_name_with_others_below_it_is_nodata(web: Any, asking: Any) -> None:
    web.add("dotted", "n1", "10.0.0.1", tags=["a.b"])
    web.add_node("x.y", "10.0.0.9")
    asker = asking(web)
    for name in ("_tcp.service.consul", "b.dotted.service.consul", "y.node.consul", "connect.consul"):
        assert asker.rcode(name) == "NOERROR", name
    for name in ("c.dotted.service.consul", "z.node.consul", "_udp.service.consul"):
        assert asker.rcode(name) == "NXDOMAIN", name


def test_a_node_whose_name_dns_cannot_carry_is_left_out_of_srv(catalog: Any, asking: Any) -> None:
    catalog.add("web", "x" * 64, "10.0.0.1", port=1)
    catalog.add("web", "ok", "10.0.0.2", port=1)
    assert len(asking(catalog).ask("web.service.consul", "SRV").rr) == 1


def test_ttls_are_the_configured_ones(web: Any, asking: Any) -> None:
    asker = asking(web, node_ttl_s=7, service_ttl_s={"web": 9}, soa_min_ttl_s=11)
    assert {rr.ttl for rr in asker.ask("web.service.consul").rr} == {9}
    assert asker.ask("n1.node.consul").rr[0].ttl == 7
    assert asker.ask("none.service.consul").auth[0].ttl == 11


def test_only_passing_leaves_out_warnings(web: Any, asking: Any) -> None:
    assert asking(web, only_passing=True).answers("web.service.consul") == ["10.0.0.1"]


def test_a_foreign_name_goes_to_the_recursors_if_the_client_wants_recursion(web: Any, asking: Any) -> None:
    asker = asking(web, recursors=("192.0.2.1",))
    assert isinstance(asker.ask("example.com"), Forward)
    assert asker.rcode("example.com", rd=0) == "REFUSED"
    assert isinstance(asker.ask("99.0.0.10.in-addr.arpa", "PTR"), Forward)


def test_counts_tell_what_happened(web: Any, asking: Any) -> None:
    asker = asking(web)
    asker.ask("web.service.consul")
    asker.ask("none.service.consul")
    asker.ask("example.com")
    asker.raw(b"\0" * 12)
    web.age_s = 60.0
    asker.resolver.tick()
    assert asker.counts == {
        "dns.queries": 3,
        "dns.nxdomain": 1,
        "dns.refused": 1,
        "dns.malformed": 1,
        "dns.stale_queries": 3,
    }


LABELS = ["web", "service", "consul", "node", "n1", "_web", "_tcp", "dc1", "v1", "x" * 63]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    junk=st.binary(max_size=300),
    labels=st.lists(st.sampled_from(LABELS), max_size=8),
    qtype=st.integers(0, 65535),
    tcp=st.booleans(),
)
def test_no_packet_raises_and_every_reply_is_readable(
    junk: bytes, labels: list[str], qtype: int, tcp: bool, web: Any, asking: Any
) -> None:
    asker = asking(web)
    question = b"".join(bytes([len(x)]) + x.encode() for x in labels) + b"\0" + qtype.to_bytes(2, "big") + b"\0\x01"
    for packet in (junk, b"\0\1\1\0\0\1\0\0\0\0\0\0" + question, b"\0\1\1\0\0\1\0\0\0\0\0\1" + question + junk):
        reply = asker.raw(packet, tcp=tcp)
        if isinstance(reply, bytes):
            assert dnslib.DNSRecord.parse(reply).header.qr == 1
            if not tcp:
                assert len(reply) <= 4096
