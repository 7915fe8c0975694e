"""Hosts on a switch: one network namespace each, and what the switch does not let through.

To be used inside namespaces of one's own (`__main__.py` makes them): the bridge lies in the caller's network, all of it
is gone with the last process. Who is cut off from whom is a set of pairs of ports at the bridge, so faults that overlap
add up. Only IP is dropped: who cannot be reached is silent, nothing is refused and no connection closed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable

CLONE_NEWNET = 0x40000000
NETWORK = "10.79.0."
TABLE = """table bridge torture {
  set blocked { type ifname . ifname; }
  chain forward {
    type filter hook forward priority 0
    ether type ip iifname . oifname @blocked drop
  }
}
"""

Pairs = frozenset[tuple[str, str]]
_libc = ctypes.CDLL(None, use_errno=True)


def _run(*argv: str, stdin: str = "") -> None:
    done = subprocess.run(argv, input=stdin, text=True, capture_output=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def enter(namespace_fd: int) -> None:
    """The calling thread's sockets belong to that namespace from now on."""
    if _libc.setns(namespace_fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """`hosts` on one bridge. Addresses are NETWORK + 11, 12, …"""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.addresses = {host: f"{NETWORK}{11 + i}" for i, host in enumerate(hosts)}
        self._blocked: Counter[tuple[str, str]] = Counter()
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "br0", "type", "bridge")
        _run("ip", "link", "set", "br0", "up")
        for host, address in self.addresses.items():
            _run("ip", "netns", "add", host)
            _run("ip", "link", "add", _port(host), "type", "veth", "peer", "name", "eth0", "netns", host)
            _run("ip", "link", "set", _port(host), "master", "br0", "up")
            _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", host, "link", "set", "eth0", "up")
            _run("ip", "-n", host, "link", "set", "lo", "up")
            self._fds[host] = os.open(f"/run/netns/{host}", os.O_RDONLY | os.O_CLOEXEC)
        _run("nft", "-f", "-", stdin=TABLE)

    def close(self) -> None:
        for host, fd in self._fds.items():
            os.close(fd)
            _run("ip", "netns", "del", host)
        _run("nft", "delete table bridge torture")
        _run("ip", "link", "del", "br0")

    def fd(self, host: str) -> int:
        return self._fds[host]

    def socket_of(self, host: str) -> socket.socket:
        """A TCP socket of that host. A socket belongs to where its thread was when it was made."""
        made: list[socket.socket | BaseException] = []

        def make() -> None:
            try:
                enter(self._fds[host])
                made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            except BaseException as e:
                made.append(e)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], BaseException):
            raise made[0]
        return made[0]

    # -- faults

    def block(self, pairs: Pairs) -> None:
        """What the first of a pair sends does not reach the second."""
        self._change(lambda: self._blocked.update(pairs))

    def unblock(self, pairs: Pairs) -> None:
        self._change(lambda: self._blocked.subtract(pairs))

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            before = +self._blocked
            change()
            after = +self._blocked
            lines = [f"add element bridge torture blocked {{ {_element(p)} }}" for p in after if p not in before]
            lines += [f"delete element bridge torture blocked {{ {_element(p)} }}" for p in before if p not in after]
            if lines:
                _run("nft", "-f", "-", stdin="\n".join(lines) + "\n")

    def unplug(self, host: str) -> None:
        _run("ip", "link", "set", _port(host), "down")

    def plug(self, host: str) -> None:
        _run("ip", "link", "set", _port(host), "up")


def _port(host: str) -> str:
    return f"p-{host}"


def _element(pair: tuple[str, str]) -> str:
    return f'"{_port(pair[0])}" . "{_port(pair[1])}"'


def between(some: Iterable[str], others: Iterable[str]) -> Pairs:
    """Both directions."""
    return one_way(some, others) | one_way(others, some)


def one_way(senders: Iterable[str], receivers: Iterable[str]) -> Pairs:
    receivers = list(receivers)
    return frozenset((a, b) for a in senders for b in receivers)
