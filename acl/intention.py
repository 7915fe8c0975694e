"""Intentions: which one decides whether a source service may connect to a destination, and why.

Destinations do not differ by case, as services of the catalog do not: a deny for `DB` protects `db`. A source is who
its certificate says, letter for letter. (Measured: Consul 1.8.7's check and authorize do the same.)

The more exact one wins, the destination before the source: 9 exact→exact, 8 *→exact, 6 exact→*, 5 *→*. A deny wins a
tie. The proxy enforces, the API checks and the UI explains with this one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

ANY = "*"


class Intention(Protocol):
    """What `decide` needs to know of an intention; the rows of the state and the snapshot of a proxy both have it."""

    @property
    def source(self) -> str: ...
    @property
    def destination(self) -> str: ...
    @property
    def action(self) -> str: ...


class Decision(NamedTuple):
    allowed: bool
    winner: Intention | None  # None: no intention matched, the default decided
    reason: str


def precedence(source: str, destination: str) -> int:
    """How exact an intention is; the highest one that matches decides."""
    if destination != ANY:
        return 9 if source != ANY else 8
    return 6 if source != ANY else 5


def matches(intention: Intention, source: str, destination: str) -> bool:
    if intention.source != source and intention.source != ANY:
        return False
    named = intention.destination
    return named in (destination, ANY) or named.lower() == destination.lower()


def decide(source: str, destination: str, intentions: Iterable[Intention], default_allow: bool) -> Decision:
    """Whether `source` may connect to `destination`."""
    winner: Intention | None = None
    highest = (0, False)
    for intention in intentions:
        if matches(intention, source, destination):
            rank = (precedence(intention.source, intention.destination), intention.action != "allow")
            if rank > highest:
                winner, highest = intention, rank
    if winner is None:
        verb = "allowed" if default_allow else "denied"
        return Decision(default_allow, None, f"{verb} by default: no intention matches {source} → {destination}")
    allowed = winner.action == "allow"
    verb = "allowed" if allowed else "denied"
    rule = f"intention {winner.source} → {winner.destination} ({winner.action}, precedence {highest[0]})"
    return Decision(allowed, winner, f"{verb} by {rule}")
