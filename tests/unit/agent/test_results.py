from __future__ import annotations

import asyncio
import gc

import pytest

from rostra.agent.results import Entry, Live, Rendering, Results, RowSet
from rostra.agent.servers_port import Delta, Key, ReadAnswer, Row
from rostra.runtime.steps import LoopSteps
from rostra.server.state.catalog import Register
from rostra.server.state.health import ServiceInstances
from rostra.server.state.kv import DeleteKey, GetKey, KeyNames, ListKeys, SetKey
from rostra.wire.errors import Denied, NoLeader
from tests.support.store_servers import StoreServers


@pytest.fixture
async def servers():
    return StoreServers()


@pytest.fixture
async def results(servers):
    results = Results(servers)
    yield results
    await results.close()


def joined(parts: list[bytes]) -> bytes:
    return b",".join(parts)


VALUES = Rendering("value", "value", lambda key, row: bytes(row[1]), joined)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_a_second_fetch_asks_for_a_barrier_but_reads_nothing(servers, results):
    servers.apply(SetKey("a", b"1"))
    first = await results.fetch(GetKey("a"))
    barriers = servers.barriers
    assert await results.fetch(GetKey("a")) is first
    assert (servers.reads, servers.barriers) == (1, barriers + 1)


async def test_a_touch_of_what_it_read_invalidates_an_entry_and_others_stay(servers, results):
    for key in ("a", "b"):
        servers.apply(SetKey(key, b"1"))
    a, b = await results.fetch(GetKey("a")), await results.fetch(GetKey("b"))
    servers.apply(SetKey("a", b"2"))
    again = await results.fetch(GetKey("a"))
    assert again.rows["a"][1] == b"2"
    assert await results.fetch(GetKey("b")) is b
    assert (a.valid, b.valid) == (False, True)


async def test_an_absent_key_and_a_prefix_are_cached_and_follow_changes(servers, results):
    assert (await results.fetch(GetKey("x/1"))).rows == {}
    assert (await results.fetch(KeyNames("x/"))).keys == []
    servers.apply(SetKey("x/1", b"1"))
    assert (await results.fetch(GetKey("x/1"))).keys == ["x/1"]
    assert (await results.fetch(KeyNames("x/"))).keys == ["x/1"]
    servers.apply(DeleteKey("x/1"))
    assert (await results.fetch(KeyNames("x/"))).keys == []


async def test_a_key_that_changes_often_is_cached_between_its_changes(servers, results):
    servers.apply(SetKey("a", b"1"))
    await results.fetch(GetKey("a"))
    servers.apply(SetKey("a", b"2"))
    servers.apply(SetKey("unrelated", b"1"))  # so that the touch is reported with a higher index than the row's
    await results.fetch(GetKey("a"))
    reads = servers.reads
    await results.fetch(GetKey("a"))
    assert servers.reads == reads


async def test_an_answer_that_was_touched_on_its_way_is_given_but_not_kept(servers, results):
    servers.apply(SetKey("a", b"1"))
    servers.read_gate = asyncio.Event()
    slow = asyncio.create_task(results.fetch(GetKey("a")))
    await until(lambda: servers.reads == 1)
    servers.apply(SetKey("a", b"2"))
    await results.servers.barrier("default")  # some other request's barrier reports the touch
    servers.read_gate.set()
    entry = await slow
    assert entry.rows["a"][1] == b"1"
    assert not entry.valid
    assert (await results.fetch(GetKey("a"))).rows["a"][1] == b"2"


async def test_identical_reads_at_once_are_one_read(servers, results):
    servers.apply(SetKey("a", b"1"))
    servers.read_gate = asyncio.Event()
    calls = [asyncio.create_task(results.fetch(GetKey("a"))) for _ in range(10)]
    await until(lambda: servers.reads >= 1 and servers.barriers == 10)
    await asyncio.sleep(0)
    servers.read_gate.set()
    assert len({id(await call) for call in calls}) == 1
    assert servers.reads == 1


async def test_a_request_after_a_write_does_not_join_a_read_from_before_it(servers, results):
    servers.apply(SetKey("a", b"1"))
    servers.read_gate = asyncio.Event()
    early = asyncio.create_task(results.fetch(GetKey("a")))
    await until(lambda: servers.reads == 1)
    servers.apply(SetKey("a", b"2"))
    late = asyncio.create_task(results.fetch(GetKey("a")))
    await until(lambda: servers.reads == 2)
    servers.read_gate.set()
    assert (await late).rows["a"][1] == b"2"
    assert (await early).rows["a"][1] == b"1"
    assert (await results.fetch(GetKey("a"))).rows["a"][1] == b"2"


