"""The state machine: entries of the log go in one at a time, answers come out, and equal logs give equal stores.

`apply` is called by one server's loop, in log order, with the bytes of an entry; it returns what the world has to
know and raises only when this process must not go on. A refused command is a result like any other. `evaluate` runs a
query on the present state. There is no clock, no chance and no I/O in here; `dump` and `Loader` carry a store between
processes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import msgpack

from rostra.server.state.cluster import StateHash
from rostra.server.state.commands import COMMAND_VOCABULARY
from rostra.server.state.entry import Entry, UnknownEntry, decode_entry
from rostra.server.state.granules import FLOOR_OF, directories, granule_hash
from rostra.server.state.rows import KVRow
from rostra.server.state.session import seen_index
from rostra.server.state.tables import Table, Tables
from rostra.server.state.transaction import Key, Tx, View, granule_index
from rostra.wire.codec import Unknown, Vocabulary
from rostra.wire.errors import RostraError

DUMP_FORMAT = 1
#: A server notes its own hash at multiples of this; the leader logs its hash of the same index for comparison.
CHECKPOINT_ENTRIES = 10_000
#: Results that a client may leave unacknowledged; further writes are refused until it reports progress.
OUTSTANDING_MAX = 8192
#: Clients whose results are remembered. The one that wrote least recently is forgotten first.
CLIENTS_MAX = 16384

_CHUNK_ROWS = 500
_CHUNK_BYTES = 1 << 20
_RING_HASHES = 32768
_RING_ENTRIES = 16384
_UNHASHED_CHANGES = 256
_INTERNAL_TEXTS = 100
_MASK = (1 << 64) - 1

Result = tuple[Any, ...]


@dataclass(slots=True)
class Applied:
    """What one entry did. `result` is ("ok", value) or ("err", code, message), as it goes to the client."""

    index: int  # of the store afterwards: a read at this index sees the effect
    result: Result
    touched: tuple[tuple[str, Key | None], ...] = ()
    effects: tuple[tuple[Any, ...], ...] = ()


class Evaluation:
    """One query being answered: the keys at once, the rows in steps, so that a long answer does not hold the loop.

    The state may change between steps. A row that is gone by then is left out, one that changed comes as it is: the
    owner sees the touches of its granules and evaluates those keys again with `query.row(view, key)`.
    """

    __slots__ = ("_at", "granules", "index", "keys", "query", "view")

    def __init__(self, query: Any, view: View) -> None:
        self.query = query
        self.view = view
        self.keys: list[Key] = query.keys(view)
        self.granules: tuple[str, ...] = tuple(view.granules)
        self.index = view.index
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= len(self.keys)

    def step(self, max_rows: int = 256) -> list[tuple[Key, Any]]:
        """The next rows, in key order: of at most `max_rows` keys. Empty only when there are no more."""
        row_of, view = self.query.row, self.view
        while not self.done:
            keys = self.keys[self._at : self._at + max_rows]
            self._at += len(keys)
            rows = [pair for key in keys if (pair := (key, row_of(view, key)))[1] is not None]
            if rows:
                return rows
        return []

    def rows(self) -> list[tuple[Key, Any]]:
        """All that remains, at once."""
        return self.step(len(self.keys))


class Store:
    """The replicated state of one server."""

    def __init__(self, commands: Vocabulary = COMMAND_VOCABULARY) -> None:
        self.tables = Tables()
        self._commands = commands
        self.index = 1
        self.internal_errors: dict[str, int] = {}  # text of an unexpected exception in a command -> how often
        self._ring: deque[tuple[int, tuple[int, ...]]] = deque()
        self._ring_hashes = 0
        self._ring_after = 1  # the ring knows every touch of later indexes
        self._hash = 0
        self._unhashed = 0
        self._checkpoints: dict[int, int] = {}
        self._pack = msgpack.Packer(use_bin_type=True).pack

    # -- writing --------------------------------------------------------------------------------------------------

    @property
    def cluster_id(self) -> str:
        row = self.tables.cluster.rows.get("")
        return row.cluster_id if row is not None else ""

    def apply(self, data: bytes) -> Applied:
        """Apply one entry of the log. Raises only what must stop the process (UnknownEntry, MemoryError, ...)."""
        entry = decode_entry(data)
        kind = entry.kind
        if kind not in self._commands:
            raise UnknownEntry(f"a log entry is a {kind!r} command, unknown to this version: a newer version wrote it")
        cluster_id = self.cluster_id
        if (entry.cluster_id != cluster_id or not cluster_id) and (cluster_id or kind != "cluster.bootstrap"):
            self.index += 1
            name = cluster_id or "none yet"
            return self._finish(
                Applied(self.index, ("err", "conflict", f"entry of cluster {entry.cluster_id!r}, this one is {name!r}"))
            )
        client_id = entry.client_id
        if client_id:
            earlier = self._earlier_result(entry)
            if earlier is not None:
                return Applied(self.index, earlier)
        self.index = index = self.index + 1
        tx = Tx(self.tables, index, entry.cluster_id, entry.at_ms, entry.actor)
        touched: tuple[tuple[str, Key | None], ...] = ()
        effects: tuple[tuple[Any, ...], ...] = ()
        result: Result
        try:
            result = ("ok", self._commands.decode(kind, entry.args).apply(tx))
        except Unknown as e:
            raise UnknownEntry(f"a log entry that this version cannot apply: {e.message}") from None
        except RostraError as e:
            tx.rollback()
            result = ("err", e.code, e.message)
        except (MemoryError, RecursionError, OSError):
            tx.rollback()
            raise
        except Exception as e:
            tx.rollback()
            result = ("err", "internal", self._note(kind, e))
        else:
            if tx.touched or tx.keys:
                touched = self._commit(tx)
            if tx.effects:
                effects = self._effects(tx)
        self._unhashed += tx.changes + len(touched)
        if client_id:
            self._remember(entry, result)
        return self._finish(Applied(index, result, touched, effects))

    def _finish(self, applied: Applied) -> Applied:
        if self._unhashed >= _UNHASHED_CHANGES:
            self._hash_changes(_UNHASHED_CHANGES)
        if self.index % CHECKPOINT_ENTRIES == 0:
            self._checkpoints[self.index] = _HASH_FORMAT | self.hash() >> 16
            while len(self._checkpoints) > 4:
                del self._checkpoints[min(self._checkpoints)]
        return applied

    def _commit(self, tx: Tx) -> tuple[tuple[str, Key | None], ...]:
        """Move the indexes of what was touched; the touches, each once."""
        index = tx.index
        touched = dict.fromkeys(tx.touched)
        granules = self.tables.granules
        rows, dirty = granules.rows, granules.dirty
        for granule, _ in touched:
            old = rows.get(granule)
            if old != index:
                if granule not in dirty:
                    dirty[granule] = old
                rows[granule] = index
        hashes = [granule_hash(granule) for granule, _ in touched]
        if tx.keys:
            highest = self.tables.kv_directories
            for key in tx.keys:
                granule = "kv:" + key
                touched[granule, key] = None
                hashes.append(granule_hash(granule))
                for directory in directories(key):
                    highest[directory] = index
                    granule = "kvdir:" + directory
                    touched[granule, key] = None
                    hashes.append(granule_hash(granule))
        if len(hashes) > 8:
            hashes = list(set(hashes))
        self._ring.append((index, tuple(hashes)))
        self._ring_hashes += len(hashes)
        while self._ring_hashes > _RING_HASHES or len(self._ring) > _RING_ENTRIES:
            self._ring_after, dropped = self._ring.popleft()
            self._ring_hashes -= len(dropped)
        return tuple(touched)

    def _effects(self, tx: Tx) -> tuple[tuple[Any, ...], ...]:
        """The effects of a command; a logged hash becomes one only where this store's own differs."""
        effects = []
        for effect in tx.effects:
            if effect[0] == "state-hash":
                _, index, theirs = effect
                ours = self._checkpoints.get(index)
                if ours is None or ours == theirs or ours >> 48 != theirs >> 48:
                    continue
                effect = ("state-differs", index, theirs, ours)
            effects.append(effect)
        return tuple(effects)

    def _note(self, kind: str, error: Exception) -> str:
        text = f"{kind}: {type(error).__name__}: {error}"[:500]
        if text in self.internal_errors or len(self.internal_errors) < _INTERNAL_TEXTS:
            self.internal_errors[text] = self.internal_errors.get(text, 0) + 1
        return "internal error in " + kind

    # -- exactly once ---------------------------------------------------------------------------------------------

    def knows(self, origin: tuple[str, int, int]) -> bool:
        """Whether this write has been applied, and its result is kept for a repetition."""
        return origin[:2] in self.tables.results.rows

    def _earlier_result(self, entry: Entry) -> Result | None:
        """The result of the application of this entry that has been, or of its refusal; None: it is new."""
        result = self.tables.results.rows.get((entry.client_id, entry.sequence))
        if result is not None:
            return result
        client = self.tables.clients.rows.get(entry.client_id)
        first = client[0] if client is not None else entry.first_outstanding
        if entry.sequence < first:
            return ("err", "conflict", "a write was repeated after its result had been acknowledged")
        if entry.sequence - max(first, entry.first_outstanding) >= OUTSTANDING_MAX:
            return (
                "err",
                "bad_request",
                f"more than {OUTSTANDING_MAX} writes of one client have no acknowledged result",
            )
        return None

    def _remember(self, entry: Entry, result: Result) -> None:
        """Keep a result for as long as the client may ask for it, and drop those that it has."""
        clients, results = self.tables.clients, self.tables.results
        client_id, first = entry.client_id, entry.first_outstanding
        client = clients.rows.get(client_id)
        if client is not None:
            if client[0] < first:
                for sequence in range(client[0], min(first, client[0] + 2 * OUTSTANDING_MAX)):
                    if results.remove((client_id, sequence)) is not None:
                        self._unhashed += 1
            else:
                first = client[0]
            clients.remove(client_id)  # so that the order of the dict is the order of last use
        clients.put(client_id, (first, self.index))
        results.put((client_id, entry.sequence), result)
        self._unhashed += 2
        if len(clients.rows) > CLIENTS_MAX:
            self._forget_client(next(iter(clients.rows)))

    def _forget_client(self, client_id: str) -> None:
        client = self.tables.clients.remove(client_id)
        if client is not None:
            for sequence in range(client[0], client[0] + 2 * OUTSTANDING_MAX):
                self.tables.results.remove((client_id, sequence))

    # -- reading --------------------------------------------------------------------------------------------------

    def view(self) -> View:
        return View(self.tables)

    def evaluate(self, query: Any) -> Evaluation:
        """Begin to answer `query`; its keys, granules and index are those of now."""
        return Evaluation(query, View(self.tables))

    def granule_index(self, granule: str) -> int:
        """The index of the last change to what `granule` names."""
        return granule_index(self.tables, granule)

    def touched_since(self, index: int) -> frozenset[int] | None:
        """Hashes of the granules touched by entries after `index`; None when that is not known: forget everything."""
        if index > self.index or index < self._ring_after:
            return None
        touched: set[int] = set()
        for at, hashes in reversed(self._ring):
            if at <= index:
                break
            touched.update(hashes)
        return frozenset(touched)

    def secret(self, name: str) -> str | None:
        """A private key, for the server itself: "cluster-ca" or "root:<root id>"."""
        return self.tables.secrets.get(name)

    def session_seen(self, session_id: str) -> int | None:
        """What `ExpireSession.seen_index` has to be for the present state; None when there is no such session."""
        return seen_index(self.tables, session_id)

    def reapable(self, table: str, keep: int) -> tuple[int, int]:
        """(how many deletions are remembered in `table`, the `below` that leaves the newest `keep` of them)."""
        tables = self.tables
        if table == "kv":
            indexes = sorted(tables.tombstones.rows.values())
        else:
            indexes = sorted(
                index
                for granule, index in tables.granules.rows.items()
                if FLOOR_OF.get(granule.partition(":")[0]) == table and not tables.is_live(granule)
            )
        return len(indexes), indexes[-keep] if 0 < keep < len(indexes) else 0

    # -- hash, dump, load -----------------------------------------------------------------------------------------

    def hash(self) -> int:
        """64 bits that are equal where the states are equal, whatever way led to them."""
        self._hash_changes(sys.maxsize)
        return _hash_of(self._pack(("", self.index, self._hash)))

    def checkpoint(self) -> StateHash | None:
        """What the leader logs from time to time: its hash at the last index at which every server notes its own.

        The upper 16 bits say of what fields the hash is made: servers of versions that differ in that do not compare.
        """
        if not self._checkpoints:
            return None
        index = max(self._checkpoints)
        return StateHash(index, self._checkpoints[index])

    def _hash_changes(self, limit: int) -> None:
        """The state's hash is the sum of its rows' hashes: take out what rows were, add what they are.

        Done some changes later, so that a row that changes often costs little, and little by little, so that a command
        that changes much does not hold the loop longer than it does anyway.
        """
        total = self._hash
        pack = self._pack
        for table in self.tables.all:
            dirty = table.dirty
            if not dirty:
                continue
            name, get = table.name, table.get
            if len(dirty) <= limit:
                changes = list(dirty.items())
                dirty.clear()
            else:
                changes = [(key, dirty.pop(key)) for key in list(islice(dirty, limit))]
            limit -= len(changes)
            for key, old in changes:
                new = get(key)
                if new is old:
                    continue
                if old is not None:
                    total -= _hash_of(pack((name, key, old)))
                if new is not None:
                    total += _hash_of(pack((name, key, new)))
        self._hash = total & _MASK
        self._unhashed = 0 if limit else self._unhashed // 2

    def dump(self) -> Iterator[tuple[Any, ...]]:
        """The state as it is now, in msgpack-able chunks; later changes do not show in them."""
        captured: list[tuple[str, list[Any] | dict[Any, Any]]] = [
            (table.name, table.rows.copy() if table.make is None else list(table.rows.values()))
            for table in self.tables.all
        ]
        return _chunks(self.index, captured)

    @classmethod
    def load(cls, chunks: Iterable[Any]) -> Store:
        """The store that `dump` wrote. Raises ValueError when it is not one, or of a newer version."""
        loader = Loader()
        for chunk in chunks:
            loader.feed(chunk)
        return loader.finish()


