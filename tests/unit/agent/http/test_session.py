"""Statuses, texts and bodies as a Consul 1.8.7 gave them to the same requests; Patroni and Vault match them."""

from __future__ import annotations

import uuid
from typing import Any

import pytest


async def create(api, body=None):
    reply = await api.put("/v1/session/create", body if body is not None else b"")
    assert reply.status == 200, reply.text
    return reply.json["ID"]


async def test_a_session_without_a_body_has_the_defaults(api):
    session = await create(api)
    assert str(uuid.UUID(session)) == session
    (row,) = (await api.get(f"/v1/session/info/{session}")).json
    assert row.pop("CreateIndex") == row.pop("ModifyIndex") > 1
    assert row == {
        "ID": session,
        "Name": "",
        "Node": "s1",
        "LockDelay": 15000000000,
        "Behavior": "release",
        "TTL": "",
        "NodeChecks": ["serfHealth"],
        "ServiceChecks": None,
    }


async def test_fields_are_found_in_lower_case_too(api):
    session = await create(api, {"name": "n", "ttl": "15s", "lockdelay": "1ms", "checks": [], "behavior": "delete"})
    (row,) = (await api.get(f"/v1/session/info/{session}")).json
    assert (row["Name"], row["TTL"], row["LockDelay"], row["NodeChecks"]) == ("n", "15s", 1000000, [])
    assert row["Behavior"] == "delete"


@pytest.mark.parametrize(
    ("lock_delay", "ns"),
    [(10, 10**10), (0, 0), ("0s", 0), (20 * 10**9, 20 * 10**9), (None, 15 * 10**9), ("20s", 20 * 10**9)],
)
async def test_lock_delay_is_seconds_below_a_thousand_and_nanoseconds_above(api, lock_delay, ns):
    session = await create(api, {"LockDelay": lock_delay})
    assert (await api.get(f"/v1/session/info/{session}")).json[0]["LockDelay"] == ns


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"TTL": "5s"}, 500, "Invalid Session TTL '5000000000', must be between [10s=24h0m0s]"),
        ({"TTL": "100000s"}, 500, "Invalid Session TTL '100000000000000', must be between [10s=24h0m0s]"),
        ({"TTL": "abc"}, 500, "Session TTL 'abc' invalid: time: invalid duration \"abc\""),
        ({"TTL": "15"}, 500, "Session TTL '15' invalid: time: missing unit in duration \"15\""),
        ({"TTL": 5}, 400, "Request decode failed: TTL must be a string"),
        ({"LockDelay": "abc"}, 400, 'Request decode failed: time: invalid duration "abc"'),
        ({"Behavior": "zz"}, 500, "Invalid Behavior setting 'zz'"),
        ({"Node": "nope"}, 500, "Missing node registration"),
        ({"Checks": ["zz"]}, 500, "Missing check 'zz' registration"),
        ({"ServiceChecks": [{"ID": "x"}]}, 500, "Missing check 'x' registration"),
        ({"Name": 5}, 400, "Request decode failed: Name must be a string"),
        ([], 400, "Request decode failed: expected a JSON object"),
        ({"Datacenter": "nope"}, 500, "No path to datacenter"),
    ],
)
async def test_mistakes_in_a_session_have_known_texts(api, body, status, text):
    reply = await api.put("/v1/session/create", body)
    assert (reply.status, reply.text) == (status, text)


async def test_malformed_json_is_400_and_names_the_place(api):
    reply = await api.put("/v1/session/create", b'{"TTL": }')
    assert reply.status == 400
    assert reply.text.startswith("Request decode failed: ")
    assert "line 1 column" in reply.text


async def test_sessions_are_renewed_listed_and_destroyed(api):
    session = await create(api, {"TTL": "15s"})
    other = await create(api)
    assert (await api.put(f"/v1/session/renew/{session}")).json[0]["TTL"] == "15s"
    assert {s["ID"] for s in (await api.get("/v1/session/list")).json} == {session, other}
    assert len((await api.get("/v1/session/node/s1")).json) == 2
    assert (await api.get("/v1/session/node/nope")).json == []
    for _ in range(2):
        assert (await api.put(f"/v1/session/destroy/{session}")).text == "true"
    assert (await api.get(f"/v1/session/info/{session}")).json == []


