"""The meaning of names: one table, and that every name has one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.dns.name import TYPE_SRV, Kind, parse_name, parse_zone

ZONES = (("consul",),)
A = 1


def meaning(name: str, qtype: int = A, zones: Any = ZONES) -> Any:
    return parse_name(tuple(name.rstrip(".").split(".")) if name != "." else (), qtype, zones, "dc1")


@pytest.mark.parametrize(
    ("name", "kind", "subject", "tag"),
    [
        ("web.service.consul", Kind.SERVICE, "web", ""),
        ("web.service.dc1.consul", Kind.SERVICE, "web", ""),
        ("web.service.dc1.dc.consul", Kind.SERVICE, "web", ""),
        ("v1.web.service.consul", Kind.SERVICE, "web", "v1"),
        ("a.b.web.service.consul", Kind.SERVICE, "web", "a.b"),
        ("_web._tcp.service.consul", Kind.SERVICE, "web", ""),
        ("_web._v1.service.dc1.consul", Kind.SERVICE, "web", "v1"),
        ("_web._tcp.v1.service.consul", Kind.SERVICE, "v1", "_web._tcp"),
        ("_web.service.consul", Kind.SERVICE, "_web", ""),
        ("n1.node.consul", Kind.NODE, "n1", ""),
        ("n1.rack.node.dc1.consul", Kind.NODE, "n1.rack", ""),
        ("0a000001.addr.dc1.consul", Kind.ADDRESS, "0a000001", ""),
        ("0a000001.addr.elsewhere.consul", Kind.ADDRESS, "0a000001", ""),
        ("fd000000000000000000000000000004.addr.consul", Kind.ADDRESS, "fd000000000000000000000000000004", ""),
        ("consul", Kind.APEX, "", ""),
        ("service.consul", Kind.EMPTY, "", ""),
        ("_tcp.service.consul", Kind.EMPTY, "", ""),
        ("_tcp.service.dc1.consul", Kind.EMPTY, "", ""),
        ("_tcp.consul", Kind.EMPTY, "", ""),
        ("connect.consul", Kind.EMPTY, "", ""),
        ("v1.web.connect.dc1.consul", Kind.CONNECT, "web", ""),
        ("ns.consul", Kind.SERVERS, "", ""),
        ("node.dc1.consul", Kind.EMPTY, "", ""),
        ("addr.dc1.consul", Kind.EMPTY, "", ""),
        ("dc1.consul", Kind.EMPTY, "", ""),
        ("dc1.dc.consul", Kind.EMPTY, "", ""),
        ("dc.consul", Kind.EMPTY, "", ""),
        ("dc2.consul", Kind.UNKNOWN, "", ""),
        ("web.service.dc2.consul", Kind.UNKNOWN, "", ""),
        ("web.service.a.b.consul", Kind.UNKNOWN, "", ""),
        ("n1.node.dc2.consul", Kind.UNKNOWN, "", ""),
        ("0a0000.addr.dc1.consul", Kind.UNKNOWN, "", ""),
        ("zz000001.addr.dc1.consul", Kind.UNKNOWN, "", ""),
        ("x.0a000001.addr.dc1.consul", Kind.UNKNOWN, "", ""),
        ("web.connect.consul", Kind.CONNECT, "web", ""),
        ("web.virtual.consul", Kind.UNKNOWN, "", ""),
        ("web.ingress.consul", Kind.UNKNOWN, "", ""),
        ("web.query.consul", Kind.UNKNOWN, "", ""),
        ("_web._tcp.consul", Kind.UNKNOWN, "", ""),
        ("1.0.0.10.in-addr.arpa", Kind.REVERSE, "0a000001", ""),
        ("0.0.10.in-addr.arpa", Kind.OUTSIDE, "", ""),
        ("256.0.0.10.in-addr.arpa", Kind.OUTSIDE, "", ""),
        ("example.com", Kind.OUTSIDE, "", ""),
        ("notconsul", Kind.OUTSIDE, "", ""),
        ("consul.example.com", Kind.OUTSIDE, "", ""),
        (".", Kind.OUTSIDE, "", ""),
    ],
)
def test_each_form_of_name_has_its_meaning(name: str, kind: Any, subject: str, tag: str) -> None:
    found = meaning(name)
    assert (found.kind, found.name, found.tag) == (kind, subject, tag)


def test_rfc_2782_names_may_leave_out_service_where_srv_is_asked() -> None:
    for name in ("_web._tcp.consul", "_web._tcp.dc1.consul"):
        assert meaning(name, TYPE_SRV)[:3] == (Kind.SERVICE, "web", "")
    assert meaning("_web._v1.consul", TYPE_SRV).tag == "v1"


def test_the_domain_may_have_several_labels_and_an_alternative() -> None:
    zones = (parse_zone("DC.Example.com."), parse_zone("consul"))
    assert meaning("web.service.dc.example.com", zones=zones).zone == ("dc", "example", "com")
    assert meaning("web.service.consul", zones=zones).zone == ("consul",)
    assert meaning("web.service.example.com", zones=zones).kind is Kind.OUTSIDE


@pytest.mark.parametrize("domain", ["", "a..b", "x" * 64, "é"])
def test_a_domain_that_is_no_name_is_refused(domain: str) -> None:
    with pytest.raises(ValueError):
        parse_zone(domain)


@given(
    st.lists(
        st.one_of(
            st.text(max_size=8), st.sampled_from(["service", "node", "addr", "consul", "dc1", "dc", "_x", "arpa"])
        ),
        max_size=12,
    ),
    st.integers(0, 65535),
)
def test_every_name_means_something(labels: list[str], qtype: int) -> None:
    found = parse_name(tuple(labels), qtype, ZONES, "dc1")
    assert isinstance(found.kind, Kind)
    if found.kind is Kind.SERVICE:
        assert found.datacenter == "dc1"
