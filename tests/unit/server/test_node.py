"""One server between its callers and the log: outcomes told apart, snapshots put in place of the state, clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rostra.acl.authorizer import EVERYTHING
from rostra.server.node import ServerNode
from rostra.server.raft.log import Outcome
from rostra.server.state.catalog import Register
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_entry
from rostra.server.state.kv import NEVER, DeleteKey, GetKey, ListKeys, SetKey
from rostra.server.state.session import CreateSession, DestroySession
from rostra.wire.caller import ANONYMOUS, Caller
from rostra.wire.codec import encode_value
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Conflict, Denied, NoLeader, RostraError, Timeout, TooLarge
from rostra.wire.frames import pack, unpack
from rostra.wire.rpc import DONE, END, FULL, RpcClient, ServedStream
from tests.support.authorizers import Only

CLUSTER = "c1"
ORIGIN = ("client", 7, 7)
#: Applied a second time, it would answer False.
ONCE = SetKey("k", b"1", cas=0)

#: What the log does with a proposal: apply it and tell, fail as given, or apply it and fail.
Step = Callable[["Log", Outcome, bytes], None]


def applies(log: Log, outcome: Outcome, entry: bytes) -> None:
    (result,) = log.node.apply([entry])
    outcome.set_result(result)


def fails(error: RostraError) -> Step:
    return lambda log, outcome, entry: outcome.set_exception(error)


def applies_and_fails(error: RostraError) -> Step:
    def step(log: Log, outcome: Outcome, entry: bytes) -> None:
        log.node.apply([entry])
        outcome.set_exception(error)

    return step


class Log:
    """The log of a server, as far as `ServerNode` asks for it. `steps` are taken in turn, the last one for ever."""

    def __init__(self, node: ServerNode, *steps: Step) -> None:
        self.node, self.steps = node, list(steps) or [applies]
        self.is_leader = True
        self.leader_id: str | None = "me"
        self.proposed: list[bytes] = []

    def propose_for(self, outcome: Outcome, entry: bytes) -> None:
        self.proposed.append(entry)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        step(self, outcome, entry)


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def server(*steps: Step, clock: Callable[[], float] | None = None, **options: Any) -> ServerNode:
    node = ServerNode(
        node_id="me",
        name="s1",
        datacenter="dc1",
        spawn=asyncio.ensure_future,
        clock=clock or asyncio.get_running_loop().time,
        wall=lambda: 1_700_000_000.5,
        client_id="server-1",
        **options,
    )
    node.cluster_id = CLUSTER
    node.raft = Log(node, *steps)  # type: ignore[assignment]
    node.apply([encode_entry(Bootstrap(CLUSTER, (), "dc1", "", ""), cluster_id=CLUSTER)])
    return node


def log_of(node: ServerNode) -> Log:
    return node.raft  # type: ignore[return-value]


async def write(node: ServerNode, command: Any = ONCE, *, hold_s: float = 0.25, **how: Any) -> Any:
    kind, args = encode_value(command)
    return await node.write(ORIGIN, kind, args, hold_s=hold_s, **how)


def value_of(node: ServerNode, key: str) -> bytes | None:
    row = node.store.tables.kv.get(key)
    return row.value if row is not None else None


# -- what becomes of a write ------------------------------------------------------------------------------------------


async def test_a_write_that_was_applied_is_done() -> None:
    node = server()
    assert await write(node) is True
    assert value_of(node, "k") == b"1"


async def test_a_write_that_the_state_refuses_is_refused() -> None:
    with pytest.raises(BadRequest, match="Missing key name"):
        await write(server(), SetKey("", b""))


@pytest.mark.parametrize("has_log", [True, False])
async def test_a_write_that_no_leader_took_is_certainly_not_done(has_log: bool) -> None:
    node = server(fails(NoLeader()))
    if not has_log:
        node.raft = None
    with pytest.raises(NoLeader):
        await write(node)
    assert value_of(node, "k") is None


async def test_the_reason_for_which_a_leader_takes_no_writes_is_told() -> None:
    with pytest.raises(NoLeader, match="waiting for the disk"):
        await write(server(fails(NoLeader("too many writes are waiting for the disk"))), hold_s=0)


async def test_a_write_that_was_unknown_once_and_then_not_done_is_unknown() -> None:
    node = server(fails(Timeout("lost")), fails(NoLeader()))
    with pytest.raises(Timeout, match="may or may not have been done"):
        await write(node)
    assert len(log_of(node).proposed) > 1


@pytest.mark.parametrize("first", [fails(Timeout("lost")), applies_and_fails(Timeout("lost"))])
async def test_an_unknown_write_is_tried_again_under_its_number_and_done_once(first: Step) -> None:
    node = server(first, applies)
    assert await write(node) is True  # a second application would answer False: the key is there then
    assert len(log_of(node).proposed) == 2


async def test_a_refusal_by_the_state_is_the_answer_whatever_was_unknown_before() -> None:
    node = server(applies_and_fails(Timeout("lost")), applies)
    with pytest.raises(BadRequest, match="Missing key name"):
        await write(node, SetKey("", b""))


async def test_a_refusal_at_the_door_does_not_make_an_unknown_write_a_refused_one() -> None:
    with pytest.raises(TooLarge):
        await write(server(fails(TooLarge("a log entry of 3 MB"))))
    with pytest.raises(Timeout, match="may or may not have been done"):
        await write(server(fails(Timeout("lost")), fails(TooLarge("a log entry of 3 MB"))))


async def test_a_write_of_the_server_itself_has_a_number_of_its_own() -> None:
    node = server(fails(Timeout("lost")), applies)
    assert await node.own_write(SetKey("k", b"1", cas=0), hold_s=1) is True
    assert await node.own_write(SetKey("k", b"2", cas=0), hold_s=1) is False
    assert list(node.store.clients.rows) == ["server-1"]


# -- through a follower -----------------------------------------------------------------------------------------------


class Leader:
    """Another server at the end of a connection: it answers proposals as it is told, or not at all."""

    def __init__(self, *answers: tuple[Any, ...] | None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []
        self._connection = FrameConnection()
        self._connection.connection_made(self)  # type: ignore[arg-type]
        self.client = RpcClient(self._connection)
        self._connection.on_frame, self._connection.on_lost = self.client.on_frame, self.client.on_lost

    # what the connection writes to

    def write(self, data: bytes) -> None:
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            self.asked.append(unpack(data[4:end]))
            data = data[end:]
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer is not None:
                payload = pack((self.asked[-1][0], *answer))
                asyncio.get_running_loop().call_soon(self._connection.data_received, _frame(payload))

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass

    def lose(self) -> None:
        self._connection.connection_lost(None)


def _frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def follower(leader: Leader) -> ServerNode:
    node = server()
    log_of(node).is_leader, log_of(node).leader_id = False, "other"
    node.peer = {"other": leader.client}.get
    return node


async def asked(leader: Leader) -> None:
    async with asyncio.timeout(30):
        while not leader.asked:
            await asyncio.sleep(0)


async def test_the_leaders_result_is_passed_on() -> None:
    assert await write(follower(Leader(("ok", ("ok", False))))) is False
    with pytest.raises(Conflict, match="another one"):
        await write(follower(Leader(("ok", ("err", "conflict", "another one")))))


async def test_what_the_leader_certainly_did_not_do_is_not_done() -> None:
    leader = Leader(("err", "no_leader", "No cluster leader"))
    with pytest.raises(NoLeader):
        await write(follower(leader))
    assert len({request[2] for request in leader.asked}) == 1


async def test_what_the_leader_does_not_know_is_unknown() -> None:
    with pytest.raises(Timeout, match="may or may not have been done"):
        await write(follower(Leader(("err", "timeout", "lost"), ("err", "no_leader", "No cluster leader"))))


async def test_a_write_is_unknown_when_the_connection_to_the_leader_was_lost_after_it_was_sent() -> None:
    leader = Leader(None)
    node = follower(leader)
    waiting = asyncio.ensure_future(write(node))
    await asked(leader)
    leader.lose()
    with pytest.raises(Timeout, match="may or may not have been done"):
        await waiting


async def test_a_write_is_not_done_when_the_connection_to_the_leader_was_lost_before() -> None:
    leader = Leader(None)
    node = follower(leader)
    leader.lose()
    node.peer = lambda _: _Opened(leader.client)  # it looks open and is not: the loss comes between look and call
    with pytest.raises(NoLeader):
        await write(node)
    assert leader.asked == []


class _Opened:
    open = True

    def __init__(self, client: RpcClient) -> None:
        self.call, self.level = client.call, client.level


async def test_a_write_is_unknown_when_another_leads_before_the_one_that_was_asked_has_answered() -> None:
    leader = Leader(None)
    node = follower(leader)
    waiting = asyncio.ensure_future(write(node))
    await asked(leader)
    log_of(node).leader_id = None
    node.role_changed(False, None, 2)
    with pytest.raises(Timeout, match="may or may not have been done"):
        await waiting


async def test_a_write_is_unknown_when_the_leader_does_not_answer_in_time() -> None:
    with pytest.raises(Timeout, match="may or may not have been done"):
        await write(follower(Leader(None)))


async def test_a_write_that_was_forwarded_goes_on_here_when_this_server_leads_next() -> None:
    leader = Leader(None)
    node = follower(leader)
    waiting = asyncio.ensure_future(write(node, hold_s=5))
    await asked(leader)
    log_of(node).is_leader, log_of(node).leader_id = True, "me"
    node.role_changed(True, "me", 2)
    assert await waiting is True


# -- what the leader decides before the log ---------------------------------------------------------------------------


async def _locked_and_lost(clock: Time) -> ServerNode:
    """A lock whose session has just ended, so that nobody may take it for a while."""
    node = server(clock=clock)
    for at, command in enumerate(
        (
            Register("n1", "10.0.0.1"),
            CreateSession("gone", "n1", lock_delay_ms=15_000, node_checks=()),
            SetKey("lock", b"", acquire="gone"),
            DestroySession("gone"),
            CreateSession("next", "n1", node_checks=()),
        )
    ):
        kind, args = encode_value(command)
        await node.write(("setup", at, 0), kind, args)
    return node


async def test_a_lock_that_was_lost_cannot_be_taken_for_its_delay() -> None:
    clock = Time()
    node = await _locked_and_lost(clock)
    assert await write(node, SetKey("lock", b"mine", acquire="next")) is False
    assert value_of(node, "lock") == b""
    clock.now += 15.1
    kind, args = encode_value(SetKey("lock", b"mine", acquire="next"))
    assert await node.write(("client", 8, 8), kind, args) is True


async def test_an_attempt_that_comes_late_cannot_undo_the_refusal_for_the_lock_delay() -> None:
    clock = Time()
    node = await _locked_and_lost(clock)
    acquire = SetKey("lock", b"mine", acquire="next")
    assert await write(node, acquire) is False
    clock.now += 15.1
    assert await write(node, acquire) is False, "the same write, once more: its answer holds"
    assert value_of(node, "lock") == b""


async def test_a_leader_that_has_not_been_founded_takes_nothing_but_the_founding() -> None:
    node = ServerNode(node_id="me", name="s1", datacenter="dc1", spawn=asyncio.ensure_future)
    node.cluster_id = CLUSTER
    node.raft = Log(node)  # type: ignore[assignment]
    with pytest.raises(NoLeader):
        await write(node)
    await node.own_write(Bootstrap(CLUSTER, (), "dc1", "", ""))
    assert await write(node) is True


async def test_a_command_that_may_not_be_is_refused_before_the_log() -> None:
    node = server(authorize=lambda caller: Only("b") if caller.token == "secret" else EVERYTHING)
    with pytest.raises(Denied, match=r"^Permission denied: kv\.set$"):
        await write(node, SetKey("a", b"1"), caller=Caller("secret"))
    assert log_of(node).proposed == []
    assert await write(node, SetKey("a", b"1"), caller=ANONYMOUS) is True
    assert await node.own_write(SetKey("a", b"2")) is True


async def test_who_may_destroy_a_session_is_decided_by_the_node_on_which_it_lives() -> None:
    node = server(authorize=lambda caller: Only("b"))
    for name in ("a1", "b1"):
        await node.own_write(Register(name, "127.0.0.1"))
        await node.own_write(CreateSession(f"of-{name}", name, node_checks=()))
    with pytest.raises(Denied):
        await write(node, DestroySession("of-a1"), caller=ANONYMOUS)
    assert await write(node, DestroySession("of-b1"), caller=ANONYMOUS) is True
    assert list(node.store.tables.sessions.rows) == ["of-a1"]


async def test_the_caller_of_a_forwarded_write_is_named_to_servers_that_know_callers() -> None:
    leader = Leader(("ok", ("ok", True)))
    node = follower(leader)
    await write(node, caller=Caller("secret", "00-1-2-01"))
    await node.own_write(ONCE)
    leader.client.level = 1
    await write(node, caller=Caller("secret"))
    told = [request[7:] for request in leader.asked]
    assert told == [({"token": "secret", "trace": "00-1-2-01"},), (None,), ()]


def test_no_row_can_have_the_version_that_means_never() -> None:
    assert pack(NEVER)
    assert NEVER > 1 << 62


# -- snapshots --------------------------------------------------------------------------------------------------------


class Watcher:
    """A stream to an agent; what the agent would put together of it."""

    def __init__(self) -> None:
        self.connection = self
        self.chunks_untaken = 0
        self.streams: dict[int, ServedStream] = {}
        self.view: dict[Any, Any] = {}
        self.chunks: list[tuple[int, int]] = []  # flags and index
        self.stream = ServedStream(self, 1)  # type: ignore[arg-type]

    def send(self, payload: bytes) -> None:
        _, _, flags, index, _, rows, removed = unpack(payload)
        self.stream.credit = 8
        self.chunks.append((flags, index))
        if flags & FULL:
            self.view.clear()
        self.view.update(rows)
        for key in removed:
            self.view.pop(key, None)

    async def has(self, chunks: int) -> None:
        async with asyncio.timeout(30):
            while len(self.chunks) < chunks or not self.chunks[-1][0] & (DONE | END):
                await asyncio.sleep(0)


def install(source: ServerNode, target: ServerNode) -> None:
    loader = target.loader()
    for chunk in source.capture():
        if chunk is not None:
            loader.feed(chunk)
    loader.finish()()


async def test_an_installed_snapshot_wakes_watches_with_what_differs_and_under_the_index_of_all_servers() -> None:
    ahead, behind = server(), server()
    for command in (SetKey("k/a", b"1"), SetKey("k/b", b"1"), SetKey("k/c", b"1")):
        for node in (ahead, behind):
            node.apply([encode_entry(command, cluster_id=CLUSTER)])
    changed, same, fresh = Watcher(), Watcher(), Watcher()
    behind.watches.subscribe(ListKeys("k/"), changed.stream, EVERYTHING)
    behind.watches.subscribe(GetKey("k/c"), same.stream, EVERYTHING)
    await changed.has(1)
    await same.has(1)
    later: tuple[Any, ...] = (SetKey("k/a", b"2"), DeleteKey("k/b"), SetKey("k/d", b"4"), SetKey("other", b""))
    for each in later:
        ahead.apply([encode_entry(each, cluster_id=CLUSTER)])
    install(ahead, behind)
    await changed.has(2)
    truth = ahead.store.evaluate(ListKeys("k/"))
    assert {key: row[1] for key, row in changed.view.items()} == {"k/a": b"2", "k/c": b"1", "k/d": b"4"}
    assert changed.chunks[-1] == (DONE, truth.index)
    assert len(same.chunks) == 1, "nothing of it has changed"
    behind.watches.subscribe(ListKeys("k/"), fresh.stream, EVERYTHING)
    await fresh.has(1)
    assert (fresh.chunks[-1][1], fresh.view) == (truth.index, changed.view)
    behind.apply([encode_entry(SetKey("k/c", b"5"), cluster_id=CLUSTER)])
    ahead.apply([encode_entry(SetKey("k/c", b"5"), cluster_id=CLUSTER)])
    await same.has(2)
    assert same.chunks[-1] == (DONE, ahead.store.evaluate(GetKey("k/c")).index)


async def test_a_watch_that_is_being_filled_when_a_snapshot_is_installed_ends_with_the_new_state() -> None:
    ahead, behind = server(), server()
    for i in range(500):
        behind.apply([encode_entry(SetKey(f"k/{i:03}", b"old"), cluster_id=CLUSTER)])
    for i in range(700):
        ahead.apply([encode_entry(SetKey(f"k/{i * 2:03}", b"new"), cluster_id=CLUSTER)])
    watcher = Watcher()
    behind.watches.subscribe(ListKeys("k/"), watcher.stream, EVERYTHING)
    for _ in range(2):
        await asyncio.sleep(0)
    install(ahead, behind)
    async with asyncio.timeout(30):
        while {row[1] for row in watcher.view.values()} != {b"new"} or len(watcher.view) != 700:
            await asyncio.sleep(0)


async def test_after_a_snapshot_clocks_of_sessions_start_again_and_lock_delays_are_over() -> None:
    clock = Time()
    ahead, behind = await _locked_and_lost(clock), server(clock=clock)
    behind.lock_delays["lock"] = clock.now + 15
    behind.session_seen["nobody"] = 1.0
    store, barrier = behind.store, behind.store.touched_since(behind.store.index)
    clock.now += 3
    install(ahead, behind)
    assert behind.session_seen == {"next": clock.now}
    assert behind.lock_delays == {}
    assert behind.store is store
    assert (store.hash(), store.cluster_id) == (ahead.store.hash(), CLUSTER)
    assert barrier == frozenset()
    assert store.touched_since(store.index - 1) is None
    assert store.touched_since(store.index) == frozenset()


async def test_a_write_that_was_done_before_the_snapshot_is_not_done_again_after_it() -> None:
    ahead, behind = server(), server()
    assert await write(ahead) is True
    install(ahead, behind)
    assert await write(behind) is True  # as the first time; applied again, compare-and-set would answer False
    assert log_of(behind).proposed


async def test_entries_show_the_time_that_the_server_is_given() -> None:
    node = server()
    await write(node)
    (entry,) = log_of(node).proposed
    assert unpack(entry)[3] == 1_700_000_000_500


# -- waiting for an index ---------------------------------------------------------------------------------------------


async def test_who_waits_for_an_index_costs_nothing_until_it_is_there() -> None:
    node = server()
    index = node.store.index
    waiting = [asyncio.ensure_future(node.at_least(index + ahead)) for ahead in (1, 2, 2, 1_000_000)]
    await asyncio.sleep(0)
    apply_one(node, SetKey("a", b"1"))
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [w.done() for w in waiting] == [True, False, False, False]
    apply_one(node, SetKey("a", b"2"))
    await asyncio.wait(waiting[:3])
    waiting[3].cancel()
    await asyncio.wait(waiting)
    assert not node._ahead
    with pytest.raises(Timeout, match="this server is at index"):
        await node.at_least(index + 100, timeout_s=0.01)
    assert not node._ahead


def apply_one(node: ServerNode, command: Any) -> None:
    node.apply([encode_entry(command, cluster_id=CLUSTER)])
