"""Intentions: which service may connect to which. One per (source, destination), either may be "*".

Names that differ by case only are the same source and destination here: a second intention for them is refused or takes
the place of the first. They are kept as they were spelled, since case still tells who connects. `acl.intention` decides
which wins, for the proxies and the API alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.acl.intention import ANY, precedence
from rostra.server.state.catalog import canonical
from rostra.server.state.rows import IntentionRow
from rostra.server.state.tables import Pair, Tables
from rostra.server.state.transaction import Tx, View
from rostra.wire.errors import BadRequest, Conflict

#: The first words of a refusal: there is such an intention already.
DUPLICATE = "duplicate intention found:"


@dataclass(frozen=True, slots=True)
class SetIntention:
    """Create or change the intention of that source and destination; its id.

    With an `id` that exists, that intention becomes this one, also where it was another pair's. With a new one, or
    another one than that pair has, the pair must be free. Without, the intention of that pair is replaced.
    """

    kind: ClassVar[str] = "intention.set"
    source: str
    destination: str
    action: str
    description: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    id: str = ""

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.intention_write(self.destination)

    def problems(self) -> list[str]:
        """Why it is refused, whatever else there is."""
        found = []
        for label, name in (("SourceName", self.source), ("DestinationName", self.destination)):
            if not name:
                found.append(f"{label} must be set")
            elif ANY in name and name != ANY:
                found.append(f"{label}: wildcard character '*' cannot be used with partial values")
        if self.action not in ("allow", "deny"):
            found.append("Action must be set to 'allow' or 'deny'")
        return found

    def apply(self, tx: Tx) -> str:
        for problem in self.problems():
            raise BadRequest(problem)
        key, table = (self.source, self.destination), tx.tables.intentions
        former = tx.tables.intentions_like(*key)
        if self.id:
            for other in [table.rows[pair] for pair in former]:
                if other.id != self.id:
                    raise Conflict(duplicate(other))
            former = sorted(tx.tables.intentions_by_id.get(self.id, ()), key=lambda pair: pair != key)
        old = table.rows[former[0]] if former else None
        row = IntentionRow(
            self.source,
            self.destination,
            self.action,
            old.id if old is not None else self.id or _id_of(tx, self),
            self.description,
            canonical(self.meta),
            precedence(self.source, self.destination),
            old.created_at_ms if old is not None else tx.at_ms,
            old.updated_at_ms if old is not None else tx.at_ms,
            old.create_index if old is not None else tx.index,
            old.modify_index if old is not None else tx.index,
        )
        if row != old:
            if old is not None:
                row = row._replace(updated_at_ms=tx.at_ms, modify_index=tx.index)
            tx.put(table, key, row)
            _touch(tx, key)
        for pair in former:
            if pair != key:
                tx.delete(table, pair)
                _touch(tx, pair)
        return row.id


@dataclass(frozen=True, slots=True)
class DeleteIntention:
    """Delete an intention, spelled exactly so. True as well when there is none.

    The caller finds out first how it is spelled. So it can delete the former spelling after an update that respells it,
    in a cluster with older servers.
    """

    kind: ClassVar[str] = "intention.delete"
    source: str
    destination: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.intention_write(self.destination)

    def apply(self, tx: Tx) -> bool:
        key = (self.source, self.destination)
        if tx.delete(tx.tables.intentions, key) is not None:
            _touch(tx, key)
        return True


@dataclass(frozen=True, slots=True)
class Intentions:
    """{(source, destination): IntentionRow} of all intentions."""

    kind: ClassVar[str] = "intention.list"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[Pair]:
        view.reads("table:intentions")
        return list(view.tables.intentions.order or ())

    def row(self, view: View, key: Pair) -> IntentionRow | None:
        return view.tables.intentions.get(key)

    def visible(self, can: Authorizer, key: Pair, row: IntentionRow) -> bool:
        return can.intention_read(row.destination)


@dataclass(frozen=True, slots=True)
class IntentionsFor:
    """{(source, destination): IntentionRow} of those that can decide about connections to `destination`."""

    kind: ClassVar[str] = "intention.match"
    destination: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.intention_read(self.destination)

    def keys(self, view: View) -> list[Pair]:
        found: list[Pair] = []
        for destination in sorted({self.destination.lower(), ANY}):
            view.reads("intention:" + destination)
            found += view.tables.intentions_for.get(destination, ())
        return sorted(found)

    def row(self, view: View, key: Pair) -> IntentionRow | None:
        return view.tables.intentions.get(key) if key[1].lower() in (self.destination.lower(), ANY) else None

    def visible(self, can: Authorizer, key: Pair, row: IntentionRow) -> bool:
        return True


def duplicate(row: IntentionRow) -> str:
    """Says that this one is there already, in the words that clients know."""
    return (
        f"{DUPLICATE} {row.action.upper()} default/{row.source} => default/{row.destination} "
        f"(ID: {row.id}, Precedence: {row.precedence})"
    )


def _touch(tx: Tx, key: Pair) -> None:
    tx.touch("intention:" + key[1].lower(), key)
    tx.touch("table:intentions", key)


def _id_of(tx: Tx, command: SetIntention) -> str:
    """An id for a caller who chose none: in the form of a UUID, the same on every server."""
    seed = f"{tx.cluster_id}\0{tx.index}\0{command.source}\0{command.destination}"
    digits = blake2b(seed.encode(), digest_size=16).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
