"""The RPC over real sockets, and the bytes of its frames, which are for ever."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rostra.wire.caller import ANONYMOUS, Caller, read_caller
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Denied, NoLeader, TooLarge
from rostra.wire.frames import RPC_FRAME_BYTES_MAX, frame, pack, unpack
from rostra.wire.rpc import (
    CREDIT_CHUNKS,
    DONE,
    END,
    FULL,
    QUESTIONS_AT_ONCE_MAX,
    Lost,
    RpcClient,
    Served,
    check_hello,
    hello,
    hello_error,
    pack_rows,
)
from tests.support.waiting import eventually

GOLDEN = Path(__file__).parents[2] / "golden"
WHO = Caller("secret", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


async def connected(handle: Any) -> tuple[RpcClient, Served]:
    """Both ends of a connection on a real socket pair."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    calling, serving = FrameConnection(), FrameConnection()
    caller = RpcClient(calling)
    calling.on_frame, calling.on_lost = caller.on_frame, caller.on_lost
    served = Served(serving, handle)
    serving.on_frame, serving.on_lost = served.on_frame, served.on_lost
    await loop.create_connection(lambda: calling, sock=ours)
    await loop.create_connection(lambda: serving, sock=theirs)
    return caller, served


async def test_an_answer_finds_its_call_whatever_the_order() -> None:
    waiting: list[tuple[int, str]] = []

    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        waiting.append((request_id, arguments[0]))
        if len(waiting) == 3:
            for each, name in reversed(waiting):
                served.reply(each, f"for {name}")

    caller, _ = await connected(handle)
    assert await asyncio.gather(*(caller.call("echo", n) for n in "abc")) == ["for a", "for b", "for c"]


async def test_a_refusal_arrives_as_the_error_that_was_raised() -> None:
    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        raise Denied("token x lacks service:write")

    caller, _ = await connected(handle)
    with pytest.raises(Denied, match="token x lacks service:write"):
        await caller.call("write")


async def test_wrong_arguments_are_told_to_the_peer_and_do_not_end_the_connection() -> None:
    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        (only,) = arguments
        served.reply(request_id, only)

    caller, _ = await connected(handle)
    with pytest.raises(BadRequest, match="malformed arguments"):
        await caller.call("one", 1, 2)
    assert await caller.call("one", 1) == 1


async def test_a_lost_connection_fails_what_was_under_way_as_lost() -> None:
    caller, served = await connected(lambda *_: None)
    call = caller.call("never answered")
    stream = caller.stream("watch")
    served.connection.abort()
    with pytest.raises(Lost):
        await call
    with pytest.raises(NoLeader):
        await stream.next()
    with pytest.raises(Lost):
        await caller.call("too late")


async def test_a_stream_sends_no_more_than_its_credit_until_the_reader_takes_some() -> None:
    sent = 0

    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        stream = served.open_stream(request_id)

        async def feed() -> None:
            nonlocal sent
            for i in range(3 * CREDIT_CHUNKS):
                if not await stream.more():
                    return
                last = i == 3 * CREDIT_CHUNKS - 1
                flags = (FULL if not i else 0) | (DONE | END if last else 0)
                stream.send(pack_rows(flags, i + 1, (), [], ()), end=last)
                sent += 1

        tasks.append(asyncio.ensure_future(feed()))

    tasks: list[asyncio.Future[None]] = []
    caller, _ = await connected(handle)
    stream = caller.stream("read")
    first = await stream.next()
    assert first is not None
    assert first.flags == FULL
    assert sent <= CREDIT_CHUNKS + 1
    indexes = [first.index]
    while (chunk := await stream.next()) is not None:
        indexes.append(chunk.index)
    assert indexes == list(range(1, 3 * CREDIT_CHUNKS + 1))


