"""Most servers are lost for ever: real servers, real directories, and the command line on what is left."""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rostra.cli.main import main
from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import Journal
from rostra.server.raft.recovery_disk import look
from rostra.server.run import UnusableData
from rostra.server.state.kv import GetKey, SetKey
from rostra.server.state.operator import SetAutopilot
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster


class Operator:
    """Types `rostra recover …` and reads what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> str:
        status = main(["recover", *words])
        out, err = self._capsys.readouterr()
        assert status == 0, err
        return out

    def follow(self, plan: str) -> str:
        """The command that the plan ends with."""
        return self(*shlex.split(plan.splitlines()[-1])[2:])


@pytest.fixture
def operator(capsys: pytest.CaptureFixture[str]) -> Operator:
    return Operator(capsys)


async def write(cluster: Cluster, at: str, prefix: str, count: int = 20) -> set[str]:
    """The keys, all acknowledged."""
    session = cluster.session(cluster.cores[at])
    for i in range(count):
        assert await session.write(SetKey(f"{prefix}/{i}", b"x")) is True
    return {f"{prefix}/{i}" for i in range(count)}


async def has_all(cluster: Cluster, name: str) -> None:
    """Server `name` has applied what is committed."""
    leader = await eventually(cluster.leader)
    ours, theirs = cluster.cores[name].node.raft, leader.node.raft
    assert ours is not None
    assert theirs is not None
    await eventually(lambda: ours.applied_index >= theirs.commit_index)


def keys(cluster: Cluster, name: str) -> set[str]:
    return set(cluster.cores[name].node.store.tables.kv.rows)


def has_failed(members: Any, name: str) -> bool:
    return members.get(name).status != "alive"


def lose(cluster: Cluster, *names: str) -> None:
    for name in names:
        shutil.rmtree(cluster.directory / name)


async def leads(cluster: Cluster, name: str) -> bool:
    leader = await eventually(cluster.leader)
    return bool(leader.settings.node_name == name)


async def test_the_last_of_three_servers_leads_again_and_has_every_acknowledged_key(
    tmp_path: Path, operator: Operator
) -> None:
    async with Cluster(tmp_path) as cluster:
        survivor = cluster.followers()[0].settings.node_name
        acknowledged = await write(cluster, survivor, "before")
        await has_all(cluster, survivor)
        others = [name for name in cluster.names if name != survivor]
        for name in (*others, survivor):
            await cluster.stop(name)
        lose(cluster, *others)

        plan = operator("plan", str(tmp_path / survivor))
        assert f"Keep {tmp_path / survivor} ({survivor}):  <- safe to keep" in plan
        assert "The missing servers are a majority" in plan
        operator.follow(plan)

        await cluster.start(survivor)
        assert await leads(cluster, survivor)
        assert acknowledged <= keys(cluster, survivor)
        await write(cluster, survivor, "after")
        session = cluster.session(cluster.cores[survivor])
        assert (await session.read(GetKey("after/19"), min_index=(await session.barrier("default")).index)).rows


async def test_wiped_servers_come_back_as_new_ones(tmp_path: Path, operator: Operator) -> None:
    async with Cluster(tmp_path) as cluster:
        acknowledged = await write(cluster, "s1", "before")
        leader = await eventually(cluster.leader)
        await leader.node.own_write(SetAutopilot(server_stabilization_time_ms=300, last_contact_threshold_ms=2000))
        await has_all(cluster, "s1")
        for name in ("s2", "s3", "s1"):
            await cluster.stop(name)
        lose(cluster, "s2", "s3")
        operator("apply", f"-keep={tmp_path / 's1'}", "-members=s1")
        await cluster.start("s1")
        leader = await eventually(cluster.leader)
        members = leader.node.store.tables.members
        for name in ("s2", "s3"):
            # A name belongs to the key that it had until that node is known to have failed.
            await eventually(partial(has_failed, members, name), 60.0, f"{name} has failed")
            await cluster.grow(name)
        await eventually(
            lambda: cluster.suffrages() == dict.fromkeys(("s1", "s2", "s3"), "voter"), 60.0, "all three vote"
        )
        await cluster.stop("s1")
        await eventually(cluster.leader)
        assert acknowledged <= keys(cluster, "s2")


async def test_two_survivors_of_five_go_on_and_the_one_that_was_behind_catches_up(
    tmp_path: Path, operator: Operator
) -> None:
    async with Cluster(tmp_path, 5) as cluster:
        behind, ahead = (core.settings.node_name for core in cluster.followers()[:2])
        acknowledged = await write(cluster, ahead, "early")
        await has_all(cluster, behind)
        await cluster.stop(behind)
        acknowledged |= await write(cluster, ahead, "late")
        await has_all(cluster, ahead)
        for name in list(cluster.cores):
            await cluster.stop(name)
        lost = [name for name in cluster.names if name not in (behind, ahead)]
        lose(cluster, *lost)

        plan = operator("plan", str(tmp_path / behind), str(tmp_path / ahead))
        assert f"Keep {tmp_path / ahead} ({ahead}):  <- safe to keep" in plan
        assert "late/0" in plan
        said = operator.follow(plan)
        assert f"Start {behind} as well" in said

        # In the order that is worst: the one that is behind, and has the old list, is there first.
        await cluster.start(behind)
        await cluster.start(ahead)
        assert await leads(cluster, ahead)
        acknowledged |= await write(cluster, behind, "after")
        await has_all(cluster, behind)
        for name in (behind, ahead):
            assert acknowledged <= keys(cluster, name)
        raft = cluster.cores[behind].node.raft
        assert raft is not None
        assert sorted(m.name for m in raft.members) == sorted((behind, ahead))


async def test_a_survivor_with_another_end_takes_over_the_kept_one_s(tmp_path: Path, operator: Operator) -> None:
    """The survivor's last entries are those of a leader that nobody followed: they are replaced, and it is told so."""
    async with Cluster(tmp_path, 5) as cluster:
        one, two = (core.settings.node_name for core in cluster.followers()[:2])
        acknowledged = await write(cluster, one, "early")
        for name in (one, two):
            await has_all(cluster, name)
        lost = [name for name in cluster.names if name not in (one, two)]
        for name in (one, two, *lost):
            await cluster.stop(name)
        lose(cluster, *lost)
        kept, other = sorted((one, two), key=lambda name: look(tmp_path / name).last_index, reverse=True)
        for name, terms in ((kept, (50, 50)), (other, (40, 40, 40))):
            found = look(tmp_path / name)
            disk = DirectoryDisk(tmp_path / name / "server" / "raft", inline=True)
            journal = Journal.open(disk, cluster_id=found.cluster_id, node_id=found.node_id)
            for term in terms:
                journal.setCurrentTerm(term, None)
                journal.add(b"\x01", journal.last_index + 1, term)
            journal.close()
            disk.close()
        words = ("apply", f"-keep={tmp_path / kept}", f"-members={kept},{other}")
        with pytest.raises(AssertionError, match=f"-lose={other}"):
            operator(*words, str(tmp_path / other))
        said = operator(*words, f"-lose={other}", str(tmp_path / other))
        assert f"{other} drops the entries that are given up" in said
        for name in (other, kept):
            await cluster.start(name)
        assert await leads(cluster, kept)
        acknowledged |= await write(cluster, other, "after")
        await has_all(cluster, other)
        assert acknowledged <= keys(cluster, other)


async def test_a_server_does_not_start_on_a_list_of_servers_that_is_not_applied(
    tmp_path: Path, operator: Operator
) -> None:
    async with Cluster(tmp_path) as cluster:
        for name in ("s2", "s3", "s1"):
            await cluster.stop(name)
        data = tmp_path / "s1"
        address = json.loads((data / "server" / "bootstrap.json").read_text())["committed"]["members"]
        port = next(m["port"] for m in address if m["name"] == "s1")
        peers = data / "server" / "raft" / "peers.json"
        peers.write_text(json.dumps([f"127.0.0.1:{port}"]))
        with pytest.raises(UnusableData, match=r"rostra recover apply -keep=.* -peers=.*peers\.json") as refused:
            await cluster.start("s1")
        command = refused.value.message.split("`")[1]
        operator(*shlex.split(command)[2:])
        await cluster.start("s1")
        assert await leads(cluster, "s1")
