"""Keys and values, with compare-and-set and locks.

A lock is a session's name in a row: only `acquire` and `release` change it, `lock_index` counts how often the key was
newly acquired. A plain write ignores the lock. Writing what is there already changes nothing and moves no index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.rows import KVRow
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Leader, Tx, View
from rostra.wire.errors import BadRequest

FLAGS_MAX = (1 << 64) - 1
#: No row has this modify_index, so a compare-and-set with it writes nothing.
NEVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SetKey:
    """Write a key. `cas`: only if its modify_index is this, 0 = only if absent."""

    kind: ClassVar[str] = "kv.set"
    key: str
    value: bytes
    flags: int = 0
    cas: int | None = None
    acquire: str | None = None
    release: str | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_write(self.key)

    def before_log(self, leader: Leader) -> SetKey:
        """Refused through the log: an earlier attempt of the same origin may be under way, and one answer holds."""
        if self.acquire and leader.is_lock_delayed(self.key):
            return SetKey(self.key, b"", cas=NEVER)
        return self

    def apply(self, tx: Tx) -> bool:
        """True when written; False when the version or the lock does not permit it."""
        if not self.key:
            raise BadRequest("Missing key name")
        if not 0 <= self.flags <= FLAGS_MAX:
            raise BadRequest(f"flags must be between 0 and {FLAGS_MAX}")
        old = tx.tables.kv.rows.get(self.key)
        if self.cas is not None and self.cas != (old.modify_index if old is not None else 0):
            return False
        session, lock_index = (old.session, old.lock_index) if old is not None else ("", 0)
        if self.acquire is not None:
            if not self.acquire:
                raise BadRequest("missing session")
            if self.acquire not in tx.tables.sessions.rows:
                raise BadRequest(f'invalid session "{self.acquire}"')
            if session and session != self.acquire:
                return False
            if not session:
                session, lock_index = self.acquire, lock_index + 1
        elif self.release is not None:
            if not self.release:
                raise BadRequest("missing session")
            if session != self.release:
                return False
            session = ""
        if old is None:
            row = KVRow(self.key, self.value, self.flags, lock_index, session, tx.index, tx.index)
        elif (
            old.value == self.value
            and old.flags == self.flags
            and old.session == session
            and old.lock_index == lock_index
        ):
            return True
        else:
            row = KVRow(old.key, self.value, self.flags, lock_index, session, old.create_index, tx.index)
        write_row(tx, row, old)
        return True


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Delete a key, whoever holds its lock. True as well when there is none."""

    kind: ClassVar[str] = "kv.delete"
    key: str
    cas: int | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_write(self.key)

    def apply(self, tx: Tx) -> bool:
        old = tx.tables.kv.get(self.key)
        if old is None:
            return True
        if self.cas is not None and self.cas != old.modify_index:
            return False
        remove_row(tx, self.key)
        return True


@dataclass(frozen=True, slots=True)
class DeleteTree:
    """Delete every key that begins with `prefix`."""

    kind: ClassVar[str] = "kv.delete-tree"
    prefix: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_write_all(self.prefix)

    def apply(self, tx: Tx) -> bool:
        for key in tx.tables.keys_under(self.prefix):
            remove_row(tx, key)
        return True


@dataclass(frozen=True, slots=True)
class GetKey:
    """{key: KVRow}, empty when there is no such key."""

    kind: ClassVar[str] = "kv.get"
    key: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_read(self.key)

    def keys(self, view: View) -> list[str]:
        view.reads("kv:" + self.key)
        return [self.key] if self.key in view.tables.kv.rows else []

    def row(self, view: View, key: str) -> KVRow | None:
        return view.tables.kv.get(key) if key == self.key else None

    def visible(self, can: Authorizer, key: str, row: KVRow) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ListKeys:
    """{key: KVRow} of all keys that begin with `prefix`."""

    kind: ClassVar[str] = "kv.list"
    prefix: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_list(self.prefix)

    def keys(self, view: View) -> list[str]:
        return view.reads_keys_under(self.prefix)

    def row(self, view: View, key: str) -> KVRow | None:
        return view.tables.kv.get(key) if key.startswith(self.prefix) else None

    def visible(self, can: Authorizer, key: str, row: KVRow) -> bool:
        return can.key_read(key)


@dataclass(frozen=True, slots=True)
class KeyNames:
    """{key: (key,)} of all keys that begin with `prefix`."""

    kind: ClassVar[str] = "kv.names"
    prefix: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.key_list(self.prefix)

    def keys(self, view: View) -> list[str]:
        return view.reads_keys_under(self.prefix)

    def row(self, view: View, key: str) -> tuple[str] | None:
        return (key,) if key.startswith(self.prefix) and key in view.tables.kv.rows else None

    def visible(self, can: Authorizer, key: str, row: tuple[str]) -> bool:
        return can.key_read(key)


def write_row(tx: Tx, row: KVRow, old: KVRow | None) -> None:
    """Put a row that has changed; `old` is the one that is there."""
    tx.put_key(row, old)
    if old is None:
        tx.delete(tx.tables.tombstones, row.key)
    tx.keys.append(row.key)


def remove_row(tx: Tx, key: str) -> None:
    """Delete a row that exists, leaving the index of its deletion."""
    tables = tx.tables
    tx.put(tables.tombstones, key, tx.index)
    tx.delete(tables.kv, key)
    tx.keys.append(key)