async def test_a_closed_stream_is_cancelled_at_the_server() -> None:
    cancelled = asyncio.Event()

    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        served.open_stream(request_id).on_cancel = cancelled.set

    caller, served = await connected(handle)
    caller.stream("watch").close()
    await asyncio.wait_for(cancelled.wait(), 5)
    assert served.streams == {}


async def test_an_id_that_is_taken_ends_the_connection_and_every_stream_of_it() -> None:
    cancelled: list[int] = []

    def handle(served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        stream = served.open_stream(request_id)
        stream.on_cancel = lambda: cancelled.append(request_id)

    caller, served = await connected(handle)
    for _ in range(3):
        caller.notify(7, "watch")
    async with asyncio.timeout(30):
        while caller.open or served.streams:
            await asyncio.sleep(0)
    assert cancelled == [7]


async def test_a_request_that_is_too_large_is_refused_by_the_caller_itself() -> None:
    caller, _ = await connected(lambda served, request_id, verb, arguments: served.reply(request_id, len(arguments[0])))
    with pytest.raises(TooLarge):
        await caller.call("echo", b"x" * RPC_FRAME_BYTES_MAX)
    assert await caller.call("echo", b"x" * (RPC_FRAME_BYTES_MAX - 100)) == RPC_FRAME_BYTES_MAX - 100


async def test_garbage_ends_the_connection_and_nothing_else() -> None:
    asked: list[str] = []
    ours, theirs = socket.socketpair()
    serving = FrameConnection()
    served = Served(serving, lambda s, i, verb, a: asked.append(verb))
    lost = asyncio.Event()
    serving.on_frame = served.on_frame
    serving.on_lost = lambda reason: lost.set()
    await asyncio.get_running_loop().create_connection(lambda: serving, sock=theirs)
    ours.sendall(frame(b"\xc1 no message"))
    await asyncio.wait_for(lost.wait(), 5)
    assert asked == []
    ours.close()


async def flooded(frames: list[Any]) -> tuple[Served, list[str]]:
    """A server's end that has got `frames` at once, and why it was lost, if it was."""

    def handle(served: Served, request_id: int, verb: str, arguments: Sequence[Any]) -> None:
        if verb == "ping":
            served.count_question()
            served.reply(request_id, None)
        elif verb == "stream":
            stream = served.open_stream(request_id)
            for _ in range(arguments[0]):
                stream.send(pack_rows(0, 1, (), [], ()))
        else:
            raise Denied("no")

    ours, theirs = socket.socketpair()
    lost: list[str] = []
    serving = FrameConnection()
    served = Served(serving, handle)
    serving.on_frame, serving.on_lost = served.on_frame, lost.append
    await asyncio.get_running_loop().create_connection(lambda: serving, sock=theirs)
    ours.sendall(b"".join(frame(pack(f)) for f in frames))
    ours.shutdown(socket.SHUT_WR)
    await eventually(lambda: lost)
    ours.close()
    return served, lost


@pytest.mark.parametrize(
    "frames",
    [
        [(1, "stream", 3), (1, "credit", 1), (1, "credit", 2)],
        [(1, "stream", 3), (1, "cancel"), (1, "credit", 1)],  # it was taken before the cancel was known
        [(1, "stream", 3), (1, "cancel")],
        [(1, "refused"), (1, "cancel")],  # the refusal and the cancel meet on their way
        [(i, "ping") for i in range(QUESTIONS_AT_ONCE_MAX)],
    ],
)
async def test_what_an_honest_caller_may_send_is_taken(frames: list[Any]) -> None:
    _, lost = await flooded(frames)
    assert lost == ["closed by the peer"]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([(1, "credit", 1)], "malformed credit"),
        ([(1, "stream", 3), (1, "credit", 4)], "malformed credit"),
        ([(1, "stream", 3), (1, "credit", 0)], "malformed credit"),
        ([(1, "stream", 3), (1, "credit", -1)], "malformed credit"),
        ([(1, "stream", 3), (1, "credit", True)], "malformed credit"),
        ([(1, "stream", 3), (1, "credit")], "malformed credit"),
        ([(1, "stream", 3), (1, "credit", 1, 1)], "malformed credit"),
        ([(1, "cancel")], "malformed cancel"),
        ([(1, "stream", 3), (1, "cancel"), (1, "cancel")], "malformed cancel"),
        ([(i, "ping") for i in range(QUESTIONS_AT_ONCE_MAX + 1)], "too many pings and barriers"),
    ],
)
async def test_who_sends_more_that_costs_nothing_than_a_caller_could_is_dropped(frames: list[Any], reason: str) -> None:
    _, lost = await flooded(frames)
    assert len(lost) == 1
    assert lost[0].startswith(reason)


