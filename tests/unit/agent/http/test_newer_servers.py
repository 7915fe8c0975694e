"""Servers of a newer version, whose rows have a field more: an agent's answers stay what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rostra.server.state.catalog import Register
from rostra.server.state.intention import SetIntention
from rostra.server.state.kv import SetKey
from rostra.server.state.session import CreateSession

SESSION = "8c5a5d4b-6d43-4a0f-9ad5-8b8e2a3c9f01"
PATHS = [
    "/v1/kv/a",
    "/v1/kv/?recurse",
    "/v1/catalog/nodes",
    "/v1/catalog/service/web",
    "/v1/catalog/node/n1",
    "/v1/catalog/node-services/n1",
    "/v1/health/service/web",
    "/v1/health/node/n1",
    "/v1/health/checks/web",
    "/v1/health/state/any",
    "/v1/connect/intentions",
    "/v1/session/list",
    f"/v1/session/info/{SESSION}",
]


def widened(row):
    """Every row in it with a field more: rows are joined as tuples of rows."""
    if row and isinstance(row[0], tuple):
        return tuple(widened(part) if isinstance(part, tuple) else part for part in row)
    return (*row, "of a newer version") if row else row


@pytest.mark.parametrize("path", PATHS)
async def test_a_field_that_an_agent_does_not_know_changes_no_answer(api, path):
    service = {"id": "w1", "name": "web", "port": 80, "tags": ("a",)}
    check = {"id": "c1", "status": "passing", "service_id": "w1"}
    for command in (
        SetKey("a", b"1"),
        Register("n1", "10.0.0.1", service=service, checks=(check,)),
        SetIntention("web", "db", "deny"),
        CreateSession(SESSION, "n1", node_checks=()),
    ):
        api.servers.apply(command)
    before = await api.get(path)
    assert (before.status, bool(before.json)) == (200, True)
    read = api.servers.read

    async def read_of_a_newer_one(query, **how):
        answer = await read(query, **how)
        return replace(answer, rows=[(key, widened(row)) for key, row in answer.rows])

    api.servers.read = read_of_a_newer_one
    api.agent.results._forget_everything(0)
    after = await api.get(path)
    assert (after.status, after.json) == (before.status, before.json)
