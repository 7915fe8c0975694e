"""What an agent accepts, the servers take: the bounds are known where something is registered."""

from __future__ import annotations

from typing import Any

import pytest

from rostra.agent import bounds
from rostra.agent.bounds import in_commands, refuse_too_large
from rostra.agent.definition import parse_check, parse_service
from rostra.agent.sync import NodeIdentity, Picture, Step, plan
from rostra.server.state.rows import CheckRow
from rostra.wire.bounds import ITEMS_MAX, check_arguments
from rostra.wire.codec import encode_value
from rostra.wire.errors import BadRequest
from rostra.wire.frames import RPC_FRAME_BYTES_MAX, pack

IDENTITY = NodeIdentity("n", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "127.0.0.1", "dc1")


def steps(definition: dict[str, Any], output: str = "") -> list[Step]:
    """All that is sent where the catalog has nothing of it, if the agent accepts it."""
    wanted = parse_service(definition, node="n")
    refuse_too_large("n", wanted.row, wanted.checks)
    checks = {
        spec.id: CheckRow(
            "n",
            spec.id,
            spec.name,
            spec.status,
            spec.notes,
            output,
            service_id=wanted.row.id,
            service_name=wanted.row.name,
            service_tags=wanted.row.tags,
        )
        for spec in wanted.checks
    }
    return plan(IDENTITY, {wanted.row.id: wanted.row}, checks, Picture(None, {}, {}))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    return value


def checks(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"CheckID": f"c{i}", "TTL": "1h", **more} for i in range(n)]


LARGEST = [
    {"Name": "tags", "Tags": ["t"] * (bounds._SERVICE_ITEMS_MAX - 20), "Checks": checks(65)},
    {"Name": "checks", "Checks": checks(900)},
    {"Name": "notes", "Checks": checks(3, Notes="é" * 130_000)},
    {"Name": "both", "Tags": ["t" * 100_000] * 4, "Checks": checks(2, Notes="x" * 130_000)},
    {"Name": "deep", "Proxy": {"Config": nested(30)}},
    {"Name": "n" * 500, "ID": "i" * 512},
]
TOO_LARGE = [
    ({"Name": "a", "Tags": [f"t{i}" for i in range(30_000)]}, "more than 15"),
    ({"Name": "a", "Checks": checks(3_000)}, "at most 4194304 are possible"),
    ({"Name": "a", "Tags": ["t" * 200_000]}, "at most 131072 are allowed"),
    ({"Name": "a", "Tags": ["t" * 100_000] * 6}, "at most 524288 are possible"),
    ({"Name": "a", "Checks": checks(1, Notes="x" * 132_000)}, "at most 131072 are allowed"),
    ({"Name": "a", "Checks": checks(1, Notes="\U0001f600" * 100_000)}, "at most 262144 are possible"),
    ({"Name": "a", "Tags": ["t" * 1000] * 100, "Checks": checks(60)}, "with the tags"),
    ({"Name": "a", "Proxy": {"Config": nested(31)}}, "nested more than 32 deep"),
    ({"Name": "a", "Proxy": {"Config": nested(900)}}, "nested more than 32 deep"),
    ({"Name": "a", "Proxy": {"Config": {"x": float("inf")}}}, "not finite"),
]


@pytest.mark.parametrize("definition", LARGEST, ids=lambda d: str(d["Name"])[:8])
def test_whatever_is_accepted_goes_to_the_servers_in_commands_that_they_take(definition: dict[str, Any]) -> None:
    sent = steps(definition, output="o" * 4096)
    for step in sent:
        kind, arguments = encode_value(step.command)
        check_arguments(arguments)
        assert len(pack(("write", ("c" * 36, 2**40, 2**40), kind, arguments, "t" * 8192))) < RPC_FRAME_BYTES_MAX
    told = [check["id"] for step in sent for check in getattr(step.command, "checks", ())]
    assert sorted(told) == sorted(check["CheckID"] for check in definition.get("Checks", ()))


@pytest.mark.parametrize(("definition", "bound"), TOO_LARGE)
def test_what_they_would_refuse_for_ever_is_refused_with_the_bound(definition: dict[str, Any], bound: str) -> None:
    with pytest.raises(BadRequest, match=bound):
        steps(definition)


def test_checks_that_do_not_go_with_their_service_come_after_it() -> None:
    sent = steps({"Name": "a", "Checks": checks(200)})
    first = next(step for step in sent if step.what == "service a")
    rest = [step for step in sent if step.what == "checks of a"]
    assert len(first.command.checks) == bounds.CHECKS_AT_ONCE  # type: ignore[union-attr]
    assert {step.stage for step in rest} == {first.stage + 1}


def test_the_checks_of_a_node_are_bounded_as_those_of_a_service_are() -> None:
    specs = [parse_check({"Name": f"c{i}", "TTL": "1h"}) for i in range(2_000)]
    refuse_too_large("n", None, specs[:500])
    with pytest.raises(BadRequest, match="the checks of the node take"):
        refuse_too_large("n", None, specs)


def test_no_check_is_lost_or_sent_twice_by_the_cutting() -> None:
    rows = [CheckRow("n", f"c{i}", output="o" * (i * 97 % 5000)) for i in range(500)]
    cut = list(in_commands(rows))
    assert [row for some in cut for row in some] == rows
    assert all(len(some) <= bounds.CHECKS_AT_ONCE for some in cut)
    assert list(in_commands([])) == []
    assert ITEMS_MAX > bounds._SERVICE_ITEMS_MAX > ITEMS_MAX // 2
