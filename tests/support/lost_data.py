"""Three servers in the moment when it matters who remembers what, and what becomes of them on damaged directories.

`prepare` leaves their directories as kill -9 would: w3 was stopped first, then w1 and w2 have acknowledged 200 writes.
`Older` copies of w2's directory were taken before: in the life before, and in the same life. `play` starts w2, damaged,
and w3, while w1 is down, and lets w1 come back then. Real `Core`s with real disks in one process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rostra.server.lived import noted_places
from rostra.server.run import Core
from rostra.server.settings import CoreSettings
from rostra.server.state.kv import SetKey
from rostra.wire.errors import RostraError
from tests.support.processes import free_port, new_host
from tests.support.waiting import eventually

NAMES = ("w1", "w2", "w3")
WRITES = 200
KEYS = frozenset(f"acknowledged/{n}" for n in range(WRITES))
#: What servers say of themselves (bootstrap.py): one that is new here, and one that the others know.
MUST_WAIT, LOG_IS_GONE = "waits to be let into it", "its log is gone"
#: Where older copies of w2's directory lie, and which life they are of.
FORMER_LIFE, SAME_LIFE = "w2-of-a-former-life", "w2-of-the-same-life"


@dataclass
class Servers:
    """Some of w1, w2, w3 on directories below `directory`; `places`: name -> (host, port)."""

    directory: Path
    places: dict[str, tuple[str, int]]
    secret: str
    cores: dict[str, Core] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)

    async def start(self, name: str) -> Core:
        host, port = self.places[name]
        settings = CoreSettings(
            node_name=name,
            data_dir=str(self.directory / name),
            bind=host,
            advertise=host,
            rpc_port=port,
            bootstrap_expect=3,
            candidates=tuple(f"{host}:{port}" for host, port in self.places.values()),
            secrets=(self.secret,),
            version="test",
        )

        def ends(status: int) -> None:
            self.exits[name] = status

        core = Core(settings, lambda: None, exit=ends)
        await core.start()
        self.cores[name] = core
        return core

    def leader(self) -> Core | None:
        for name, core in self.cores.items():
            raft = core.node.raft
            if name not in self.exits and raft is not None and raft.is_leader and raft.lease_valid():
                return core
        return None

    def keys(self, name: str) -> set[str]:
        return {key for key in self.cores[name].node.store.tables.kv.rows if key in KEYS}

    async def write(self, *keys: str) -> None:
        leader = await eventually(self.leader)
        await asyncio.gather(*(leader.node.own_write(SetKey(key, b"x" * 50)) for key in keys))

    async def level(self) -> None:
        """All have applied the same."""
        leader = await eventually(self.leader)
        await eventually(
            lambda: {c.node.store.index for c in self.cores.values()} == {leader.node.store.index}, what="all level"
        )

    async def stop(self, *names: str) -> None:
        for name in names or tuple(self.cores):
            await self.cores.pop(name).stop()


async def prepare(directory: Path) -> Servers:
    """The directories of w1, w2, w3 and the older copies, below `directory`."""
    places = {}
    for name in NAMES:
        host = new_host()
        places[name] = (host, free_port(host))
    servers = Servers(directory, places, base64.b64encode(os.urandom(32)).decode())
    live = Servers(directory / "live", places, servers.secret)
    w2 = live.directory / "w2"
    await asyncio.gather(*(live.start(name) for name in NAMES))
    await live.write(*(f"early/{n}" for n in range(20)))
    await live.level()
    await eventually(lambda: (w2 / "tls" / "issued.pem").exists(), what="w2 has a certificate of the cluster CA")
    raft = live.cores["w2"].node.raft
    assert raft is not None
    await raft.take_snapshot()
    shutil.copytree(w2, directory / FORMER_LIFE, ignore=_passing)
    await live.stop()
    await asyncio.gather(*(live.start(name) for name in NAMES))
    await live.write("later")
    await live.level()
    await eventually(lambda: _all_met(live), what="all have seen each other's second start")
    shutil.copytree(w2, directory / SAME_LIFE, ignore=_passing)
    await live.stop("w3")
    await live.write(*KEYS)
    await live.level()
    raft = live.cores["w2"].node.raft
    assert raft is not None
    place = raft.place
    await eventually(lambda: min(noted_places(w2)) >= place, 20.0, what="w2 has noted twice how far its log goes")
    for name in NAMES:
        shutil.copytree(live.directory / name, directory / name, ignore=_passing)
    await live.stop()
    return servers


def _all_met(servers: Servers) -> bool:
    paths = [servers.directory / name / "server" / "raft" / "witness.json" for name in NAMES]
    return all(path.exists() and path.read_text().count("[2, ") == 2 for path in paths)


def _passing(directory: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith((".sock", ".new")) or name.startswith(".")]


@dataclass
class Outcome:
    """`how`: refused (at its start), stopped (exit 78 after it), waits or serves. `said`: what an operator reads."""

    how: str
    said: str = ""


async def play(prepared: Servers, directory: Path, damage: Callable[[Path], None]) -> Outcome:
    """AssertionError where anything that was acknowledged is lost, or missing where somebody leads."""
    for name in NAMES:
        shutil.copytree(prepared.directory / name, directory / name)
    damage(directory / "w2")
    servers = Servers(directory, prepared.places, prepared.secret)
    log = io.StringIO()
    try:
        with contextlib.redirect_stderr(log):
            outcome = await _play(servers)
            lines = [line for line in log.getvalue().splitlines() if "w2" in line or str(directory / "w2") in line]
    finally:
        with contextlib.redirect_stderr(log):
            await servers.stop()
    if outcome.how in ("stopped", "waits"):
        wanted = "add-peer w2"
        found = [line for line in lines if wanted in line and ("WARN" in line or "ERR" in line)]
        outcome.said = found[-1] if found else ""
    assert "Traceback" not in log.getvalue(), log.getvalue()
    return outcome


async def _play(servers: Servers) -> Outcome:
    await servers.start("w3")
    outcome = Outcome("serves")
    try:
        await servers.start("w2")
    except RostraError as e:
        outcome = Outcome("refused", e.message)
    else:
        outcome.how = await eventually(lambda: _state(servers), 15.0, what="w2 serves, waits or stops")
    if outcome.how == "stopped":
        await servers.stop("w2")
    assert outcome.how == "serves" or servers.leader() is None, "w3 leads without anybody who remembers"
    if outcome.how == "serves":
        leader = servers.leader()
        assert leader is not None
        assert servers.keys(leader.settings.node_name) == KEYS, f"{leader.settings.node_name} leads without them"
    await servers.start("w1")
    asked = ["w1", "w3", *(["w2"] if outcome.how == "serves" else [])]
    await eventually(
        lambda: servers.leader() and all(servers.keys(name) == KEYS for name in asked),
        15.0,
        what=f"all keys at {asked}",
    )
    return outcome


def _state(servers: Servers) -> str:
    core = servers.cores["w2"]
    if "w2" in servers.exits:
        assert servers.exits["w2"] == 78
        return "stopped"
    if servers.leader() is not None:
        return "serves"
    if core.node.raft is not None:
        return ""
    known = {m["key_hash"] for m in servers.cores["w3"]._servers()}
    is_new = core._identity.key_hash not in known
    return "waits" if (MUST_WAIT if is_new else LOG_IS_GONE) in core.bootstrap_status else ""


# -- what is done to w2 ----------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def empty(path: Path) -> None:
    if path.is_dir():
        for inside in path.iterdir():
            remove(inside)
    elif path.exists():
        os.truncate(path, 0)


def replace(path: Path, by: Path) -> None:
    """By what is in the same place of another directory; nothing, where nothing is there."""
    remove(path)
    if by.is_dir():
        shutil.copytree(by, path)
    elif by.exists():
        path.parent.mkdir(exist_ok=True)
        shutil.copy2(by, path)
