"""A child process that dies with its parent: both hold an end of one socketpair.

The socket carries a few messages at start (config down, readiness up); after that its only meaning is that it is open.
End of file at the child means that the parent is gone, however it went, and a thread of its own (not the loop, which
may be busy) ends the process. The parent makes no session and no process group; the child ignores SIGINT, because the
parent stops it in order. Messages are frames of `wire/frames.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rostra.wire.frames import RPC_FRAME_BYTES_MAX, FrameDecoder, FrameTooLarge, frame, pack, unpack

#: How a child is told its end of the socketpair.
FLAG = "-lifeline-fd"


class LifelineClosed(Exception):
    """The other side is gone."""


# -- the child's side ------------------------------------------------------------------------------------------------


class Lifeline:
    """The child's end. First `receive` and `send` as needed (blocking, before the loop runs), then `watch`."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`. SIGINT is ignored from here on when called by the main thread."""
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self._socket.setblocking(True)
        self._decoder = FrameDecoder(RPC_FRAME_BYTES_MAX)
        self._received: deque[bytes] = deque()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def receive(self, timeout_s: float | None = 30.0) -> Any:
        """The parent's next message. Raises LifelineClosed, TimeoutError."""
        self._socket.settimeout(timeout_s)
        try:
            while not self._received:
                data = self._socket.recv(65536)
                if not data:
                    raise LifelineClosed("the parent is gone")
                self._received.extend(self._decoder.payloads(data))
        except (ConnectionError, FrameTooLarge) as e:
            raise LifelineClosed(str(e)) from None
        finally:
            self._socket.settimeout(None)
        return unpack(self._received.popleft())

    def send(self, message: Any) -> None:
        """Tell the parent something. A parent that is gone is not an error here: `watch` will notice."""
        try:
            self._socket.sendall(frame(pack(message)))
        except OSError:
            pass

    def watch(self, on_end: Callable[[], None] | None = None, *, grace_s: float = 5.0) -> threading.Thread:
        """From now on the process ends when the parent is gone; see `watch_lifeline`. Later messages are dropped."""
        return watch_lifeline(self._socket.fileno(), on_end, grace_s=grace_s)


def watch_lifeline(fd: int, on_end: Callable[[], None] | None = None, *, grace_s: float = 5.0) -> threading.Thread:
    """Start the thread that waits for the end of `fd`. Without `on_end` the process exits at once with status 0.

    `on_end` runs on that thread (use `loop.call_soon_threadsafe` inside) and has `grace_s` to end the process in
    order; then it is ended anyway.
    """

    def wait() -> None:
        while True:
            try:
                if not os.read(fd, 65536):
                    break
            except OSError:
                break
        if on_end is not None:
            try:
                on_end()
                threading.Event().wait(grace_s)
            finally:
                os._exit(0)
        os._exit(0)

    thread = threading.Thread(target=wait, name="lifeline", daemon=True)
    thread.start()
    return thread


# -- the parent's side -----------------------------------------------------------------------------------------------


class Child:
    """A running child. Its life hangs on `self`: `close` (or the end of this process) ends it."""

    def __init__(self, process: subprocess.Popen[bytes], end: socket.socket, pidfd: int) -> None:
        self._process = process
        self._pidfd = pidfd
        self._socket = end
        self._decoder = FrameDecoder(RPC_FRAME_BYTES_MAX)
        self._received: deque[bytes] = deque()
        self._exited: asyncio.Future[int] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.poll()

    async def send(self, message: Any) -> None:
        """Raises LifelineClosed."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, frame(pack(message)))
        except OSError as e:
            raise LifelineClosed(f"child {self.pid}: {e}") from None

    async def receive(self) -> Any:
        """The child's next message. Raises LifelineClosed when it ended first."""
        loop = asyncio.get_running_loop()
        while not self._received:
            try:
                data = await loop.sock_recv(self._socket, 65536)
            except OSError as e:
                raise LifelineClosed(f"child {self.pid}: {e}") from None
            if not data:
                raise LifelineClosed(f"child {self.pid} closed its lifeline")
            self._received.extend(self._decoder.payloads(data))
        return unpack(self._received.popleft())

    async def wait(self) -> int:
        """The exit status, when it has one. Any number of tasks may wait."""
        if self._exited is None:
            self._exited = self._watch_exit()
        return await asyncio.shield(self._exited)

    def _watch_exit(self) -> asyncio.Future[int]:
        # A pidfd works on every loop and in every thread; child watchers need the main one.
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[int] = loop.create_future()

        def ended() -> None:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            if not exited.done():
                exited.set_result(self._process.wait())

        loop.add_reader(self._pidfd, ended)
        return exited

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens to a child that has ended."""
        self._process.send_signal(number)

    async def stop(self, grace_s: float = 10.0) -> int:
        """SIGTERM, then after `grace_s` SIGKILL. The exit status."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                status = await self.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            status = await self.wait()
        self.close()
        return status

    def close(self) -> None:
        """Let go of the lifeline: a child that still runs ends itself."""
        self._socket.close()


def spawn(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> Child:
    """Start `argv` with `-lifeline-fd N` added. stdout and stderr are ours, stdin is empty.

    Raises OSError, and then nothing runs: a child that exists can be waited for, whatever runs out later.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    # SIGINT stays blocked in the child until it ignores it: Ctrl-C during its imports must not kill it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [*argv, FLAG, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=dict(env) if env is not None else None,
            cwd=cwd,
        )
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    ours.setblocking(False)
    return Child(process, ours, pidfd)
