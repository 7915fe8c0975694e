"""From values to records: health, tags, addresses, TTLs."""

from __future__ import annotations

from typing import Any

import pytest

from rostra.dns.answer import DnsConfig, select_instances
from rostra.dns.source import Instance, pack_address


def instance(**fields: Any) -> Instance:
    return Instance("n", "dc1", "10.0.0.1", **fields)


def test_critical_instances_are_left_out_and_warning_ones_only_on_request() -> None:
    rows = [instance(status=s) for s in ("passing", "warning", "critical")]
    assert [i.status for i in select_instances(rows, "", only_passing=False)] == ["passing", "warning"]
    assert [i.status for i in select_instances(rows, "", only_passing=True)] == ["passing"]


def test_a_tag_selects_whatever_its_case() -> None:
    rows = [instance(tags=["Primary"]), instance(tags=["other"])]
    assert select_instances(rows, "primary", only_passing=False) == rows[:1]


def test_the_weight_is_the_statuss_and_fits_into_16_bits() -> None:
    assert instance(status="warning", weight_passing=5, weight_warning=2).weight == 2
    assert instance(weight_passing=70000).weight == 65535
    assert instance(weight_passing=-1).weight == 0


@pytest.mark.parametrize(("service", "ttl_s"), [("web", 5), ("web-two", 10), ("webs", 10), ("db", 30), ("WEB", 30)])
def test_the_ttl_is_the_exact_names_else_the_longest_prefixs(service: str, ttl_s: int) -> None:
    config = DnsConfig(service_ttl_s={"web": 5, "web*": 10, "w*": 20, "*": 30})
    assert config.ttl_of(service) == ttl_s


@pytest.mark.parametrize(("text", "size"), [("10.0.0.1", 4), ("fd00::1", 16), ("db.example.com", 0), ("", 0), ("1", 0)])
def test_only_ip_addresses_are_packed(text: str, size: int) -> None:
    assert len(pack_address(text)) == size


def test_zones_are_sought_longest_first() -> None:
    assert DnsConfig(domain="consul", alt_domain="dc.consul.").zones == (("dc", "consul"), ("consul",))
