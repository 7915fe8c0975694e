"""Intentions: which service may connect to which. One per (source, destination), either may be "*".

Who wins is decided in `acl.intention`, by the proxies and by the API alike; here they are only kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.acl.intention import ANY, precedence
from rostra.server.state.catalog import canonical
from rostra.server.state.rows import IntentionRow
from rostra.server.state.tables import Pair
from rostra.server.state.transaction import Tx, View
from rostra.wire.errors import BadRequest


@dataclass(frozen=True, slots=True)
class SetIntention:
    """Create or change the intention of that source and destination; its id."""

    kind: ClassVar[str] = "intention.set"
    source: str
    destination: str
    action: str
    description: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    id: str = ""

    def allowed(self, can: Authorizer) -> bool:
        return can.intention_write(self.destination)

    def apply(self, tx: Tx) -> str:
        for label, name in (("SourceName", self.source), ("DestinationName", self.destination)):
            if not name:
                raise BadRequest(f"{label} must be set")
            if ANY in name and name != ANY:
                raise BadRequest(f"{label}: wildcard character '*' cannot be used with partial values")
        if self.action not in ("allow", "deny"):
            raise BadRequest("Action must be set to 'allow' or 'deny'")
        key = (self.source, self.destination)
        old = tx.tables.intentions.get(key)
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
            tx.put(tx.tables.intentions, key, row)
            _touch(tx, key)
        return row.id


@dataclass(frozen=True, slots=True)
class DeleteIntention:
    """Delete an intention. True as well when there is none."""

    kind: ClassVar[str] = "intention.delete"
    source: str
    destination: str

    def allowed(self, can: Authorizer) -> bool:
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

    def allowed(self, can: Authorizer) -> bool:
        return True

    def keys(self, view: View) -> list[Pair]:
        view.reads("table:intentions")
        return list(view.tables.intentions.order or ())

    def row(self, view: View, key: Pair) -> IntentionRow | None:
        return view.tables.intentions.get(key)


@dataclass(frozen=True, slots=True)
class IntentionsFor:
    """{(source, destination): IntentionRow} of those that can decide about connections to `destination`."""

    kind: ClassVar[str] = "intention.match"
    destination: str

    def allowed(self, can: Authorizer) -> bool:
        return can.intention_read(self.destination)

    def keys(self, view: View) -> list[Pair]:
        found = []
        for destination in sorted({self.destination, ANY}):
            view.reads("intention:" + destination)
            found += [(source, destination) for source in view.tables.sources_for.get(destination, ())]
        return sorted(found)

    def row(self, view: View, key: Pair) -> IntentionRow | None:
        return view.tables.intentions.get(key) if key[1] in (self.destination, ANY) else None


def _touch(tx: Tx, key: Pair) -> None:
    tx.touch("intention:" + key[1], key)
    tx.touch("table:intentions", key)


def _id_of(tx: Tx, command: SetIntention) -> str:
    """An id for a caller who chose none: in the form of a UUID, the same on every server."""
    seed = f"{tx.cluster_id}\0{tx.index}\0{command.source}\0{command.destination}"
    digits = blake2b(seed.encode(), digest_size=16).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
