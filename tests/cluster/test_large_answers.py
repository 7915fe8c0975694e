"""Answers and changes of any size reach the agent without costing it its session."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rostra.server.state.catalog import Register
from rostra.server.state.health import ServiceInstances
from rostra.server.state.kv import DeleteTree, KeyNames, ListKeys, SetKey
from tests.support.cores import Cluster

pytestmark = pytest.mark.cluster


async def test_a_few_keys_with_large_values_are_read_at_once(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        session = cluster.session(cluster.cores["s1"])
        for i in range(8):
            await session.write(SetKey(f"big/{i}", b"x" * 400_000))
        answer = await session.read(ListKeys("big/"))
        assert sum(len(row[1]) for _, row in answer.rows) == 3_200_000
        assert session.reconnects == 1


async def test_instances_with_long_check_outputs_are_read_and_watched(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        session = cluster.session(cluster.cores["s1"])
        for i in range(120):
            checks = tuple(
                {"id": f"c{n}", "name": "c", "service_id": "web", "status": "passing", "output": "o" * 4096}
                for n in range(4)
            )
            service = {"id": "web", "name": "web", "port": 80}
            await session.write(Register(node=f"n{i}", address="10.0.0.1", service=service, checks=checks))
        answer = await session.read(ServiceInstances("web"))
        assert len(answer.rows) == 120
        async with asyncio.timeout(30):
            rows = 0
            async for delta in session.watch(ServiceInstances("web")):
                rows += len(delta.rows)
                if delta.done:
                    break
        assert rows == 120
        assert session.reconnects == 1


async def test_the_removal_of_very_many_rows_reaches_a_watch(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        session = cluster.session(cluster.cores["s1"])
        name = "many/" + "n" * 200
        for some in range(0, 6000, 500):
            keys = [SetKey(f"{name}/{some + i}", b"x") for i in range(500)]
            await asyncio.gather(*(session.write(key, timeout_s=60.0) for key in keys))
        reconnects = session.reconnects
        gone: set[Any] = set()
        deleting: asyncio.Future[bool] | None = None
        async with asyncio.timeout(30):
            async for delta in session.watch(KeyNames("many/")):
                gone.update(delta.removed)
                if deleting is None and delta.done:
                    deleting = asyncio.ensure_future(session.write(DeleteTree("many/")))
                if len(gone) == 6000:
                    break
        assert len(gone) == 6000
        assert session.reconnects == reconnects
