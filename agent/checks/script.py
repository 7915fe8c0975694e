"""The script check: a program's exit status, run under `wrapper.py` so that it dies with the agent.

Exit 0 is passing, 1 is warning, everything else critical. No shell is involved. The agent and the wrapper hold the ends
of a socket pair: the answer comes over it, and closing it ends the script. The wrapper is started from a worker thread,
because starting a process takes longer than a step of the loop may.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

from rostra.agent.checks.check import CRITICAL, PASSING, WARNING, Result, cap_captured
from rostra.agent.checks.spec import CheckSpec

_WRAPPER = Path(__file__).with_name("wrapper.py")
_GRACE_S = 5.0  # the wrapper ends the script at the timeout; only a wrapper that hangs needs this


async def run(spec: CheckSpec) -> Result:
    """One run of the script; when this task is cancelled, the script is killed."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    writer: asyncio.StreamWriter | None = None
    try:
        try:
            process = await asyncio.to_thread(_start, spec, theirs)
        except (OSError, ValueError) as error:  # the latter: an argument that no program can be given
            return Result(CRITICAL, f"cannot start a script: {error}")
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(spec.timeout_s + _GRACE_S):
                answer = await reader.read()
        except TimeoutError:
            process.kill()
            answer = b""
        await asyncio.to_thread(process.wait)
    finally:
        ours.close() if writer is None else writer.transport.abort()
    return _result(answer, spec)


def _start(spec: CheckSpec, theirs: socket.socket) -> subprocess.Popen[bytes]:
    with theirs:
        fd = theirs.fileno()
        head = [sys.executable, "-I", "-S", str(_WRAPPER), str(fd), str(spec.timeout_s), str(spec.output_bytes_max)]
        return subprocess.Popen(
            [*head, *spec.args],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _result(answer: bytes, spec: CheckSpec) -> Result:
    head, newline, tail = answer.partition(b"\n")
    if not newline:
        return Result(CRITICAL, "the script's wrapper ended without an answer")
    code, timed_out, total = (int(part) for part in head.split())
    output = cap_captured(tail, total)
    if timed_out:
        return Result(CRITICAL, f"Timed out ({spec.timeout_s:g}s) running check\n\n{output}")
    return Result({0: PASSING, 1: WARNING}.get(code, CRITICAL), output)
