"""What a peer may say of itself and ask: the parts of hellos and requests that every verb has, read with their bounds.

All raise BadRequest for what is not what it should be. Pure functions of what came.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rostra.wire.caller import Caller, read_caller
from rostra.wire.errors import BadRequest

_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,253}")


@dataclass(slots=True, eq=False)
class Peer:
    """Who is at the other end, proven by TLS or by the kernel, never by what the hello says."""

    key_hash: str  # "" on the Unix socket
    address: str
    local: bool = False
    public_key: bytes = b""  # DER; its hash is `key_hash`
    #: "server" only for a connection between servers; what an agent says of its role decides nothing
    role: str = "client"
    name: str = ""
    node_id: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    clients: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class About:
    """What the hello of an agent says of its node, checked."""

    datacenter: str
    address: str
    serf_port: int
    version: str


def about_node(message: dict[str, Any], own_datacenter: str, seen_address: str) -> About:
    """The parts of an agent's hello. Raises BadRequest for what is not what it should be."""
    address = text_in(message, "address", 253) or seen_address
    try:
        ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        if not _HOST_NAME.fullmatch(address):
            raise BadRequest(f"address {address!r} is neither an IP address nor a host name") from None
    port = message.get("serf_port", 8301)
    if type(port) is not int or not 0 < port < 65536:
        raise BadRequest("serf_port is not a port")
    return About(text_in(message, "datacenter", 64) or own_datacenter, address, port, text_in(message, "version", 64))


def caller_of_peer(caller: Sequence[Any]) -> Caller | None:
    """For whom another server asks: for itself where it names nobody, as servers up to 0.1.0 never do."""
    return None if not caller or caller[0] is None else read_caller(caller[0])


def index_in(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadRequest("an index is a number from 0 on")
    return value


def text_in(message: dict[str, Any], name: str, chars_max: int) -> str:
    value = message.get(name, "")
    if value is None:
        return ""
    if type(value) is not str or len(value) > chars_max or not value.isprintable():
        raise BadRequest(f"the hello's {name} is not a text of at most {chars_max} characters")
    return value


def origin_in(origin: Any) -> tuple[str, int, int]:
    client, sequence, first = origin
    if type(client) is not str or type(sequence) is not int or type(first) is not int:
        raise BadRequest("malformed origin of a write")
    if not 0 <= first <= sequence <= _SEQUENCE_MAX:
        raise BadRequest("malformed origin of a write")
    if not 0 < len(client) <= 64:
        raise BadRequest("a client's id has 1 to 64 characters")
    return origin  # type: ignore[no-any-return]


_SEQUENCE_MAX = (1 << 63) - 1
