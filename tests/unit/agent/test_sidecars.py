from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rostra.agent.local import LocalAgent
from rostra.agent.sidecars import Sidecars
from tests.support.waiting import eventually

# A proxy that notes how it was started and lives as long as its lifeline; `stubborn` ignores SIGTERM.
PROXY = """
import os, signal, sys
args = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if os.path.exists(sys.argv[1] + "/stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1] + "/starts", "a") as f:
    f.write(args["-proxy-id"] + " " + args["-http-addr"] + "\\n")
if os.path.exists(sys.argv[1] + "/fail"):
    sys.exit(3)
os.read(int(args["-lifeline-fd"]), 1)
"""


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.local = LocalAgent(node="n", port_is_busy=lambda address, port: False)
        self.sidecars = Sidecars(
            self.local,
            http_addr="http://127.0.0.1:8500",
            command=(sys.executable, "-I", "-S", "-c", PROXY, str(directory)),
            first_delay_s=0.02,
            most_delay_s=0.05,
        )

    def starts(self) -> list[str]:
        path = self.directory / "starts"
        return path.read_text().splitlines() if path.exists() else []

    async def register(self, name: str = "web", **config: Any) -> None:
        sidecar = {"Proxy": {"Config": config}}
        await self.local.register_service({"Name": name, "Port": 80, "Connect": {"SidecarService": sidecar}})


@asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    w = World(directory)
    await w.local.start()
    await w.sidecars.start()
    try:
        yield w
    finally:
        await w.sidecars.stop()
        await w.local.stop()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_registered_sidecar_gets_a_process_that_knows_its_agent(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.register()
        await eventually(lambda: w.starts() == ["web-sidecar-proxy http://127.0.0.1:8500"])
        assert set(w.sidecars.pids()) == {"web-sidecar-proxy"}


async def test_a_sidecar_that_the_user_runs_is_left_to_them(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.register("mine", supervise=False)
        proxy = {"Name": "p", "Kind": "connect-proxy", "Port": 1, "Proxy": {"DestinationServiceName": "a"}}
        await w.local.register_service(proxy)
        await w.register("yours")
        await eventually(lambda: w.starts() == ["yours-sidecar-proxy http://127.0.0.1:8500"])


async def test_a_deregistered_sidecar_loses_its_process(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.register()
        pid = (await eventually(w.sidecars.pids))["web-sidecar-proxy"]
        await w.local.deregister_service("web")
        await eventually(lambda: not alive(pid))
        assert not w.sidecars.pids()


async def test_a_process_that_ends_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    async with world(tmp_path) as w:
        await w.register()
        await eventually(lambda: len(w.starts()) >= 3)
        (tmp_path / "fail").unlink()
        await eventually(w.sidecars.pids)


async def test_a_registration_with_another_configuration_keeps_the_process(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.register()
        pids = await eventually(w.sidecars.pids)
        await w.register(handshake_timeout_ms=1)
        assert w.sidecars.pids() == pids


async def test_the_end_of_the_agent_ends_even_a_stubborn_process(tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    async with world(tmp_path) as w:
        await w.register("a")
        await w.register("b")
        await eventually(lambda: len(w.starts()) == 2)
        pids = list(w.sidecars.pids().values())
    assert not any(map(alive, pids))
