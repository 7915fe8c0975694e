"""Clients of the cluster: they write and read through any server, and repeat what got no answer under the same number.

A client believes an answer, an error that says "not done", and nothing else: after a silence, a lost server or an
unknown outcome it asks another server the same thing under the same origin. It goes on until it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rostra.wire.errors import NoLeader, RostraError, Timeout
from tests.sim.world import Handle

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.server import Server

#: The product tells "not done" from "unknown" to the end.
TRUST_NOT_DONE = True

#: One way between a client and its server.
TRIP_S = 0.0002
#: Without any server to ask, a client looks again after this long.
AGAIN_S = 0.03


class Client:
    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.chance = cluster.world.chance
        self.id = f"c{number}"
        self._sequence = 0
        #: sequence -> the write, while its outcome is not known here
        self.outstanding: dict[int, Write] = {}
        self._server: Server | None = None

    def server(self) -> Server | None:
        """Whom to ask: the same as before, mostly."""
        server, chance = self._server, self.chance
        if server is None or server.loop.is_dead or chance.random() < 0.05:
            alive = [m.server for m in self.cluster.machines if m.server is not None]
            server = self._server = chance.choice(alive) if alive else None
        return server

    def leave(self, server: Server | None = None) -> None:
        """Ask another one from now on (if it was `server`)."""
        if server is None or server is self._server:
            self._server = None

    def write(
        self, kind: str, args: dict[str, Any], server: Server | None = None, then: Callable[[], None] | None = None
    ) -> None:
        """At `server` first, or at any. `then` follows the acknowledgement."""
        self._sequence += 1
        write = self.outstanding[self._sequence] = Write(self, self._sequence, kind, args)
        write.wanted, write.then = server, then
        write.send()

    def read(self, mode: str, key: str, server: Server | None = None) -> None:
        """From `server`, or from any."""
        Read(self, mode, key, server).send()


class Question:
    """Something asked of servers until it is answered."""

    def __init__(self, client: Client) -> None:
        self.client, self.world = client, client.world
        self.is_over = False
        #: whom to ask first
        self.wanted: Server | None = None
        self._attempt = 0
        self._asked: Server | None = None

    def send(self) -> None:
        if self.is_over:
            return
        self._attempt += 1
        server, self.wanted = self.wanted or self.client.server(), None
        if server is None:
            self.world.after(AGAIN_S, self._again, self._attempt)
            return
        self._asked = server
        self.world.after(TRIP_S, self._arrive, server)
        self.world.after(self.client.chance.uniform(0.8, 3.0), self._silent, self._attempt)

    def _again(self, attempt: int) -> None:
        if attempt == self._attempt:
            self.send()

    def _silent(self, attempt: int) -> None:
        if attempt == self._attempt and not self.is_over:
            self.client.leave()
            self.unknown()

    def _arrive(self, server: Server) -> None:
        if server.loop.is_dead:
            self.lost(server)
        else:
            server.loop.fire(Handle(self.ask, (server,)))

    def lost(self, server: Server) -> None:
        """`server` has died."""
        if server is self._asked and not self.is_over:
            self._asked = None
            self.world.after(TRIP_S, self._gone)

    def _gone(self) -> None:
        if not self.is_over:
            self.client.leave()
            self.unknown()

    def answered(self, server: Server, outcome: Any) -> None:
        self.world.after(TRIP_S, self._answer, server, outcome)

    def _answer(self, server: Server, outcome: Any) -> None:
        if not self.is_over:
            self.answer(server, outcome)

    # -- of each kind

    def ask(self, server: Server) -> None:
        """In the server's process."""
        raise NotImplementedError

    def answer(self, server: Server, outcome: Any) -> None:
        raise NotImplementedError

    def unknown(self) -> None:
        """No answer will come, or it will be late."""
        raise NotImplementedError


class Write(Question):
    def __init__(self, client: Client, sequence: int, kind: str, args: dict[str, Any]) -> None:
        super().__init__(client)
        self.sequence, self.kind, self.args = sequence, kind, args
        self.origin = (client.id, sequence)
        #: Some attempt may still be done, whatever another one is told.
        self.is_unknown = False
        self._begun_s = self.world.now
        self.then: Callable[[], None] | None = None
        client.cluster.open_writes += 1

    def __repr__(self) -> str:
        return f"write {self.origin}"

    def ask(self, server: Server) -> None:
        chance = self.client.chance
        first = next(iter(self.client.outstanding), self.sequence)
        origin = (self.client.id, self.sequence, min(first, self.sequence))
        server.ask(self, server.node.write(origin, self.kind, self.args, hold_s=chance.uniform(0.3, 2.0)))

    def unknown(self) -> None:
        self.is_unknown = True
        self.client.cluster.counts["outcomes unknown"] += 1
        self.send()

    def answer(self, server: Server, outcome: Any) -> None:
        oracle = self.client.cluster.oracle
        if isinstance(outcome, Timeout):
            self.client.leave()
            self.unknown()
            return
        if isinstance(outcome, NoLeader):
            if self.is_unknown or not TRUST_NOT_DONE:
                self.client.leave()
                self.world.after(AGAIN_S, self.send)
                return
            oracle.was_not_done(self.origin)
        elif isinstance(outcome, RostraError):
            oracle.was_acknowledged(self.origin, ("err", outcome.code))
        else:
            oracle.was_acknowledged(self.origin, ("ok", outcome))
            self.client.cluster.acknowledged()
            self.client.cluster.written(self._begun_s)
            if self.then is not None:
                self.then()
        self.is_over = True
        self.client.cluster.open_writes -= 1
        del self.client.outstanding[self.sequence]


class Read(Question):
    def __init__(self, client: Client, mode: str, key: str, server: Server | None) -> None:
        super().__init__(client)
        self.mode, self.key, self.wanted = mode, key, server
        self._floor = client.cluster.oracle.floor

    def __repr__(self) -> str:
        return f"{self.mode} read of {self.key}"

    def ask(self, server: Server) -> None:
        raft = server.raft
        if self.mode == "default" and raft is not None and raft.is_leader and raft.lease_valid():
            self.answered(server, server.look(self.key))  # as the endpoint does, without a task
        else:
            server.ask(self, server.read(self.mode, self.key))

    def unknown(self) -> None:
        self.is_over = True  # a read may be forgotten

    def answer(self, server: Server, outcome: Any) -> None:
        self.is_over = True
        if isinstance(outcome, RostraError):
            self.client.leave()
            return
        self.client.cluster.oracle.was_read(server.id, self.mode, self._floor, self.key, outcome)
        if self.mode != "stale":
            self.client.cluster.acknowledged()
