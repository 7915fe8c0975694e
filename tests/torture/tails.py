"""What a power cut may leave behind the end of a journal: a torn, a zeroed or a garbage tail, in the last segment.

And beside it, files that were not finished. Only bytes after the last whole frame are touched: all that was synced, and
so all that was promised, lies before. The layout is read here without the product's code (frame: length, CRC seeded
with the place, body), so that a journal which misreads itself is not believed.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

HEADER_BYTES = 512
TORN, ZEROED, GARBAGE, OLD = "torn", "zeroed", "garbage", "old blocks"
KINDS = (TORN, ZEROED, GARBAGE, OLD)
SECTOR = 512
_FRAME = struct.Struct("<II")
_ENTRY = struct.Struct("<BQQ")


def last_segment(directory: Path) -> Path:
    return max(directory.glob("journal-" + "[0-9]" * 8))


def end_of(data: bytes, number: int) -> int:
    """Where the whole frames of a segment end."""
    salt = zlib.crc32(struct.pack("<Q", number)) if int.from_bytes(data[8:12], "little") >= 2 else 0
    at = HEADER_BYTES
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if not 0 < length == len(body) or zlib.crc32(body, salt ^ (at & 0xFFFFFFFF)) != crc:
            break
        at += _FRAME.size + length
    return at


def spoil(directory: Path, kind: str, rng: random.Random) -> str:
    """Write such a tail behind the journal in `directory`, whose server is dead. What was done, in words."""
    path = last_segment(directory)
    data = path.read_bytes()
    end = end_of(data, int(path.name.rpartition("-")[2]))
    others = [other.read_bytes() for other in sorted(directory.glob("journal-*")) if other != path]
    tail = _tail(kind, data[:end], others, rng)[: max(0, len(data) - end)]
    with path.open("r+b") as file:
        file.seek(end)
        file.write(tail)
    leave_behind(directory, rng)
    return f"{len(tail)} bytes ({kind}) at {end} of {path.name}"


def leave_behind(directory: Path, rng: random.Random) -> None:
    """Files that were never finished or, while a snapshot came in, not synced to their end: nobody was told of them."""
    following = int(last_segment(directory).name.rpartition("-")[2]) + 1
    for name in (f"journal-{following:08d}.new", "snapshot-taking.new"):
        if rng.random() < 0.5:
            (directory / name).write_bytes(rng.randbytes(rng.choice([0, 100, 100_000])))
    for path in directory.glob("incoming-*"):
        with path.open("r+b") as file:
            file.seek(max(0, path.stat().st_size - rng.choice([1, 5000, 200_000])))
            file.write(rng.randbytes(100))


def _tail(kind: str, before: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    content = rng.randbytes(rng.choice([40, 700, 5000, 60_000]))
    body = _ENTRY.pack(1, 1 << 40, 1) + content + b"\xff"  # zeros cannot complete it
    frame = _FRAME.pack(len(body), zlib.crc32(body, len(before) & 0xFFFFFFFF)) + body
    if kind == TORN:  # the first bytes arrived, and the last ones did not
        cut = rng.randrange(1, len(frame))
        return frame[:cut]
    if kind == ZEROED:  # some sectors arrived and one between them did not
        sectors = [bytearray(frame[i : i + SECTOR]) for i in range(0, len(frame), SECTOR)]
        lost = rng.randrange(len(sectors))
        sectors[lost][:] = bytes(len(sectors[lost]))
        if lost == 0 and len(sectors) == 1:
            return b"\0" * 8 + frame[8:-1]
        return b"".join(sectors)
    if kind == GARBAGE:
        return rng.randbytes(rng.choice([1, 7, 100, 4096, 100_000]))
    # What lay on these blocks before: frames of elsewhere, or of the same place in another segment.
    if others and rng.random() < 0.5 and len(other := rng.choice(others)) > len(before):
        return other[len(before) : len(before) + 8192]
    start = rng.randrange(max(1, len(before) - 4096))
    return before[start : start + 8192]
