"""The TCP check: passing when a connection to host:port opens within the timeout."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from rostra.agent.checks.check import CRITICAL, PASSING, Result


async def run(address: str, timeout_s: float) -> Result:
    """One attempt to connect. Never raises for what the other side does."""
    try:
        host, port = split_address(address)
    except ValueError as error:
        return Result(CRITICAL, str(error))
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        return Result(CRITICAL, describe(error, host, port))
    writer.transport.abort()
    return Result(PASSING, f"TCP connect {address}: Success")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError in the words of Go's dialer."""
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ValueError(f"dial tcp: address {address}: missing port in address")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"dial tcp: address {address}: too many colons in address")
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise ValueError(f"dial tcp: address {port}: invalid port")
    return host or "127.0.0.1", int(port)


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
