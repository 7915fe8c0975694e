"""Shared watches: what subscribers put together is what a fresh evaluation says, and nothing outlives its use."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from typing import Any

import pytest

from rostra.acl.authorizer import EVERYTHING
from rostra.server.state.catalog import Deregister, Nodes, Register, ServiceNames
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_args
from rostra.server.state.health import Checks, ServiceInstances
from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, KeyNames, ListKeys, SetKey
from rostra.server.state.store import Store
from rostra.server.watches import LAG_CHUNKS, SLICE_ROWS, SLICE_SUBSCRIBERS, SharedWatch, Watches
from rostra.wire.codec import encode_value
from rostra.wire.frames import pack, unpack
from rostra.wire.rpc import CREDIT_CHUNKS, DONE, END, FULL, ServedStream
from rostra.wire.turns import TURN_S, Turns
from tests.support.authorizers import Nothing, Only


class Wire:
    """Where streams send to: what an agent would put together of it."""

    def __init__(self) -> None:
        self.connection = self
        self.reads = True
        self.chunks_untaken = 0
        self.streams: dict[int, ServedStream] = {}
        self.views: dict[int, dict[Any, Any]] = {}
        self.chunks: dict[int, int] = {}
        self.done: set[int] = set()
        self.failed: dict[int, str] = {}
        self.indexes: dict[int, int] = {}
        self.out_of_order: set[int] = set()
        self.told: dict[int, str] = {}

    def open(self) -> ServedStream:
        number = len(self.views) + 1
        stream = self.streams[number] = ServedStream(self, number)  # type: ignore[arg-type]
        self.views[number], self.chunks[number] = {}, 0
        return stream

    def take(self, number: int, chunks: int = 1) -> None:
        stream = self.streams[number]
        stream.credit = min(stream.credit + chunks, CREDIT_CHUNKS)
        stream._wake()

    def send(self, payload: bytes) -> None:
        number, kind, *rest = unpack(payload)
        if kind == "err":
            self.failed[number] = rest[0]
            return
        flags, index, _, rows, removed = rest
        self.told[number] = self.told.get(number, "") + repr((rows, removed))
        if index < self.indexes.get(number, 0):
            self.out_of_order.add(number)
        self.indexes[number] = index
        if self.reads and number in self.streams:
            self.take(number)
        view = self.views[number]
        self.chunks[number] += 1
        if flags & FULL:
            view.clear()
        view.update(rows)
        for key in removed:
            view.pop(key, None)
        if flags & (DONE | END):
            self.done.add(number)


class Server:
    """A store with watches, and commands that go into it as the log would hand them over."""

    def __init__(self) -> None:
        self.store = Store()
        self.tasks: set[asyncio.Task[None]] = set()
        self.watches = Watches(self.store, self.spawn)
        self.wire = Wire()
        self.sequence = 0
        self.do(Bootstrap("c1", (), "dc1", "", ""))

    def spawn(self, coro: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coro)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def do(self, command: Any) -> Any:
        kind, fields = encode_value(command)
        entry = encode_args(kind, fields, cluster_id="c1", client=("", 0, 0), at_ms=0, actor="", source="")
        (result,), touches, _ = self.store.apply_all((entry,))
        self.watches.applied(touches)
        return result

    def watch(self, query: Any, can: Any = EVERYTHING, *, once: bool = False) -> int:
        stream = self.wire.open()
        self.watches.subscribe(query, stream, can, once=once)
        return stream.id

    def cancel(self, number: int) -> None:
        self.wire.streams.pop(number)._cancel()

    def truth(self, query: Any, can: Any = EVERYTHING) -> dict[Any, Any]:
        rows = self.store.evaluate(query, can).rows()
        return dict(unpack(pack(rows)))

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            while any(watch._busy or watch._sending for watch in self.watches._by_query.values()):
                await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)


async def test_deltas_arrive_in_order_however_many_subscribe_and_leave_meanwhile() -> None:
    server = Server()
    chance = random.Random(7)
    server.do(SetKey("k", b"0"))
    numbers = [server.watch(GetKey("k")) for _ in range(SLICE_SUBSCRIBERS * 5)]
    await server.settled()
    for round_ in range(40):
        server.do(SetKey("k", b"1 %d" % round_))
        await asyncio.sleep(0)  # the first of them have it
        for number in chance.sample(numbers, 40):
            numbers.remove(number)
            server.cancel(number)
        numbers += [server.watch(GetKey("k")) for _ in range(chance.choice((40, 400)))]
        server.do(SetKey("k", b"2 %d" % round_))
        for _ in range(chance.randrange(30)):
            await asyncio.sleep(0)
    await server.settled()
    assert not server.wire.out_of_order
    truth = server.truth(GetKey("k"))
    assert [n for n in numbers if server.wire.views[n] != truth] == []


async def test_a_watch_that_is_given_up_before_its_first_answer_leaves_nothing_behind() -> None:
    server = Server()
    server.do(SetKey("k", b"0"))
    for turns in range(6):
        number = server.watch(GetKey("k"))
        for _ in range(turns):
            await asyncio.sleep(0)
        server.cancel(number)
        await server.settled()
        assert not server.watches._by_query
        assert not server.watches._by_granule


async def test_a_first_answer_is_complete_although_what_it_reads_changes_all_the_time() -> None:
    server = Server()
    for i in range(SLICE_ROWS * 3):
        server.do(SetKey(f"k/{i}", b"0"))
    stop, count = False, 0

    def change() -> None:
        nonlocal count
        if not stop:
            count += 1
            for i in range(3):
                server.do(SetKey(f"k/{i}", b"%d" % count))
            asyncio.get_running_loop().call_soon(change)

    change()
    number = server.watch(ListKeys("k/"), once=True)
    try:
        for _ in range(2000):
            await asyncio.sleep(0)
            if number in server.wire.done:
                break
        assert number in server.wire.done
        assert len(server.wire.views[number]) == SLICE_ROWS * 3
    finally:
        stop = True
    await server.settled()


async def test_an_answer_is_of_one_moment_also_while_the_loop_is_busy() -> None:
    server = Server()
    loop = asyncio.get_running_loop()
    busy = server.watches.turns = Turns(loop.call_soon, turn_s=0, rest_s=60, slice_s=0)
    for i in range(SLICE_ROWS * 3):
        server.do(SetKey(f"k/{i}", b"0"))
    server.watch(ListKeys("k/"))
    await server.settled()
    numbers = []
    for begin_late in (False, True):
        loop.call_soon(busy.begin)  # so that nobody else begins in that turn
        numbers.append(server.watch(ListKeys("k/"), once=True))
        if begin_late:
            await asyncio.sleep(0)
        server.do(DeleteTree("k/"))
        await server.settled()
        for i in range(SLICE_ROWS * 3):
            server.do(SetKey(f"k/{i}", b"0"))
        await server.settled()
    assert {len(server.wire.views[number]) for number in numbers} <= {0, SLICE_ROWS * 3}


async def test_an_index_is_told_with_all_rows_that_it_stands_for() -> None:
    server, chance = Server(), random.Random(11)
    changed_at: dict[str, list[int]] = {}
    stale: list[tuple[str, int, int]] = []
    checked = 0

    class Checking(Wire):
        def send(self, payload: bytes) -> None:
            nonlocal checked
            super().send(payload)
            _, _, flags, index, _, _, _ = unpack(payload)
            if flags & DONE:
                checked += 1
                for key, row in self.views[number].items():
                    if row[-1] < max((at for at in changed_at[key] if at <= index), default=0):
                        stale.append((key, row[-1], index))

    def change(key: str) -> None:
        server.do(SetKey(key, b"%d" % chance.getrandbits(32)))
        changed_at.setdefault(key, []).append(server.store.index)

    server.wire = Checking()
    keys = [f"k/{i}" for i in range(SLICE_ROWS * 3)]
    for key in keys:
        change(key)
    number = server.watch(ListKeys("k/"))
    await server.settled()
    server.wire.reads = False
    for _ in range(5):
        for _ in range(CREDIT_CHUNKS + LAG_CHUNKS):  # until it gets no more
            change(keys[0])
            await server.settled()
        for key in keys:
            change(key)
        for _ in range(400):
            change(chance.choice(keys))
            server.wire.take(number)
            await asyncio.sleep(0)
    assert checked > 10
    assert stale == []


@pytest.mark.parametrize("rows", [1, SLICE_ROWS * 20])
async def test_a_subscriber_that_takes_nothing_fills_no_memory_and_misses_nothing(rows: int) -> None:
    server = Server()
    for i in range(rows):
        server.do(SetKey(f"k/{i}", b"0"))
    number = server.watch(ListKeys("k/"))
    await server.settled()
    server.wire.reads = False
    for i in range(1000):
        server.do(SetKey(f"k/{i % 7}", b"%d" % i + b"x" * 400))
        server.do(DeleteKey(f"k/{i % 11}"))
        await asyncio.sleep(0)
    await server.settled()
    assert server.wire.chunks[number] <= CREDIT_CHUNKS + LAG_CHUNKS + rows // SLICE_ROWS + 2
    assert server.wire.streams[number].credit >= -LAG_CHUNKS - 2
    server.wire.reads = True
    server.wire.take(number, LAG_CHUNKS + CREDIT_CHUNKS)
    await server.settled()
    server.do(SetKey("k/0", b"last"))
    await server.settled()
    assert server.wire.views[number] == server.truth(ListKeys("k/"))


async def test_a_subscriber_that_missed_very_much_has_to_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rostra.server.watches.MISSED_MAX", 50)
    server = Server()
    server.wire.reads = False
    for i in range(SLICE_ROWS * 20):
        server.do(SetKey(f"k/{i}", b"0"))
    number = server.watch(ListKeys("k/"))
    await server.settled()
    for i in range(60):
        server.do(SetKey(f"k/{i}", b"1"))
    await server.settled()
    assert server.wire.failed[number] == "timeout"
    assert not server.watches._by_query


async def test_watches_of_every_kind_stay_equal_to_a_fresh_evaluation() -> None:
    server = Server()
    chance = random.Random(3)
    queries = [GetKey("a/1"), ListKeys("a/"), KeyNames(""), ServiceInstances("web"), ServiceInstances("Web")]
    numbers = {server.watch(query): query for query in queries}
    for _ in range(600):
        key = chance.choice(["a/1", "a/2", "a/b/3", "b"])
        node = f"n{chance.randrange(4)}"
        status = chance.choice(["passing", "critical"])
        server.do(
            chance.choice(
                [
                    SetKey(key, b"%d" % chance.randrange(3)),
                    DeleteKey(key),
                    DeleteTree(chance.choice(["a/", "a/b"])),
                    Register(node=node, address=f"10.0.0.{chance.randrange(9)}", service={"id": "w", "name": "web"}),
                    Register(node=node, address="10.0.0.1", checks=({"id": "c", "name": "c", "status": status},)),
                ]
            )
        )
        if chance.random() < 0.2:
            await asyncio.sleep(0)
    await server.settled()
    for number, query in numbers.items():
        assert server.wire.views[number] == server.truth(query), query


async def test_each_watcher_is_told_of_what_it_may_see_and_of_nothing_else() -> None:
    server = Server()
    chance = random.Random(5)
    queries = [KeyNames(""), ListKeys(""), Nodes(), ServiceNames(), Checks(), ServiceInstances("a-web")]
    rights = [EVERYTHING, Only("a"), Only("b"), Nothing()]
    asked = {server.watch(query, can): (query, can) for query in queries for can in rights}
    secret = "b-secret"
    for _ in range(400):
        service, node = chance.choice(["a-web", "b-web"]), chance.choice(["a1", "a2", "b1"])
        check = {"id": "c", "name": "c", "status": chance.choice(["passing", "critical"]), "service_id": "w"}
        server.do(
            chance.choice(
                [
                    SetKey(chance.choice(["a/1", "a/2", secret]), b"%d" % chance.randrange(3)),
                    DeleteKey(chance.choice(["a/1", secret])),
                    # An instance that becomes another service is seen by others afterwards, and no more by some.
                    Register(node=node, address="10.0.0.1", service={"id": "w", "name": service}, checks=(check,)),
                    Deregister(node),
                ]
            )
        )
        if chance.random() < 0.3:
            await asyncio.sleep(0)
        if chance.random() < 0.05:
            query, can = chance.choice(queries), chance.choice(rights)
            asked[server.watch(query, can, once=chance.random() < 0.3)] = query, can
    await server.settled()
    for number, (query, can) in asked.items():
        if number in server.wire.streams and not server.wire.streams[number].cancelled:
            assert server.wire.views[number] == server.truth(query, can), (query, can)
        if can == Only("a"):
            assert secret not in server.wire.told[number]
        if can == Nothing():
            assert server.wire.views[number] == {}
            assert server.wire.chunks[number] == 1  # and when others see something happen, it sees nothing happen


async def test_those_who_may_see_the_same_share_what_is_packed() -> None:
    server = Server()
    for can in (Only("a"), Only("a"), Only("b"), EVERYTHING):
        for _ in range(10):
            server.watch(KeyNames(""), can)
    await server.settled()
    packed = list[int]()
    (watch,) = server.watches._by_query.values()
    delta = watch._delta
    watch._delta = lambda *args, **how: (packed.append(1), delta(*args, **how))[1]  # type: ignore[method-assign,func-returns-value,assignment]
    server.do(SetKey("a", b"1"))
    await server.settled()
    assert len(packed) == 3


async def test_a_change_that_concerns_a_thousand_watches_is_told_over_many_turns() -> None:
    server = Server()
    numbers = [server.watch(KeyNames("k" * i)) for i in range(400)]
    async with asyncio.timeout(30):
        while server.wire.done != set(numbers):
            await asyncio.sleep(0)
    had = sum(server.wire.chunks.values())
    server.do(SetKey("k" * 400, b"1"))
    turns, most, before = 0, 0, had
    while sum(server.wire.chunks.values()) < had + len(numbers):
        await asyncio.sleep(0)
        now = sum(server.wire.chunks.values())
        most, before, turns = max(most, now - before), now, turns + 1
        assert turns < 100_000
    assert most < len(numbers) / 2
    assert [i for i, n in enumerate(numbers) if server.wire.views[n] != server.truth(KeyNames("k" * i))] == []


async def test_what_is_evaluated_for_nobody_any_more_is_not_evaluated_to_its_end() -> None:
    server = Server()
    for i in range(SLICE_ROWS * 30):
        server.do(SetKey(f"k/{i}", b""))
    steps = 0
    evaluate = server.store.evaluate

    class Counted:
        def __init__(self, query: Any) -> None:
            self._inner = evaluate(query)
            self.granules, self.index = self._inner.granules, self._inner.index

        def step(self, rows: int) -> Any:
            nonlocal steps
            steps += 1
            time.sleep(TURN_S)  # what a turn has room for
            return self._inner.step(rows)

    server.store.evaluate = Counted  # type: ignore[method-assign, assignment]
    number = server.watch(ListKeys("k/"))
    while steps < 2:
        await asyncio.sleep(0)
    server.cancel(number)
    await server.settled()
    assert not server.tasks
    assert steps < 15


@pytest.mark.parametrize("once", [False, True])
async def test_a_stream_that_is_over_is_freed_without_the_cyclic_collector(once: bool) -> None:
    server = Server()
    for i in range(SLICE_ROWS * 2):
        server.do(SetKey(f"k/{i}", b""))

    def alive() -> int:
        return sum(type(each) in (ServedStream, SharedWatch) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        for i in range(6):
            number = server.watch(ListKeys("k/"), once=once)
            if i % 2:  # the others are given up before their first answer
                await server.settled()
            if number in server.wire.streams:
                server.cancel(number)
            async with asyncio.timeout(10):
                while server.tasks:
                    await asyncio.sleep(0)
        assert alive() == before
    finally:
        gc.enable()
