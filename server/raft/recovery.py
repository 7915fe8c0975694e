"""Recovery after a majority of the servers is lost: which data directory to go on from, and what that costs. Pure.

`plan_recovery` compares what `recovery_disk.py` has read; `choose` checks a choice and says what has to be written. It
knows no files. What it rests on:

- Two logs with an entry of the same index and term are equal up to there (Raft's log matching).
- What was acknowledged is on a majority of the voters, each of which has an entry of the term in which it was
  committed, or of a later one, for ever. So of the logs that hold all that is *known* to be committed, the one that
  Raft would elect (last term, then last index) holds all that any server here has helped to acknowledge.
- What the missing servers acknowledged without those here, nobody here can know. That is possible only if the missing
  ones are a majority themselves.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import msgpack

from rostra.server.raft.members import REPLICA, VOTER, Member, Members, voters
from rostra.server.state.entry import UnknownEntry, decode_entry
from rostra.wire.errors import BadRequest, Conflict

#: (command, index, term), as in the journal.
Entry = tuple[bytes, int, int]

# First bytes of entries: commands, nothing.
_BATCH, _NO_OP = b"\x00", b"\x01"


@dataclass(frozen=True, slots=True)
class SnapshotFound:
    """A snapshot that is whole: everything up to `index` is in it."""

    index: int
    term: int
    size: int
    members: Members
    members_index: int


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What one data directory holds. With `problems` a server would not start on it, or not with all it had."""

    path: str
    node_id: str
    cluster_id: str
    term: int = 0
    entries: Sequence[Entry] = ()
    commit_index: int = 0
    snapshot: SnapshotFound | None = None
    members: Members = ()
    members_index: int = 0
    founding: bool = False  # the members are those of the founding: neither log nor snapshot say otherwise
    torn_bytes: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what is wrong and does not matter for a start
    in_use: str = ""

    @property
    def name(self) -> str:
        """The server's, or the beginning of its node id where no list of members has it."""
        return next((m.name for m in self.members if m.id == self.node_id), self.node_id[:8] or "?")

    @property
    def is_empty(self) -> bool:
        return not self.entries and self.snapshot is None

    @property
    def is_sound(self) -> bool:
        return not self.problems and not self.is_empty

    @property
    def first_index(self) -> int:
        if self.entries:
            return self.entries[0][1]
        return self.snapshot.index if self.snapshot else 0

    @property
    def last_index(self) -> int:
        if self.entries:
            return self.entries[-1][1]
        return self.snapshot.index if self.snapshot else 0

    @property
    def last_term(self) -> int:
        if self.entries:
            return self.entries[-1][2]
        return self.snapshot.term if self.snapshot else 0

    @property
    def order(self) -> tuple[int, int]:
        """Raft's: a server votes only for one whose log is not below its own."""
        return self.last_term, self.last_index

    @property
    def committed(self) -> int:
        """Everything up to here is known here to be committed."""
        return max(self.commit_index, self.snapshot.index if self.snapshot else 0)

    def entries_between(self, first: int, last: int) -> Sequence[Entry]:
        """Of those that the log still has."""
        if not self.entries:
            return ()
        start = self.entries[0][1]
        return self.entries[max(0, first - start) : max(0, last + 1 - start)]


def effective(
    entries: Sequence[Entry],
    commit_index: int,
    snapshot: SnapshotFound | None,
    logged: tuple[int, Members] | None,
    founding: Members,
) -> dict[str, Any]:
    """The fields of `Found` that a server would start with: a snapshot may be ahead of its log, or of another leader.

    `logged`: the last list of members in the log, with its index.
    """
    problems: tuple[str, ...] = ()
    if snapshot is not None:
        at = snapshot.index - entries[0][1] if entries else -1
        if not entries or at >= len(entries) or (at >= 0 and entries[at][2] != snapshot.term):
            entries = ((_NO_OP, snapshot.index, snapshot.term),)  # what the server makes of its log when it starts
    if entries and entries[0][1] > 1 and (snapshot is None or snapshot.index < entries[0][1]):
        problems = (f"the log begins at entry {entries[0][1]} and no whole snapshot holds what was before",)
    last = entries[-1][1] if entries else 0
    base = (snapshot.members_index, snapshot.members) if snapshot is not None else (0, founding)
    is_newer = logged is not None and (snapshot.index if snapshot is not None else 0) < logged[0] <= last
    index, members = logged if logged is not None and is_newer else base
    return {
        "entries": entries,
        "commit_index": min(commit_index, last),
        "snapshot": snapshot,
        "members": members,
        "members_index": index,
        "founding": index == 0,
        "problems": problems,
    }


