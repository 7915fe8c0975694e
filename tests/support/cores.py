"""Real servers in one process: three `Core`s on loopback with everything but the processes, and an agent's session.

What a test does to them is what happens to real ones: `kill` drops a server without a goodbye and keeps its data.
"""

from __future__ import annotations

import asyncio
import base64
import os
from pathlib import Path
from typing import Any

from rostra.agent.servers import ServerAddress, ServerLink
from rostra.runtime.service import Tasks
from rostra.runtime.tls import client_context, peer_key_hash
from rostra.server.run import Core
from rostra.server.settings import CoreSettings
from rostra.wire.errors import Conflict
from tests.support.waiting import POLL_S, eventually


class Cluster:
    """Use as `async with Cluster(tmp_path) as cluster`."""

    def __init__(self, directory: Path, size: int = 3) -> None:
        self.secret = base64.b64encode(os.urandom(32)).decode()
        self.directory = directory
        self.names = [f"s{i + 1}" for i in range(size)]  # of those that found it
        self.cores: dict[str, Core] = {}
        self._ports: dict[str, int] = {}
        self._sessions: dict[Core, ServerLink] = {}
        self._tasks = Tasks("test")

    async def __aenter__(self) -> Cluster:
        for name in self.names:
            await self.start(name)
        addresses = [f"127.0.0.1:{c.rpc_port}" for c in self.cores.values()]
        for core in self.cores.values():
            core.learn(addresses)
        await eventually(self.leader)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._tasks.stop()
        for name in list(self.cores):
            await self.stop(name)

    async def start(self, name: str, **changed: Any) -> Core:
        """Start a server, with its data and on its port if it was here before. `changed`: other settings."""
        options: dict[str, Any] = {
            "node_name": name,
            "data_dir": str(self.directory / name),
            "bind": "127.0.0.1",
            "advertise": "127.0.0.1",
            "rpc_port": self._ports.get(name, 0),
            "bootstrap_expect": len(self.names),
            "secrets": (self.secret,),
            "version": "test",
        }
        core = Core(CoreSettings(**(options | changed)), lambda: None)
        await core.start()
        self._ports[name] = core.rpc_port
        self.cores[name] = core
        return core

    async def add(self, name: str, **changed: Any) -> Core:
        """Start one more server that knows where the others are, as `retry_join` would tell it."""
        core = await self.start(name, **changed)
        core.learn([f"127.0.0.1:{c.rpc_port}" for c in self.cores.values() if c is not core])
        return core

    async def grow(self, name: str, **changed: Any) -> Core:
        """As `add`, and an operator lets it in; it is a learner then, or what it asked to be."""
        core = await self.add(name, **changed)
        await eventually(lambda: name in [w["name"] for w in self.waiting()], what=f"{name} waits")
        await self.act("raft.add-peer", {"name": name})
        return core

    async def act(self, kind: str, args: dict[str, Any], *, at: str = "") -> Any:
        """What the agent of a server's host asks: of server `at`, or of the leader."""
        while True:
            core = self.cores[at] if at else await eventually(self.leader)
            if core not in self._sessions:
                self._sessions[core] = self.session(core)
            try:
                return await self._sessions[core].act(kind, args, timeout_s=60.0)
            except Conflict as e:
                if "another change of the servers is on its way (promoting" not in e.message:
                    raise
            await asyncio.sleep(POLL_S)  # autopilot is faster than a test on a busy machine: as an operator, try again

    def waiting(self) -> list[dict[str, Any]]:
        """Who waits to be let in, as the leader knows it."""
        leader = self.leader()
        return leader._roster.describe_waiting() if leader is not None else []

    def suffrages(self) -> dict[str, str]:
        """name -> suffrage, as the leader has it; empty while nobody leads or a change is on its way."""
        leader = self.leader()
        raft = leader.node.raft if leader is not None else None
        return {m.name: m.suffrage for m in raft.members} if raft is not None and raft.members_settled else {}

    async def stop(self, name: str) -> None:
        await self.cores.pop(name).stop()

    def leader(self) -> Core | None:
        def leads(core: Core) -> bool:
            raft = core.node.raft
            return raft is not None and raft.is_leader and raft.lease_valid()

        return next(filter(leads, self.cores.values()), None)

    def followers(self) -> list[Core]:
        return [c for c in self.cores.values() if not c.node.is_leader]

    def session(self, core: Core, name: str = "") -> ServerLink:
        """What the agent on `core`'s own host holds; with a name, a client agent's over mTLS."""
        path = str(self.directory / core.settings.node_name / "server" / "core.sock")

        async def addresses() -> list[ServerAddress]:
            if name:
                return [ServerAddress(host="127.0.0.1", port=c.rpc_port) for c in self.cores.values()]
            return [ServerAddress(path=path)]

        context: Any = None
        if name:
            from rostra.runtime.identity import NodeIdentity
            from rostra.runtime.secret import parse_secrets

            identity = NodeIdentity.open(self.directory / f"agent-{name}", name, parse_secrets([self.secret]))
            context = client_context(identity)
        session = ServerLink(
            addresses=addresses,
            context=lambda: context,
            about=lambda: {"name": name or core.settings.node_name, "role": "client", "address": "127.0.0.1"},
            key_of=peer_key_hash,
            spawn=lambda coro: self._tasks.start("session", coro),
        )
        self._tasks.start("session", session.run())
        return session
