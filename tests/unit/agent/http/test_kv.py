"""Statuses, texts and bodies as a Consul 1.8.7 gave them to the same requests."""

from __future__ import annotations

import uuid

import pytest

ROW = {"LockIndex": 0, "Key": "a", "Flags": 0, "Value": "aGVsbG8="}


def without_indexes(rows):
    return [{k: v for k, v in row.items() if k not in ("CreateIndex", "ModifyIndex")} for row in rows]


async def test_a_key_is_written_and_read_with_its_value_in_base64(api):
    assert (await api.put("/v1/kv/a", b"hello")).text == "true"
    reply = await api.get("/v1/kv/a")
    assert reply.status == 200
    assert without_indexes(reply.json) == [ROW]
    assert reply.index == reply.json[0]["ModifyIndex"]
    assert reply.headers["X-Consul-KnownLeader"] == "true"
    assert reply.headers["X-Consul-LastContact"] == "0"
    assert reply.headers["X-Consul-Effective-Consistency"] == "leader"


async def test_an_empty_value_is_null_and_raw_is_empty(api):
    await api.put("/v1/kv/e", b"")
    assert (await api.get("/v1/kv/e")).json[0]["Value"] is None
    raw = await api.get("/v1/kv/e?raw")
    assert (raw.status, raw.body) == (200, b"")


async def test_raw_is_the_value_and_cannot_run_in_a_browser(api):
    await api.put("/v1/kv/a", b"\x00<script>")
    reply = await api.get("/v1/kv/a?raw")
    assert reply.body == b"\x00<script>"
    assert reply.headers["Content-Type"] == "text/plain"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Security-Policy"] == "sandbox"


@pytest.mark.parametrize(
    "path", ["/v1/kv/nope", "/v1/kv/nope?recurse", "/v1/kv/nope?keys", "/v1/kv/nope?raw", "/v1/kv/?recurse"]
)
async def test_a_missing_key_is_404_without_a_body_but_with_an_index(api, path):
    reply = await api.get(path)
    assert (reply.status, reply.body) == (404, b"")
    assert reply.index >= 1


async def test_keys_of_the_empty_root_are_an_empty_list(api):
    reply = await api.get("/v1/kv/?keys")
    assert (reply.status, reply.json) == (200, [])


async def test_keys_may_hold_encoded_slashes_spaces_and_other_scripts(api):
    for path in ("/v1/kv/x%2Fy", "/v1/kv/a%20b", "/v1/kv/%C3%A4%22"):
        assert (await api.put(path, b"1")).text == "true"
    assert (await api.get("/v1/kv/?keys")).json == ["a b", "x/y", 'ä"']
    assert (await api.get("/v1/kv/x/y")).status == 200


async def test_keys_are_listed_up_to_a_separator(api):
    for key in ("x/y", "x/z/w", "x/z/v", "xx"):
        await api.put(f"/v1/kv/{key}", b"1")
    assert (await api.get("/v1/kv/x?keys")).json == ["x/y", "x/z/v", "x/z/w", "xx"]
    assert (await api.get("/v1/kv/x?keys&separator=/")).json == ["x/", "xx"]
    assert (await api.get("/v1/kv/x/?keys&separator=/")).json == ["x/y", "x/z/"]
    assert [r["Key"] for r in (await api.get("/v1/kv/x/?recurse&raw")).json] == ["x/y", "x/z/v", "x/z/w"]


async def test_compare_and_set_answers_false_when_another_version_is_there(api):
    assert (await api.put("/v1/kv/a?cas=0", b"1")).text == "true"
    assert (await api.put("/v1/kv/a?cas=0", b"2")).text == "false"
    index = (await api.get("/v1/kv/a")).json[0]["ModifyIndex"]
    assert (await api.put(f"/v1/kv/a?cas={index}", b"2")).text == "true"
    assert (await api.delete(f"/v1/kv/a?cas={index}")).text == "false"
    assert (await api.delete("/v1/kv/a?cas=0")).text == "false"
    assert (await api.delete("/v1/kv/a")).text == "true"


async def test_flags_are_unsigned_64_bits(api):
    await api.put("/v1/kv/a?flags=18446744073709551615", b"1")
    assert (await api.get("/v1/kv/a")).json[0]["Flags"] == 2**64 - 1


