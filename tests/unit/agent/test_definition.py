from __future__ import annotations

from typing import Any

import pytest

from rostra.agent.definition import parse_check, parse_service
from rostra.agent.definition_fields import DecodeError
from rostra.wire.errors import BadRequest


def refusal(definition: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        parse_service(definition, node="n")
    return caught.value.message


def service(**fields: Any) -> dict[str, Any]:
    return {"Name": "x", **fields}


def test_json_in_any_case_and_hcl_name_the_same_fields() -> None:
    json_form = {
        "ID": "a1",
        "Name": "a",
        "Port": 80,
        "EnableTagOverride": True,
        "TaggedAddresses": {"lan": {"Address": "1.2.3.4", "Port": 2}},
        "Meta": {"Kept_As": "Is"},
        "Check": {"HTTP": "http://127.0.0.1/", "Interval": "10s", "DeregisterCriticalServiceAfter": "5m"},
    }
    go_form = {key.lower(): value for key, value in json_form.items()}
    hcl_form = {
        "id": "a1",
        "name": "a",
        "port": 80,
        "enable_tag_override": True,
        "tagged_addresses": [{"lan": [{"address": "1.2.3.4", "port": 2}]}],
        "meta": [{"Kept_As": "Is"}],
        "check": [{"http": "http://127.0.0.1/", "interval": "10s", "deregister_critical_service_after": "5m"}],
    }
    parsed = parse_service(json_form, node="n")
    assert parse_service(go_form, node="n") == parsed
    assert parse_service(hcl_form, node="n") == parsed
    assert parsed.row.meta == {"Kept_As": "Is"}
    assert parsed.row.tagged_addresses == {"lan": {"address": "1.2.3.4", "port": 2}}
    assert parsed.checks[0].id == "service:a1"
    assert parsed.checks[0].deregister_after_s == 300


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({}, "Missing service name"),
        ({"Name": ""}, "Missing service name"),
        (service(Check={"HTTP": "http://a"}), "Invalid check: Interval must be > 0 for Script, HTTP, or TCP checks"),
        (service(Check={"Interval": "10s"}), "Invalid check: TTL must be > 0 for TTL checks"),
        (
            service(Check={"TTL": "10s", "HTTP": "http://a", "Interval": "1s"}),
            "Invalid check: Interval and TTL cannot both be specified",
        ),
        (
            service(Check={"TTL": "10s", "Status": "weird"}),
            "Status for checks must 'passing', 'warning', 'critical'",
        ),
        (service(Checks=[{"TTL": "-1s"}]), "Invalid check: TTL must be > 0 for TTL checks"),
        (service(Weights={"Passing": 0, "Warning": 1}), "Invalid Weights: Passing must be greater than 0"),
        (
            service(Weights={"Passing": 100000, "Warning": 1}),
            "Invalid Weights: DNS Weight must be between 0 and 65535",
        ),
        (
            service(Meta={"a b": "1"}),
            "Invalid Service Meta: Couldn't load metadata pair ('a b', '1'): Key contains invalid characters",
        ),
        (
            service(Meta={"consul-x": "1"}),
            "Invalid Service Meta: Couldn't load metadata pair ('consul-x', '1'): "
            "Key prefix 'consul-' is reserved for internal use",
        ),
        (service(Address="0.0.0.0"), "Invalid service address"),
        (service(Port=70000), "Invalid Port: 70000 is not between 0 and 65535"),
        (
            service(Connect={"SidecarService": {"ID": "q"}}),
            "1 error occurred:\n\t* A SidecarService cannot specify an ID as this is managed by the agent\n\n",
        ),
        (
            service(Connect={"SidecarService": {"Connect": {"SidecarService": {}}}}),
            "1 error occurred:\n\t* A SidecarService cannot have a nested SidecarService\n\n",
        ),
        (
            service(Kind="connect-proxy"),
            "2 errors occurred:\n\t* Proxy.DestinationServiceName must be non-empty for Connect proxy services\n"
            "\t* Port must be set for a Connect proxy\n\n",
        ),
    ],
)
def test_a_bad_definition_is_refused_with_the_words_of_consul(definition: Any, message: str) -> None:
    assert refusal(definition) == message


