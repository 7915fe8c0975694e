"""The tables of the state, and what is derived from them: sorted keys, who runs what, who holds which lock.

Tables are dicts of immutable rows. Only `Table.put` and `Table.remove` change one; they keep the derived part right.
Only rows are captured; the derived part is built again while loading. Transactions and loading call this; queries read
it; nothing here knows a command.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedList

from rostra.server.state.granules import FLOORS, after_prefix, directory_of, parent_directories
from rostra.server.state.rows import (
    AutopilotRow,
    CaRow,
    CheckRow,
    ClusterRow,
    IntentionRow,
    KVRow,
    MemberRow,
    NodeRow,
    RootRow,
    ServiceRow,
    SessionRow,
    session_row,
)

K = TypeVar("K")
R = TypeVar("R")

Pair = tuple[str, str]

#: Prefixes of more keys than this take the index of their directory instead of the highest of their rows.
EXACT_PREFIX_KEYS_MAX = 4096


class Table(Generic[K, R]):
    """Rows by key. `changed(key, old, new)` keeps what is derived; `order`, where kept, is the sorted keys."""

    __slots__ = ("changed", "get", "make", "name", "order", "rows")

    def __init__(
        self,
        name: str,
        make: Callable[..., R] | None = None,
        changed: Callable[[K, R | None, R | None], None] | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        self.name = name
        self.make = make  # builds a row from its captured array; None: the value is captured as it is, with its key
        self.changed = changed
        self.rows: dict[K, R] = {}
        self.get = self.rows.get
        self.order: list[K] | None = [] if ordered else None

    def put(self, key: K, row: R) -> R | None:
        """Set a row; the row that was there."""
        rows = self.rows
        old = rows.get(key)
        rows[key] = row
        if old is None and self.order is not None:
            insort(self.order, key)  # type: ignore[call-overload]
        if self.changed is not None:
            self.changed(key, old, row)
        return old

    def remove(self, key: K) -> R | None:
        """Drop a row; the row that was there."""
        old = self.rows.pop(key, None)
        if old is None:
            return None
        if self.order is not None:
            discard(self.order, key)
        if self.changed is not None:
            self.changed(key, old, None)
        return old


class ServiceName:
    """The instances of one service name, counted by tag, and the row that `ServiceNames` shows."""

    __slots__ = ("count", "row", "tags")

    def __init__(self) -> None:
        self.count = 0
        self.tags: dict[str, int] = {}
        self.row: tuple[tuple[str, ...]] = ((),)


class Tables:
    """All that is replicated, and what follows from it."""

    def __init__(self) -> None:
        # Derived. Case does not tell nodes and services apart, so names are looked up folded (in lower case).
        self.kv_names: SortedList = SortedList()  # keys of rows and of tombstones
        self.kv_directories: dict[str, int] = {}  # directory -> index of the last change below it
        self.locks_of: dict[str, set[str]] = {}  # session -> keys that it holds
        self.node_by_fold: dict[str, str] = {}
        self.node_by_id: dict[str, str] = {}
        self.services_on: dict[str, list[str]] = {}  # node -> service ids
        self.instances_of: dict[str, list[Pair]] = {}  # folded service name -> (node, service id)
        self.meshed_for: dict[str, list[Pair]] = {}  # folded destination -> (node, service id) that can speak for it
        self.service_names: dict[str, ServiceName] = {}
        self.service_name_order: list[str] = []
        self.checks_on: dict[str, list[Pair]] = {}  # node -> (node, check id)
        self.checks_for: dict[Pair, tuple[CheckRow, ...]] = {}  # (node, service id or "") -> checks by id
        self.sessions_on: dict[str, list[str]] = {}
        self.sessions_by_check: dict[Pair, list[str]] = {}  # (node, folded check id) -> sessions
        self.odd_services: dict[Pair, list[Pair]] = {}  # (node, folded id) -> keys of ids that have capital letters
        self.odd_checks: dict[Pair, list[Pair]] = {}
        self.intentions_for: dict[str, list[Pair]] = {}  # folded destination -> (source, destination)
        self.intentions_by_fold: dict[Pair, list[Pair]] = {}  # folded source and destination -> how they are spelled
        self.intentions_by_id: dict[str, list[Pair]] = {}

        # Replicated.
        self.kv: Table[str, KVRow] = Table("kv", KVRow, self._kv_changed)
        self.tombstones: Table[str, int] = Table("tombstones", None, self._tombstone_changed)
        self.nodes: Table[str, NodeRow] = Table("nodes", NodeRow, self._node_changed, ordered=True)
        self.services: Table[Pair, ServiceRow] = Table("services", ServiceRow, self._service_changed)
        self.checks: Table[Pair, CheckRow] = Table("checks", CheckRow, self._check_changed)
        self.sessions: Table[str, SessionRow] = Table("sessions", session_row, self._session_changed, ordered=True)
        self.renewals: Table[str, int] = Table("renewals")  # session -> index of its last logged renewal
        self.intentions: Table[Pair, IntentionRow] = Table(
            "intentions", IntentionRow, self._intention_changed, ordered=True
        )
        self.roots: Table[str, RootRow] = Table("roots", RootRow, ordered=True)
        self.ca: Table[str, CaRow] = Table("ca", CaRow)  # one row, key ""
        self.cluster: Table[str, ClusterRow] = Table("cluster", ClusterRow)  # one row, key ""
        self.members: Table[str, MemberRow] = Table("members", MemberRow, ordered=True)
        self.secrets: Table[str, str] = Table("secrets")  # private keys; no query reads this
        self.counters: Table[str, int] = Table("counters")
        self.granules: Table[str, int] = Table("granules")  # all but kv: and kvdir:, which follow from rows
        self.floors: Table[str, int] = Table("floors")
        self.autopilot: Table[str, AutopilotRow] = Table("autopilot", AutopilotRow)  # one row, key ""
        for family in FLOORS:
            self.floors.put(family, 1)

        #: In the order of loading: what is derived from two tables finds the first one filled.
        self.all: tuple[Table[Any, Any], ...] = (
            self.kv,
            self.tombstones,
            self.nodes,
            self.services,
            self.checks,
            self.sessions,
            self.renewals,
            self.intentions,
            self.roots,
            self.ca,
            self.cluster,
            self.members,
            self.secrets,
            self.counters,
            self.granules,
            self.floors,
            self.autopilot,
        )

    # -- key/value ------------------------------------------------------------------------------------------------

    def keys_under(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        names = self._names_under(prefix)
        rows = self.kv.rows
        return [key for key in names if key in rows] if self.tombstones.rows else list(names)

    def _names_under(self, prefix: str) -> Iterator[str]:
        if not prefix:
            return iter(self.kv_names)
        return self.kv_names.irange(prefix, after_prefix(prefix), (True, False))  # type: ignore[no-any-return]

    def prefix_index(self, prefix: str, keys: list[str]) -> int:
        """The index of what lies under `prefix`, of which `keys` are the rows; never falls.

        A directory keeps its index. Any other prefix has the highest index of its rows and tombstones, or where these
        are many that of its directory. This is never below the exact one, and only a newer change leads back to that.
        """
        floor = self.floors.rows["kv"]
        directory = directory_of(prefix)
        if directory == prefix or len(keys) > EXACT_PREFIX_KEYS_MAX:
            return max(floor, self.kv_directories.get(directory, 0))
        rows = self.kv.rows
        index = max([rows[key].modify_index for key in keys], default=0)
        tombstones = self.tombstones.rows
        if tombstones:
            index = max(index, max([tombstones.get(key, 0) for key in self._names_under(prefix)], default=0))
        return max(floor, index)

    def _kv_changed(self, key: str, old: KVRow | None, new: KVRow | None) -> None:
        if old is None:
            if key not in self.tombstones.rows:
                self.kv_names.add(key)
            before = ""
        else:
            before = old.session
        if new is None:
            if key not in self.tombstones.rows:
                self.kv_names.remove(key)
            after = ""
        else:
            after = new.session
        if before != after:
            if before:
                held = self.locks_of[before]
                held.discard(key)
                if not held:
                    del self.locks_of[before]
            if after:
                self.locks_of.setdefault(after, set()).add(key)

    def _tombstone_changed(self, key: str, old: int | None, new: int | None) -> None:
        if key in self.kv.rows:
            return
        if old is None:
            self.kv_names.add(key)
        elif new is None:
            self.kv_names.remove(key)

    # -- nodes, services, checks ----------------------------------------------------------------------------------

    def node_name(self, name: str) -> str:
        """The name under which that node is registered; `name` itself when there is none."""
        return name if name in self.nodes.rows else self.node_by_fold.get(name.lower(), name)

    def services_like(self, node: str, service_id: str) -> list[Pair]:
        """The keys of services on `node` whose ids differ from this one by case only; the one spelled so first.

        More than one only where an older version, to which they were different, has written them.
        """
        key = (node, service_id)
        return [*([key] if key in self.services.rows else ()), *self.other_services(key)]

    def checks_like(self, node: str, check_id: str) -> list[Pair]:
        """As `services_like`, of checks."""
        key = (node, check_id)
        return [*([key] if key in self.checks.rows else ()), *self.other_checks(key)]

    def other_services(self, key: Pair) -> Sequence[Pair]:
        """The keys of the service `key` in other spellings: none, as good as always."""
        return _others(self.services.rows, self.odd_services, key)

    def other_checks(self, key: Pair) -> Sequence[Pair]:
        """As `other_services`, of checks."""
        return _others(self.checks.rows, self.odd_checks, key)

    def intentions_like(self, source: str, destination: str) -> list[Pair]:
        """The intentions of a source and a destination that differ from these by case only; the exact one first."""
        key = (source, destination)
        return sorted(self.intentions_by_fold.get((source.lower(), destination.lower()), ()), key=lambda k: k != key)

    def check_pairs(self) -> list[Pair]:
        """The keys of all checks, sorted."""
        checks_on = self.checks_on
        pairs: list[Pair] = []
        for node in self.nodes.order or ():
            pairs += checks_on.get(node, ())
        return pairs

    def _node_changed(self, name: str, old: NodeRow | None, new: NodeRow | None) -> None:
        if old is not None and old.id and self.node_by_id.get(old.id) == name:
            del self.node_by_id[old.id]
        if new is None:
            del self.node_by_fold[name.lower()]
            return
        if old is None:
            self.node_by_fold[name.lower()] = name
        if new.id:
            self.node_by_id[new.id] = name

    def _service_changed(self, key: Pair, old: ServiceRow | None, new: ServiceRow | None) -> None:
        if old is not None and new is not None and old.name == new.name and old.tags == new.tags:
            if old.native == new.native and old.proxy == new.proxy and old.kind == new.kind:
                return
        else:
            if old is not None:
                self._uncount(old)
            if new is not None:
                self._count(new)
        if old is None:
            add(self.services_on, key[0], key[1])
            _note_odd(self.odd_services, key, add)
        elif new is None:
            take(self.services_on, key[0], key[1])
            _note_odd(self.odd_services, key, take)
        self._move(self.instances_of, key, old.name.lower() if old else "", new.name.lower() if new else "")
        self._move(
            self.meshed_for,
            key,
            mesh_destination(old).lower() if old else "",
            mesh_destination(new).lower() if new else "",
        )

    @staticmethod
    def _move(groups: dict[str, list[Pair]], key: Pair, before: str, after: str) -> None:
        if before != after:
            if before:
                take(groups, before, key)
            if after:
                add(groups, after, key)

    def _count(self, row: ServiceRow) -> None:
        name = self.service_names.get(row.name)
        if name is None:
            name = self.service_names[row.name] = ServiceName()
            insort(self.service_name_order, row.name)
        name.count += 1
        tags = name.tags
        size = len(tags)
        for tag in set(row.tags):
            tags[tag] = tags.get(tag, 0) + 1
        if len(tags) != size:
            name.row = (tuple(sorted(tags)),)

    def _uncount(self, row: ServiceRow) -> None:
        name = self.service_names[row.name]
        name.count -= 1
        if not name.count:
            del self.service_names[row.name]
            discard(self.service_name_order, row.name)
            return
        tags = name.tags
        size = len(tags)
        for tag in set(row.tags):
            if tags[tag] == 1:
                del tags[tag]
            else:
                tags[tag] -= 1
        if len(tags) != size:
            name.row = (tuple(sorted(tags)),)

    def _check_changed(self, key: Pair, old: CheckRow | None, new: CheckRow | None) -> None:
        node, check_id = key
        if old is None:
            add(self.checks_on, node, key)
            _note_odd(self.odd_checks, key, add)
        elif new is None:
            take(self.checks_on, node, key)
            _note_odd(self.odd_checks, key, take)
        if old is not None and (new is None or new.service_id != old.service_id):
            owner = (node, old.service_id)
            rest = tuple([c for c in self.checks_for[owner] if c.id != check_id])
            if rest:
                self.checks_for[owner] = rest
            else:
                del self.checks_for[owner]
        if new is not None:
            owner = (node, new.service_id)
            present = self.checks_for.get(owner, ())
            if old is not None and old.service_id == new.service_id:
                self.checks_for[owner] = tuple([new if c.id == check_id else c for c in present])
            else:
                self.checks_for[owner] = tuple(sorted([*present, new], key=_check_id)) if present else (new,)

    # -- sessions, intentions -------------------------------------------------------------------------------------

    def _session_changed(self, key: str, old: SessionRow | None, new: SessionRow | None) -> None:
        if old is not None:
            take(self.sessions_on, old.node, key)
            for check in session_checks(old):
                take(self.sessions_by_check, (old.node, check), key)
        if new is not None:
            add(self.sessions_on, new.node, key)
            for check in session_checks(new):
                add(self.sessions_by_check, (new.node, check), key)

    def _intention_changed(self, key: Pair, old: IntentionRow | None, new: IntentionRow | None) -> None:
        source, destination = key[0].lower(), key[1].lower()
        if old is None:
            add(self.intentions_for, destination, key)
            add(self.intentions_by_fold, (source, destination), key)
        elif new is None:
            take(self.intentions_for, destination, key)
            take(self.intentions_by_fold, (source, destination), key)
        self._move(self.intentions_by_id, key, old.id if old else "", new.id if new else "")

    # -- granules -------------------------------------------------------------------------------------------------

    def raise_directories(self, key: str, index: int) -> None:
        """While loading: `key` was changed or deleted at `index`, in whatever order keys come."""
        highest = self.kv_directories
        for directory in parent_directories(key):
            if highest.get(directory, 0) < index:
                highest[directory] = index

    def is_live(self, granule: str) -> bool:
        """Whether the thing that a granule names exists."""
        family, _, name = granule.partition(":")
        match family:
            case "service":
                return name in self.instances_of
            case "connect":
                return name in self.meshed_for
            case "node":
                return name in self.node_by_fold
            case "session":
                return name in self.sessions.rows
            case "intention":
                return name in self.intentions_for
        return True


def mesh_destination(row: ServiceRow) -> str:
    """The service for which an instance accepts connections of the mesh: "" when it does not."""
    if row.kind == "connect-proxy":
        return str((row.proxy or {}).get("destination_service_name", ""))
    return row.name if row.native else ""


def session_checks(row: SessionRow) -> set[str]:
    """The folded ids of the checks that a session relies on."""
    return {check.lower() for check in (*row.node_checks, *row.service_checks, *row.checks)}


def _check_id(row: CheckRow) -> str:
    return row.id


# -- ids that differ by case only ---------------------------------------------------------------------------------


def _others(rows: dict[Pair, Any], odd: dict[Pair, list[Pair]], key: Pair) -> Sequence[Pair]:
    name = key[1]
    folded = name.lower()
    if folded == name:
        return [other for other in odd.get(key, ()) if other != key] if odd else ()
    plain = (key[0], folded)
    return [*([plain] if plain in rows else ()), *[other for other in odd.get(plain, ()) if other != key]]


def _note_odd(odd: dict[Pair, list[Pair]], key: Pair, change: Callable[[Any, Any, Any], None]) -> None:
    folded = key[1].lower()
    if folded != key[1]:
        change(odd, (key[0], folded), key)


# -- groups: sorted lists by name, absent when empty --------------------------------------------------------------


def add(groups: dict[Any, list[Any]], name: Any, item: Any) -> None:
    group = groups.get(name)
    if group is None:
        groups[name] = [item]
    else:
        insort(group, item)


def take(groups: dict[Any, list[Any]], name: Any, item: Any) -> None:
    group = groups[name]
    if len(group) == 1:
        del groups[name]
    else:
        discard(group, item)


def discard(items: list[Any], item: Any) -> None:
    at = bisect_left(items, item)
    if at < len(items) and items[at] == item:
        del items[at]
