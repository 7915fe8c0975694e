"""An agent's session: what keeps it, what ends it, and where it goes next."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import time
from pathlib import Path
from typing import Any

import pytest

from rostra.agent import servers
from rostra.agent.results import Results
from rostra.agent.servers import ServerAddress
from rostra.runtime import log
from rostra.server.peers import dial
from rostra.server.raft.log import RaftLog
from rostra.server.run import Core
from rostra.server.state.kv import GetKey, KeyNames, SetKey
from rostra.wire.errors import Denied, NoLeader, RostraError, TooLarge
from rostra.wire.frames import RPC_FRAME_BYTES_MAX
from rostra.wire.rpc import hello
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster


def isolate(core: Core) -> None:
    """Cut `core` off from the other servers, and from nobody else."""

    async def refuse(*_: Any) -> Any:
        raise ConnectionRefusedError

    assert core._raft is not None
    core._raft._links._dial = refuse
    core._endpoint._accept_raft = lambda _, connection: connection.abort("isolated")
    for link in core._raft._links.links.values():
        if link.connection is not None:
            link.connection.abort("isolated")


async def test_a_write_as_large_as_a_request_may_be_is_passed_on_by_a_follower(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        follower = cluster.followers()[0]
        session = cluster.session(follower)
        await session.barrier("default")
        value = b"x" * (RPC_FRAME_BYTES_MAX - 95)
        async with asyncio.timeout(30):
            assert await session.write(SetKey("k", value)) is True
        barrier = await session.barrier("default")
        answer = await session.read(GetKey("k"), min_index=barrier.index)
        assert len(answer.rows[0][1][1]) == len(value)
        assert session.reconnects == 1


async def test_a_write_that_no_request_can_hold_is_refused_without_losing_the_session(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        session = cluster.session(cluster.cores["s1"])
        await session.barrier("default")
        async with asyncio.timeout(30):
            with pytest.raises(TooLarge):
                await session.write(SetKey("k", b"x" * RPC_FRAME_BYTES_MAX))
        assert await session.write(SetKey("k", b"x")) is True
        assert session.reconnects == 1


async def test_an_agent_leaves_a_server_that_is_cut_off_from_the_others(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        core = cluster.cores[session.server_hello["name"]]
        isolate(core)
        await eventually(lambda: core.node.leader_id is None or not core.node.is_leader)
        async with asyncio.timeout(30):
            while session.server_hello["name"] == core.settings.node_name:
                await asyncio.sleep(0.05)
            while True:
                try:
                    assert await session.write(SetKey("k", b"x")) is True
                    break
                except RostraError:
                    continue


async def test_an_agent_stays_where_it_is_while_no_server_has_a_leader(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        for core in cluster.cores.values():
            isolate(core)
        await eventually(lambda: all(core.node.leader_id is None for core in cluster.cores.values()))
        before = session.reconnects
        await asyncio.sleep(8)
        assert session.reconnects - before <= 2


async def test_a_server_that_still_reads_its_log_answers_nothing_from_an_empty_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        await cluster.session(cluster.cores["s1"]).write(SetKey("k", b"1"))
        await cluster.stop("s1")
        start, opened = RaftLog.start, asyncio.Event()

        async def start_later(log: RaftLog) -> None:
            await opened.wait()
            await start(log)

        monkeypatch.setattr(RaftLog, "start", start_later)
        session = cluster.session(await cluster.start("s1"))
        await eventually(lambda: session.connected)
        with pytest.raises(NoLeader):
            await session.read(GetKey("k"))
        live = Results(session).live(GetKey("k"))
        assert not await live.ready(0.5)
        opened.set()
        assert await live.ready(5.0)
        assert live.rows["k"][1] == b"1"


async def test_an_address_that_is_none_does_not_end_the_search_for_servers(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        session = cluster.session(cluster.cores["s1"], "a1")
        good = session._addresses

        async def addresses() -> list[ServerAddress]:
            bad = [ServerAddress(host="x" * 70 + ".example", port=8300), ServerAddress(host="127.0.0.1", port=99999)]
            return [*bad, *await good()]

        session._addresses = addresses
        await eventually(lambda: session.connected, within_s=5)


async def test_a_watch_never_goes_back_when_its_next_server_is_behind(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        first = session.server_hello["name"]
        behind = next(c for c in cluster.followers() if c.settings.node_name != first)
        live = Results(session).live(GetKey("k"))
        await session.write(SetKey("k", b"1"))
        await eventually(lambda: live.rows and live.rows["k"][1] == b"1")
        isolate(behind)
        await session.write(SetKey("k", b"2"))
        await eventually(lambda: live.rows["k"][1] == b"2")

        async def addresses() -> list[ServerAddress]:
            return [ServerAddress(host="127.0.0.1", port=behind.rpc_port)]

        session._addresses = addresses
        assert session._connection is not None
        session._connection.abort("test")
        await eventually(lambda: session.connected and session.server_hello["name"] == behind.settings.node_name)
        for _ in range(100):
            await asyncio.sleep(0.01)
            assert live.rows["k"][1] == b"2"
        assert live.epoch == 0


async def test_a_lost_session_does_not_hold_up_the_loop_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        session = cluster.session(core)
        await session.barrier("default")
        assert core._raft is not None
        await eventually(lambda: core.node.store.tables.checks.get(("s1", "serfHealth")))
        with monkeypatch.context() as slow:
            slow.setattr(core._raft, "propose_for", lambda outcome, entry: None)
            write = asyncio.ensure_future(session.write(SetKey("k", b"x"), timeout_s=5.0))
            while session._client is None or len(session._client._calls) < 2:  # the write, and after it a ping
                await asyncio.sleep(0)
        assert session._connection is not None
        session._connection.abort("test")
        async with asyncio.timeout(30):
            assert await write is True


async def test_what_is_asked_while_a_server_stops_is_done_by_another(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        core = cluster.cores[session.server_hello["name"]]
        may_end = asyncio.Event()

        async def long_goodbye() -> None:
            while not may_end.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await may_end.wait()

        core._tasks.start("long goodbye", long_goodbye())
        stopping = asyncio.create_task(cluster.stop(core.settings.node_name))
        await eventually(lambda: core._tasks.stopped)
        try:
            assert await session.write(SetKey("k", b"x"), timeout_s=5.0) is True
            await session.barrier("default")
        finally:
            may_end.set()
            await stopping


async def test_each_write_is_done_once_whatever_is_lost_on_its_way(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        stop = False

        async def create(worker: int) -> int:
            done = 0
            while not stop:
                # Only a first application finds no such key: a second one would answer False.
                assert await session.write(SetKey(f"k/{worker}/{done}", b"x", cas=0), timeout_s=30.0) is True
                done += 1
            return done

        workers = [asyncio.create_task(create(i)) for i in range(32)]
        for turn in range(12):
            await asyncio.sleep(0.25)
            if turn % 4 == 3:
                leader = await eventually(cluster.leader)
                await cluster.stop(leader.settings.node_name)
                await cluster.start(leader.settings.node_name)
            elif session._connection is not None:
                session._connection.abort("test")
        stop = True
        counts = await asyncio.gather(*workers)
        assert min(counts) > 10
        barrier = await session.barrier("default")
        answer = await session.read(KeyNames("k/"), min_index=barrier.index)
        assert len(answer.rows) == sum(counts)


async def test_a_cached_default_read_is_never_older_than_an_acknowledged_write(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        sessions = [cluster.session(cluster.followers()[0], f"a{i}") for i in range(3)]
        for session in sessions:
            await session.barrier("default")
        caches = [Results(session) for session in sessions]
        stop, acknowledged, reads = False, 0, 0

        async def write() -> None:
            nonlocal acknowledged
            while not stop:
                await sessions[0].write(SetKey("k", b"%d" % (acknowledged + 1)), timeout_s=30.0)
                acknowledged += 1
                await asyncio.sleep(0.002)

        async def read(cache: Results, mode: Any) -> None:
            nonlocal reads
            while not stop:
                expected = acknowledged
                try:
                    entry = await cache.fetch(GetKey("k"), mode=mode)
                except RostraError:
                    await asyncio.sleep(0.02)
                    continue
                assert int(entry.rows["k"][1]) >= expected if expected else True
                reads += 1
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(write())]
        tasks += [asyncio.create_task(read(c, m)) for c in caches for m in ("default", "default", "consistent")]
        for turn in range(12):
            await asyncio.sleep(0.25)
            if turn % 4 == 3:
                leader = await eventually(cluster.leader)
                await cluster.stop(leader.settings.node_name)
                await cluster.start(leader.settings.node_name)
            elif (connection := sessions[turn % 3]._connection) is not None:
                connection.abort("test")
        stop = True
        await asyncio.gather(*tasks)
        assert reads > 50
        assert sum(cache.hits for cache in caches) > 0


async def test_reads_without_a_leader_end_in_time_however_many_wait_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HOLD_S", 1.0)
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0], "a1")
        await session.barrier("default")
        for core in cluster.cores.values():
            isolate(core)
        await eventually(lambda: all(core.node.leader_id is None for core in cluster.cores.values()))

        async def refused(after_s: float) -> float:
            await asyncio.sleep(after_s)
            began = time.monotonic()
            with pytest.raises(NoLeader):
                await session.barrier("default")
            return time.monotonic() - began

        took = await asyncio.gather(*(refused(0.3 * i) for i in range(8)))
        assert max(took) < 1.0 + servers.ASK_MIN_S + 2.0  # one behind the other they would take 8 s and more


async def test_an_agent_that_looks_whether_its_core_lives_is_not_a_rejected_connection(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        told = io.StringIO()
        log.configure("debug", stream=told)
        try:
            _, writer = await asyncio.open_unix_connection(str(cluster.cores["s1"]._socket_path))
            writer.close()
            await eventually(lambda: "ended without a hello" in told.getvalue())
        finally:
            log.configure("info")
        assert "rejected a connection" not in told.getvalue()


async def test_a_server_with_another_key_than_expected_leaves_no_unseen_exception(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        unseen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, about: unseen.append(about))
        with pytest.raises(Denied, match="another key"):
            await dial("127.0.0.1", core.rpc_port, core._identity.client_context(), hello("peer"), key_hash="0" * 64)
        gc.collect()
        await asyncio.sleep(0)
        assert unseen == []
