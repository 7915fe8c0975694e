"""What becomes of a write whose server is lost on the way: done, refused, not done and unknown are told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rostra.agent.servers import ServerAddress, ServerLink
from rostra.server.state.kv import SetKey
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Conflict, NoLeader, Timeout
from rostra.wire.frames import pack, unpack
from rostra.wire.rpc import hello

LOSE, GONE, SILENT, DONE = "lose", "gone", "silent", ("ok", True)
NO_LEADER, UNKNOWN = ("err", "no_leader", "No cluster leader"), ("err", "timeout", "it may or may not have been done")


class Server:
    """Answers each write as the script says. LOSE: by the end of the connection; GONE: and no other; SILENT: not."""

    def __init__(self, path: Path, *script: Any) -> None:
        self.path, self.script = path, list(script)
        self.writes: list[tuple[Any, ...]] = []
        self.refuses_sessions = False

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._made, str(self.path))

    def _made(self) -> FrameConnection:
        connection = FrameConnection()

        def request(payload: bytes) -> None:
            number, verb, *arguments = unpack(payload)
            if verb == "ping":
                connection.send(pack((number, "ok", (True, 0))))
            elif verb == "write":
                self.writes.append(arguments[0])
                answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                if answer in (LOSE, GONE):
                    self.refuses_sessions = answer == GONE
                    connection.abort()
                elif answer != SILENT:
                    connection.send(pack((number, *answer)))

        def greeting(payload: bytes) -> None:
            if self.refuses_sessions:
                connection.abort()
                return
            connection.on_frame = request
            connection.send(hello("ok", name="s1"))

        connection.on_frame = greeting
        return connection

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Any]:
    tasks: list[asyncio.Task[Any]] = []
    servers: list[Server] = []

    def spawn(work: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.ensure_future(work))
        return tasks[-1]

    async def start(*script: Any) -> tuple[ServerLink, Server]:
        server = Server(tmp_path / "sock", *script)
        await server.start()
        servers.append(server)

        async def addresses() -> list[ServerAddress]:
            return [ServerAddress(path=str(server.path))]

        session = ServerLink(
            addresses=addresses,
            context=lambda: None,  # type: ignore[arg-type,return-value]
            about=lambda: {"name": "a1"},
            key_of=lambda _: "",
            spawn=spawn,
            jitter=lambda low, high: low,
        )
        spawn(session.run())
        return session, server

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for server in servers:
        await server.stop()


@pytest.mark.parametrize("script", [(DONE,), (LOSE, DONE), (LOSE, LOSE, DONE)])
async def test_a_write_is_done_under_one_number_however_many_connections_it_takes(start: Any, script: Any) -> None:
    session, server = await start(*script)
    assert await session.write(SetKey("k", b""), timeout_s=5) is True
    assert len(server.writes) == len(script)
    assert len(set(server.writes)) == 1


@pytest.mark.parametrize("script", [(("err", "conflict", "x"),), (LOSE, ("err", "conflict", "x"))])
async def test_a_refusal_is_a_refusal(start: Any, script: Any) -> None:
    session, _ = await start(*script)
    with pytest.raises(Conflict):
        await session.write(SetKey("k", b""), timeout_s=5)


async def test_a_write_that_no_leader_took_is_not_done(start: Any) -> None:
    session, _ = await start(NO_LEADER)
    with pytest.raises(NoLeader):
        await session.write(SetKey("k", b""), timeout_s=5)


async def test_a_write_that_was_sent_to_no_server_is_not_done(start: Any) -> None:
    session, server = await start(DONE)
    server.refuses_sessions = True
    with pytest.raises(NoLeader):
        await session.write(SetKey("k", b""), timeout_s=0.2)
    assert server.writes == []


@pytest.mark.parametrize("script", [(UNKNOWN,), (LOSE, NO_LEADER), (LOSE, UNKNOWN), (SILENT,), (LOSE, SILENT)])
async def test_a_write_is_unknown_when_an_attempt_may_have_been_applied(start: Any, script: Any) -> None:
    session, server = await start(*script)
    with pytest.raises(Timeout, match="may or may not have been done"):
        await session.write(SetKey("k", b""), timeout_s=0.5)
    assert server.writes


async def test_a_write_is_unknown_when_its_server_was_lost_and_no_other_is_found(start: Any) -> None:
    session, server = await start(GONE)
    with pytest.raises(Timeout, match="may or may not have been done"):
        await session.write(SetKey("k", b""), timeout_s=0.3)
    assert len(server.writes) == 1