@pytest.mark.parametrize(
    ("upstreams", "message"),
    [
        ([{"LocalBindPort": 1}], "upstream destination name cannot be empty"),
        ([{"DestinationName": "b"}], "upstream local bind port cannot be zero"),
        (
            [{"DestinationName": "b", "LocalBindPort": 1}, {"DestinationName": "c", "LocalBindPort": 1}],
            'upstreams cannot contain duplicates by local bind address and port; "127.0.0.1:1" is specified twice',
        ),
        (
            [{"DestinationName": "b", "LocalBindPort": 1}, {"DestinationName": "b", "LocalBindPort": 2}],
            'upstreams cannot contain duplicates of [type="service", name="b", namespace="", datacenter=""]',
        ),
        (
            [{"DestinationName": "b", "DestinationType": "x", "LocalBindPort": 1}],
            'unknown upstream destination type: "x"',
        ),
    ],
)
def test_bad_upstreams_are_refused_with_the_words_of_consul(upstreams: Any, message: str) -> None:
    proxy = {"DestinationServiceName": "a", "Upstreams": upstreams}
    assert refusal(service(Kind="connect-proxy", Port=1, Proxy=proxy)) == f"1 error occurred:\n\t* {message}\n\n"


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (service(Chck=1), 'json: unknown field "Chck"'),
        (service(Check={"TTL": "1s", "Scrpt": ""}), 'json: unknown field "Check.Scrpt"'),
        (service(Port="a"), "json: cannot unmarshal string into field Port of type int"),
        (service(Check={"TTL": "bogus"}), 'time: invalid duration "bogus"'),
        (service(Check={"TCP": "a:1", "Interval": "10"}), 'time: missing unit in duration "10"'),
        ([], "json: cannot unmarshal array into a definition: an object is needed"),
    ],
)
def test_a_definition_that_cannot_be_read_says_which_field(definition: Any, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        parse_service(definition, node="n")
    assert caught.value.message == message


def test_an_empty_check_object_is_no_check_and_one_of_no_time_is_a_wrong_one() -> None:
    for empty in ({}, {"TTL": ""}, {"TTL": 0, "Name": None}, {"TLSSkipVerify": False, "ScriptArgs": []}):
        assert parse_service(service(Check=empty), node="n").checks == ()
    assert refusal(service(Check={"TTL": "0s"})) == "Invalid check: TTL must be > 0 for TTL checks"


def test_several_checks_are_numbered_and_a_single_one_is_not() -> None:
    many = parse_service(
        service(ID="x1", Checks=[{"TTL": "1s"}, {"TTL": "1s"}, {"CheckID": "c", "TTL": "1s"}]), node="n"
    )
    one = parse_service(service(ID="x1", Checks=[{"TTL": "1s"}]), node="n")
    assert [c.id for c in many.checks] == ["service:x1:1", "service:x1:2", "c"]
    assert [c.id for c in one.checks] == ["service:x1"]
    assert one.checks[0].name == "Service 'x' check"


def test_an_interval_below_a_second_becomes_a_second() -> None:
    parsed = parse_service(service(Check={"TCP": "a:1", "Interval": "1ms"}), node="n")
    assert parsed.checks[0].interval_s == 1.0


def test_a_sidecar_takes_name_tags_and_destination_from_its_service() -> None:
    parsed = parse_service(
        service(ID="x1", Port=80, Tags=["a"], Meta={"k": "v"}, Connect={"SidecarService": {}}), node="n"
    )
    assert parsed.sidecar is not None
    row = parsed.sidecar.row
    assert (row.id, row.name, row.kind, row.port) == ("x1-sidecar-proxy", "x-sidecar-proxy", "connect-proxy", 0)
    assert (row.tags, row.meta) == (("a",), {"k": "v"})
    assert row.proxy == {
        "destination_service_name": "x",
        "destination_service_id": "x1",
        "local_service_address": "127.0.0.1",
        "local_service_port": 80,
    }
    assert parsed.sidecar.default_sidecar_checks


def test_a_sidecar_may_have_a_connect_of_its_own_that_asks_for_nothing() -> None:
    for connect in ({}, {"Native": True}, {"SidecarService": None}):
        parsed = parse_service(service(Connect={"SidecarService": {"Connect": connect}}), node="n")
        assert parsed.sidecar is not None
        assert not parsed.sidecar.row.native


def test_an_id_counts_for_a_check_that_has_a_check_id_too() -> None:
    assert parse_check({"Name": "c", "ID": "a", "CheckID": "b", "TTL": "1s"}).id == "a"


def test_an_empty_list_of_checks_keeps_a_sidecar_without_any() -> None:
    parsed = parse_service(service(Connect={"SidecarService": {"Checks": []}}), node="n")
    assert parsed.sidecar is not None
    assert parsed.sidecar.checks == ()
    assert not parsed.sidecar.default_sidecar_checks


def test_users_own_maps_keep_their_keys_and_lists_become_tuples() -> None:
    config = {"supervise": False, "Some_Key": {"List": [1, 2]}}
    upstream = {"DestinationName": "b", "LocalBindPort": 9, "Config": {"Connect_X": [1]}}
    parsed = parse_service(
        service(Connect={"SidecarService": {"Proxy": {"Config": config, "Upstreams": [upstream]}}}), node="n"
    )
    assert parsed.sidecar is not None
    proxy = parsed.sidecar.row.proxy
    assert proxy is not None
    assert proxy["config"] == {"supervise": False, "Some_Key": {"List": (1, 2)}}
    assert proxy["upstreams"] == (
        {
            "destination_type": "service",
            "destination_name": "b",
            "local_bind_port": 9,
            "config": {"Connect_X": (1,)},
        },
    )


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({}, "Missing check name"),
        ({"Name": "a"}, "Invalid check: TTL must be > 0 for TTL checks"),
        ({"Name": "a", "TTL": "1s", "Status": "zz"}, "Bad check status"),
    ],
)
def test_a_bad_check_is_refused_with_the_words_of_consul(definition: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_check(definition)
    assert caught.value.message == message


def test_failures_before_warning_is_failures_before_critical_unless_given() -> None:
    spec = parse_check({"Name": "a", "TCP": "h:1", "Interval": "1s", "FailuresBeforeCritical": 3})
    assert (spec.failures_before_warning, spec.failures_before_critical) == (3, 3)
