"""The state machine: entries of the log go in, answers come out, and equal logs give equal stores.

`apply` and `apply_all` are called by one server's loop, in log order, with the bytes of entries. They return what the
world has to know, and raise only when this process must not go on. A refused command is a result like any other.
`evaluate` runs a query on the present state. There is no clock, no chance and no I/O in here; `capture.py` carries a
store between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any
from zlib import crc32

import msgpack

from rostra.acl.authorizer import EVERYTHING, Authorizer
from rostra.server.state import capture as capturing
from rostra.server.state.clients import Clients, Result
from rostra.server.state.cluster import StateHash
from rostra.server.state.commands import COMMAND_VOCABULARY
from rostra.server.state.entry import UnknownEntry, read_entry
from rostra.server.state.granules import directories, granule_hash, parent_directories
from rostra.server.state.session import seen_index
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Key, Tx, View, granule_index
from rostra.wire.codec import Unknown, Vocabulary
from rostra.wire.errors import RostraError

#: A server notes its history at multiples of this; the leader logs its own of the same index for comparison.
CHECKPOINT_ENTRIES = 10_000
#: So much is packed at a time for the history (an array of fewer than 16 or 65,536 items has a head of 1 or 3 bytes).
_FOLD_ITEMS = 192
#: Entries of which this server, as the leader, keeps the command that it has decoded already: small ones, so many.
_EXPECTED_BYTES_MAX, _EXPECTED_MAX = 4096, 8192

#: How far back a barrier can be told what was touched, in entries and in touches.
_RING_ENTRIES = 4096
_RING_TOUCHES = 16384
_INTERNAL_TEXTS = 100

_pack = msgpack.Packer(use_bin_type=True).pack

#: What one entry touched: (index of the state after it, ((granule, row key or None), ...), keys of the KV table).
Touches = tuple[int, tuple[tuple[str, Key | None], ...], tuple[str, ...]]


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

    __slots__ = ("_at", "_can", "granules", "index", "keys", "query", "view")

    def __init__(self, query: Any, view: View, can: Authorizer) -> None:
        self.query = query
        self._can = can
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
            if self._can is not EVERYTHING:
                rows = [(key, row) for key, row in rows if self.query.visible(self._can, key, row)]
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
        self.clients = Clients()
        self.index = 1
        self.internal_errors: dict[str, int] = {}  # text of an unexpected exception in a command -> how often
        self._decoders = commands.decoders
        self._tx = Tx(self.tables)
        self.cluster_id = ""  # as the bootstrap has named it
        #: Of the entries that are being applied: what they touched, and what each server's own clock has to know.
        self._touches: list[Touches] = []
        self._effects: list[tuple[Any, ...]] = []
        self._ring: deque[Touches] = deque()
        self._ring_touches = 0
        self._ring_after = 1  # the ring knows every touch of later indexes
        self._checkpoints: dict[int, int] = {}
        #: A checksum over every change and result from the beginning: servers that differ in it have applied the log
        #: differently. Carried by snapshots, since it does not follow from rows.
        self.history = 0
        self._done: list[Any] = []  # what is not in it yet
        #: Commands that this server has decoded already, when it proposed them; see `expect`.
        self._expected: dict[bytes, tuple[Any, ...]] = {}

    # -- writing --------------------------------------------------------------------------------------------------

    def apply(self, data: bytes) -> Applied:
        """Apply one entry of the log. Raises only what must stop the process (UnknownEntry, MemoryError, ...)."""
        (result,), touches, effects = self.apply_all((data,))
        return Applied(self.index, result, every_touch(touches), tuple(effects))

    def apply_all(self, entries: Sequence[bytes]) -> tuple[list[Result], list[Touches], list[tuple[Any, ...]]]:
        """Apply entries of the log in order: their results, what each of them touched, and the effects of all.

        Raises as `apply`.
        """
        apply = self._apply
        results = [apply(data) for data in entries]
        touches, effects = self._touches, self._effects
        if touches:
            self._touches = []
            ring = self._ring
            ring.extend(touches)
            self._ring_touches += sum([len(touched) + len(keys) for _, touched, keys in touches])
            while len(ring) > _RING_ENTRIES or self._ring_touches > _RING_TOUCHES:
                self._ring_after, touched, keys = ring.popleft()
                self._ring_touches -= len(touched) + len(keys)
        if effects:
            self._effects = []
        self._fold()
        return results, touches, effects

    def expect(self, data: bytes, *known: Any) -> None:
        """This server proposes `data`, and knows what is in it if it should be applied.

        `known`: cluster id, client, at_ms, actor, kind and the command itself.
        """
        if len(data) <= _EXPECTED_BYTES_MAX:
            if len(self._expected) >= _EXPECTED_MAX:
                self._expected.clear()
            self._expected[data] = known

    def expect_nothing(self) -> None:
        """The commands that were proposed here may never be applied."""
        self._expected.clear()

    def _apply(self, data: bytes) -> Result:
        expected = self._expected.pop(data, None) if self._expected else None
        if expected is not None:
            cluster_id, client_key, at_ms, actor, kind, command = expected
        else:
            cluster_id, client_key, at_ms, actor, kind, args = read_entry(data)
            command = None
            try:
                decode = self._decoders[kind]
            except (KeyError, TypeError):
                raise UnknownEntry(
                    f"a log entry is a {kind!r} command, unknown to this version: a newer version wrote it"
                ) from None
        ours = self.cluster_id
        if (cluster_id != ours or not ours) and (ours or kind != "cluster.bootstrap"):
            name = ours or "none yet"
            return self._counted(("err", "conflict", f"entry of cluster {cluster_id!r}, this one is {name!r}"), ())
        client_id, sequence, first = client_key
        clients = self.clients
        client = None
        if client_id:
            client = clients.rows.get(client_id)
            if client is not None and (earlier := client.results.get(sequence)) is not None:
                return earlier
            if refusal := clients.refusal(client, sequence, first):
                return refusal
        index = self.index + 1
        tx = self._tx
        tx.begin(index, cluster_id, at_ms, actor)
        result: Result
        try:
            result = ("ok", (command if command is not None else decode(args)).apply(tx))
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
            if tx.keys or tx.touched:
                self._touch(tx)
            if tx.effects:
                self._effects += self._real_effects(tx.effects)
                tx.effects.clear()
            if kind == "cluster.bootstrap":
                self.cluster_id = self.tables.cluster.rows[""].cluster_id
        if client_id:
            clients.remember(client_id, client, sequence, first, result, index)
        return self._counted(result, tx.changes)

    def _counted(self, result: Result, changes: Sequence[Any]) -> Result:
        """One more command counts."""
        self.index = index = self.index + 1
        done = self._done
        done.append(result)
        if changes:
            for table, key, _, row in changes:
                done += (table.name, key, row)
            if len(done) > _FOLD_ITEMS:
                self._fold()
            changes.clear()  # type: ignore[attr-defined]
        if not index % CHECKPOINT_ENTRIES:
            self._note_checkpoint()
        return result

    def _touch(self, tx: Tx) -> None:
        """Move the indexes of what was touched, and note it."""
        index, tables, keys = tx.index, self.tables, tx.keys
        touched: tuple[tuple[str, Key | None], ...] = ()
        if tx.touched:
            touched = tuple(dict.fromkeys(tx.touched))
            tx.touched.clear()
            granules = tables.granules.rows
            for granule, _ in touched:
                granules[granule] = index
        if len(keys) > 1:
            keys = list(dict.fromkeys(keys))
        highest = tables.kv_directories
        for key in keys:
            for directory in parent_directories(key):
                highest[directory] = index
        self._touches.append((index, touched, tuple(keys)))
        tx.keys.clear()

    def _real_effects(self, effects: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """The effects of a command; a logged hash becomes one only where this store's own differs."""
        for effect in effects:
            if effect[0] == "state-hash":
                _, index, theirs = effect
                ours = self._checkpoints.get(index)
                if ours is None or ours == theirs or ours >> 48 != theirs >> 48:
                    continue
                effect = ("state-differs", index, theirs, ours)
            yield effect

    def _note(self, kind: str, error: Exception) -> str:
        text = f"{kind}: {type(error).__name__}: {error}"[:500]
        if text in self.internal_errors or len(self.internal_errors) < _INTERNAL_TEXTS:
            self.internal_errors[text] = self.internal_errors.get(text, 0) + 1
        return "internal error in " + kind

    def knows(self, origin: tuple[str, int, int]) -> bool:
        """Whether this write has been applied, and its result is kept for a repetition."""
        client = self.clients.rows.get(origin[0])
        return client is not None and origin[1] in client.results

    # -- reading --------------------------------------------------------------------------------------------------

    def view(self) -> View:
        return View(self.tables)

    def evaluate(self, query: Any, can: Authorizer = EVERYTHING) -> Evaluation:
        """Begin to answer `query` with what `can` may see; its keys, granules and index are those of now."""
        return Evaluation(query, View(self.tables), can)

    def granule_index(self, granule: str) -> int:
        """The index of the last change to what `granule` names."""
        return granule_index(self.tables, granule)

    def touched_since(self, index: int) -> frozenset[int] | None:
        """Hashes of the granules touched by entries after `index`; None when that is not known: forget everything."""
        if index > self.index or index < self._ring_after:
            return None
        granules: set[str] = set()
        parents: set[str] = set()
        for at, touched, keys in reversed(self._ring):
            if at <= index:
                break
            granules.update([granule for granule, _ in touched])
            granules.update(["kv:" + key for key in keys])
            parents.update([key[: key.rfind("/") + 1] for key in keys])
        for parent in parents:
            granules.update(["kvdir:" + directory for directory in parent_directories(parent)])
        return frozenset(map(granule_hash, granules))

    def secret(self, name: str) -> str | None:
        """A private key, for the server itself: "cluster-ca" or "root:<root id>"."""
        return self.tables.secrets.get(name)

    def session_seen(self, session_id: str) -> int | None:
        """What `ExpireSession.seen_index` has to be for the present state; None when there is no such session."""
        return seen_index(self.tables, session_id)

    def reapable(self, below: int, at_most: int) -> int:
        """The `below` of a `ReapTombstones` that forgets the oldest deletions of keys; 0: none is older than `below`.

        About `at_most` of them: those of one index, such as of a whole tree, go together.
        """
        oldest = list(islice(self.tables.tombstones.rows.values(), at_most))
        if not oldest or oldest[0] >= below:
            return 0
        return min(below, oldest[-1] + 1)

    # -- comparing ------------------------------------------------------------------------------------------------

    def hash(self) -> int:
        """64 bits that are equal where the states are equal, whatever way led to them. Reads everything: for tests."""
        digest = blake2b(_pack((self.index,)), digest_size=8)
        for table in self.tables.all:
            for key, row in sorted(table.rows.items()):
                digest.update(_pack((table.name, key, row)))
        for client_id, client in self.clients.rows.items():
            digest.update(_pack((client_id, client.first, client.used, sorted(client.results.items()))))
        return int.from_bytes(digest.digest(), "big")

    def checkpoint(self) -> StateHash | None:
        """What the leader logs from time to time: its history at the last index at which every server notes its own.

        The upper 16 bits say of what fields it is made: servers of versions that differ in that do not compare.
        """
        if not self._checkpoints:
            return None
        index = max(self._checkpoints)
        return StateHash(index, self._checkpoints[index])

    def _fold(self) -> None:
        """Bring what was done since the last time into `history`."""
        done = self._done
        for at in range(0, len(done), _FOLD_ITEMS):
            part = done[at : at + _FOLD_ITEMS]
            # Without the number of items before them: how entries were handed over must not show.
            self.history = crc32(memoryview(_pack(part))[1 if len(part) < 16 else 3 :], self.history)
        done.clear()

    def _note_checkpoint(self) -> None:
        self._fold()
        self._checkpoints[self.index] = _HISTORY_FORMAT | self.history
        while len(self._checkpoints) > 4:
            del self._checkpoints[min(self._checkpoints)]

    # -- snapshots ------------------------------------------------------------------------------------------------

    def capture(self) -> Iterator[bytes | None]:
        """The state as it is at the first step, in chunks; see `capture.py`."""
        return capturing.capture(self)

    def adopt(self, loaded: capturing.Loader) -> None:
        """Become what was loaded. What was handed out before (views, evaluations) shows the former state."""
        self.tables, self.clients = loaded.tables, loaded.clients
        self.index, self.history = loaded.index, loaded.history
        self._tx = Tx(self.tables)
        row = self.tables.cluster.rows.get("")
        self.cluster_id = row.cluster_id if row is not None else ""
        self._ring.clear()
        self._ring_touches = 0
        self._ring_after = self.index
        self._checkpoints.clear()


def every_touch(touches: Sequence[Touches]) -> tuple[tuple[str, Key | None], ...]:
    """(granule, row key) of everything that was touched, those of keys and of the directories around them included."""
    found: dict[tuple[str, Key | None], None] = {}
    for _, touched, keys in touches:
        found.update(dict.fromkeys(touched))
        for key in keys:
            found["kv:" + key, key] = None
            for directory in directories(key):
                found["kvdir:" + directory, key] = None
    return tuple(found)


#: Differs between versions whose rows have different fields; the upper 16 of 64 bits.
_HISTORY_FORMAT = crc32(_pack([(t.name, getattr(t.make, "_fields", ())) for t in Tables().all])) >> 16 << 48