async def test_a_caller_that_gives_up_does_not_take_the_read_from_the_others(servers, results):
    servers.apply(SetKey("a", b"1"))
    servers.read_gate = asyncio.Event()
    gives_up, stays = (asyncio.create_task(results.fetch(GetKey("a"))) for _ in range(2))
    await until(lambda: servers.reads == 1 and servers.barriers == 2)
    gives_up.cancel()
    await asyncio.sleep(0)
    servers.read_gate.set()
    assert (await stays).keys == ["a"]


async def test_tokens_do_not_share_answers(servers, results):
    servers.apply(SetKey("a", b"1"))
    one = await results.fetch(GetKey("a"), token="one")
    assert await results.fetch(GetKey("a"), token="two") is not one
    assert await results.fetch(GetKey("a"), token="one") is one


async def test_different_queries_with_equal_fields_do_not_share_answers(servers, results):
    servers.apply(SetKey("a", b"1"))
    assert len({id(await results.fetch(q("a"))) for q in (GetKey, ListKeys, KeyNames)}) == 3


async def test_a_new_session_forgets_everything(servers, results):
    servers.apply(SetKey("a", b"1"))
    entry = await results.fetch(GetKey("a"))
    servers.disconnect()
    with pytest.raises(NoLeader):
        await results.fetch(GetKey("a"))
    servers.reconnect()
    assert await results.fetch(GetKey("a")) is not entry
    assert not entry.valid


async def test_the_cache_is_bounded_by_bytes_and_drops_the_least_used(servers):
    results = Results(servers, bytes_max=20_000)
    for i in range(100):
        servers.apply(SetKey(f"k{i}", b"x" * 500))
    kept = await results.fetch(GetKey("k0"))
    for i in range(1, 100):
        await results.fetch(GetKey(f"k{i}"))
        await results.fetch(GetKey("k0"))
        assert results.bytes_used <= 20_000
    assert kept.valid
    assert results.bytes_used == sum(e.bytes_used for e in results._entries.values())
    await results.close()


async def test_rendering_counts_towards_the_bound(servers, results):
    servers.apply(SetKey("a", b"x" * 10_000))
    entry = await results.fetch(GetKey("a"))
    before = results.bytes_used
    await entry.render(VALUES)
    assert results.bytes_used >= before + 10_000


async def test_the_memory_of_touches_is_bounded_and_forgotten_ones_count_as_touched(servers, results, monkeypatch):
    monkeypatch.setattr("rostra.agent.results.TOUCHED_MAX", 10)
    servers.apply(SetKey("a", b"1"))
    servers.read_gate = asyncio.Event()
    slow = asyncio.create_task(results.fetch(GetKey("a")))
    await until(lambda: servers.reads == 1)
    for i in range(30):
        servers.apply(SetKey(f"other{i}", b"1"))
        await servers.barrier("default")
    servers.read_gate.set()
    assert not (await slow).valid  # it may have been touched: nobody remembers
    assert len(results._touched) <= 10


# -- rendering ---------------------------------------------------------------------------------------------------------


async def test_each_row_is_encoded_once_for_all_views_of_a_shape(servers, results):
    for i in range(5):
        servers.apply(SetKey(f"k{i}", b"%d" % i))
    encoded: list[str] = []

    def encode(key, row):
        encoded.append(key)
        return bytes(row[1])

    entry = await results.fetch(ListKeys("k"))
    everything = Rendering("v", "all", encode, joined)
    odd = Rendering("v", "odd", encode, joined, lambda key, row: int(row[1]) % 2 == 1)
    assert (await entry.render(everything))[0].body == b"0,1,2,3,4"
    assert (await entry.render(odd))[0].body == b"1,3"
    assert len(encoded) == 5


