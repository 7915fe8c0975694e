"""Frames: how messages are cut out of a byte stream. Sans-IO, no knowledge of what is inside.

    frame := length (u32, big-endian, of the payload) payload

A payload is one msgpack array. The length is bounded by the reader before anything is allocated: a peer that announces
more is disconnected (`FrameTooLarge`), so that one number cannot make this process ask for 4 GiB.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

HEADER_BYTES = 4
_length = struct.Struct(">I").unpack_from
#: Arrays and maps in one request; below so many bytes nobody counts.
CONTAINERS_MAX, _COUNTED_BYTES = 20_000, 16 << 10
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
        if buffer:
            buffer += data
            if not self._is_whole(buffer):
                return []
            data = bytes(buffer)
            buffer.clear()
        payloads: list[bytes] = []
        at, size, bytes_max = 0, len(data), self._bytes_max
        while size - at >= HEADER_BYTES:
            (length,) = _length(data, at)
            end = at + HEADER_BYTES + length
            if end > size or length > bytes_max:
                break
            payloads.append(bytes(data[at + HEADER_BYTES : end]))
            at = end
        if at < size:
            buffer += data[at:]
            self._is_whole(buffer)
        return payloads

    def _is_whole(self, buffer: bytearray) -> bool:
        """Whether the first frame of `buffer` is complete. Raises FrameTooLarge as soon as its length is there."""
        if len(buffer) < HEADER_BYTES:
            return False
        (length,) = _length(buffer)
        if length > self._bytes_max:
            raise FrameTooLarge(f"frame of {length} bytes, at most {self._bytes_max} allowed")
        return len(buffer) >= HEADER_BYTES + int(length)

    @property
    def buffered(self) -> int:
        return len(self._data)

    def clear(self) -> None:
        """Forget what has come of an unfinished frame."""
        self._data.clear()

    def raise_bound(self, bytes_max: int) -> None:
        """After the hello a connection may turn into one with larger frames (Raft)."""
        self._bytes_max = bytes_max


def frame(payload: bytes) -> bytes:
    """`payload` with its length before it."""
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def pack(message: Any) -> bytes:
    """A message as msgpack; str and bytes stay apart, tuples become arrays."""
    packed: bytes = _packer.pack(message)
    if len(packed) > _KEPT_BYTES:
        _packer.reset_buffer()
    return packed


class _Packer:
    """One packer for all messages: to make one costs more than to pack a short message."""

    def __init__(self) -> None:
        self.reset_buffer()

    def reset_buffer(self) -> None:
        """Packers keep their buffer as large as it ever was."""
        self.pack = msgpack.Packer(use_bin_type=True).pack


_KEPT_BYTES = 1 << 20
_packer = _Packer()


def unpack_request(payload: bytes) -> Any:
    """The message in `payload` of a peer who may mean harm. Raises whatever the library raises, and ValueError.

    1 MiB of empty maps would take 80 MB and hold the loop for 170 ms; what is large in an honest request is one value.
    """
    if len(payload) <= _COUNTED_BYTES:
        return msgpack.unpackb(payload, use_list=False, strict_map_key=False)
    left = CONTAINERS_MAX

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {CONTAINERS_MAX} arrays and maps")
        return container

    return msgpack.unpackb(payload, use_list=False, strict_map_key=False, list_hook=count, object_hook=count)


def unpack(payload: bytes) -> Any:
    """The message in `payload`, arrays as tuples. Raises ValueError on anything that is not exactly one message."""
    try:
        return msgpack.unpackb(payload, use_list=False, strict_map_key=False)
    except Exception as e:  # the library raises a dozen types for bad input
        raise ValueError(f"not a msgpack message: {type(e).__name__}") from None
