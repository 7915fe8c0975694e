"""Sessions: what locks are held by. A session lives on a node and ends with it, with its checks, or when told to.

When it ends, its keys are released or deleted and stay closed to others for `lock_delay_ms` (the leader's clock
decides that, before the log; the effects tell it when). TTLs are the leader's business too: it proposes
`ExpireSession` with the index up to which it saw the session renewed, and a later renewal makes that entry do
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state import kv
from rostra.server.state.rows import SessionRow, session_row
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Tx, View
from rostra.wire.errors import BadRequest, Conflict

LOCK_DELAY_MS_MAX = 60_000


@dataclass(frozen=True, slots=True)
class CreateSession:
    """`id` is chosen before the log. The node must exist, and the checks exist there and not be critical."""

    kind: ClassVar[str] = "session.create"
    id: str
    node: str
    name: str = ""
    lock_delay_ms: int = 15000
    behavior: str = "release"
    ttl_ms: int = 0
    node_checks: tuple[str, ...] = ("serfHealth",)
    service_checks: tuple[str, ...] = ()
    # These fields are sent only where they say more than those above: older servers cannot apply them.
    checks: tuple[str, ...] = ()
    ttl: str = ""
    lock_delay_ns: int = -1

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.session_write(self.node)

    def apply(self, tx: Tx) -> str:
        tables = tx.tables
        if not self.id:
            raise BadRequest("Missing session id")
        if self.behavior not in ("release", "delete"):
            raise BadRequest(f"Invalid Behavior setting '{self.behavior}'")
        if self.ttl_ms < 0 or self.lock_delay_ms < 0:
            raise BadRequest("Invalid Session TTL or LockDelay: must not be negative")
        if self.id in tables.sessions.rows:
            raise Conflict(f"session {self.id} exists already")
        node = tables.node_name(self.node)
        if node not in tables.nodes.rows:
            raise BadRequest("Missing node registration")
        for check_id in (*self.checks, *self.node_checks, *self.service_checks):
            like = tables.checks_like(node, check_id)
            if not like:
                raise BadRequest(f"Missing check '{check_id}' registration")
            if any(tables.checks.rows[key].status == "critical" for key in like):
                raise BadRequest(f"Check '{check_id}' is in critical state")
        row = SessionRow(
            self.id,
            node,
            self.name,
            min(self.lock_delay_ms, LOCK_DELAY_MS_MAX),
            self.behavior,
            self.ttl_ms,
            self.node_checks,
            self.service_checks,
            tx.index,
            tx.index,
        )
        if self.checks or self.ttl or self.lock_delay_ns >= 0:
            row = session_row(*row, self.checks, self.ttl, self.lock_delay_ns)
        tx.put(tables.sessions, self.id, row)
        _touch(tx, self.id)
        tx.effect("session-created", self.id)
        return self.id


@dataclass(frozen=True, slots=True)
class DestroySession:
    """End a session. True as well when there is none."""

    kind: ClassVar[str] = "session.destroy"
    id: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        session = tables.sessions.get(self.id)
        return session is None or can.session_write(session.node)

    def apply(self, tx: Tx) -> bool:
        if self.id in tx.tables.sessions.rows:
            end_session(tx, self.id)
        return True


@dataclass(frozen=True, slots=True)
class ExpireSession:
    """End a session unless it has been renewed after `seen_index` (see `seen_index()` below)."""

    kind: ClassVar[str] = "session.expire"
    servers_only: ClassVar[bool] = True
    id: str
    seen_index: int

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        seen = seen_index(tx.tables, self.id)
        if seen is None or seen > self.seen_index:
            return False
        end_session(tx, self.id)
        return True


@dataclass(frozen=True, slots=True)
class RenewSessions:
    """Restart the clocks of these sessions on every server. Nothing that a query shows changes."""

    kind: ClassVar[str] = "session.renewed"
    servers_only: ClassVar[bool] = True
    ids: tuple[str, ...]

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> None:
        for session_id in self.ids:
            if session_id in tx.tables.sessions.rows:
                tx.put(tx.tables.renewals, session_id, tx.index)
                tx.effect("session-renewed", session_id)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """{id: SessionRow}, empty when there is no such session."""

    kind: ClassVar[str] = "session.info"
    id: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("session:" + self.id)
        return [self.id] if self.id in view.tables.sessions.rows else []

    def row(self, view: View, key: str) -> SessionRow | None:
        return view.tables.sessions.get(key) if key == self.id else None

    def visible(self, can: Authorizer, key: str, row: SessionRow) -> bool:
        return can.session_read(row.node)


@dataclass(frozen=True, slots=True)
class Sessions:
    """{id: SessionRow} of all sessions."""

    kind: ClassVar[str] = "session.list"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:sessions")
        return list(view.tables.sessions.order or ())

    def row(self, view: View, key: str) -> SessionRow | None:
        return view.tables.sessions.get(key)

    def visible(self, can: Authorizer, key: str, row: SessionRow) -> bool:
        return can.session_read(row.node)


@dataclass(frozen=True, slots=True)
class NodeSessions:
    """{id: SessionRow} of the sessions that live on a node."""

    kind: ClassVar[str] = "session.node"
    node: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:sessions")
        return list(view.tables.sessions_on.get(view.tables.node_name(self.node), ()))

    def row(self, view: View, key: str) -> SessionRow | None:
        row = view.tables.sessions.get(key)
        return row if row is not None and row.node == view.tables.node_name(self.node) else None

    def visible(self, can: Authorizer, key: str, row: SessionRow) -> bool:
        return can.session_read(row.node)


def seen_index(tables: Tables, session_id: str) -> int | None:
    """Up to which index a session is known to be wanted: its creation or last logged renewal. None when it is gone."""
    row = tables.sessions.get(session_id)
    return None if row is None else tables.renewals.get(session_id, row.create_index)


def end_session(tx: Tx, session_id: str) -> None:
    """Remove a session that exists; release or delete what it holds."""
    tables = tx.tables
    row = tables.sessions.rows[session_id]
    for key in sorted(tables.locks_of.get(session_id, ())):
        if row.behavior == "delete":
            kv.remove_row(tx, key)
        else:
            held = tables.kv.rows[key]
            kv.write_row(tx, held._replace(session="", modify_index=tx.index), held)
        tx.effect("lock-released", key, row.lock_delay_ms)
    tx.delete(tables.sessions, session_id)
    tx.delete(tables.renewals, session_id)
    _touch(tx, session_id)
    tx.effect("session-gone", session_id)


def end_sessions_of_check(tx: Tx, node: str, check_id: str) -> None:
    """The check is critical or gone: so are the sessions that rely on it."""
    for session_id in list(tx.tables.sessions_by_check.get((node, check_id.lower()), ())):
        end_session(tx, session_id)


def _touch(tx: Tx, session_id: str) -> None:
    tx.touch("session:" + session_id, session_id)
    tx.touch("table:sessions", session_id)
