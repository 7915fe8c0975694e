"""A write on its way: into this server's log, or to the server that leads, and to the next one until its time is over.

There is one path, whoever asks: an agent (`endpoint.py`), a duty of this server (`ServerNode.own_write`), another
server for one of its agents. No write has a task of its own. Those that wait for another server, or for a leader, are
looked at when the leader changes and ten times a second. Every attempt of a write has the same origin, so a result is
the result, whichever of them was applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from rostra.wire.caller import Caller
from rostra.wire.errors import BadRequest, NoLeader, RostraError, Timeout, from_wire
from rostra.wire.rpc import Lost

#: How long a request waits for a leader before it is refused (Consul's rpc_hold_timeout).
HOLD_S = 7.0
#: Those that wait are looked at so often: a connection to the leader may be back although the leader is the same.
LOOK_S = 0.1
#: What is said of a write of which nobody here will learn what became of it.
UNKNOWN = "the leader was lost before it answered: the write may or may not have been done"

#: (client id, sequence, first outstanding sequence) of a write.
Origin = tuple[str, int, int]


class Server(Protocol):
    """The server that brings writes to the leader: a `ServerNode`."""

    clock: Callable[[], float]
    counts: dict[str, int]
    peer: Callable[[str], Any]
    writes: Writes

    @property
    def is_leader(self) -> bool: ...

    @property
    def leader_id(self) -> str | None: ...

    def append(
        self,
        outcome: Write,
        origin: Origin,
        kind: str,
        args: dict[str, Any],
        actor: str,
        source: str,
        caller: Caller | None,
    ) -> None: ...


class Write:
    """One write until its end, which comes once: `ended` or `failed`, which subclasses have.

    The outcome is told apart: a result tuple of the state machine (its value or its refusal), NoLeader (certainly not
    done), Timeout (it may have been done, or may still be), or the error of what must not get into the log.
    """

    __slots__ = (
        "_asked",
        "_call",
        "_node",
        "actor",
        "args",
        "caller",
        "deadline",
        "is_unknown",
        "kind",
        "origin",
        "source",
    )

    def __init__(
        self,
        node: Server,
        origin: Origin,
        kind: str,
        args: dict[str, Any],
        actor: str,
        source: str,
        caller: Caller | None,
        hold_s: float = HOLD_S,
    ) -> None:
        """`origin` is one that `origin_in` in requests.py lets pass; `caller` None: a server on its own behalf."""
        self._node = node
        self.origin, self.kind, self.args = origin, kind, args
        self.actor, self.source, self.caller = actor, source, caller
        self.deadline = node.clock() + hold_s
        self.is_unknown = False  # an attempt has ended, and nobody can say how
        self._asked: str | None = None  # the server that is being asked
        self._call: asyncio.Future[Any] | None = None

    def ended(self, result: Any) -> None:
        """The state machine's result tuple."""
        raise NotImplementedError

    def failed(self, error: RostraError) -> None:
        """There will be no result."""
        raise NotImplementedError

    def submit(self) -> None:
        """Begin. Raises what the decoder of commands raises for arguments of the wrong kind."""
        self._node.counts["writes"] += 1
        self._attempt()

    def _attempt(self) -> None:
        node = self._node
        if node.is_leader:
            try:
                node.append(self, self.origin, self.kind, self.args, self.actor, self.source, self.caller)
            except RostraError as e:
                self.set_exception(e)
            return
        leader_id = node.leader_id
        peer = node.peer(leader_id) if leader_id else None
        if peer is None or not peer.open:
            self._wait(NoLeader().message)
            return
        node.counts["writes_forwarded"] += 1
        self._asked = leader_id
        arguments = (self.origin, self.kind, self.args, self.actor, self.source)
        self._call = peer.call("propose", *arguments, *on_behalf_of(self.caller, peer))
        self._call.add_done_callback(self._answered)
        node.writes.keep(self)

    # -- what becomes of an attempt: the log and `_answered` say it ------------------------------------------------

    def done(self) -> bool:
        return False

    def set_result(self, result: Any) -> None:
        self.ended(result)

    def set_exception(self, error: BaseException) -> None:
        if isinstance(error, NoLeader):
            self._wait(error.message)
        elif isinstance(error, Timeout) or not isinstance(error, RostraError):
            self.is_unknown = True
            self._wait(UNKNOWN)
        elif self.is_unknown:  # this attempt was refused at the door; what became of the other?
            self.failed(Timeout(UNKNOWN))
        else:
            self.failed(error)

    def _answered(self, call: asyncio.Future[Any]) -> None:
        if self._call is not call:
            return  # given up
        self._node.writes.forget(self)
        self._call = None
        error = call.exception()
        if error is None:
            self.ended(call.result())
        else:
            was_done_perhaps = isinstance(error, Lost) and error.was_sent
            self.set_exception(Timeout(UNKNOWN) if was_done_perhaps else error)

    def _wait(self, why: str) -> None:
        """For a leader, as long as there is time."""
        node = self._node
        if node.clock() < self.deadline:
            try:
                node.writes.keep(self)
                return
            except RostraError:
                pass  # this server is stopping
        self.failed(Timeout(UNKNOWN) if self.is_unknown else NoLeader(why))

    def look_again(self) -> None:
        """Another server may lead, or the time may be over."""
        node = self._node
        if self._call is not None:
            is_over = node.clock() >= self.deadline
            if not is_over and node.leader_id == self._asked:
                return
            # The server that was asked does not lead any more, and may never answer.
            call, self._call = self._call, None
            call.cancel()
            self.is_unknown = True
        node.writes.forget(self)
        if node.clock() >= self.deadline:
            self.failed(Timeout(UNKNOWN) if self.is_unknown else NoLeader())
            return
        try:
            self._attempt()
        except (TypeError, ValueError, LookupError) as e:
            self.failed(BadRequest(f"malformed arguments: {type(e).__name__}: {e}"))


class AwaitedWrite(Write):
    """`await write.result` gives the value, or raises the refusal or the error."""

    __slots__ = ("result",)

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def ended(self, result: Any) -> None:
        if self.result.done():
            return
        if result[0] == "ok":
            self.result.set_result(result[1])
        else:
            self.result.set_exception(from_wire(result[1], result[2]))

    def failed(self, error: RostraError) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class Writes:
    """Those that wait for another server or for a leader."""

    def __init__(self, spawn: Callable[..., asyncio.Task[Any]]) -> None:
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Write, None] = {}
        self._task: asyncio.Task[Any] | None = None
        self._is_due = False

    def keep(self, write: Write) -> None:
        """Raises RostraError where this server is stopping."""
        if self._task is None or self._task.done():
            self._task = self._spawn(self._look())
        self._waiting[write] = None

    def forget(self, write: Write) -> None:
        self._waiting.pop(write, None)

    def leader_changed(self) -> None:
        if self._waiting and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._look_now)

    def _look_now(self) -> None:
        self._is_due = False
        for write in list(self._waiting):
            if write in self._waiting:
                write.look_again()

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_S)
            self._look_now()


def on_behalf_of(caller: Caller | None, peer: Any) -> tuple[Any, ...]:
    """The last argument of what is asked of another server: nothing where that one does not know it."""
    return () if peer.level < 2 else (None if caller is None else caller.packed(),)
