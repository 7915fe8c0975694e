"""Who may come in: the policy of the public listener.

A peer is known by the SPIFFE URI of its verified certificate. It must be a service of our trust domain, and the
intentions decide by `acl.intention`, as on the servers. Open sessions are asked again with each new snapshot
(`Inbound.decide`), so that a deny ends them. Nothing here does IO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from rostra.acl import intention
from rostra.acl.identity import BadIdentity, ServiceIdentity, parse
from rostra.connect_proxy.session import Dial, Refusal
from rostra.connect_proxy.snapshot import ProxySnapshot, Rule
from rostra.connect_proxy.tls import PeerCertificate

LOCAL_DIAL_TIMEOUT_S: Final = 5.0
_DECISIONS_KEPT_MAX: Final = 4096
#: Precedences from here on belong to intentions whose destination is the service itself: for agents of version 0.1.
_EXACT_DESTINATION: Final = 7


class _Intention(NamedTuple):
    """A rule of the snapshot as `acl.intention` wants it."""

    source: str
    destination: str
    action: str
    rule: Rule


class Decision(NamedTuple):
    """What the intentions say about one source. `rule` None: none fits and the default decided."""

    allowed: bool
    rule: Rule | None
    overruled: tuple[Rule, ...]  # those that fit too, with less precedence
    service: str = ""  # whose proxy this is

    def fields(self) -> dict[str, str | int]:
        """For the log: which intention decided, and what it overruled."""
        if self.rule is None:
            return {"intention": "none", "default": "allow" if self.allowed else "deny"}
        fields: dict[str, str | int] = {
            "intention": self.rule.id or "-",
            "rule": self._spelled(self.rule),
            "precedence": self.rule.precedence,
        }
        if self.overruled:
            fields["overruled"] = ",".join(f"{self._spelled(r)}({r.precedence})" for r in self.overruled)
        return fields

    def _spelled(self, rule: Rule) -> str:
        return f"{rule.source}=>{_destination(rule, self.service)}:{rule.action}"


def _destination(rule: Rule, here: str) -> str:
    if rule.destination:
        return rule.destination
    return intention.ANY if 0 < rule.precedence < _EXACT_DESTINATION else here


def decide(snapshot: ProxySnapshot, source: str) -> Decision:
    """What the intentions of `snapshot` say about `source`, by the rule that servers and agents use."""
    here = snapshot.service
    intentions = [
        _Intention(rule.source, _destination(rule, here), rule.action, rule)
        for rule in snapshot.intentions
        if rule.source in (source, intention.ANY)
    ]
    decision = intention.decide(source, here, intentions, snapshot.default_allow)
    if decision.winner is None:
        return Decision(decision.allowed, None, (), here)
    winner = next(i.rule for i in intentions if i is decision.winner)
    return Decision(decision.allowed, winner, tuple(i.rule for i in intentions if i.rule is not winner), here)


class Inbound:
    """The intentions of one snapshot, with the answers kept."""

    __slots__ = ("_kept", "_snapshot")

    def __init__(self, snapshot: ProxySnapshot) -> None:
        self._snapshot = snapshot
        self._kept: dict[str, Decision] = {}

    def source(self, uri: str) -> ServiceIdentity | Refusal:
        """The service behind `uri`, if it is one of our trust domain."""
        try:
            identity = parse(uri)
        except BadIdentity:
            return Refusal("not_a_service")
        if not isinstance(identity, ServiceIdentity):
            return Refusal("not_a_service")
        if identity.trust_domain != self._snapshot.trust_domain.lower():
            return Refusal("wrong_trust_domain")
        return identity

    def decide(self, source: str) -> Decision:
        kept = self._kept.get(source)
        if kept is None:
            if len(self._kept) >= _DECISIONS_KEPT_MAX:
                self._kept.clear()
            kept = self._kept[source] = decide(self._snapshot, source)
        return kept

    def local(self) -> Dial | None:
        """Where the application listens; None when it does not."""
        local = self._snapshot.local
        return Dial(local.host, local.port, LOCAL_DIAL_TIMEOUT_S) if local and local.port else None


#: `refused(certificate, reason, decision)`: the shell logs and counts it.
Refused = Callable[[PeerCertificate, str, Decision | None], None]


class InboundPolicy:
    """`session.Policy` of one connection to the public listener. `current` gives the newest snapshot's rules: a deny
    that arrives during the handshake counts."""

    __slots__ = ("_current", "_dialled", "_dial_failed", "_refused", "source")
    dials_first = False

    def __init__(self, current: Callable[[], Inbound], refused: Refused, dial_failed: Callable[[str], None]) -> None:
        self._current = current
        self._refused = refused
        self._dial_failed = dial_failed
        self._dialled = False
        self.source = ""  # the admitted peer's service

    def admit(self, certificate: PeerCertificate) -> Refusal | None:
        inbound = self._current()
        identity = inbound.source(certificate.uri)
        if isinstance(identity, Refusal):
            self._refused(certificate, identity.reason, None)
            return identity
        decision = inbound.decide(identity.service)
        if not decision.allowed:
            self._refused(certificate, "denied", decision)
            return Refusal("denied")
        self.source = identity.service
        return None

    def target(self) -> Dial | None:
        if self._dialled:
            return None
        self._dialled = True
        return self._current().local()

    def failed(self, reason: str) -> None:
        self._dial_failed(reason)

    def succeeded(self) -> None:
        pass
