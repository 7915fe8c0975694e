"""The RPC: requests, answers and streams over one `FrameConnection`. Both sides of it, without knowing what is asked.

Frames are msgpack arrays. From the caller: `[id, verb, *arguments]`; `id` counts up from 1 on each connection.

    [id, "credit", n]      n more chunks of stream `id` may be sent: as many as have been taken, so never more than came
    [id, "cancel"]         the answer of `id` is no longer wanted: once for a request at most

From the server, each carrying the id of its request:

    [id, "ok", value]                                                 the answer
    [id, "err", code, message]                                        refused; codes are those of `errors.py`
    [id, "rows", flags, index, granules, rows, removed]               a chunk of a stream: at most 64 KiB of rows

`flags`: FULL begins a first answer, DONE ends it, END ends the stream. A stream starts with CREDIT_CHUNKS of credit,
so that one slow reader holds at most CREDIT_CHUNKS * CHUNK_BYTES of a server's memory. The first frame each way is a
map, the hello, before any request; see `hello` and `check_hello`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, NoLeader, RostraError, TooLarge, from_wire
from rostra.wire.frames import ANSWER_FRAME_BYTES_MAX, RPC_FRAME_BYTES_MAX, pack, unpack, unpack_first, unpack_request

PROTOCOL_VERSION = 1
#: What the arguments of verbs may be, as far as this program knows; a hello that says nothing is of level 1.
#: 2: `propose` and `act` between servers end with their caller.
LEVEL = 2
CHUNK_BYTES = 64 << 10
CREDIT_CHUNKS = 8
FULL, DONE, END = 1, 2, 4

#: Requests that may be under way on one connection; one more is refused.
REQUESTS_MAX = 16_384
#: Pings and barriers that come at once. An agent has one of each mode under way; one that gets no answer for 7 s asks
#: again each 0.5 s, and leaves a server that has not answered a ping for 0.75 s.
QUESTIONS_AT_ONCE_MAX = 64


def hello(protocol: str, **about: Any) -> bytes:
    """The first frame of a connection. `protocol`: "rpc", "raft" or "bootstrap"."""
    return pack({"rostra": PROTOCOL_VERSION, "level": LEVEL, "protocol": protocol, **about})


def check_hello(payload: bytes) -> dict[str, Any]:
    """The peer's hello. Raises BadRequest where it is not one of ours or speaks a version that we do not know."""
    try:
        message = unpack_first(payload)
    except ValueError as e:
        raise BadRequest(f"the first frame is {e}") from None
    if not isinstance(message, dict) or not isinstance(message.get("rostra"), int):
        raise BadRequest("the first frame is not a Rostra hello")
    if "error" in message:
        code, text = message["error"]
        raise from_wire(str(code), str(text))
    if message["rostra"] != PROTOCOL_VERSION:
        raise BadRequest(
            f"the peer speaks RPC version {message['rostra']}, this program {PROTOCOL_VERSION}; upgrade the older one"
        )
    return message


def hello_error(error: RostraError) -> bytes:
    """A hello that refuses: the caller raises it as its own error."""
    return pack({"rostra": PROTOCOL_VERSION, "error": [error.code, error.message]})


class Chunk:
    """One `rows` frame as the caller sees it."""

    __slots__ = ("flags", "granules", "index", "removed", "rows")

    def __init__(self, flags: int, index: int, granules: Any, rows: Any, removed: Any) -> None:
        self.flags, self.index, self.granules, self.rows, self.removed = flags, index, granules, rows, removed


