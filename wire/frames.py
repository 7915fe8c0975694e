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
#: Arrays and maps in one request, and what is in them; below so many bytes nobody counts.
CONTAINERS_MAX, ITEMS_MAX, _COUNTED_BYTES = 20_000, 20_000, 16 << 10
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
    """Feed it bytes as they come and take whole payloads out, one by one: what waits costs its bytes only."""

    __slots__ = ("_at", "_bytes_max", "_data", "_unfinished")

    def __init__(self, bytes_max: int = RPC_FRAME_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._data, self._at = b"", 0
        self._unfinished = bytearray()  # one frame's beginning; only while `_data` has no frame left

    def feed(self, data: bytes) -> None:
        unfinished = self._unfinished
        if unfinished:
            unfinished += data
            if self._lacks(unfinished) > 0:
                return
            data = bytes(unfinished)
            unfinished.clear()
        elif self._at < len(self._data):
            data = self._data[self._at :] + data
        self._data, self._at = data, 0

    def take(self) -> bytes | None:
        """The next payload, or None until more bytes come. Raises FrameTooLarge."""
        data, at = self._data, self._at
        if len(data) - at >= HEADER_BYTES:
            (length,) = _length(data, at)
            at += HEADER_BYTES
            end = at + length
            if end <= len(data) and length <= self._bytes_max:
                self._at = end
                return data[at:end]
        if self._at < len(data):
            self._unfinished += data[self._at :] if self._at else data
            self._data, self._at = b"", 0
        self._lacks(self._unfinished)
        return None

    def _lacks(self, unfinished: bytearray) -> int:
        """How many bytes the frame needs that begins there; 0 or less: none. Raises FrameTooLarge."""
        if len(unfinished) < HEADER_BYTES:
            return HEADER_BYTES - len(unfinished)
        (length,) = _length(unfinished)
        if length > self._bytes_max:
            raise FrameTooLarge(f"frame of {length} bytes, at most {self._bytes_max} allowed")
        return HEADER_BYTES + int(length) - len(unfinished)

    def payloads(self, data: bytes) -> list[bytes]:
        """Feed, and all that is complete then: for those who trust their peer. Raises FrameTooLarge."""
        self.feed(data)
        return list(iter(self.take, None))

    @property
    def buffered(self) -> int:
        """The bytes that were not taken yet."""
        return len(self._data) - self._at + len(self._unfinished)

    def clear(self) -> None:
        """Forget what has come and was not taken."""
        self._data, self._at = b"", 0
        self._unfinished.clear()

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

    1 MiB of empty maps would take 80 MB and hold the loop for 170 ms, 1 MiB of short texts for 150 ms; an honest large
    request has one large value. The names in a map are texts or bytes: the hashes of arrays and numbers can be made
    equal, and a map of 4,500 of them takes two seconds, here and wherever the log is read.
    """
    if len(payload) <= _COUNTED_BYTES:
        return msgpack.unpackb(payload, use_list=False, strict_map_key=True)
    containers, items = CONTAINERS_MAX, ITEMS_MAX

    def count(container: Any) -> Any:
        nonlocal containers, items
        containers -= 1
        items -= len(container)
        if containers < 0 or items < 0:
            raise ValueError(f"more than {CONTAINERS_MAX} arrays and maps, or {ITEMS_MAX} items in them")
        return container

    return msgpack.unpackb(
        payload,
        use_list=False,
        strict_map_key=True,
        list_hook=count,
        object_hook=count,
        max_array_len=ITEMS_MAX,
        max_map_len=ITEMS_MAX,
    )


def unpack_first(payload: bytes) -> Any:
    """As `unpack`, of a peer who may mean harm."""
    try:
        return unpack_request(payload)
    except Exception as e:
        raise ValueError(f"not a msgpack message: {type(e).__name__}") from None


def unpack(payload: bytes) -> Any:
    """The message in `payload`, arrays as tuples. Raises ValueError on anything that is not exactly one message."""
    try:
        return msgpack.unpackb(payload, use_list=False, strict_map_key=False)
    except Exception as e:  # the library raises a dozen types for bad input
        raise ValueError(f"not a msgpack message: {type(e).__name__}") from None
