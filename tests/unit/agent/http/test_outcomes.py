"""What a client is told of a change that failed: refused, certainly not done, or perhaps done; the same for all."""

from __future__ import annotations

import asyncio

import pytest

from rostra.agent.http.app import Deadlines
from rostra.agent.http.permissions import anybody
from rostra.agent.http.routing import Response, Route
from rostra.wire.errors import BadRequest, Conflict, Denied, Internal, NoLeader, Timeout
from rostra.wire.rpc import Lost
from tests.unit.agent.http.conftest import make_api

INTENTION = {"SourceName": "web", "DestinationName": "db", "Action": "allow"}
CHANGES = [
    ("PUT", "/v1/kv/a", b"1"),
    ("DELETE", "/v1/kv/a", None),
    ("DELETE", "/v1/kv/?recurse", None),
    ("PUT", "/v1/session/create", b""),
    ("PUT", "/v1/session/destroy/b4b1d3d2-5d6b-4f0e-9a4e-6c1f0c7d7d11", b""),
    ("PUT", "/v1/catalog/register", {"Node": "n", "Address": "10.0.0.1"}),
    ("PUT", "/v1/catalog/deregister", {"Node": "n"}),
    ("POST", "/v1/connect/intentions", INTENTION),
    ("PUT", "/v1/connect/intentions/exact?source=web&destination=db", INTENTION),
    ("DELETE", "/v1/connect/intentions/exact?source=web&destination=db", None),
    ("PUT", "/v1/operator/autopilot/configuration", {}),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c[0]} {c[1]}")
async def test_a_change_says_the_same_of_each_way_to_fail(api, change):
    for error, status, outcome in (
        (NoLeader(), 500, "not-done"),
        (Timeout("a write may or may not have been done"), 500, "unknown"),
        (Conflict("another one"), 409, "refused"),
        (Denied("not yours"), 403, "refused"),
        (BadRequest("never"), 500, "refused"),
        (Internal("a defect"), 500, "unknown"),
    ):
        api.servers.write_errors = [error]
        reply = await api.call(*change)
        assert (reply.status, reply.headers["X-Rostra-Outcome"]) == (status, outcome)
        assert error.message in reply.text
    done = await api.call(*change)
    assert "X-Rostra-Outcome" not in done.headers


async def test_a_request_that_the_edge_refuses_was_not_done(api):
    reply = await api.put("/v1/kv/a?cas=x")
    assert (reply.status, reply.headers["X-Rostra-Outcome"]) == (500, "refused")
    assert "X-Rostra-Outcome" not in (await api.get("/v1/kv/?raw")).headers


async def test_an_act_whose_connection_was_lost_is_unknown(api):
    api.servers.acts["session.renew"] = Lost()
    reply = await api.put("/v1/session/renew/b4b1d3d2-5d6b-4f0e-9a4e-6c1f0c7d7d11")
    assert (reply.status, reply.headers["X-Rostra-Outcome"]) == (500, "unknown")


async def test_a_change_that_takes_too_long_or_breaks_is_unknown(monkeypatch):
    async def endless(request, agent):
        await asyncio.Event().wait()
        return Response()

    async def broken(request, agent):
        raise ValueError

    monkeypatch.setattr(Deadlines, "LOOK_S", 0.02)
    monkeypatch.setattr("rostra.agent.http.app.REQUEST_S", 0.05)
    api = await make_api([Route("PUT", "/v1/endless", endless, anybody), Route("PUT", "/v1/broken", broken, anybody)])
    for path in ("/v1/endless", "/v1/broken"):
        reply = await api.put(path)
        assert (reply.status, reply.headers["X-Rostra-Outcome"]) == (500, "unknown")
    await api.server.close(1.0)


async def test_an_intention_that_moves_to_another_pair_is_never_without_a_rule(api):
    made = (await api.call("POST", "/v1/connect/intentions", INTENTION)).json["ID"]
    path, moved = f"/v1/connect/intentions/{made}", {**INTENTION, "DestinationName": "db2"}

    async def pairs():
        rows = (await api.get("/v1/connect/intentions")).json
        return {(row["SourceName"], row["DestinationName"]) for row in rows}

    assert (await api.put(path, {**moved, "Action": "perhaps"})).status == 500
    assert await pairs() == {("web", "db")}
    api.servers.write_errors = [NoLeader()]
    reply = await api.put(path, moved)
    assert (reply.status, reply.headers["X-Rostra-Outcome"]) == (500, "not-done")
    assert await pairs() == {("web", "db")}
    assert (await api.put(path, moved)).status == 200
    assert await pairs() == {("web", "db2")}
