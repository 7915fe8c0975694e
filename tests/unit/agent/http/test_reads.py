"""Blocking queries, `?cached` and what a client may rely on about indexes."""

from __future__ import annotations

import asyncio
import time

import pytest

from rostra.agent.config import Config
from rostra.agent.context import Agent
from rostra.agent.http.reads import how_long
from rostra.agent.http.routing import Request
from rostra.agent.results import Results
from rostra.server.state.catalog import Register
from rostra.server.state.kv import DeleteKey, SetKey
from tests.support.store_servers import StoreServers


def instance(i, status="passing", output=""):
    return Register(
        f"n{i}",
        f"10.0.0.{i}",
        service={"id": f"w{i}", "name": "web", "port": 80},
        checks=({"id": f"c{i}", "status": status, "service_id": f"w{i}", "output": output},),
    )


async def parked(api, path, n=1):
    """A call that has begun to wait on a watch."""
    call = asyncio.create_task(api.get(path))
    async with asyncio.timeout(30):
        while sum(len(live._waiters) for live in api.agent.results._lives.values()) < n:
            assert not call.done(), (await call).text
            await asyncio.sleep(0.001)
    return call


async def test_an_index_below_the_present_one_answers_at_once(api):
    api.servers.apply(SetKey("a", b"1"))
    reply = await api.get("/v1/kv/a?index=1&wait=10s")
    assert reply.json[0]["Key"] == "a"


async def test_a_parked_query_answers_when_its_key_changes(api):
    api.servers.apply(SetKey("a", b"1"))
    first = await api.get("/v1/kv/a")
    call = await parked(api, f"/v1/kv/a?index={first.index}&wait=10s")
    api.servers.apply(SetKey("a", b"2"))
    reply = await call
    assert reply.json[0]["Value"] == "Mg=="
    assert reply.index > first.index


async def test_unrelated_writes_do_not_wake_it(api):
    api.servers.apply(SetKey("a", b"1"))
    first = await api.get("/v1/kv/a")
    call = await parked(api, f"/v1/kv/a?index={first.index}&wait=10s")
    for i in range(20):
        api.servers.apply(SetKey(f"b{i}", b"1"))
    await asyncio.sleep(0.02)
    assert not call.done()
    api.servers.apply(DeleteKey("a"))
    assert (await call).status == 404


async def test_a_change_that_the_filter_hides_does_not_wake_it(api):
    api.servers.apply(instance(1))
    api.servers.apply(instance(2, "critical"))
    first = await api.get("/v1/health/service/web?passing")
    call = await parked(api, f"/v1/health/service/web?passing&index={first.index}&wait=10s")
    api.servers.apply(instance(2, "critical", output="still down"))
    live = next(iter(api.agent.results._lives.values()))
    async with asyncio.timeout(30):
        while live.version < 1 or not live._waiters:
            await asyncio.sleep(0)
    assert not call.done()
    api.servers.apply(instance(2, "passing"))
    reply = await call
    assert [r["Service"]["ID"] for r in reply.json] == ["w1", "w2"]


async def test_at_the_end_of_the_wait_it_answers_with_the_same_index(api):
    api.servers.apply(SetKey("a", b"1"))
    first = await api.get("/v1/kv/a")
    started = time.monotonic()
    reply = await api.get(f"/v1/kv/a?index={first.index}&wait=200ms")
    assert reply.index == first.index
    assert time.monotonic() - started >= 0.2


async def test_at_the_end_of_the_wait_the_index_covers_hidden_changes(api):
    api.servers.apply(instance(1, "critical"))
    first = await api.get("/v1/health/service/web?passing")
    call = await parked(api, f"/v1/health/service/web?passing&index={first.index}&wait=300ms")
    api.servers.apply(instance(1, "critical", output="x"))
    reply = await call
    assert reply.json == []
    assert reply.index > first.index


async def test_an_index_ahead_of_the_present_one_waits(api):
    api.servers.apply(SetKey("a", b"1"))
    started = time.monotonic()
    reply = await api.get("/v1/kv/a?index=99999&wait=100ms")
    assert reply.index < 99999
    assert time.monotonic() - started >= 0.1


async def test_a_missing_key_can_be_waited_for(api):
    first = await api.get("/v1/kv/later")
    assert first.status == 404
    call = await parked(api, f"/v1/kv/later?index={first.index}&wait=10s")
    api.servers.apply(SetKey("later", b"now"))
    assert (await call).status == 200


