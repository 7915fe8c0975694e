"""The door that strangers knock at: who gets through TLS, how long the others may stay, what they cost."""

import asyncio
import contextlib
import os
import socket
import ssl
import time

import pytest
import uvloop

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import Secret
from rostra.runtime.tls import Handshakes, NotTls
from tests.support.waiting import eventually

SECRET = Secret(os.urandom(32))


class Door:
    """A listener whose connections all go through one `Handshakes`."""

    def __init__(self, identity: NodeIdentity, **limits) -> None:
        self.handshakes = Handshakes(identity.server_context, **limits)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.errors: list[BaseException] = []
        self.through = 0
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self):
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_):
        self._accepting.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(self._accepting, *self._tasks, return_exceptions=True)
        self.listener.close()

    async def _accept(self):
        while True:
            accepted, _ = await asyncio.get_running_loop().sock_accept(self.listener)
            task = asyncio.create_task(self._shake(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _shake(self, accepted):
        try:
            await self.handshakes.shake(accepted, asyncio.Protocol())
        except (OSError, ssl.SSLError) as e:
            self.errors.append(e)
        else:
            self.through += 1


def nodes(tmp_path):
    return [NodeIdentity.open(tmp_path / name, name, [SECRET]) for name in "ab"]


async def knock(door, identity):
    """The seconds that a node needs to get in."""
    began = time.perf_counter()
    async with asyncio.timeout(30):
        _, writer = await asyncio.open_connection(*door.address, ssl=identity.client_context(), server_hostname="")
    took = time.perf_counter() - began
    writer.close()
    return took


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def hello_of(identity) -> bytes:
    """The first record of a client's handshake."""
    out = ssl.MemoryBIO()
    tls = identity.client_context().wrap_bio(ssl.MemoryBIO(), out)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


async def stalling(door, data):
    """A hundred connections that say `data` and no more."""
    held = [await asyncio.open_connection(*door.address) for _ in range(100)]
    for _, writer in held:
        writer.write(data)
    return held


HALVES = {
    "nothing": lambda hello: b"",
    "one byte": lambda hello: hello[:1],
    "a header": lambda hello: hello[:5],
    "half a greeting": lambda hello: hello[: len(hello) // 2],
    "a greeting and no more": lambda hello: hello,
}


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("part", HALVES)
def test_a_hundred_that_stall_hold_up_nobody_and_are_closed_in_time(tmp_path, part, loop):
    async def main():
        a, b = nodes(tmp_path)
        before = open_files()
        data = HALVES[part](hello_of(b))
        async with Door(a, timeout_s=300.0) as door:
            held = await stalling(door, data)
            await eventually(lambda: door.handshakes.pending == 100)
            await knock(door, b)
            assert door.handshakes.pending >= 100  # it waited for none of them
            for _, writer in held:
                writer.close()
        async with Door(a, timeout_s=0.3) as door:
            held = await stalling(door, data)
            await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in held), return_exceptions=True), 30)
            await eventually(lambda: door.handshakes.pending == 0)
            assert len(door.errors) == 100
            for _, writer in held:
                writer.close()
        await eventually(lambda: open_files() <= before + 4)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x02cos\nsystem\n", b"\x16\x03\x01\xff\xff", b"\x17"]
)
async def test_what_is_not_tls_is_closed_at_once(tmp_path, garbage):
    a, _ = nodes(tmp_path)
    async with Door(a, timeout_s=30) as door:
        reader, writer = await asyncio.open_connection(*door.address)
        writer.write(garbage.ljust(5, b"\0"))
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        await eventually(lambda: door.errors)
        assert isinstance(door.errors[0], NotTls)
        writer.close()


async def test_of_too_many_strangers_the_oldest_must_go(tmp_path):
    a, b = nodes(tmp_path)
    async with Door(a, strangers_max=3, timeout_s=30) as door:
        held = [await asyncio.open_connection(*door.address) for _ in range(5)]
        for reader, _ in held[:2]:
            assert await asyncio.wait_for(reader.read(), 2) == b""
        assert door.handshakes.pending == 3
        await knock(door, b)
        for _, writer in held:
            writer.close()


async def test_a_greeting_that_comes_byte_by_byte_is_understood(tmp_path):
    a, b = nodes(tmp_path)
    async with Door(a) as door:
        reader, writer = await asyncio.open_connection(*door.address)
        for byte in hello_of(b):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(reader.read(1), 2)) == b"\x16"  # the server's part of the handshake
        writer.close()