# -- comparing two logs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shared:
    """Two logs are equal up to entry `up_to`. Up to `unknown_to` they could not be compared: one of them has only a
    snapshot of it. `contradiction`: an entry with the same index and term, but not the same content."""

    up_to: int
    unknown_to: int
    contradiction: int = 0


def compare(a: Found, b: Found) -> Shared:
    """Entry by entry: index, term and command."""
    low, high = max(a.first_index, b.first_index), min(a.last_index, b.last_index)
    known = min(a.committed, b.committed, low - 1)  # committed on both: equal by Raft's promise
    if a.is_empty or b.is_empty:
        return Shared(0, 0)
    if low > high:
        return Shared(min(a.committed, b.committed, high), high)
    ours, theirs = a.entries_between(low, high), b.entries_between(low, high)
    for mine, other in zip(ours, theirs, strict=True):
        _, index, term = mine
        if mine == other:
            continue
        if term != other[2]:
            return Shared(index - 1, index - 1) if index > low or low <= 1 else Shared(known, low - 1)
        # The first entry of a log that begins under a snapshot may be a place-holder without the content.
        if index > low or low <= 1:
            return Shared(index - 1, index - 1, contradiction=index)
    return Shared(high, high)


# -- what entries are about ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Contents:
    """The commands in some entries, without their values."""

    commands: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    keys: dict[str, None] = field(default_factory=dict)  # of the key-value store, in order; all of them
    unreadable: int = 0
    newest_ms: int = 0


def contents_of(entries: Iterable[Entry]) -> Contents:
    found = Contents()
    for command, _, _ in entries:
        if command[:1] != _BATCH:
            continue
        try:
            proposals = msgpack.unpackb(memoryview(command)[1:], use_list=False)
        except Exception:  # whatever it is: it is counted, and the person decides
            found.unreadable += 1
            continue
        for proposal in proposals if isinstance(proposals, tuple) else ():
            found.commands += 1
            try:
                entry = decode_entry(proposal)
            except (UnknownEntry, TypeError):
                found.unreadable += 1
                continue
            found.kinds[str(entry.kind)] += 1
            if isinstance(entry.at_ms, int):
                found.newest_ms = max(found.newest_ms, entry.at_ms)
            if entry.kind.startswith("kv.") and isinstance(entry.args, dict):
                key = entry.args.get("key", entry.args.get("prefix"))
                if isinstance(key, str):
                    found.keys[key + ("*" if "prefix" in entry.args else "")] = None
    return found


