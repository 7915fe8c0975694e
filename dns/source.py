"""The port through which DNS sees the catalog, and the values that cross it.

Reading is synchronous and costs nothing at servers: the names of all services come from one watch, so a name that
nobody registered is refused from memory; instances of a service come from a watch that starts when the service is first
asked for (`ServiceView.ready` is the only wait). Views go on answering what they last knew when the servers are gone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

Status = Literal["passing", "warning", "critical"]


def pack_address(address: str) -> bytes:
    """4 or 16 bytes of an IP address, or nothing where `address` is a host name."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError):
        return b""


class Instance:
    """One instance of a service as DNS needs it. Immutable by custom; derived once because it is read often."""

    __slots__ = ("datacenter", "encoded", "has_own_address", "host", "ip", "node", "port", "status", "tags", "weight")

    def __init__(
        self,
        node: str,
        datacenter: str,
        node_address: str,
        *,
        address: str = "",
        port: int = 0,
        tags: Sequence[str] = (),
        status: Status = "passing",
        weight_passing: int = 1,
        weight_warning: int = 1,
    ) -> None:
        self.node = node
        self.datacenter = datacenter
        self.has_own_address = bool(address)
        reached_at = address or node_address
        self.ip = pack_address(reached_at)
        self.host = "" if self.ip else reached_at
        self.port = min(max(port, 0), 65535)
        self.tags = frozenset(tag.lower() for tag in tags)
        self.status = status
        self.weight = min(max(weight_warning if status == "warning" else weight_passing, 0), 65535)
        #: What `answer.py` made of it, by record type and zone: a change of one instance encodes one instance again.
        self.encoded: dict[tuple[int, tuple[str, ...]], object] = {}


class Node:
    """One node: its address and its metadata. `ip` is empty and `host` set where the address is a name."""

    __slots__ = ("datacenter", "host", "ip", "meta", "name")

    def __init__(self, name: str, datacenter: str, address: str, meta: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.datacenter = datacenter
        self.ip = pack_address(address)
        self.host = "" if self.ip else address
        self.meta = dict(meta or {})


class LiveRows(Protocol):
    """Something live: known or not yet, told when it changes."""

    @property
    def is_ready(self) -> bool: ...

    async def ready(self, timeout_s: float) -> bool:
        """Wait until it is known; False when that takes too long."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """`callback()` after every change, on the loop. Keeps the view alive until the returned remover is called."""


class ServiceView(LiveRows, Protocol):
    def instances(self) -> Sequence[Instance]:
        """All instances, the unhealthy ones too."""


class NodesView(LiveRows, Protocol):
    def get(self, name: str) -> Node | None:
        """The node of this name, which is lower case."""

    def has_below(self, name: str) -> bool:
        """Whether a node's name ends in `.` and this lower-case name."""

    def by_address(self, ip: bytes) -> Node | None:
        """A node that has this packed address."""


class AddressesView(LiveRows, Protocol):
    def service_at(self, ip: bytes) -> str:
        """The name of a service of which an instance has this packed address for its own; "" where there is none."""


class Source(Protocol):
    #: Set by the resolver: a source that builds a large service in slices calls `prepare(name, instances)` with each.
    prepare: Callable[[str, Sequence[Instance]], None]

    @property
    def is_ready(self) -> bool:
        """Whether the names of services are known. They stay known when the servers go away."""

    @property
    def age_s(self) -> float:
        """Seconds since the last proof that what is known is current; 0 while connected."""

    def service(self, name: str) -> ServiceView | None:
        """The live view of the service of this lower-case name; None where none is registered."""

    def connect(self, name: str) -> ServiceView | None:
        """As `service`, of what accepts connections of the mesh for it."""

    @property
    def nodes(self) -> NodesView: ...

    @property
    def addresses(self) -> AddressesView: ...
