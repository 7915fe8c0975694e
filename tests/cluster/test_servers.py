"""Three servers, real pysyncobj, real sockets and disks: what they promise to agents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rostra.server.endpoint import Act
from rostra.server.state.catalog import Register
from rostra.server.state.health import ServiceInstances
from rostra.server.state.kv import GetKey, KeyNames, SetKey
from rostra.wire.errors import Conflict, RostraError, Timeout
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster


async def test_a_write_through_any_server_is_seen_by_a_default_read_through_any_other(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        sessions = [cluster.session(core) for core in cluster.cores.values()]
        for i in range(30):
            writer, reader = sessions[i % 3], sessions[(i + 1) % 3]
            assert await writer.write(SetKey("k", b"%d" % i)) is True
            barrier = await reader.barrier("default")
            answer = await reader.read(GetKey("k"), min_index=barrier.index)
            assert answer.rows[0][1][1] == b"%d" % i


async def test_acknowledged_writes_survive_the_loss_of_the_leader_and_its_return(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        leader = cluster.leader()
        assert leader is not None
        session = cluster.session(cluster.followers()[0])
        acknowledged = set()
        for i in range(50):
            await session.write(SetKey(f"before/{i}", b"x"))
            acknowledged.add(f"before/{i}")
        await cluster.stop(leader.settings.node_name)
        for i in range(50):
            await session.write(SetKey(f"after/{i}", b"x"))
            acknowledged.add(f"after/{i}")
        back = await cluster.start(leader.settings.node_name)
        await eventually(lambda: back.node.store.index >= cluster.followers()[0].node.store.index)
        for core in cluster.cores.values():
            assert acknowledged <= set(core.node.store.tables.kv.rows)


async def test_everything_is_there_after_all_servers_were_stopped(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0])
        for i in range(20):
            await session.write(SetKey(f"k/{i}", b"x"))
        for name in list(cluster.cores):
            await cluster.stop(name)
        for name in cluster.names:
            await cluster.start(name)
        await eventually(cluster.leader)
        session = cluster.session(cluster.followers()[0])
        barrier = await session.barrier("default")
        assert len((await session.read(KeyNames("k/"), min_index=barrier.index)).rows) == 20
        hashes = {c.node.store.hash() for c in cluster.cores.values() if c.node.store.index == barrier.index}
        assert len(hashes) == 1


async def test_a_watch_gets_a_first_answer_and_then_only_what_changed(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        session = cluster.session(cluster.followers()[0])
        for i in range(150):
            service = {"id": f"web{i}", "name": "web", "port": 80}
            await session.write(Register(node=f"n{i:03}", address="10.0.0.1", service=service))
        await session.barrier("default")
        watch = session.watch(ServiceInstances("web"))
        rows, chunks = 0, 0
        async for delta in watch:
            rows, chunks = rows + len(delta.rows), chunks + 1
            if delta.done:
                break
        assert rows == 150
        await session.write(Register(node="n007", address="10.0.0.2"))
        delta = await anext(watch)
        assert [row[0][0] for row in (r for _, r in delta.rows)] == ["n007"]
        assert not delta.full
        assert delta.removed == []


async def test_a_client_agents_node_is_bound_to_its_key_and_listed_with_serf_health(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        some = cluster.followers()[0]
        session = cluster.session(some, name="c1")
        await eventually(lambda: session.connected)
        await eventually(lambda: ("c1", "serfHealth") in some.node.store.tables.checks.rows)
        assert some.node.store.tables.checks.rows[("c1", "serfHealth")].status == "passing"
        (tmp_path / "agent-c1").rename(tmp_path / "old")
        stranger = cluster.session(some, name="c1")
        await eventually(lambda: "another node key" in stranger.last_error)
        assert not stranger.connected


async def test_a_server_of_a_wrong_kind_of_request_says_so_and_goes_on(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        session = cluster.session(core)
        with pytest.raises(RostraError, match="unknown act"):
            await session.act("no such thing", {})
        with pytest.raises(RostraError, match="must be"):
            await session.write(SetKey("k", "text"))  # type: ignore[arg-type]
        assert await session.write(SetKey("k", b"bytes"))


async def test_an_act_whose_answer_was_lost_is_asked_again_unless_it_may_be_done_once_only(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        asked: list[dict[str, Any]] = []

        async def slow_once(peer: Any, args: dict[str, Any], caller: Any) -> int:
            asked.append(args)
            if len(asked) % 2:
                await asyncio.Event().wait()
            return len(asked)

        core._acts.table["test.slow"] = Act(slow_once, lambda *_: True)
        session = cluster.session(core)

        async def lost(asked_before: int, **how: Any) -> Any:
            act = asyncio.create_task(session.act("test.slow", {}, **how))
            await eventually(lambda: len(asked) == asked_before + 1)
            session._connection.abort("a test")  # type: ignore[union-attr]
            return await act

        assert await lost(0) == 2
        with pytest.raises(Timeout, match="may or may not"):
            await lost(2, once=True)
        assert len(asked) == 3


async def test_concurrent_increments_by_compare_and_set_lose_none_over_a_change_of_leader(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        leader = cluster.leader()
        assert leader is not None
        sessions = [cluster.session(c) for c in cluster.followers()]
        await sessions[0].write(SetKey("n", b"0"))
        done = 0

        async def increment(session: object, times: int) -> None:
            nonlocal done
            for _ in range(times):
                while True:
                    barrier = await session.barrier("default")  # type: ignore[attr-defined]
                    answer = await session.read(GetKey("n"), min_index=barrier.index)  # type: ignore[attr-defined]
                    row = answer.rows[0][1]
                    command = SetKey("n", b"%d" % (int(row[1]) + 1), cas=row[6])
                    if await session.write(command):  # type: ignore[attr-defined]
                        done += 1
                        break

        async def depose() -> None:
            await eventually(lambda: done > 20, 20)
            await cluster.stop(leader.settings.node_name)

        await asyncio.gather(depose(), *(increment(s, 30) for s in sessions for _ in range(2)))
        barrier = await sessions[0].barrier("consistent")
        answer = await sessions[0].read(GetKey("n"), min_index=barrier.index)
        assert answer.rows[0][1][1] == b"120"


async def test_a_name_bound_to_a_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    from rostra.server.state.cluster import BindNode

    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        await core.node.own_write(BindNode(name="x", key_hash="1" * 64, role="client", address="127.0.0.1"))
        with pytest.raises(Conflict, match="force-leave x"):
            await core.node.own_write(BindNode(name="x", key_hash="2" * 64, role="client", address="127.0.0.1"))