def newest_command_ms(found: Found) -> int:
    """When the newest command in the log was written (ms since 1970), 0 where the log's end has none."""
    for entry in list(found.entries[-200:])[::-1]:
        if at := contents_of([entry]).newest_ms:
            return at
    return 0


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loss:
    """Entries `first` to `last` of a directory that a choice gives up, counted by what is known of them."""

    of: Found
    first: int
    last: int
    committed: int  # for certain: acknowledged
    possible: int  # servers that are not here may have completed the majority
    overtaken: int  # a later leader did not have them; acknowledged only if the missing servers did so afterwards
    never: int  # certainly not acknowledged
    contents: Contents

    @property
    def count(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Choice:
    """To go on from this directory alone. `followers`: directories whose log is a part of its log."""

    keep: Found
    losses: tuple[Loss, ...]
    followers: tuple[Found, ...]

    @property
    def loses_known(self) -> int:
        """Entries that are known to be committed."""
        return max((loss.committed for loss in self.losses), default=0)


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """One cluster's directories and what can be done with them."""

    cluster_id: str
    found: tuple[Found, ...]  # all that was given of this cluster
    older_copies: tuple[Found, ...]  # of a server of which there is a newer one
    shared: tuple[tuple[Found, Found, Shared], ...]  # how far each two of them are equal
    choices: tuple[Choice, ...]  # the best first
    best: Choice | None  # safe to keep; None where there is none, or no need
    startable: tuple[Found, ...]  # a majority is here: start these, nothing else is needed
    members: Members  # in force, by the best log
    missing: tuple[Member, ...]  # voters that no sound directory is here of
    unseen: bool  # the missing may have acknowledged writes that no directory here has
    contradictions: tuple[str, ...]

    @property
    def term(self) -> int:
        """The highest that anyone here has seen. A snapshot may be on the disk before the term that it came in."""
        return max((max(f.term, f.last_term) for f in self.found), default=0)

    def choice(self, keep: Found) -> Choice | None:
        return next((c for c in self.choices if c.keep is keep), None)


def plan_recovery(found: Sequence[Found]) -> list[RecoveryPlan]:
    """One plan for each cluster among the directories, in the order given. A directory without any log is in none."""
    clusters = dict.fromkeys(f.cluster_id for f in found if f.cluster_id and not f.is_empty)
    return [_Cluster([f for f in found if f.cluster_id == c and not f.is_empty]).plan(c) for c in clusters]


def name_of(found: Found, others: Iterable[Found]) -> str:
    """The server's name, by whichever directory knows it."""
    for each in (found, *others):
        for member in each.members:
            if member.id == found.node_id:
                return member.name
    return found.name


class _Cluster:
    """The directories of one cluster while they are compared."""

    def __init__(self, found: list[Found]) -> None:
        self.found = found
        self._shared: dict[tuple[int, int], Shared] = {}
        for a, b in combinations(found, 2):
            self._shared[id(a), id(b)] = self._shared[id(b), id(a)] = compare(a, b)
        newest: dict[str, Found] = {}
        for f in found:
            before = newest.get(f.node_id)
            if before is None or (f.is_sound, f.term, f.order) > (before.is_sound, before.term, before.order):
                newest[f.node_id] = f
        self.newest = {node_id: f for node_id, f in newest.items() if f.is_sound}
        self.older = tuple(f for f in found if newest[f.node_id] is not f)
        # Lists of voters that may count; not those before one that is known to be committed.
        floor = max((f.members_index for f in found if f.members_index <= f.committed), default=0)
        self.lists = list(dict.fromkeys(voters(f.members) for f in found if f.members and f.members_index >= floor))
        self.contradictions = self._contradictions()

    def shared(self, a: Found, b: Found) -> Shared:
        return Shared(a.last_index, a.last_index) if a is b else self._shared[id(a), id(b)]

    def plan(self, cluster_id: str) -> RecoveryPlan:
        contradictions = self.contradictions
        sound = [f for f in self.found if f.is_sound]
        holders = [f for f in sound if f not in self.older and self._holds_all_committed(f)]
        best = max(holders, key=lambda f: f.order, default=None) if not contradictions else None
        choices = [self._choice(f) for f in sound]
        choices.sort(key=lambda c: (c.keep is not best, c.loses_known, c.keep in self.older, _below(c.keep.order)))
        leading = best or max(self.found, key=lambda f: (f.is_sound, f.order))
        missing = tuple(m for m in leading.members if m.votes and m.id not in self.newest)
        startable = () if contradictions else self._startable()
        return RecoveryPlan(
            cluster_id=cluster_id,
            found=tuple(self.found),
            older_copies=self.older,
            shared=tuple((a, b, self.shared(a, b)) for a, b in combinations(self.found, 2)),
            choices=tuple(choices),
            best=next((c for c in choices if c.keep is best), None) if not startable else None,
            startable=startable,
            members=leading.members,
            missing=missing,
            unseen=not self.lists or any(self._missing_of(each) >= _majority(each) for each in self.lists),
            contradictions=contradictions,
        )

    def _missing_of(self, voting: frozenset[str]) -> int:
        return len(voting - self.newest.keys())

    def _contradictions(self) -> tuple[str, ...]:
        """What cannot be where Raft's rules were kept: somebody has to look at it."""
        texts = []
        for a, b in combinations(self.found, 2):
            shared, names = self.shared(a, b), f"{a.path} and {b.path}"
            if shared.contradiction:
                texts.append(f"entry {shared.contradiction} of {names} has the same term and not the same content")
            elif shared.unknown_to < min(a.committed, b.committed):
                texts.append(
                    f"{names} differ after entry {shared.up_to}, and both know what they have to be committed: one of"
                    " them was restored from an older copy, or recovered before, and went on without the other"
                )
        return tuple(texts)

    def _holds_all_committed(self, keep: Found) -> bool:
        return all(self.shared(f, keep).unknown_to >= f.committed for f in self.found)

    def _startable(self) -> tuple[Found, ...]:
        """The directories that elect a leader by themselves, all members of its list; () where none do."""
        for leader in sorted(self.newest.values(), key=lambda f: f.order, reverse=True):
            voting = voters(leader.members)
            for_it = [f for f in self.newest.values() if f.node_id in voting and f.order <= leader.order]
            if leader.node_id in voting and len(for_it) >= _majority(voting):
                ids = {m.id for m in leader.members}
                return tuple(f for f in self.newest.values() if f.node_id in ids)
        return ()

    # -- what a choice costs

    def _choice(self, keep: Found) -> Choice:
        losses, followers = [], []
        for other in self.found:
            if other is keep:
                continue
            loss = self._loss(keep, other)
            if loss is not None:
                losses.append(loss)
            elif other.is_sound and other not in self.older and other.node_id != keep.node_id:
                followers.append(other)
        return Choice(keep, tuple(losses), tuple(followers))

    def _loss(self, keep: Found, other: Found) -> Loss | None:
        shared = self.shared(keep, other)
        first = max(shared.up_to, min(shared.unknown_to, keep.committed)) + 1
        if first > other.last_index:
            return None
        # The committed entries are a beginning of a log; those that conflict with a committed one are an end of it.
        committed_to = max(min(f.committed, self.shared(f, other).up_to) for f in self.found)
        dead_from = min(
            (
                self.shared(f, other).unknown_to + 1
                for f in self.found
                if self.shared(f, other).unknown_to < min(f.committed, other.last_index)
            ),
            default=other.last_index + 1,
        )
        if self.contradictions:
            dead_from = other.last_index + 1  # that was concluded from rules which were not kept
        counts = Counter[str]()
        counts["committed"] = max(0, min(committed_to, other.last_index) - first + 1)
        middle = max(first, committed_to + 1)
        for index in range(middle, max(middle, dead_from)):
            counts[self._standing(other, index)] += 1
        counts["never"] += max(0, other.last_index - max(first, committed_to + 1, dead_from) + 1)
        return Loss(
            of=other,
            first=first,
            last=other.last_index,
            committed=counts["committed"],
            possible=counts["possible"],
            overtaken=counts["overtaken"],
            never=counts["never"],
            contents=contents_of(other.entries_between(first, other.last_index)),
        )

    def _standing(self, other: Found, index: int) -> str:
        """Whether entry `index` of `other`, of which nobody here knows that it is committed, may be."""
        if self.contradictions:
            return "possible"
        entry = other.entries_between(index, index)
        term = entry[0][2] if entry else 0
        # A leader of a later term did not have it: it was not committed before that term. A server that helped to
        # commit it afterwards has an entry of a still later term.
        overtaken_in = max(
            (f.last_term for f in self.found if f.last_term > term and self.shared(f, other).unknown_to < index),
            default=0,
        )
        holders = {
            f.node_id
            for f in self.newest.values()
            if self.shared(f, other).up_to >= index and f.last_term > overtaken_in
        }
        reachable = (len(holders & each) + self._missing_of(each) >= _majority(each) for each in self.lists)
        if self.lists and not any(reachable):
            return "never"
        return "overtaken" if overtaken_in and not holders else "possible"


def _majority(voting: frozenset[str]) -> int:
    return len(voting) // 2 + 1


def _below(order: tuple[int, int]) -> tuple[int, int]:
    return -order[0], -order[1]


# -- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What has to be written into the kept directory: this list of members, as a committed entry."""

    keep: Found
    index: int
    term: int
    members: Members
    followers: tuple[Found, ...]  # listed as well: they keep their data and are started after the kept one
    emptied: tuple[str, ...]  # names of known servers that must not be started on the data that they have
    remarks: tuple[str, ...]


def choose(plan: RecoveryPlan, keep: Found, wanted: Sequence[Member], lose: Iterable[str]) -> Change:
    """The change that makes `wanted` the members, with the log of `keep`. Raises Conflict or BadRequest: why not.

    `lose`: names (or paths) of the servers whose entries are given up; whoever has entries that `keep` does not have
    must be named.
    """
    given_up = set(lose)
    names = {id(f): name_of(f, plan.found) for f in plan.found}
    _check_keep(plan, keep, names)
    choice = plan.choice(keep)
    assert choice is not None
    for loss in choice.losses:
        if not given_up & {names[id(loss.of)], loss.of.path}:
            raise Conflict(
                f"{names[id(loss.of)]} ({loss.of.path}) has {_entries(loss.count)} that {keep.path} does not have:"
                f" {standing(loss)}. To give them up, say -lose={names[id(loss.of)]}"
            )
    if unknown := given_up - {n for f in plan.found for n in (names[id(f)], f.path)}:
        raise BadRequest(f"-lose={sorted(unknown)[0]}: no directory given is that server's")
    followers, remarks = [], []
    for member in wanted:
        if member.id == keep.node_id:
            continue
        theirs = [f for f in plan.found if f.node_id == member.id and f not in plan.older_copies]
        if not theirs or not theirs[0].is_sound:
            what = "is damaged" if theirs else "is not among those given"
            raise Conflict(
                f"{member.name} cannot be a member from the start: its data directory {what}, so nobody knows whether"
                f" its log agrees. {'Leave it out' if theirs else 'Give its directory too, or leave it out'}; empty its"
                " data directory and add it afterwards"
            )
        other = theirs[0]
        if compare(keep, other).unknown_to < other.committed:
            raise Conflict(
                f"{member.name} cannot be a member from the start: it knows entries to be committed that {keep.path}"
                " does not have. Leave it out; empty its data directory and add it afterwards"
            )
        if any(loss.of is other for loss in choice.losses):
            remarks.append(f"{member.name} drops the entries that are given up when it hears the new leader")
        followers.append(other)
    listed = {m.id for m in wanted}
    known = {m.id: m.name for f in plan.found for m in f.members}
    known.update((f.node_id, names[id(f)]) for f in plan.found)
    return Change(
        keep=keep,
        index=keep.last_index + 1,
        term=plan.term + 1,
        members=tuple(sorted(wanted, key=lambda m: m.id)),
        followers=tuple(followers),
        emptied=tuple(sorted({n for i, n in known.items() if i not in listed} - {m.name for m in wanted})),
        remarks=tuple(remarks),
    )


def _check_keep(plan: RecoveryPlan, keep: Found, names: Mapping[int, str]) -> None:
    if keep.problems:
        raise Conflict(f"{keep.path} cannot be kept: {keep.problems[0]}")
    for each in plan.found:
        if each.in_use:
            raise Conflict(f"{each.path}: {each.in_use}. Stop every server first: what is compared must not change")
    if plan.startable:
        started = ", ".join(names[id(f)] for f in plan.startable)
        raise Conflict(f"a majority of the voting servers is here, no recovery is needed: start {started}")


def standing(loss: Loss) -> str:
    """`3 known to be committed, 1 certainly never acknowledged`."""
    parts = [
        (loss.committed, "known to be committed"),
        (loss.possible, "possibly acknowledged"),
        (loss.overtaken, "overtaken by a later leader (acknowledged only if the missing servers did so afterwards)"),
        (loss.never, "certainly never acknowledged"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count)


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


# -- the new list of members -----------------------------------------------------------------------------------------


def members_by_name(plan: RecoveryPlan, keep: Found, names: Sequence[str]) -> Members:
    """The servers of these names; each keeps its suffrage, and the kept one votes. Raises BadRequest."""
    known = _known(plan, keep)
    chosen = []
    for name in dict.fromkeys(names):
        member = next((m for m in known if m.name == name), None)
        if member is None:
            names_known = ", ".join(sorted({m.name for m in known}))
            raise BadRequest(f"-members: no server is called {name!r}; known are {names_known}")
        chosen.append(member)
    return _with_kept(chosen, plan, keep, "-members")


def members_by_peers_json(plan: RecoveryPlan, keep: Found, text: bytes | str, where: str) -> Members:
    """Consul's recovery file, in both forms: ["ip:port", …] and [{"id", "address", "non_voter"}, …].

    Each must be a server that one of the directories knows, by id or else by address: a member needs the hash of its
    key. The file's addresses count. Raises BadRequest.
    """
    try:
        listed = json.loads(text)
    except ValueError as e:
        raise BadRequest(f"{where}: {e}") from None
    if not isinstance(listed, list) or not listed:
        raise BadRequest(f"{where}: must be an array of servers, not empty")
    known = _known(plan, keep)
    chosen: list[Member] = []
    for item in listed:
        node_id, address, suffrage = _peer(item, where)
        host, port = _host_port(address, where)
        member = next((m for m in known if m.id == node_id), None) or next(
            (m for m in known if (_canonical(m.host), m.port) == (host, port)), None
        )
        if member is None:
            raise BadRequest(
                f"{where}: no directory given knows a server {node_id or address}. A member needs the hash of its key,"
                " so it cannot be listed; start it with an empty data directory and add it afterwards"
            )
        if member.id in {m.id for m in chosen}:
            raise BadRequest(f"{where}: {member.name} is listed twice")
        chosen.append(replace(member, host=host, port=port, suffrage=suffrage))
    if any(m.id == keep.node_id and m.suffrage != VOTER for m in chosen):
        raise BadRequest(f"{where}: the kept server must be a voter")
    return _with_kept(chosen, plan, keep, where)


def _peer(item: Any, where: str) -> tuple[str, str, str]:
    """(id or "", address, suffrage)."""
    if isinstance(item, str):
        return "", item, VOTER
    if not isinstance(item, dict) or not isinstance(item.get("address"), str):
        raise BadRequest(f'{where}: a server must be "ip:port" or {{"id": …, "address": "ip:port"}}')
    node_id, non_voter = item.get("id", ""), item.get("non_voter", False)
    if not isinstance(node_id, str) or not isinstance(non_voter, bool):
        raise BadRequest(f"{where}: id must be a text and non_voter true or false")
    return node_id.lower(), item["address"], REPLICA if non_voter else VOTER


def _host_port(address: str, where: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        host = str(ipaddress.ip_address(host))
        if colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
            return host, int(port)
    except ValueError:
        pass
    raise BadRequest(f"{where}: {address!r} is not ip:port")


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _known(plan: RecoveryPlan, keep: Found) -> list[Member]:
    """Every server that a directory knows as a member, as the newest list has it; likelier ones first.

    A server that was wiped and let in again has the name and the address that its old identity had.
    """
    known: dict[str, Member] = {}
    for found in sorted(plan.found, key=lambda f: (f.members_index, f.order)):
        known.update((m.id, m) for m in found.members)
    known.update((m.id, m) for m in plan.members)
    present, in_force = {f.node_id for f in plan.found}, {m.id for m in plan.members}
    return sorted(
        known.values(), key=lambda m: (m.id != keep.node_id, m.id not in in_force, m.id not in present, m.name)
    )


def _with_kept(chosen: Sequence[Member], plan: RecoveryPlan, keep: Found, where: str) -> Members:
    if keep.node_id not in {m.id for m in chosen}:
        raise BadRequest(f"{where}: the kept server, {name_of(keep, plan.found)}, must be in the list")
    return tuple(replace(m, suffrage=VOTER) if m.id == keep.node_id else m for m in chosen)
