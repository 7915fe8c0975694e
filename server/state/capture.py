"""A store as bytes and back: what snapshots carry.

`capture` copies the tables first: rows never change, so copying references is enough. None stands for a step of that,
and nothing may be applied until the first chunk comes. Then it packs them, a bounded piece of work for each chunk.
Later changes do not show. `Loader` takes one chunk at a time and builds a store beside the one in use. Derived tables
are not carried, they follow from rows. A chunk is a msgpack array:

    ["state", format, index, history]  [table, rows]…  ["clients", [[id, first, used, [sequence, result…]]…]]…  ["end"]
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import msgpack

from rostra.server.state.clients import Clients
from rostra.server.state.rows import KVRow
from rostra.server.state.tables import Table, Tables

FORMAT = 1
CLIENTS = "clients"

_pack = msgpack.Packer(use_bin_type=True).pack

#: Rows copied in one step: about 0.5 ms where they are spread over memory.
COPY_ROWS = 20_000
#: What one chunk carries: about 0.2 ms to pack, 1 ms to load. A single larger row has a chunk of its own.
CHUNK_ROWS = 256
CHUNK_BYTES = 256 << 10


class State(Protocol):
    """What is captured: a `Store`."""

    index: int
    history: int
    tables: Tables
    clients: Clients


def capture(store: State) -> Iterator[bytes | None]:
    """The store as it is at the first step."""
    index, history, tables = store.index, store.history, store.tables
    copies: list[tuple[str, list[Any]]] = []
    for table in tables.all:
        copied: list[Any] = []
        copies.append((table.name, copied))
        # A table whose rows do not name their key is carried as pairs.
        source = iter(table.rows.items() if table.make is None else table.rows.values())
        while part := list(islice(source, COPY_ROWS)):
            copied += part
            yield None
            if store.index != index or store.tables is not tables:
                raise RuntimeError("an entry was applied while a snapshot copied the tables")
    clients: list[tuple[str, int, int, list[Any]]] = []
    copied_results = 0
    for client_id, client in store.clients.rows.items():
        clients.append(
            (client_id, client.first, client.used, [part for pair in client.results.items() for part in pair])
        )
        copied_results += 1 + len(client.results)
        if copied_results > COPY_ROWS:
            copied_results = 0
            yield None
            if store.index != index:
                raise RuntimeError("an entry was applied while a snapshot copied the clients")
    yield _pack(("state", FORMAT, index, history))
    for name, rows in copies:
        yield from _chunks(name, rows)
        rows.clear()
    yield from _chunks(CLIENTS, _parts(clients))
    yield _pack(("end",))


def _parts(clients: list[tuple[str, int, int, list[Any]]]) -> Iterator[tuple[str, int, int, list[Any]]]:
    """Clients with at most CHUNK_ROWS results; more of them under the same id."""
    for client_id, first, used, results in clients:
        for at in range(0, max(1, len(results)), 2 * CHUNK_ROWS):
            yield client_id, first, used, results[at : at + 2 * CHUNK_ROWS]


def _chunks(name: str, rows: Any) -> Iterator[bytes]:
    head = b"\x92" + _pack(name)
    packed: list[bytes] = []
    size = 0
    for row in rows:
        data = _pack(row)
        if packed and (size + len(data) > CHUNK_BYTES or len(packed) >= CHUNK_ROWS):
            yield b"".join((head, b"\xdd", len(packed).to_bytes(4, "big"), *packed))
            packed, size = [], 0
        packed.append(data)
        size += len(data)
    if packed:
        yield b"".join((head, b"\xdd", len(packed).to_bytes(4, "big"), *packed))


class Loader:
    """Builds what was captured into `tables`, `clients`, `index` and `history`; see `Store.adopt`."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.clients = Clients()
        self.index = self.history = 0
        self._by_name: dict[str, Table[Any, Any]] = {table.name: table for table in self.tables.all}
        self._has_ended = False

    def feed(self, chunk: bytes) -> None:
        """Take one chunk. Raises ValueError."""
        try:
            name, *rest = msgpack.unpackb(chunk, use_list=False, strict_map_key=False)
        except Exception as e:  # the library raises a dozen types for bad input
            raise ValueError(f"a chunk of a snapshot is no msgpack array: {type(e).__name__}") from None
        if not self.index:
            if name != "state" or rest[0] != FORMAT:
                raise ValueError(f"a snapshot of the state in format {rest[:1]}, this version reads {FORMAT}")
            self.index, self.history = rest[1:3]
        elif name == "end":
            self._has_ended = True
        elif name == CLIENTS:
            for client_id, first, used, results in rest[0]:
                self.clients.load(client_id, first, used, zip(results[::2], results[1::2]))
        else:
            table = self._by_name.get(name)
            if table is None:
                raise ValueError(f"a snapshot with a table {name!r}: a newer version wrote it")
            self._fill(table, rest[0])

    def finish(self) -> None:
        """Everything is there. Raises ValueError where the end is missing."""
        if not self._has_ended:
            raise ValueError("a snapshot of the state without an end")

    def _fill(self, table: Table[Any, Any], rows: Any) -> None:
        if table is self.tables.kv:
            self._fill_keys(rows)
        elif table is self.tables.tombstones:
            self._fill_tombstones(rows)
        elif table is self.tables.granules:
            self._fill_granules(rows)
        elif table.make is None:
            for key, row in rows:
                table.put(key, row)
        else:
            for row in rows:
                made = table.make(*row)
                table.put(_key_of(table.name, made), made)

    def _fill_keys(self, rows: Any) -> None:
        """As `put` does, but names are added together: one by one they take most of the time."""
        tables = self.tables
        filled, raise_directories = tables.kv.rows, tables.raise_directories
        tables.kv_names.update([row[0] for row in rows])
        for row in rows:
            made = KVRow(*row)
            key = made.key
            filled[key] = made
            if made.session:
                tables.locks_of.setdefault(made.session, set()).add(key)
            raise_directories(key, made.modify_index)

    def _fill_granules(self, rows: Any) -> None:
        """Destinations of intentions were noted as they were spelled before their case ceased to matter."""
        granules = self.tables.granules.rows
        for name, index in rows:
            folded = name.lower() if name.startswith("intention:") else name
            granules[folded] = max(index, granules.get(folded, 0))

    def _fill_tombstones(self, rows: Any) -> None:
        tables = self.tables
        tombstones = tables.tombstones.rows
        tables.kv_names.update([key for key, _ in rows])
        for key, index in rows:
            tombstones[key] = index
            tables.raise_directories(key, index)


def _key_of(table: str, row: Any) -> Any:
    """The key under which a captured row lies."""
    match table:
        case "services" | "checks" | "intentions":
            return row[0], row[1]
        case "ca" | "cluster" | "autopilot":
            return ""
    return row[0]