def test_a_hello_of_another_version_says_which_program_is_older() -> None:
    with pytest.raises(BadRequest, match="RPC version 9"):
        check_hello(pack({"rostra": 9, "protocol": "rpc"}))


def test_a_refused_hello_raises_the_servers_reason() -> None:
    with pytest.raises(Denied, match="not a server"):
        check_hello(hello_error(Denied("not a server of this cluster")))


@pytest.mark.parametrize("payload", [b"", b"\x80", b"\x93\x01\x02\x03", pack("hello"), pack({"rostra": "1"})])
def test_what_is_no_hello_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        check_hello(payload)


def rpc_frames() -> dict[str, bytes]:
    """One of each frame that crosses the wire."""
    return {
        "hello": frame(hello("rpc", name="n1", node_id="id", cluster="c", datacenter="dc1", version="0.1.0")),
        "hello-error": frame(hello_error(Denied("no"))),
        "write": frame(pack((1, "write", ("client", 7, 5), "kv.set", {"key": "a", "value": b"1"}, WHO.packed()))),
        "read": frame(pack((2, "read", "kv.get", {"key": "a"}, 9, WHO.packed()))),
        "barrier": frame(pack((3, "barrier", "default", 12))),
        "watch": frame(pack((4, "watch", "health.service", {"name": "web"}, WHO.packed()))),
        "act": frame(pack((5, "act", "session.renew", {"id": "s"}, WHO.packed()))),
        "propose": frame(
            pack((6, "propose", ("client", 7, 5), "kv.set", {"key": "a"}, "n1", "127.0.0.1", WHO.packed()))
        ),
        "propose-own": frame(pack((6, "propose", ("client", 7, 5), "kv.set", {"key": "a"}, "server", "s1", None))),
        "act-between": frame(pack((7, "act", "session.renew", {"id": "s"}, WHO.packed()))),
        "credit": frame(pack((4, "credit", 1))),
        "cancel": frame(pack((4, "cancel"))),
        "ok": frame(pack((1, "ok", True))),
        "err": frame(pack((1, "err", "no_leader", "No cluster leader"))),
        "rows": frame(b"\x97" + pack(4) + pack_rows(FULL | DONE, 9, (1, 2), [("a", ("a", b"1"))], ["b"])),
    }


def test_the_frames_are_the_golden_ones() -> None:
    golden = GOLDEN / "rpc-frames-2.txt"
    lines = [f"{name} {data.hex()}" for name, data in rpc_frames().items()]
    assert golden.read_text().splitlines() == lines, "a frame changed: older agents and servers would not understand it"


def test_the_frames_of_0_1_0_are_still_understood() -> None:
    frames = dict(line.split() for line in (GOLDEN / "rpc-frames-1.txt").read_text().splitlines())
    ours = rpc_frames()
    for name, text in frames.items():
        data = bytes.fromhex(text)
        if name == "hello":
            assert check_hello(data[4:]).get("level", 1) == 1
        elif name in ("write", "read", "watch", "act"):
            theirs, mine = unpack(data[4:]), unpack(ours[name][4:])
            assert theirs[:-1] == mine[:-1]
            assert read_caller(theirs[-1]) == ANONYMOUS
        else:
            assert data == ours[name]
