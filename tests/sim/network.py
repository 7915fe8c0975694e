"""A virtual network: byte streams between processes, as transports under the real `FrameConnection`s.

A stream keeps order and repeats nothing, as TCP does. What was handed over still arrives, unless the machine loses its
power or the connection is cut: then a prefix of the bytes arrives. A blocked path swallows silently in its direction
(the sender notices nothing; what was on its way is sent again when the path is healed). A dead process's peers are
told; a dead machine's are not, until somebody answers there again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from tests.sim.world import Handle, Loop, World

#: One-way trips of a connection before it is there on both sides: SYN and TLS.
TRIPS = 3
#: A machine that does not answer is tried again after this long.
KNOCK_AGAIN_S = 1.0
#: A stream's bytes come in two pieces this often.
SPLIT = 0.02


class Process(Protocol):
    """What the network knows of who is at its ends."""

    loop: Loop
    host: str
    #: of the certificate that it shows
    key_hash: str

    def incoming(self, transport: End) -> None:
        """Somebody has connected. On this process's loop."""


class Path:
    """One direction between two hosts."""

    __slots__ = ("blocked", "delay_s", "held", "jitter_s", "slow_s", "stalled_until")

    def __init__(self) -> None:
        self.blocked = 0  # by so many faults
        self.delay_s, self.jitter_s = 0.00005, 0.0003
        self.slow_s = 0.0
        self.stalled_until = 0.0
        self.held: list[End] = []  # what these have said waits until the path is healed


class Network:
    def __init__(self, world: World) -> None:
        self.world = world
        #: the process that listens on each host
        self.processes: dict[str, Process] = {}
        self.powered_off: set[str] = set()
        self._paths: dict[tuple[str, str], Path] = {}
        self._ends: list[End] = []

    def path(self, source: str, target: str) -> Path:
        path = self._paths.get((source, target))
        if path is None:
            path = self._paths[source, target] = Path()
        return path

    def arrival(self, path: Path) -> float:
        """When something arrives that is sent now."""
        chance = self.world.chance
        at = self.world.now + path.delay_s + path.jitter_s * chance.random()
        if path.slow_s:
            at += path.slow_s * (0.5 + chance.random())
        return max(at, path.stalled_until)

    # -- connecting

    async def connect(self, process: Process, factory: Callable[[], Any], host: str) -> tuple[End, Any]:
        """`loop.create_connection` of `process`. Raises ConnectionRefusedError where nobody listens."""
        answer: asyncio.Future[End] = process.loop.create_future()
        self._knock(process, host, answer)
        try:
            transport = await answer
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close()
            raise
        protocol = factory()
        transport.protocol = protocol
        protocol.connection_made(transport)
        transport.take_early()
        return transport, protocol

    def _knock(self, process: Process, host: str, answer: asyncio.Future[End]) -> None:
        if process.loop.is_dead or answer.done():
            return
        there, back = self.path(process.host, host), self.path(host, process.host)
        is_silent = host in self.powered_off and host not in self.processes
        if there.blocked or back.blocked or is_silent:
            self.world.after(KNOCK_AGAIN_S, self._knock, process, host, answer)
            return
        self.world.at(self.arrival(there), self._shake, process, host, answer, TRIPS)

    def _shake(self, process: Process, host: str, answer: asyncio.Future[End], trips: int) -> None:
        """The handshake goes to and fro. A packet of it that is swallowed ends it; who dials gives up in time."""
        if process.loop.is_dead or answer.done():
            return
        there, back = self.path(process.host, host), self.path(host, process.host)
        if there.blocked or back.blocked:
            return
        if trips > 1:
            self.world.at(self.arrival(there if trips % 2 else back), self._shake, process, host, answer, trips - 1)
            return
        target = self.processes.get(host)
        if target is None:
            if host not in self.powered_off:
                process.loop.fire(Handle(_refuse, (answer, host)))
            return
        near, far = End(self, target, process), End(self, process, target)
        near.peer, far.peer = far, near
        self._ends += (near, far)
        target.loop.fire(Handle(target.incoming, (near,)))
        self.world.at(self.arrival(back), self._opened, far, answer)

    @staticmethod
    def _opened(far: End, answer: asyncio.Future[End]) -> None:
        far.owner.loop.fire(Handle(_take_over, (answer, far)))

    # -- faults

    def block(self, source: str, target: str) -> None:
        self.path(source, target).blocked += 1

    def unblock(self, source: str, target: str) -> None:
        path = self.path(source, target)
        path.blocked -= 1
        if path.blocked == 0:
            held, path.held = path.held, []
            for end in held:
                end.resume()

    def connections(self, a: str, b: str) -> list[End]:
        """One end of each connection between two hosts that both sides believe in."""
        self._ends = [end for end in self._ends if end.is_alive]
        return [e for e in self._ends if e.owner.host == a and e.other.host == b and e.peer.is_alive]

    def died(self, process: Process, *, power_lost: bool) -> None:
        for end in self._ends:
            if end.owner is process and end.is_alive:
                end.owner_died(power_lost)
        self._ends = [end for end in self._ends if end.is_alive]


