"""`rostra maint`: what it asks of the agent, and what it shows."""

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("flags", "path", "query", "out"),
    [
        (["-enable"], "maintenance", {"enable": "true"}, "Node maintenance is now enabled\n"),
        (
            ["-enable", "-reason=a b"],
            "maintenance",
            {"enable": "true", "reason": "a b"},
            "Node maintenance is now enabled\n",
        ),
        (["-disable"], "maintenance", {"enable": "false"}, "Node maintenance is now disabled\n"),
        (
            ["-disable", "-service=w/1"],
            "service/maintenance/w/1",
            {"enable": "false"},
            'Service maintenance is now disabled for "w/1"\n',
        ),
    ],
)
def test_maintenance_begins_and_ends(
    flags: list[str], path: str, query: dict[str, str], out: str, rostra_cli: Any, agent: Any
) -> None:
    agent.on("PUT", f"/v1/agent/{path}", b"")
    assert rostra_cli("maint", *flags) == (0, out, "")
    assert agent.asked[-1].query == query


def test_without_flags_it_shows_what_is_under_maintenance(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/checks", {"other": {}})
    assert rostra_cli("maint") == (0, "", "")
    checks = {
        "_node_maintenance": {"Notes": "why"},
        "_service_maintenance:w1": {"ServiceID": "w1", "Notes": "because"},
    }
    agent.on("GET", "/v1/agent/checks", checks)
    agent.on("GET", "/v1/agent/self", {"Config": {"NodeName": "n1"}})
    assert rostra_cli("maint") == (
        *(0, "Node:\n  Name:   n1\n  Reason: why\n\nService:\n  ID:     w1\n  Reason: because\n\n", ""),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-enable", "-disable"], "Only one of -enable or -disable may be provided"),
        (["-reason=x"], "Reason may only be provided with -enable"),
        (["-service=x"], "Service requires either -enable or -disable"),
        (["-enable", "-service=x"], "Error enabling service maintenance: Unexpected response code: 404 (not found)"),
    ],
)
def test_what_cannot_be_meant_is_one_line(flags: list[str], message: str, rostra_cli: Any, agent: Any) -> None:
    assert rostra_cli("maint", *flags) == (1, "", f"{message}\n")