async def test_watchers_of_one_question_share_one_watch_and_one_encoding(api):
    api.servers.apply(instance(1))
    first = await api.get("/v1/health/service/web")
    calls = [asyncio.create_task(api.get(f"/v1/health/service/web?index={first.index}&wait=10s")) for _ in range(20)]
    async with asyncio.timeout(30):
        while sum(len(live._waiters) for live in api.agent.results._lives.values()) < 20:
            await asyncio.sleep(0.001)
    reads = api.servers.reads
    api.servers.apply(instance(2))
    replies = await asyncio.gather(*calls)
    assert {r.body for r in replies} == {replies[0].body}
    assert api.servers.watches_started == 1
    assert api.servers.reads == reads


async def test_a_change_before_the_watch_began_is_not_lost(api):
    api.servers.apply(SetKey("a", b"1"))
    first = await api.get("/v1/kv/a")
    api.servers.apply(SetKey("a", b"2"))
    api.servers.apply(SetKey("a", b"1"))
    reply = await api.get(f"/v1/kv/a?index={first.index}&wait=10s")
    assert reply.index > first.index


async def test_a_lost_session_ends_no_parked_query_and_the_next_answer_catches_up(api):
    api.servers.apply(SetKey("a", b"1"))
    first = await api.get("/v1/kv/a")
    call = await parked(api, f"/v1/kv/a?index={first.index}&wait=10s")
    api.servers.disconnect()
    api.servers.apply(SetKey("unrelated", b"1"))
    await asyncio.sleep(0.01)
    assert not call.done()
    api.servers.reconnect()
    api.servers.apply(SetKey("a", b"2"))
    assert (await call).json[0]["Value"] == "Mg=="


async def test_an_index_that_went_back_wakes_the_parked(api):
    api.servers.apply(SetKey("a", b"1"))
    for i in range(5):
        api.servers.apply(SetKey("a", b"%d" % i))
    first = await api.get("/v1/kv/a")
    call = await parked(api, f"/v1/kv/a?index={first.index}&wait=10s")
    api.servers.store = type(api.servers.store)()  # restored from an old snapshot
    api.servers.reconnect()
    reply = await call
    assert reply.index < first.index


async def test_the_index_is_never_zero(api):
    for path in ("/v1/kv/none", "/v1/catalog/services", "/v1/session/list", "/v1/connect/intentions", "/v1/kv/?keys"):
        assert (await api.get(path)).index >= 1


async def test_cached_is_a_miss_and_then_hits_that_ask_no_server(api):
    api.servers.apply(instance(1))
    first = await api.get("/v1/health/service/web?cached")
    assert first.headers["X-Cache"] == "MISS"
    assert "Age" not in first.headers
    async with asyncio.timeout(30):
        while (reply := await api.get("/v1/health/service/web?cached")).headers["X-Cache"] != "HIT":
            pass
    reads, barriers = api.servers.reads, api.servers.barriers
    reply = await api.get("/v1/health/service/web?cached")
    assert (reply.headers["X-Cache"], reply.headers["Age"], reply.json) == ("HIT", "0", first.json)
    assert (api.servers.reads, api.servers.barriers) == (reads, barriers)


async def test_cached_answers_without_servers_and_says_how_old_it_is(api):
    api.servers.apply(instance(1))
    await api.get("/v1/health/service/web?cached")
    async with asyncio.timeout(30):
        while (await api.get("/v1/health/service/web?cached")).headers["X-Cache"] != "HIT":
            pass
    api.servers.disconnect()
    live = next(iter(api.agent.results._lives.values()))
    live._fresh_at -= 70
    api.agent.results.connected_at -= 70
    reply = await api.get("/v1/health/service/web?cached")
    assert reply.status == 200
    assert int(reply.headers["Age"]) >= 1


async def test_cached_and_consistent_contradict_each_other(api):
    reply = await api.get("/v1/catalog/services?cached&consistent")
    assert (reply.status, reply.text) == (400, "Cannot specify ?cached with ?consistent, conflicting semantics.")


@pytest.mark.parametrize("path", ["/v1/catalog/nodes?cached", "/v1/kv/a?cached"])
async def test_cached_is_ignored_where_consul_does_not_know_it(api, path):
    assert "X-Cache" not in (await api.get(path)).headers


async def test_reads_see_every_write_that_was_acknowledged_before(api):
    for i in range(50):
        await api.put("/v1/kv/counter", b"%d" % i)
        assert (await api.get("/v1/kv/counter?raw")).body == b"%d" % i


@pytest.mark.parametrize(
    ("wait", "seconds"), [("", 20), ("?wait=30m", 1800), ("?wait=2h", 3600), ("?wait=0s", 20), ("?wait=5s", 5)]
)
def test_how_long_a_question_waits_is_bounded_by_the_settings_alone(wait, seconds):
    servers = StoreServers()
    config = Config(default_query_time_s=20.0, max_query_time_s=3600.0)
    agent = Agent(servers, Results(servers), config=config)
    assert how_long(Request("GET", f"/v1/kv/a{wait}", headers={}), agent) == seconds