class End:
    """One end of a stream: the transport of a protocol."""

    def __init__(self, network: Network, owner: Process, other: Process) -> None:
        self._network, self._world = network, network.world
        self.owner, self.other = owner, other
        self.peer: End
        self.protocol: Any = None
        self._early: list[bytes | None] = []  # what came before there was a protocol to take it
        self._path = network.path(owner.host, other.host)
        #: on their way to the other end; None is the end of the stream
        self._flying: deque[bytes | None] = deque()
        self._flying_bytes = 0
        self._last_arrival = 0.0
        self._generation = 0  # of what was scheduled for `_flying`
        self._is_held = False
        self._said_end = False
        self.is_alive = True  # this side believes in the connection

    # -- asyncio's transport

    def write(self, data: bytes) -> None:
        self._say(data)

    def get_write_buffer_size(self) -> int:
        return self._flying_bytes

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "ssl_object" else default  # peer_key_hash() of it is patched

    def close(self) -> None:
        if self.is_alive and not self.owner.loop.is_dead:
            self._say(None)
            self._end()

    def abort(self) -> None:
        if self.is_alive and not self.owner.loop.is_dead:
            if not self._said_end and self._world.chance.random() < 0.5:
                self._tear()
            self._say(None)
            self._end()

    # -- the stream

    def _say(self, data: bytes | None) -> None:
        if not self.is_alive or self._said_end or self.owner.loop.is_dead:
            return
        self._said_end = data is None
        self._flying.append(data)
        if data is not None:
            self._flying_bytes += len(data)
        self._send_off()

    def _send_off(self) -> None:
        """Schedule the arrival of one more of `_flying`."""
        path = self._path
        if path.blocked or self._is_held:
            self._hold()
            return
        when = self._network.arrival(path)
        if when < self._last_arrival:
            when = self._last_arrival
        self._last_arrival = when
        self._world.at(when, self._arrive, self._generation)

    def _hold(self) -> None:
        if not self._is_held:
            self._is_held = True
            self._path.held.append(self)

    def resume(self) -> None:
        """The path is healed: after a while what was swallowed is sent again."""
        self._is_held = False
        self._generation += 1
        self._last_arrival = self._world.now + 0.4 * self._world.chance.random() ** 2
        for _ in range(len(self._flying)):
            self._send_off()

    def _arrive(self, generation: int) -> None:
        if generation != self._generation or not self._flying:
            return
        if self._path.blocked or self._is_held:
            self._hold()
            return
        data = self._flying.popleft()
        if data is not None:
            self._flying_bytes -= len(data)
        peer = self.peer
        if not peer.is_alive or peer.owner.loop.is_dead:
            self._to_nobody(data)
            return
        chance = self._world.chance
        if data is not None and len(data) > 1 and chance.random() < SPLIT:
            at = chance.randrange(1, len(data))
            self._flying.appendleft(data[at:])
            self._flying_bytes += len(data) - at
            data = data[:at]
            self._send_off()
        peer.owner.loop.fire(Handle(peer._take, (data,)))

    def _to_nobody(self, data: bytes | None) -> None:
        """There is no such connection there any more: the system there says so, if there is one."""
        if data is None or not self.is_alive or self.other.host in self._network.powered_off:
            return
        back = self._network.path(self.other.host, self.owner.host)
        if not back.blocked:
            self._world.at(self._network.arrival(back), self._reset)

    def _reset(self) -> None:
        if self.is_alive:
            self.owner.loop.fire(Handle(self._lost, (ConnectionResetError("connection reset by peer"),)))

    def _take(self, data: bytes | None) -> None:
        """In this end's process: bytes, or the end of the stream."""
        if not self.is_alive:
            return
        if self.protocol is None:
            self._early.append(data)
        elif data is None:
            self._lost(None)
        else:
            self.protocol.data_received(data)

    def take_early(self) -> None:
        early, self._early = self._early, []
        for data in early:
            self._take(data)

    def _lost(self, error: Exception | None) -> None:
        """In this end's process."""
        if self.is_alive:
            self.is_alive = False
            if self.protocol is not None:
                self.protocol.connection_lost(error)

    def _end(self) -> None:
        """This side has ended it; its protocol is told in a later turn."""
        self.is_alive = False
        if self.protocol is not None:
            self.owner.loop.call_soon(self.protocol.connection_lost, None)

    def _tear(self) -> None:
        """Of what is on its way, a prefix arrives."""
        flying = b"".join(data for data in self._flying if data is not None)
        self._flying.clear()
        self._generation += 1
        kept = flying[: self._world.chance.randrange(len(flying) + 1)]
        self._flying_bytes = len(kept)
        if kept:
            self._flying.append(kept)
            self._send_off()

    def cut(self) -> None:
        """Something on the way has ended the connection: both sides learn of it, after some of the bytes."""
        for end in (self, self.peer):
            if end.is_alive and not end._said_end:
                end._tear()
                end._finish()

    def _finish(self) -> None:
        self._said_end = True
        self._flying.append(None)
        self._send_off()

    def owner_died(self, power_lost: bool) -> None:
        self.is_alive = False
        if power_lost:
            self._tear()
            self._said_end = True
        elif not self._said_end:
            self._finish()


def _refuse(answer: asyncio.Future[End], host: str) -> None:
    if not answer.done():
        answer.set_exception(ConnectionRefusedError(f"nobody listens on {host}"))


def _take_over(answer: asyncio.Future[End], end: End) -> None:
    if answer.done():
        end.close()
    else:
        answer.set_result(end)