async def test_a_long_encoding_is_shared_and_lets_the_loop_turn(servers, results):
    for i in range(400):
        servers.apply(SetKey(f"k{i:03}", b"x"))
    entry = await results.fetch(ListKeys("k"))
    encoded, turns, done = list[str](), 0, False

    async def count() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    def encode(key, row) -> bytes:
        encoded.append(key)
        return b"x"

    view = Rendering("v", "v", encode, joined)
    counter = asyncio.create_task(count())
    bodies = await asyncio.gather(*(entry.render(view) for _ in range(5)))
    done = True
    await counter
    assert len(encoded) == 400
    assert len({id(rendered) for rendered, _ in bodies}) == 1
    assert turns >= 400 // 50 - 1


async def test_an_encoder_that_fails_fails_every_caller_and_the_next_call_tries_again():
    rows = RowSet()
    rows.rows = {str(i): (i,) for i in range(100)}
    rows.keys = sorted(rows.rows)
    broken = True

    def encode(key, row):
        if broken and key == "70":
            raise ValueError("no")
        return b"x"

    view = Rendering("v", "v", encode, joined)
    got = await asyncio.gather(*(rows.render(view) for _ in range(3)), return_exceptions=True)
    assert [type(g) for g in got] == [ValueError] * 3
    broken = False
    assert (await rows.render(view))[0].body == joined([b"x"] * 100)


# -- watches -----------------------------------------------------------------------------------------------------------


async def test_a_watch_follows_inserts_changes_and_deletions_in_key_order(servers, results):
    servers.apply(SetKey("k2", b"2"))
    live = results.live(ListKeys("k"))
    assert await live.ready(5)
    for command in (SetKey("k3", b"3"), SetKey("k1", b"1"), SetKey("k2", b"two"), DeleteKey("k3"), SetKey("k0", b"0")):
        version = live.version
        servers.apply(command)
        assert await live.wait_change(version, 5)
    assert live.keys == ["k0", "k1", "k2"]
    assert live.rows["k2"][1] == b"two"
    assert live.index == servers.store.index
    assert (await live.render(VALUES))[0].body == b"0,1,two"


async def test_a_watch_re_encodes_only_what_changed(servers, results):
    for i in range(200):
        servers.apply(SetKey(f"k{i:03}", b"x"))
    encoded = []

    def encode(key, row) -> bytes:
        encoded.append(key)
        return bytes(row[1])

    view = Rendering("v", "v", encode, joined)
    live = results.live(ListKeys("k"))
    await live.ready(5)
    await live.render(view)
    encoded.clear()
    version = live.version
    servers.apply(SetKey("k007", b"y"))
    await live.wait_change(version, 5)
    await live.render(view)
    assert encoded == ["k007"]


async def test_an_unchanged_view_stays_the_same_object(servers, results):
    servers.apply(SetKey("ka", b"1"))
    servers.apply(SetKey("kb", b"1"))
    live = results.live(ListKeys("k"))
    await live.ready(5)
    only_a = Rendering("v", "only-a", VALUES.encode, joined, lambda key, row: key == "ka")
    before, _ = await live.render(only_a)
    servers.apply(SetKey("kb", b"2"))
    assert await live.wait_change(live.version, 5)
    after, index = await live.render(only_a)
    assert after is before
    assert index == servers.store.index


async def test_many_changes_at_once_are_applied_like_few(servers, results):
    live = results.live(ListKeys("k"))
    await live.ready(5)
    rows: list[tuple[Key, Row]] = [(f"k{i:03}", (f"k{i:03}", b"x", 0, 0, "", 2, 2)) for i in range(300)]
    live._take(Delta(5, False, False, (), rows[:150], []))
    assert live.keys == []
    live._take(Delta(5, False, True, (), rows[150:], []))
    assert live.keys == [key for key, _ in rows]
    live._take(Delta(6, False, True, (), [], [key for key, _ in rows[::2]]))
    assert live.keys == [key for key, _ in rows[1::2]]


async def test_rows_are_kept_in_key_order_in_whatever_order_a_server_sends_them(results):
    def row(key: str) -> tuple[Key, Row]:
        return key, (key, b"x", 0, 0, "", 2, 2)

    assert Entry(ReadAnswer(5, (), [row("kb"), row("kc"), row("ka")])).keys == ["ka", "kb", "kc"]
    live = results.live(ListKeys("k"))
    await live.ready(5)
    live._take(Delta(5, True, True, (), [row("kb"), row("kd"), row("ka"), row("kc")], []))
    assert live.keys == ["ka", "kb", "kc", "kd"]
    live._take(Delta(6, False, True, (), [row("kd")], ["kd", "ka", "ka"]))  # gone, and back before we were told
    assert live.keys == sorted(live.rows) == ["kb", "kc", "kd"]
    live._take(Delta(7, False, True, (), [], ["kd"]))
    assert live.keys == sorted(live.rows) == ["kb", "kc"]