class Loader:
    """Builds a store from the chunks of a dump, one at a time."""

    def __init__(self) -> None:
        self._store = Store()
        self._tables: dict[str, Table[Any, Any]] = {table.name: table for table in self._store.tables.all}
        self._begun = False
        self._ended = False

    def feed(self, chunk: Any) -> None:
        """Take one chunk. Raises ValueError."""
        name, *rest = chunk
        if not self._begun:
            if name != "state" or rest[0] != DUMP_FORMAT:
                raise ValueError(f"a dump of format {rest[:1]}, this version reads {DUMP_FORMAT}")
            self._store.index = rest[1]
            self._begun = True
        elif name == "end":
            self._ended = True
        else:
            table = self._tables.get(name)
            if table is None:
                raise ValueError(f"a dump with a table {name!r}: a newer version wrote it")
            self._fill(table, rest[0])

    def finish(self) -> Store:
        """The store. Raises ValueError when the end of the dump is missing."""
        if not self._ended:
            raise ValueError("a dump without an end")
        store = self._store
        store._ring_after = store.index
        store.hash()
        return store

    def _fill(self, table: Table[Any, Any], rows: Any) -> None:
        if table.name in ("kv", "tombstones"):
            self._fill_keys(table, rows)
        elif table.make is None:
            for key, row in rows:
                table.put(key, row)
        else:
            for row in rows:
                made = table.make(*row)
                table.put(_key_of(table.name, made), made)
        self._store.hash()

    def _fill_keys(self, table: Table[Any, Any], rows: Any) -> None:
        """As `put` does, but with one update of the sorted names: one by one they take most of the time of loading."""
        tables = self._store.tables
        tables.kv_names.update([row[0] for row in rows])
        for row in rows:
            key = row[0]
            if table is tables.kv:
                made = tables.kv.rows[key] = KVRow(*row)
                if made.session:
                    tables.locks_of.setdefault(made.session, set()).add(key)
                tables.raise_directories(key, made.modify_index)
            else:
                tables.tombstones.rows[key] = row[1]
                tables.raise_directories(key, row[1])
        table.dirty.update(dict.fromkeys([row[0] for row in rows]))


def _chunks(index: int, captured: list[tuple[str, list[Any] | dict[Any, Any]]]) -> Iterator[tuple[Any, ...]]:
    yield ("state", DUMP_FORMAT, index)
    for name, rows in captured:
        chunk: list[Any] = []
        size = 0
        row: Any
        for row in rows.items() if isinstance(rows, dict) else rows:
            chunk.append(row)
            size += len(row.value) if name == "kv" else 0
            if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield (name, tuple(chunk))
                chunk, size = [], 0
        if chunk:
            yield (name, tuple(chunk))
    yield ("end",)


def _key_of(table: str, row: Any) -> Any:
    """The key under which a dumped row lies."""
    match table:
        case "services" | "checks" | "intentions":
            return row[0], row[1]
        case "ca" | "cluster":
            return ""
    return row[0]


def _hash_of(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


#: Differs between versions whose rows have different fields; in the upper 16 of 64 bits.
_HASH_FORMAT = _hash_of(msgpack.packb([(t.name, getattr(t.make, "_fields", ())) for t in Tables().all])) >> 48 << 48
