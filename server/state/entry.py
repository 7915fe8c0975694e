"""An entry of the log: one command, who asked for it, and in which cluster it is valid. On disk for ever.

    [1, cluster_id, [client_id, sequence, first_outstanding], at_ms, actor, source, kind, {field: value}]   (msgpack)

(client_id, sequence) names one attempt to write, however often it is proposed; `first_outstanding` is the lowest
sequence whose result that client may still ask for. `at_ms`, `actor` and `source` are for people, nothing depends on
them. A Raft entry carries a msgpack array of these byte strings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from rostra.wire.codec import encode_value
from rostra.wire.errors import BadRequest

FORMAT = 1

#: The bytes of an entry whose parts are known to be good, see `encode_args`.
pack_entry: Callable[[tuple[Any, ...]], bytes] = msgpack.Packer(use_bin_type=True).pack
_unpack = msgpack.unpackb


class UnknownEntry(Exception):
    """An entry that this version cannot apply. Guessing would make servers differ, so the process has to stop."""


class Entry(NamedTuple):
    cluster_id: str
    client_id: str  # "": an entry that nobody repeats
    sequence: int
    first_outstanding: int
    at_ms: int
    actor: str
    source: str
    kind: str
    args: dict[str, Any]


def encode_entry(
    command: Any,
    *,
    cluster_id: str,
    client: tuple[str, int, int] = ("", 0, 0),
    at_ms: int = 0,
    actor: str = "",
    source: str = "",
) -> bytes:
    """The bytes that go into the log for `command`."""
    kind, args = encode_value(command)
    return encode_args(kind, args, cluster_id=cluster_id, client=client, at_ms=at_ms, actor=actor, source=source)


def encode_args(
    kind: str,
    args: dict[str, Any],
    *,
    cluster_id: str,
    client: tuple[str, int, int],
    at_ms: int,
    actor: str,
    source: str,
) -> bytes:
    """As `encode_entry`, from fields that a client has encoded already. Raises BadRequest: no such bytes may get in."""
    client_id, sequence, first_outstanding = client
    if type(client_id) is not str or type(sequence) is not int or type(first_outstanding) is not int:
        raise BadRequest("a client is named by a string and two integers")
    if not 0 <= first_outstanding <= sequence < 1 << 63:
        raise BadRequest("a sequence number must not be below the first outstanding one")
    return pack_entry((FORMAT, cluster_id, client, at_ms, actor, source, kind, args))


def read_entry(data: bytes) -> tuple[str, tuple[str, int, int], int, str, str, dict[str, Any]]:
    """(cluster_id, client, at_ms, actor, kind, args) of an entry: `decode_entry` for the one who reads all of them."""
    try:
        format_, cluster_id, client, at_ms, actor, _, kind, args = _unpack(data, use_list=False, strict_map_key=False)
        client_id, sequence, first = client
    except Exception:
        raise _refused(data) from None
    if format_ != FORMAT or type(client_id) is not str or type(sequence) is not int or type(first) is not int:
        raise _refused(data)
    return cluster_id, client, at_ms, actor, kind, args


def decode_entry(data: bytes) -> Entry:
    """The entry in `data`. Raises UnknownEntry on anything but the known format."""
    try:
        parts = _unpack(data, use_list=False, strict_map_key=False)
    except Exception as e:
        raise UnknownEntry(f"a log entry is no msgpack message: {type(e).__name__}") from None
    if type(parts) is not tuple or not parts or parts[0] != FORMAT:
        shown = parts[0] if type(parts) is tuple and parts else type(parts).__name__
        raise UnknownEntry(f"a log entry has format {shown!r}, this version knows {FORMAT}: a newer version wrote it")
    try:
        _, cluster_id, (client_id, sequence, first_outstanding), at_ms, actor, source, kind, args = parts
    except (ValueError, TypeError):
        raise UnknownEntry("a log entry of format 1 does not have the parts of format 1") from None
    if type(client_id) is not str or type(sequence) is not int or type(first_outstanding) is not int:
        raise UnknownEntry("a log entry names its client in an unknown way")
    return Entry(cluster_id, client_id, sequence, first_outstanding, at_ms, actor, source, kind, args)


def _refused(data: bytes) -> UnknownEntry:
    """What `decode_entry` says of an entry that it cannot read."""
    try:
        entry = decode_entry(data)
    except UnknownEntry as e:
        return e
    raise AssertionError(f"an entry that can be read: {entry.kind}")