class Stream:
    """The caller's end of a stream: chunks in order until END, an error or a lost connection."""

    __slots__ = ("_chunks", "_client", "_waiter", "error", "id")

    def __init__(self, client: RpcClient, request_id: int) -> None:
        self._client, self.id = client, request_id
        self._chunks: list[Chunk] = []
        self._waiter: asyncio.Future[None] | None = None
        self.error: RostraError | None = None

    async def next(self) -> Chunk | None:
        """The next chunk; None after the last. Raises the server's error, or NoLeader for a lost connection."""
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self.id not in self._client.streams:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunk = self._chunks.pop(0)
        if self.id in self._client.streams:
            self._client.notify(self.id, "credit", 1)
        return chunk

    def close(self) -> None:
        """Tell the server that the rest is not wanted."""
        if self._client.streams.pop(self.id, None) is not None:
            self._client.notify(self.id, "cancel")
        self._wake()

    def _feed(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RpcClient:
    """The asking side of a connection. The owner has exchanged hellos already and passes frames to `on_frame`."""

    def __init__(
        self, connection: FrameConnection, *, level: Any = LEVEL, request_bytes_max: int = RPC_FRAME_BYTES_MAX
    ) -> None:
        """`level`: what the peer's hello says of itself."""
        self._connection = connection
        self.level = level if type(level) is int else 1
        self._request_bytes_max = request_bytes_max
        self._loop = asyncio.get_running_loop()
        self._next_id = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self.streams: dict[int, Stream] = {}

    @property
    def open(self) -> bool:
        return self._connection.open

    def call(self, verb: str, *arguments: Any) -> asyncio.Future[Any]:
        """Resolves to the answer. Raises the server's error; a lost connection is Lost."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self._connection.open:
            future.set_exception(Lost(was_sent=False))
            return future
        self._next_id += 1
        request = pack((self._next_id, verb, *arguments))
        if len(request) > self._request_bytes_max:  # the server would end the connection, and with it all other work
            future.set_exception(
                TooLarge(f"a request of {len(request)} bytes; at most {self._request_bytes_max} are allowed")
            )
            return future
        self._calls[self._next_id] = future
        self._connection.send(request)
        return future

    def stream(self, verb: str, *arguments: Any) -> Stream:
        self._next_id += 1
        stream = Stream(self, self._next_id)
        if not self._connection.open:
            stream.error = Lost()
            return stream
        self.streams[self._next_id] = stream
        self._connection.send(pack((self._next_id, verb, *arguments)))
        return stream

    def notify(self, request_id: int, verb: str, *arguments: Any) -> None:
        self._connection.send(pack((request_id, verb, *arguments)))

    def on_frame(self, payload: bytes) -> None:
        try:
            message = unpack(payload)
            request_id, kind = message[0], message[1]
        except (ValueError, TypeError, IndexError):
            self._connection.abort("malformed answer")
            return
        if kind == "rows":
            stream = self.streams.get(request_id)
            if stream is not None:
                _, _, flags, index, granules, rows, removed = message
                if flags & END:
                    del self.streams[request_id]
                stream._feed(Chunk(flags, index, granules, rows, removed))
            return
        future = self._calls.pop(request_id, None)
        if future is not None:
            if future.done():
                return
            if kind == "ok":
                future.set_result(message[2])
            else:
                future.set_exception(from_wire(message[2], message[3]))
            return
        stream = self.streams.pop(request_id, None)
        if stream is not None:
            if kind == "err":
                stream.error = from_wire(message[2], message[3])
            stream._wake()

    def on_lost(self, reason: str) -> None:
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(Lost(reason))
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.error = Lost(reason)
            stream._wake()

    def close(self) -> None:
        self._connection.close()


class Lost(NoLeader):
    """The connection went away.

    `was_sent`: whether the request was carried out is unknown, repeat it under the same ids only. Else it was too late
    to send it, and it was certainly not.
    """

    def __init__(self, reason: str = "connection lost", *, was_sent: bool = True) -> None:
        super().__init__(f"No cluster leader: the connection to the server was lost ({reason})")
        self.was_sent = was_sent


class ServedStream:
    """The server's end of a stream: `send` while `credit` lasts, else `await more()`."""

    __slots__ = ("_served", "_waiter", "cancelled", "credit", "id", "on_cancel")

    def __init__(self, served: Served, request_id: int) -> None:
        self._served, self.id = served, request_id
        self.credit = CREDIT_CHUNKS
        self.cancelled = False
        self._waiter: asyncio.Future[None] | None = None
        self.on_cancel: Callable[[], None] | None = None

    def send(self, packed_rest: bytes, *, end: bool = False) -> None:
        """`packed_rest`: what `pack_rows` made; shared by all streams that get the same chunk."""
        if self.cancelled:
            return
        if len(packed_rest) > ANSWER_FRAME_BYTES_MAX - 16:
            on_cancel = self.on_cancel
            self.fail(TooLarge(f"a row of {len(packed_rest)} bytes is too large to be sent"))
            if on_cancel is not None:
                on_cancel()
            return
        self.credit -= 1
        self._served.chunks_untaken += 1
        self._served.connection.send(b"\x97" + pack(self.id) + packed_rest)
        if end:
            self._over()

    def fail(self, error: RostraError) -> None:
        if not self.cancelled:
            self._over()
            self._served.connection.send(pack((self.id, "err", error.code, error.message)))

    def _over(self) -> None:
        self._served.streams.pop(self.id, None)
        self.cancelled = True
        self.on_cancel = None  # it holds who holds this: a cycle, and a core runs without the cyclic collector

    async def more(self) -> bool:
        """Wait for credit. False: cancelled or lost."""
        while self.credit <= 0 and not self.cancelled:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return not self.cancelled

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cancel(self) -> None:
        if not self.cancelled:
            on_cancel = self.on_cancel
            self._over()
            self._wake()
            if on_cancel is not None:
                on_cancel()


def pack_rows(flags: int, index: int, granules: Any, rows: Any, removed: Any) -> bytes:
    """The elements of a `rows` frame behind its id."""
    return b"".join((pack("rows"), pack(flags), pack(index), pack(granules), pack(rows), pack(removed)))


class Served:
    """The answering side of a connection: counts, bounds and routes; `handle(served, id, verb, arguments)` decides."""

    def __init__(
        self,
        connection: FrameConnection,
        handle: Callable[[Served, int, str, Sequence[Any]], None],
        peer: Any = None,
        *,
        unforeseen: Callable[[str, Exception], RostraError] | None = None,
    ) -> None:
        """`unforeseen(verb, error)` is told of what `handle` should not raise, and what the peer is told instead."""
        self.connection = connection
        self.peer = peer
        self._handle = handle
        self._unforeseen = unforeseen
        self._open = 0
        self.request_bytes = 0  # of the request that is being handled
        self.streams: dict[int, ServedStream] = {}
        # What the peer may still send that gets no answer: it pays with what it has asked for and taken.
        self.chunks_untaken = self._cancels_left = 0
        self._asked_in = self._asked_at_once = 0

    def on_frame(self, payload: bytes) -> None:
        try:
            request_id, verb, *arguments = unpack_request(payload)
            if type(request_id) is not int or type(verb) is not str:
                raise ValueError("id or verb of the wrong type")
        except Exception:  # the library raises a dozen types for bad input
            self.connection.abort("malformed request")
            return
        if verb == "credit":
            n = arguments[0] if len(arguments) == 1 and type(arguments[0]) is int else 0
            self.chunks_untaken -= n
            if n < 1 or self.chunks_untaken < 0:
                self.connection.abort("malformed credit: for more chunks than were sent")
                return
            stream = self.streams.get(request_id)
            if stream is not None:
                stream.credit = min(stream.credit + n, CREDIT_CHUNKS)
                stream._wake()
            return
        if verb == "cancel":
            self._cancels_left -= 1
            if self._cancels_left < 0:
                self.connection.abort("malformed cancel: more of them than requests")
                return
            stream = self.streams.pop(request_id, None)
            if stream is not None:
                stream._cancel()
            return
        if request_id in self.streams:
            # The open stream would lose its owner: the end of the connection would not end it, nor any bound count it.
            self.connection.abort("malformed request: the id of an open stream")
            return
        self._cancels_left += 1
        if self._open >= REQUESTS_MAX or len(self.streams) >= REQUESTS_MAX:
            self.connection.send(pack((request_id, "err", "internal", "too many requests on this connection")))
            return
        self._open += 1
        self.request_bytes = len(payload)
        try:
            self._handle(self, request_id, verb, arguments)
        except RostraError as e:
            self.fail(request_id, e)
        except (TypeError, ValueError, IndexError, KeyError) as e:
            # Arguments of the wrong number or type: the peer's mistake, told to the peer.
            self.fail(request_id, BadRequest(f"malformed arguments of {verb}: {e}"))
        except Exception as e:
            if self._unforeseen is None:
                raise
            self.fail(request_id, self._unforeseen(verb, e))

    def count_question(self) -> None:
        """A ping or barrier has come: its answer costs nothing, and the peer is one that waits for it."""
        arrivals = self.connection.arrivals
        if self._asked_in != arrivals:
            self._asked_in, self._asked_at_once = arrivals, 0
        self._asked_at_once += 1
        if self._asked_at_once > QUESTIONS_AT_ONCE_MAX:
            self.connection.abort("too many pings and barriers that wait for no answer")

    def open_stream(self, request_id: int) -> ServedStream:
        self._open -= 1
        stream = self.streams[request_id] = ServedStream(self, request_id)
        return stream

    def reply(self, request_id: int, value: Any) -> None:
        self._open -= 1
        self.connection.send(pack((request_id, "ok", value)))

    def fail(self, request_id: int, error: RostraError) -> None:
        self.refuse(request_id, error.code, error.message)

    def refuse(self, request_id: int, code: str, message: str) -> None:
        self._open -= 1
        self.connection.send(pack((request_id, "err", code, message)))

    def on_lost(self, reason: str) -> None:
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream._cancel()
