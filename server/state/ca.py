"""The mesh CA in the state: root certificates, which of them signs, its configuration, serial numbers given out.

Private keys lie in the table of secrets, which no query reads; a server takes them from its own store to sign. When
and how to rotate is decided outside (a pure plan of the leader); these commands only refuse what would leave no valid
root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.catalog import canonical
from rostra.server.state.rows import CaRow, RootRow
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Tx, View
from rostra.wire.codec import decode_row
from rostra.wire.errors import BadRequest, Conflict

SERIAL = "ca.serial"


@dataclass(frozen=True, slots=True)
class SetRoot:
    """Add or change a root; an active one becomes the only active one.

    `expected_active`: only if that is the active root's id now ("": none), so that two leaders cannot both make a first
    root. Without a key the one known for this root stays.
    """

    kind: ClassVar[str] = "ca.set-root"
    servers_only: ClassVar[bool] = True
    root: dict[str, Any]
    private_key_pem: str = ""
    expected_active: str | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True when set; False when another root is active than was expected."""
        tables = tx.tables
        ca = tables.ca.get("") or CaRow(create_index=tx.index)
        if self.expected_active is not None and self.expected_active != ca.active_root_id:
            return False
        row = decode_row(RootRow, self.root, "root", create_index=tx.index, modify_index=tx.index)
        if not row.id or not row.trust_domain or not row.cert_pem:
            raise BadRequest("a root needs an id, a trust domain and a certificate")
        if ca.trust_domain and ca.trust_domain != row.trust_domain:
            raise Conflict(f"the cluster's trust domain is {ca.trust_domain}, not {row.trust_domain}")
        if not row.active and ca.active_root_id == row.id:
            raise Conflict(f"root {row.id} is the active one: make another root active instead")
        old = tables.roots.get(row.id)
        if old is not None:
            row = row._replace(create_index=old.create_index)
        if row.active and not self.private_key_pem and _secret(row.id) not in tables.secrets.rows:
            raise BadRequest(f"root {row.id} cannot be active: its private key is not known")
        if self.private_key_pem:
            tx.put(tables.secrets, _secret(row.id), self.private_key_pem)
        if row.active and ca.active_root_id and ca.active_root_id != row.id:
            former = tables.roots.rows[ca.active_root_id]
            tx.put(tables.roots, former.id, former._replace(active=False, modify_index=tx.index))
            tx.touch("table:ca", former.id)
        tx.put(tables.roots, row.id, row)
        tx.touch("table:ca", row.id)
        if row.active or not ca.trust_domain:
            active = row.id if row.active else ca.active_root_id
            tx.put(
                tables.ca, "", ca._replace(trust_domain=row.trust_domain, active_root_id=active, modify_index=tx.index)
            )
            tx.touch("table:ca", "")
        return True


@dataclass(frozen=True, slots=True)
class DropRoot:
    """Forget a root that is not active, and its key. True as well when there is none."""

    kind: ClassVar[str] = "ca.drop-root"
    servers_only: ClassVar[bool] = True
    id: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        row = tx.tables.roots.get(self.id)
        if row is not None:
            if row.active:
                raise Conflict(f"root {self.id} is the active one: make another root active first")
            tx.delete(tx.tables.roots, self.id)
            tx.delete(tx.tables.secrets, _secret(self.id))
            tx.touch("table:ca", self.id)
        return True


@dataclass(frozen=True, slots=True)
class SetCaConfig:
    """Replace the CA's configuration. `cas`: only if its `config_index` is this."""

    kind: ClassVar[str] = "ca.config"
    config: dict[str, Any]
    cas: int | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True when set; False when `cas` names another version."""
        old = tx.tables.ca.get("") or CaRow(create_index=tx.index)
        if self.cas is not None and self.cas != old.config_index:
            return False
        config = canonical(self.config)
        if config != old.config or not old.config_index:
            tx.put(tx.tables.ca, "", old._replace(config=config, config_index=tx.index, modify_index=tx.index))
            tx.touch("table:ca", "config")
        return True


@dataclass(frozen=True, slots=True)
class NextSerial:
    """Take `count` serial numbers; the first of them. No certificate shares one, whichever server signs."""

    kind: ClassVar[str] = "ca.next-serial"
    servers_only: ClassVar[bool] = True
    count: int = 1

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> int:
        if not 1 <= self.count <= 65536:
            raise BadRequest("count must be between 1 and 65536")
        last = tx.tables.counters.get(SERIAL, 0)
        tx.put(tx.tables.counters, SERIAL, last + self.count)
        return last + 1


@dataclass(frozen=True, slots=True)
class Roots:
    """{root id: RootRow, "": (trust domain, active root id)}; empty before the CA exists."""

    kind: ClassVar[str] = "ca.roots"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:ca")
        ca = view.tables.ca.get("")
        return ["", *(view.tables.roots.order or ())] if ca is not None and ca.trust_domain else []

    def row(self, view: View, key: str) -> RootRow | tuple[str, str] | None:
        if key:
            return view.tables.roots.get(key)
        ca = view.tables.ca.get("")
        return (ca.trust_domain, ca.active_root_id) if ca is not None and ca.trust_domain else None

    def visible(self, can: Authorizer, key: str, row: RootRow | tuple[str, str]) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class CaConfig:
    """{"config": (config, its index)}, empty before it was ever set."""

    kind: ClassVar[str] = "ca.config"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_read()

    def keys(self, view: View) -> list[str]:
        view.reads("table:ca")
        ca = view.tables.ca.get("")
        return ["config"] if ca is not None and ca.config_index else []

    def row(self, view: View, key: str) -> tuple[dict[str, Any], int] | None:
        ca = view.tables.ca.get("")
        return (ca.config, ca.config_index) if key == "config" and ca is not None and ca.config_index else None

    def visible(self, can: Authorizer, key: str, row: tuple[dict[str, Any], int]) -> bool:
        return True


def _secret(root_id: str) -> str:
    return "root:" + root_id
