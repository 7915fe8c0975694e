from __future__ import annotations

import re

import pytest

from rostra.agent.checks import kinds
from rostra.agent.definition import parse_check
from rostra.agent.definition_fields import DecodeError, read
from rostra.agent.schema import CHECK, PROXY, SERVICE, Table, api_name


@pytest.mark.parametrize(
    "api",
    ["ID", "CheckID", "HTTP", "TLSSkipVerify", "TLSServerName", "GRPCUseTLS", "DockerContainerID", "TTL", "TCP",
     "DeregisterCriticalServiceAfter", "OutputMaxSize", "AliasNode", "DestinationServiceID", "EnableTagOverride"],
)  # fmt: skip
def test_the_api_s_spelling_follows_from_that_of_files(api: str) -> None:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", api).lower()
    assert api_name(snake) == api


def test_every_field_that_asks_for_a_kind_is_one_of_a_check() -> None:
    for kind in kinds.KINDS:
        assert {*kind.asked_by, *kind.needs} <= set(CHECK.in_bodies), kind.name


@pytest.mark.parametrize("name", sorted(set(CHECK.in_files) - set(CHECK.in_bodies)))
def test_what_only_a_file_may_say_is_refused_by_an_agent_by_its_name(name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        parse_check({"name": "c", "ttl": "1s", name: "x"})
    assert caught.value.message == f'json: unknown field "{name}"'


@pytest.mark.parametrize("table", [SERVICE, CHECK, PROXY])
def test_every_spelling_names_the_field_and_null_and_nothing_are_the_same(table: Table) -> None:
    for name, field in table.in_bodies.items():
        for spelling in (name, field.api, field.api.lower(), field.api.upper()):
            assert table.in_body(spelling) is field
    assert read(table, dict.fromkeys(table.in_bodies)) == read(table, {})


def test_durations_of_bodies_are_text_or_nanoseconds() -> None:
    assert read(CHECK, {"Interval": "1.5s", "Timeout": 2e9, "TTL": 5})["interval"] == 1_500_000_000
    assert read(CHECK, {"Interval": "", "Timeout": 2e9, "TTL": 5})["timeout"] == 2_000_000_000
    with pytest.raises(DecodeError, match="into field TTL of type duration"):
        read(CHECK, {"TTL": 1e300})
