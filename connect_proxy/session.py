"""The life of one proxied connection, without IO: what happens next, for the inbound and the outbound side alike.

    inbound   ACCEPTED ─identified→ AUTHORIZED (dials the application) ─connected→ RELAYING → CLOSED
    outbound  ACCEPTED (dials an endpoint) ─connected→ CONNECTED ─identified→ RELAYING → CLOSED

The shell (`relay`) reports events by calling the methods, named in the past tense, and carries out the actions that
they return. The bytes do not come through here. While relaying, the two directions end separately; the session is over
when both have been ended and flushed, or when either side breaks. Whether a peer may talk to us, and where to dial, is
asked of a `Policy`: `inbound` and `outbound` are the two.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, Protocol

from rostra.connect_proxy.tls import PeerCertificate


class State(Enum):
    ACCEPTED = "accepted"
    CONNECTED = "connected"
    AUTHORIZED = "authorized"
    RELAYING = "relaying"
    CLOSED = "closed"


class Side(Enum):
    """PLAIN is the application's connection, SECURE the other proxy's."""

    PLAIN = "plain"
    SECURE = "secure"


class Dial(NamedTuple):
    """Open a connection there; a former attempt is to be dropped."""

    host: str
    port: int
    timeout_s: float


class Identify(NamedTuple):
    """Begin the TLS handshake on the connection that was dialled."""


class Relay(NamedTuple):
    """Begin to pass bytes both ways."""


class Finish(NamedTuple):
    """No more will be written to this side: send what is left, then its end mark, then report `flushed`."""

    side: Side


class Close(NamedTuple):
    """The end. `abort`: both sides must see a broken connection, not an orderly end."""

    reason: str
    abort: bool


Action = Dial | Identify | Relay | Finish | Close


class Refusal(NamedTuple):
    """Why a peer was not accepted: a constant to be counted."""

    reason: str


class Policy(Protocol):
    """What the two directions decide differently."""

    dials_first: bool

    def admit(self, certificate: PeerCertificate) -> Refusal | None:
        """None when this peer is right; it may log and count."""

    def target(self) -> Dial | None:
        """Where to dial, and after `failed` where to dial next; None when there is nothing left."""

    def failed(self, reason: str) -> None:
        """The last target could not be used."""

    def succeeded(self) -> None:
        """The last target is being used."""


_NONE: Final[tuple[Action, ...]] = ()


class ProxiedConnection:
    """One proxied connection."""

    __slots__ = ("_ended", "_flushed", "_policy", "certificate", "close_reason", "state")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.state = State.ACCEPTED
        self.certificate: PeerCertificate | None = None
        self.close_reason = ""
        self._ended: set[Side] = set()  # sides that will send us nothing more
        self._flushed: set[Side] = set()  # sides that have everything, the end mark included

    def accepted(self) -> tuple[Action, ...]:
        """The listener took the connection."""
        return self._dial("no_endpoint") if self._policy.dials_first else _NONE

    def connected(self) -> tuple[Action, ...]:
        """The dialled side answers."""
        if self.state is State.ACCEPTED and self._policy.dials_first:
            self.state = State.CONNECTED
            return (Identify(),)
        if self.state is State.AUTHORIZED:
            return self._relay()
        return _NONE

    def identified(self, certificate: PeerCertificate) -> tuple[Action, ...]:
        """The handshake is complete and the chain verified: this is who the peer is."""
        if self.state not in (State.ACCEPTED, State.CONNECTED):
            return _NONE
        refusal = self._policy.admit(certificate)
        if refusal is not None:
            return self.dial_failed(refusal.reason) if self.state is State.CONNECTED else self._close(refusal.reason)
        self.certificate = certificate
        if self.state is State.CONNECTED:
            return self._relay()
        self.state = State.AUTHORIZED
        return self._dial("no_local_application")

    def dial_failed(self, reason: str) -> tuple[Action, ...]:
        """The dialled side refused, was too slow, failed its handshake or is someone else."""
        if self.state in (State.RELAYING, State.CLOSED):
            return _NONE
        self._policy.failed(reason)
        if self.state is State.CONNECTED:
            self.state = State.ACCEPTED
        return self._dial(reason)

    def ended(self, side: Side) -> tuple[Action, ...]:
        """`side` has sent its end mark; the other side is to hear of it."""
        if self.state is not State.RELAYING or side in self._ended:
            return _NONE
        self._ended.add(side)
        return (Finish(_other(side)),)

    def flushed(self, side: Side) -> tuple[Action, ...]:
        """`side` has been sent everything after `Finish`."""
        self._flushed.add(side)
        if self.state is State.RELAYING and len(self._flushed) == 2:
            return self._close("done", abort=False)
        return _NONE

    def broken(self, reason: str) -> tuple[Action, ...]:
        """A side was reset, truncated, or sent what it may not; or time ran out; or an intention now forbids it."""
        return self._close(reason) if self.state is not State.CLOSED else _NONE

    def _dial(self, reason_if_none: str) -> tuple[Action, ...]:
        target = self._policy.target()
        return (target,) if target is not None else self._close(reason_if_none)

    def _relay(self) -> tuple[Action, ...]:
        self._policy.succeeded()
        self.state = State.RELAYING
        return (Relay(),)

    def _close(self, reason: str, *, abort: bool = True) -> tuple[Action, ...]:
        self.state = State.CLOSED
        self.close_reason = reason
        return (Close(reason, abort),)


def _other(side: Side) -> Side:
    return Side.SECURE if side is Side.PLAIN else Side.PLAIN
