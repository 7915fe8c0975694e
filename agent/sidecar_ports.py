"""Which port a sidecar gets that names none: the one that it had before, else the first of the range that nobody has.

`agent/local.py` asks, one at a time. A port is remembered on disk when its sidecar has gone, and goes to another one
only where no other port is free.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Container

from rostra.agent.local_files import Files
from rostra.wire.errors import Conflict


class SidecarPorts:
    """`ports`: the first and the last of the range. `is_busy`: whether something listens at an address and port."""

    def __init__(self, files: Files, ports: tuple[int, int], is_busy: Callable[[str, int], bool]) -> None:
        self._files, self._is_busy = files, is_busy
        self._low, self._high = ports
        self._remembered: dict[str, int] = {}  # sidecar id -> port

    async def load(self) -> None:
        for kept in await self._files.load("sidecar-ports"):
            self._remembered.update(kept.get("ports", {}))

    def choose(self, sidecar_id: str, address: str, taken: set[int]) -> int:
        """`taken`: what registered services have. Raises Conflict when there is none left."""
        known = self._remembered.get(sidecar_id, 0)
        if self._low <= known <= self._high and known not in taken:
            return known
        others = {p for i, p in self._remembered.items() if i != sidecar_id}
        for avoided in (taken | others, taken):
            for port in range(self._low, self._high + 1):
                if port not in avoided and not self._is_busy(address, port):
                    return port
        raise Conflict(
            f"no free port for a sidecar between {self._low} and {self._high} "
            "(ports.sidecar_min_port, sidecar_max_port)"
        )

    async def keep(self, sidecar_id: str, port: int, *, still: Container[str]) -> None:
        """Remember it, durably. When there are more than the range has, only those of `still` are remembered."""
        if self._remembered.get(sidecar_id) == port:
            return
        ports = {i: p for i, p in self._remembered.items() if p != port}
        if len(ports) > self._high - self._low:
            ports = {i: p for i, p in ports.items() if i in still}
        self._remembered = {**ports, sidecar_id: port}
        await self._files.save("sidecar-ports", "all", {"ports": self._remembered})


def port_is_busy_here(address: str, port: int) -> bool:
    """Whether something on this host listens there already. An address of another host is judged by all of ours."""
    try:
        is_v6 = ipaddress.ip_address(address).version == 6
    except ValueError:
        is_v6, address = False, "0.0.0.0"
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
