"""How commands write and queries read: `Tx` with undo, and `View`, which notes what an answer depends on.

A command changes rows only through `Tx.put` and `Tx.delete`, and says with `Tx.touch` whose answers that changes.
Nothing outside sees a change before the command has ended; when it raises, everything is put back. Indexes move at
commit only.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from rostra.server.state.granules import FLOOR_OF, directory_of
from rostra.server.state.rows import KVRow
from rostra.server.state.tables import Table, Tables

K = TypeVar("K")
R = TypeVar("R")

Key = str | tuple[str, ...]


class Leader(Protocol):
    """What the leader knows that is not in the state, for commands with a `before_log(leader)`.

    That gives the command that goes into the log: itself, or another of its kind where something must be decided
    before. A command that is made of commands asks each of them.
    """

    def is_lock_delayed(self, key: str) -> bool: ...


class Tx:
    """One command on its way into the state."""

    __slots__ = ("actor", "at_ms", "changes", "cluster_id", "effects", "index", "keys", "tables", "touched")

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.begin(0, "", 0, "")
        self.touched: list[tuple[str, Key | None]] = []
        #: Touched as well: keys of the KV table, each with the directories around it.
        self.keys: list[str] = []
        self.effects: list[tuple[Any, ...]] = []
        #: (table, key, the row before, the row after) of every change, in order; None: there is none.
        self.changes: list[tuple[Table[Any, Any], Any, Any, Any]] = []

    def begin(self, index: int, cluster_id: str, at_ms: int, actor: str) -> None:
        """The next command. The effects of the one before were taken or put back."""
        self.index = index  # what a row that is written now has as its modify_index
        self.cluster_id = cluster_id
        self.at_ms = at_ms  # for display only: nothing may be decided by it
        self.actor = actor

    def put(self, table: Table[K, R], key: K, row: R) -> None:
        self.changes.append((table, key, table.put(key, row), row))

    def put_key(self, row: KVRow, old: KVRow | None) -> None:
        """As `put`, for the table with by far the most changes; `old` is the row that is there."""
        kv = self.tables.kv
        key = row.key
        kv.rows[key] = row
        if old is None or old.session != row.session:
            kv.changed(key, old, row)  # type: ignore[misc]
        self.changes.append((kv, key, old, row))

    def delete(self, table: Table[K, R], key: K) -> R | None:
        """Drop a row; the row that was there."""
        old = table.remove(key)
        if old is not None:
            self.changes.append((table, key, old, None))
        return old

    def touch(self, granule: str, key: Key | None = None) -> None:
        """Answers that read `granule` may differ from now on; only in row `key`, unless it is None."""
        self.touched.append((granule, key))

    def effect(self, *effect: Any) -> None:
        """Something that each server's own clock has to know; no part of the state."""
        self.effects.append(effect)

    def rollback(self) -> None:
        """Put back every row, in reverse order, so that what is derived goes back the way it came."""
        for table, key, old, _ in reversed(self.changes):
            if old is None:
                table.remove(key)
            else:
                table.put(key, old)
        self.changes.clear()
        self.touched.clear()
        self.keys.clear()
        self.effects.clear()


class View:
    """The state as one evaluation of a query sees it. `granules` and `index` are complete after `query.keys(view)`."""

    __slots__ = ("granules", "index", "tables")

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.granules: list[str] = []
        self.index = 1

    def reads(self, granule: str) -> None:
        """The answer depends on `granule`."""
        self.granules.append(granule)
        index = granule_index(self.tables, granule)
        if index > self.index:
            self.index = index

    def reads_keys_under(self, prefix: str) -> list[str]:
        """The keys under `prefix`; the answer depends on them and on those that may come."""
        self.granules.append("kvdir:" + directory_of(prefix))
        keys = self.tables.keys_under(prefix)
        index = self.tables.prefix_index(prefix, keys)
        if index > self.index:
            self.index = index
        return keys


def granule_index(tables: Tables, granule: str) -> int:
    """The index of the last change to what `granule` names; its family's floor when nothing is known of it."""
    index = tables.granules.rows.get(granule)
    if index is not None:
        return index
    family, _, name = granule.partition(":")
    floors = tables.floors.rows
    if family == "kv":
        row = tables.kv.rows.get(name)
        return row.modify_index if row is not None else max(tables.tombstones.rows.get(name, 0), floors["kv"])
    if family == "kvdir":
        return max(tables.kv_directories.get(name, 0), floors["kv"])
    floor = FLOOR_OF.get(family)
    return floors[floor] if floor is not None else 1
