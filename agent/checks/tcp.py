"""The TCP check: passing when a connection to host:port opens within the timeout."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket

from rostra.agent.checks.check import CRITICAL, PASSING, Result
from rostra.agent.checks.spec import CheckSpec


async def run(spec: CheckSpec) -> Result:
    """One attempt to connect. Never raises for what the other side does."""
    address = spec.tcp
    try:
        host, name = split_address(address)
        number = port_number(name)
        port = await asyncio.to_thread(_service_port, name) if number is None else number
    except ValueError as error:
        return Result(CRITICAL, str(error))
    try:
        async with asyncio.timeout(spec.timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        return Result(CRITICAL, describe(error, host, port))
    writer.transport.abort()
    return Result(PASSING, f"TCP connect {address}: Success")


def split_address(address: str) -> tuple[str, str]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError in the words of Go's dialer."""
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ValueError(f"dial tcp: address {address}: missing port in address")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"dial tcp: address {address}: too many colons in address")
    return host or "127.0.0.1", port


def port_number(port: str) -> int | None:
    """The number that `port` is, none at all being 0; None for the name of a service. Raises ValueError for no port."""
    if not port:
        return 0
    if not re.fullmatch(r"[+-]?[0-9]+", port):
        return None
    if len(port) > 10 or not 0 <= int(port) <= 65535:
        raise ValueError(f"dial tcp: address {port}: invalid port")
    return int(port)


def _service_port(name: str) -> int:
    """By /etc/services, which small images lack. Raises ValueError."""
    try:
        return socket.getservbyname(name.lower(), "tcp")
    except (OSError, ValueError):
        known = _SERVICES.get(name.lower())
        if known is None:
            raise ValueError(f"dial tcp: address tcp/{name}: unknown port") from None
        return known


_SERVICES = {"domain": 53, "ftp": 21, "ftps": 990, "http": 80, "https": 443, "imap2": 143, "imap3": 220, "imaps": 993}
_SERVICES |= {"pop3": 110, "pop3s": 995, "smtp": 25, "ssh": 22, "telnet": 23}


def describe(error: BaseException, host: str, port: int) -> str:
    """Why a connection did not open, in the words that operators know from Consul's checks."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(error, socket.gaierror):
        return f"dial tcp: lookup {host}: no such host"
    if isinstance(error, TimeoutError) and error.errno is None:
        return f"dial tcp {target}: i/o timeout"
    if isinstance(error, OSError):
        number = error.errno
        if number is None or number < 0 or number not in errno.errorcode:
            return f"dial tcp {target}: connect: {str(error).lower()}"
        return f"dial tcp {target}: connect: {os.strerror(number).lower()}"
    return f"dial tcp {target}: {error}"