async def test_users_of_one_question_share_its_watch(servers, results):
    assert results.live(ListKeys("k")) is results.live(ListKeys("k"))
    assert results.live(ListKeys("k")) is not results.live(ListKeys("k"), token="t")


async def test_a_lost_session_keeps_the_rows_and_the_next_one_brings_only_differences(servers, results):
    servers.apply(SetKey("ka", b"1"))
    servers.apply(SetKey("kb", b"1"))
    live = results.live(ListKeys("k"))
    await live.ready(5)
    assert live.age_s == 0.0
    servers.disconnect()
    assert live.keys == ["ka", "kb"]
    assert live.age_s > 0.0
    version = live.version
    servers.reconnect()
    await until(lambda: not servers._watches[0].events.qsize())
    assert live.version == version
    servers.apply(SetKey("ka", b"2"))
    assert await live.wait_change(version, 5)
    assert live.age_s == 0.0


async def test_a_refused_watch_tells_those_who_wait():
    class Refusing(StoreServers):
        async def watch(self, query, *, token=""):
            raise Denied("no")
            yield

    results = Results(Refusing())
    with pytest.raises(Denied):
        await results.live(ListKeys("k")).ready(5)
    await results.close()


async def test_callbacks_are_called_after_each_change_until_removed(servers, results):
    live = results.live(ListKeys("k"))
    await live.ready(5)
    seen: list[int] = []

    def broken() -> None:
        raise ValueError("a callback's own fault")

    live.on_change(broken)
    remove = live.on_change(lambda: seen.append(live.version))
    servers.apply(SetKey("k1", b"1"))
    await until(lambda: seen)
    remove()
    servers.apply(SetKey("k2", b"1"))
    await live.wait_change(seen[0], 5)
    assert len(seen) == 1


async def test_an_idle_watch_ends_and_one_with_a_callback_stays(servers):
    results = Results(servers, idle_s=0.02)
    held, idle = results.live(ListKeys("a")), results.live(ListKeys("b"))
    held.on_change(lambda: None)
    await held.ready(5)
    await idle.ready(5)
    async with asyncio.timeout(30):
        while len(servers._watches) > 1:
            await asyncio.sleep(0.005)
    assert results.live(ListKeys("a")) is held
    assert results.live(ListKeys("b")) is not idle
    await results.close()
    assert servers._watches == []


async def test_wait_change_ends_without_a_change(servers, results):
    live = results.live(ListKeys("k"))
    await live.ready(5)
    assert await live.wait_change(live.version, 0.01) is False
    assert not live._waiters


async def test_three_hundred_watchers_of_a_thousand_instances_do_not_hold_the_loop(servers, results):
    for i in range(1000):
        checks = ({"id": f"c{i}", "status": "passing", "service_id": f"w{i}"},)
        service = {"id": f"w{i}", "name": "web", "port": 80, "tags": ("a", "b")}
        servers.apply(Register(f"n{i}", "10.0.0.1", service=service, checks=checks))
    live: Live = results.live(ServiceInstances("web"))
    await live.ready(10)
    view = Rendering("v", "v", lambda key, row: repr(row).encode(), joined)
    await live.render(view)
    woken = 0

    async def watcher() -> None:
        nonlocal woken
        version = live.version
        assert await live.wait_change(version, 20)
        await live.render(view)
        woken += 1

    watchers = [asyncio.create_task(watcher()) for _ in range(300)]
    await until(lambda: len(live._waiters) == 300)
    steps = LoopSteps()
    gc.collect()
    gc.disable()  # a collection of all that the tests made is not a step of ours
    steps.start()
    servers.apply(Register("n7", "10.0.0.1", checks=({"id": "c7", "status": "critical", "service_id": "w7"},)))
    await asyncio.gather(*watchers)
    await asyncio.sleep(0.02)
    steps.stop()
    gc.enable()
    assert woken == 300
    assert steps.longest_ms < 20.0  # the limit is 2; the margin is for other work on the machine that runs the tests