async def test_trees_are_deleted(api):
    for key in ("t/1", "t/2", "u"):
        await api.put(f"/v1/kv/{key}", b"1")
    assert (await api.delete("/v1/kv/t/?recurse")).text == "true"
    assert (await api.get("/v1/kv/?keys")).json == ["u"]
    assert (await api.delete("/v1/kv/?recurse")).text == "true"
    assert (await api.get("/v1/kv/?keys")).json == []


async def test_a_lock_is_acquired_shown_and_released(api):
    session = (await api.put("/v1/session/create")).json["ID"]
    assert (await api.put(f"/v1/kv/lk?acquire={session}", b"y")).text == "true"
    row = (await api.get("/v1/kv/lk")).json[0]
    assert (row["LockIndex"], row["Session"]) == (1, session)
    assert (await api.put(f"/v1/kv/lk?release={session}", b"z")).text == "true"
    assert "Session" not in (await api.get("/v1/kv/lk")).json[0]


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v1/kv/", 400, "Missing key name"),
        ("GET", "/v1/kv/?separator=/", 400, "Missing key name"),
        ("PUT", "/v1/kv/", 400, "Missing key name"),
        ("DELETE", "/v1/kv/", 400, "Missing key name"),
        ("PUT", "/v1/kv/a?cas=x", 500, 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("PUT", "/v1/kv/a?flags=-1", 500, 'strconv.ParseUint: parsing "-1": invalid syntax'),
        ("DELETE", "/v1/kv/a?cas=x", 500, 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("PUT", "/v1/kv/a?cas=0&acquire=x", 400, "Conflicting flags: acquire=x&cas=0"),
        ("DELETE", "/v1/kv/a?recurse&cas=1", 400, "Conflicting flags: cas=1&recurse="),
        ("PUT", "/v1/kv/a?acquire=no", 500, "failed session lookup: index error: UUID must be 36 characters"),
        ("PUT", "/v1/kv/a?acquire=", 500, "missing session"),
        ("PUT", "/v1/kv/a?release=", 500, "missing session"),
        ("PUT", "/v1/kv/a?release=no", 200, "false"),
        ("GET", "/v1/kv/a?dc=nope", 500, "No path to datacenter"),
        ("PUT", "/v1/kv/a?dc=nope", 500, "No path to datacenter"),
        ("GET", "/v1/kv/a?stale&consistent", 400, "Cannot specify ?stale with ?consistent, conflicting semantics."),
        ("GET", "/v1/kv/a?index=abc", 400, "Invalid index"),
        ("GET", "/v1/kv/a?index=-1", 400, "Invalid index"),
        ("GET", "/v1/kv/a?index=18446744073709551616", 400, "Invalid index"),
        ("GET", "/v1/kv/a?index=1&wait=abc", 400, "Invalid wait time"),
        ("GET", "/v1/kv/a?wait=10", 400, "Invalid wait time"),
    ],
)
async def test_mistakes_have_the_statuses_and_texts_that_clients_know(api, method, path, status, text):
    reply = await api.call(method, path, b"x" if method == "PUT" else None)
    assert (reply.status, reply.text) == (status, text)


async def test_an_unknown_session_is_500_invalid_session(api):
    session = str(uuid.uuid4())
    reply = await api.put(f"/v1/kv/a?acquire={session}", b"x")
    assert (reply.status, reply.text) == (500, f'invalid session "{session}"')


async def test_the_empty_forms_of_index_and_wait_are_ignored(api):
    await api.put("/v1/kv/a", b"x")
    for query in ("index=", "index=0", "wait=", "wait=1.5s", "index=0&wait=-10s"):
        assert (await api.get(f"/v1/kv/a?{query}")).status == 200


@pytest.mark.parametrize(
    ("query", "shown"), [("", "leader"), ("?stale", "stale"), ("?stale=false", "stale"), ("?consistent", "consistent")]
)
async def test_the_effective_consistency_is_shown(api, query, shown):
    reply = await api.get(f"/v1/kv/a{query}")
    assert reply.headers["X-Consul-Effective-Consistency"] == shown


async def test_deleting_what_is_not_there_succeeds_whatever_version_is_named(api):
    for version in (0, 5):
        assert (await api.delete(f"/v1/kv/missing?cas={version}")).text == "true"
    await api.put("/v1/kv/there", b"v")
    assert (await api.delete("/v1/kv/there?cas=0")).text == "false"
    assert (await api.get("/v1/kv/there")).status == 200