async def test_renewing_an_unknown_session_is_404(api):
    session = str(uuid.uuid4())
    reply = await api.put(f"/v1/session/renew/{session}")
    assert (reply.status, reply.text) == (404, f"Session id '{session}' not found")


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v1/session/info/", 400, "Missing session"),
        ("PUT", "/v1/session/renew/", 400, "Missing session"),
        ("PUT", "/v1/session/destroy/", 400, "Missing session"),
        ("GET", "/v1/session/node/", 400, "Missing node name"),
        ("GET", "/v1/session/info/zz", 500, "failed session lookup: index error: UUID must be 36 characters"),
        ("PUT", "/v1/session/renew/zz", 500, "failed session lookup: index error: UUID must be 36 characters"),
        ("PUT", "/v1/session/destroy/zz", 500, "failed session lookup: index error: UUID must be 36 characters"),
        ("PUT", "/v1/session/create/", 404, ""),
    ],
)
async def test_mistakes_in_a_path_have_known_texts(api, method, path, status, text):
    reply = await api.call(method, path)
    assert (reply.status, reply.text) == (status, text)


@pytest.mark.parametrize(
    ("fields", "node_checks", "checks"),
    [
        ({"Checks": ["c1"]}, ["serfHealth"], ["c1"]),
        ({"NodeChecks": ["c1"]}, ["c1"], None),
        ({"Checks": ["c1"], "NodeChecks": ["c2"]}, ["c2"], ["c1"]),
        ({"Checks": ["serfHealth"]}, ["serfHealth"], None),
        ({"Checks": ["serfHealth", "c1"]}, ["serfHealth"], ["serfHealth", "c1"]),
        ({"Checks": ["c1"], "NodeChecks": []}, [], None),
        ({"Checks": []}, [], None),
        ({"NodeChecks": None}, [], None),
    ],
)
async def test_checks_add_to_the_health_of_the_node_and_node_checks_replace_it(api, fields, node_checks, checks):
    body: dict[str, Any] = {"Node": "e9", "Address": "10.9.0.1"}
    body["Checks"] = [{"CheckID": i, "Name": i, "Status": "passing"} for i in ("serfHealth", "c1", "c2")]
    await api.put("/v1/catalog/register", body)
    session = await create(api, {"Node": "e9", **fields})
    (row,) = (await api.get(f"/v1/session/info/{session}")).json
    assert (row["NodeChecks"], row.get("Checks")) == (node_checks, checks)
    await api.put("/v1/catalog/register", {**body, "Checks": [{"CheckID": "serfHealth", "Status": "critical"}]})
    assert bool((await api.get(f"/v1/session/info/{session}")).json) is ("serfHealth" not in node_checks)


async def test_a_node_without_health_can_hold_a_session_by_node_checks_only(api):
    check = {"CheckID": "c1", "Name": "c1", "Status": "passing"}
    await api.put("/v1/catalog/register", {"Node": "e8", "Address": "10.9.0.1", "Check": check})
    reply = await api.put("/v1/session/create", {"Node": "e8", "Checks": ["c1"]})
    assert (reply.status, reply.text) == (500, "Missing check 'serfHealth' registration")
    await create(api, {"Node": "e8", "NodeChecks": ["C1"]})


@pytest.mark.parametrize("ttl", ["1h", "24h", "10000ms", "0", "90s", "1m0.5s"])
async def test_a_ttl_is_shown_as_it_was_given(api, ttl):
    session = await create(api, {"TTL": ttl})
    assert (await api.get(f"/v1/session/info/{session}")).json[0]["TTL"] == ttl


@pytest.mark.parametrize(("delay", "ns"), [("1us", 1000), ("70s", 70 * 10**9), (1000, 1000), (1.5, 10**9)])
async def test_a_lock_delay_is_shown_as_it_was_given(api, delay, ns):
    session = await create(api, {"LockDelay": delay})
    assert (await api.get(f"/v1/session/info/{session}")).json[0]["LockDelay"] == ns


async def test_the_case_of_a_session_s_id_does_not_matter(api):
    session = await create(api, {"TTL": "15s"})
    assert (await api.get(f"/v1/session/info/{session.upper()}")).json[0]["ID"] == session
    assert (await api.put(f"/v1/kv/lock?acquire={session.upper()}", b"")).text == "true"
    assert (await api.put(f"/v1/kv/lock?release={session}", b"")).text == "true"
    await api.put(f"/v1/session/destroy/{session.upper()}")
    assert (await api.get("/v1/session/list")).json == []
