"""Frames: how messages are cut out of a byte stream. Sans-IO, no knowledge of what is inside.

    frame := length (u32, big-endian, of the payload) payload

A payload is one msgpack array. The length is bounded by the reader before anything is allocated: a peer that announces
more is disconnected (`FrameTooLarge`), so that one number cannot make this process ask for 4 GiB.
"""

from __future__ import annotations

from typing import Any

import msgpack

HEADER_BYTES = 4
#: Requests of the RPC.
RPC_FRAME_BYTES_MAX = 1 << 20
#: A request that a server passes on, with what it adds to it.
PEER_FRAME_BYTES_MAX = RPC_FRAME_BYTES_MAX + (64 << 10)
#: Answers of the RPC. They are streamed in chunks far below it, but a row is never cut.
ANSWER_FRAME_BYTES_MAX = 16 << 20
#: One append_entries message; the group commit keeps a log entry far below it.
RAFT_FRAME_BYTES_MAX = 16 << 20


class FrameTooLarge(Exception):
    """The peer announced a frame above the reader's bound."""


class FrameDecoder:
    """Feed it bytes as they come; it gives whole payloads back."""

    __slots__ = ("_bytes_max", "_data")

    def __init__(self, bytes_max: int = RPC_FRAME_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._data = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """All payloads completed by `data`. Raises FrameTooLarge."""
        buffer = self._data
        buffer += data
        payloads: list[bytes] = []
        at, size = 0, len(buffer)
        while size - at >= HEADER_BYTES:
            length = int.from_bytes(buffer[at : at + HEADER_BYTES], "big")
            if length > self._bytes_max:
                raise FrameTooLarge(f"frame of {length} bytes, at most {self._bytes_max} allowed")
            end = at + HEADER_BYTES + length
            if end > size:
                break
            payloads.append(bytes(buffer[at + HEADER_BYTES : end]))
            at = end
        if at:
            del buffer[:at]
        return payloads

    @property
    def buffered(self) -> int:
        return len(self._data)

    def raise_bound(self, bytes_max: int) -> None:
        """After the hello a connection may turn into one with larger frames (Raft)."""
        self._bytes_max = bytes_max


def frame(payload: bytes) -> bytes:
    """`payload` with its length before it."""
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def pack(message: Any) -> bytes:
    """A message as msgpack; str and bytes stay apart, tuples become arrays."""
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def unpack(payload: bytes) -> Any:
    """The message in `payload`, arrays as tuples. Raises ValueError on anything that is not exactly one message."""
    try:
        return msgpack.unpackb(payload, use_list=False, strict_map_key=False)
    except Exception as e:  # the library raises a dozen types for bad input
        raise ValueError(f"not a msgpack message: {type(e).__name__}") from None
