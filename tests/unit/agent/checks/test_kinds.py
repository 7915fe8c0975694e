from __future__ import annotations

from typing import Any

import pytest

from rostra.agent.checks import kinds
from rostra.agent.checks.spec import CheckSpec
from rostra.agent.definition import Scripts, ScriptsDisabled, parse_check
from rostra.wire.errors import BadRequest

EVERY = "1s"
ASKING: dict[str, dict[str, Any]] = {
    "http": {"HTTP": "http://h", "Interval": EVERY},
    "tcp": {"TCP": "h:1", "Interval": EVERY},
    "script": {"ScriptArgs": ["true"], "Interval": EVERY},
    "ttl": {"TTL": "10s"},
    "alias": {"AliasService": "web"},
}


@pytest.mark.parametrize("name", ASKING)
def test_a_definition_has_the_kind_that_its_fields_ask_for(name: str) -> None:
    spec = parse_check({"Name": "c", **ASKING[name]})
    assert spec.type == kinds.of(spec).name == name
    assert (kinds.of(spec).probe is None) == (name in ("ttl", "alias"))


def test_every_kind_that_is_available_is_asked_for_here() -> None:
    assert set(ASKING) == {kind.name for kind in kinds.KINDS if not kind.missing}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"GRPC": "h:1", "Interval": EVERY}, "gRPC checks are not available"),
        ({"DockerContainerID": "x", "Args": ["true"], "Interval": EVERY}, "Docker checks are not available"),
        ({"HTTP": "http://h", "AliasService": "web", "Interval": EVERY}, "Interval cannot be set for Alias checks"),
        ({"AliasService": "web", "TTL": "1s"}, "TTL must be not be set for Alias checks"),
        ({"TCP": "h:1", "TTL": "1s"}, "Interval must be > 0 for Script, HTTP, or TCP checks"),
    ],
)
def test_what_no_kind_can_do_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_check({"Name": "c", **fields})
    assert caught.value.message == f"Invalid check: {problem}"


def test_of_several_probes_the_first_in_the_table_counts() -> None:
    assert parse_check({"Name": "c", **ASKING["tcp"], **ASKING["script"], **ASKING["http"]}).type == "http"


@pytest.mark.parametrize("name", ["", "udp", "grpc", "docker"])
async def test_a_kind_that_is_not_available_is_never_run(name: str) -> None:
    spec = CheckSpec("c", "c", name, args=("true",))
    probe = kinds.of(spec).probe
    assert probe is not None
    with pytest.raises(ValueError, match=f"runs no check of type '{name}'"):
        await probe(spec)


def test_a_catalog_registration_is_shown_as_the_first_kind_that_is_complete() -> None:
    shown = kinds.shown_as
    assert shown({"http": "x", "ttl": 1}) == "ttl"
    assert shown({"http": "x", "interval": "1s", "ttl": 1}) == "http"
    assert shown({"docker_container_id": "x", "interval": "1s"}) == ""
    assert shown({"docker_container_id": "x", "args": ["a"], "interval": "1s"}) == "docker"
    assert shown({"args": ["a"]}) == "script"


def test_only_kinds_that_run_programs_need_leave() -> None:
    for name, fields in ASKING.items():
        spec = parse_check({"Name": "c", **fields})
        if name == "script":
            with pytest.raises(ScriptsDisabled):
                Scripts().allow(spec, from_file=False)
        else:
            Scripts().allow(spec, from_file=False)
