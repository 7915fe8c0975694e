"""A connection that carries frames: the asyncio side of `frames.py`, for RPC and Raft alike.

Sends are joined and written once per turn of the loop, so that the answers of a batch cost one system call. The owner
sets `on_frame(payload)` and `on_lost(reason)`; both run on the loop and must not block. `on_lost` runs exactly once,
after the last frame. A peer's frames get their share of each turn (`turns.py`); while the rest waits, in its order,
nothing more is read, so what waits is at most what the transport gave at once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from rostra.wire.frames import HEADER_BYTES, RPC_FRAME_BYTES_MAX, FrameDecoder, FrameTooLarge
from rostra.wire.turns import CLUSTER, turns

#: A peer that takes nothing while this much waits for it is dropped: memory is bounded, and it will reconnect.
BACKLOG_BYTES_MAX = 64 << 20


class FrameConnection(asyncio.Protocol):
    """One peer. Usable with `loop.create_connection`, `create_server`, `create_unix_*`, with or without `ssl=`."""

    def __init__(
        self,
        on_frame: Callable[[bytes], None] | None = None,
        on_lost: Callable[[str], None] | None = None,
        *,
        on_made: Callable[[FrameConnection], None] | None = None,
        frame_bytes_max: int = RPC_FRAME_BYTES_MAX,
    ) -> None:
        self.on_frame = on_frame
        self.on_lost = on_lost
        self._on_made = on_made
        self._decoder = FrameDecoder(frame_bytes_max)
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False
        self._lost = False
        self._turns = turns()
        self._waits = False  # for its turn, with frames; nothing is read meanwhile
        self._end_reason = ""  # why there will be no more bytes, while what came before is not handled yet
        #: How often bytes have come: what came at once was sent before any of it was answered.
        self.arrivals = 0
        #: When the peer last said something, in the loop's time.
        self.heard_at = self._loop.time()
        self.writable = asyncio.Event()
        self.writable.set()

    # -- what the owner calls -----------------------------------------------------------------------------------

    def send(self, payload: bytes) -> None:
        """Queue one frame. Silently dropped on a lost connection: `on_lost` has told the owner already."""
        if self._lost or self._transport is None:
            return
        self._out.append(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is queued now instead of at the end of this turn of the loop."""
        self._flush_scheduled = False
        if not self._out or self._lost or self._transport is None:
            return
        data = b"".join(self._out) if len(self._out) > 1 else self._out[0]
        self._out.clear()
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > BACKLOG_BYTES_MAX:
            self.abort("peer does not read")

    def close(self) -> None:
        """Flush, then close. Bytes that were not handled yet are dropped."""
        self.flush()
        self._decoder.clear()
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str = "aborted") -> None:
        """Drop the connection and everything queued on it."""
        if self._transport is not None:
            self._transport.abort()
        self._gone(reason)

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._lost

    @property
    def queued_bytes(self) -> int:
        waiting = sum(map(len, self._out))
        return waiting + (self._transport.get_write_buffer_size() if self.open and self._transport else 0)

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        return self.info("ssl_object")  # type: ignore[no-any-return]

    def info(self, name: str) -> Any:
        """The transport's `get_extra_info`: "peername", "socket", "ssl_object"."""
        return self._transport.get_extra_info(name) if self._transport is not None else None

    def raise_bound(self, frame_bytes_max: int) -> None:
        self._decoder.raise_bound(frame_bytes_max)

    def is_of_the_cluster(self) -> None:
        """The peer is one of our own cluster, and no agent of another host: its frames wait for nobody else's."""
        self._turns = turns(CLUSTER)

    # -- what asyncio calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self.arrivals += 1
        self._decoder.feed(data)
        if self._waits:
            return
        if not (self._turns.begin() and self._handle()):
            self._waits = True
            if self._transport is not None and not self._transport.is_closing():
                self._transport.pause_reading()
            self._turns.queue(self._go_on)

    def _handle(self) -> bool:
        """Handle what has come, as far as there is room in this turn. Whether that was all."""
        decoder, room = self._decoder, self._turns.room
        try:
            while (payload := decoder.take()) is not None:
                if self.on_frame is not None:  # it may be another one after each frame
                    self.on_frame(payload)
                if self._lost:
                    return True
                if not room() and decoder.buffered:
                    return False
        except FrameTooLarge as e:
            self.abort(str(e))
        return True

    def _go_on(self) -> None:
        """Our turn has come."""
        if self._lost:
            return
        self.heard_at = self._loop.time()  # it was we who did not listen
        try:
            if not self._handle():
                self._turns.queue(self._go_on)
                return
        except BaseException:
            self.abort("failed")
            raise
        self._waits = False
        if self._end_reason:
            self._gone(self._end_reason)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        # It holds us as its protocol: a cycle, with all of TLS in it, and a core runs without the cyclic collector.
        self._transport = None
        reason = str(exc) if exc else "closed by the peer"
        if self._waits:
            self._end_reason = reason
        else:
            self._gone(reason)

    def _gone(self, reason: str) -> None:
        if self._lost:
            return
        self._lost = True
        self._out.clear()
        self.writable.set()
        on_lost = self.on_lost
        self.on_frame = self.on_lost = self._on_made = None  # closures that hold us: cycles too
        self._decoder.clear()
        if on_lost is not None:
            on_lost(reason)
