"""What `rostra recover` says, as lines. Pure. Keys are shown, values never; nothing that could steer a terminal is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rostra.server.raft.members import VOTER, Member
from rostra.server.raft.recovery import (
    Change,
    Choice,
    Contents,
    Found,
    RecoveryPlan,
    name_of,
    newest_command_ms,
    standing,
)

#: Of what would be lost, so much is named.
KEYS_SHOWN, KEY_CHARS = 8, 64


def describe(found: Found, others: Sequence[Found]) -> Iterator[str]:
    """One directory. `others` may know its server's name."""
    yield f"{found.path}: server {_shown(name_of(found, others))}"
    yield f"    node {found.node_id or 'unknown'}, cluster {found.cluster_id or 'unknown'}"
    if found.is_empty:
        yield "    no log: nothing to keep here (an emptied directory, or a client's)"
    else:
        at_ms = newest_command_ms(found)
        newest = f"; newest command of {_date(at_ms / 1000)}" if at_ms else ""
        yield (
            f"    term {found.term}; log entries {_range(found.first_index, found.last_index)}, the last of term"
            f" {found.last_term}{newest}"
        )
        yield f"    known to be committed up to {found.committed}"
        snapshot = found.snapshot
        if snapshot is not None:
            yield f"    snapshot up to entry {snapshot.index} of term {snapshot.term}, {snapshot.size:,} bytes"
        else:
            yield "    no snapshot"
        since = "as founded" if found.founding else f"since entry {found.members_index}"
        listed = sorted(found.members, key=lambda m: m.name)
        yield f"    members {since}: {', '.join(map(_member, listed)) or 'unknown'}"
    if found.torn_bytes:
        yield f"    torn end of {found.torn_bytes} bytes that nobody was told of; wiped at the next start"
    for text in found.notes:
        yield f"    note: {_shown(text, 400)}"
    for text in found.problems:
        yield f"    CANNOT BE KEPT: {_shown(text, 400)}"
    if found.in_use:
        yield f"    {found.in_use.upper()}: stop it; what is read of a running server may be incomplete"
    yield ""


def describe_plan(plan: RecoveryPlan) -> Iterator[str]:
    """What the directories of one cluster are good for."""
    names = _names(plan)
    voting = [m.name for m in plan.members if m.votes]
    missing = sorted(_shown(m.name) for m in plan.missing)
    yield f"Cluster {plan.cluster_id}: {len(voting) - len(missing)} of {len(voting)} voters can be started from here"
    if missing:
        yield f"    missing: {', '.join(missing)}"
    for older in plan.older_copies:
        yield f"    {older.path} is the older of two copies of {names[older.path]}: never start it"
    for text in plan.contradictions:
        yield f"    CONTRADICTION: {text}"
    for a, b, shared in plan.shared:
        unknown = f" (up to {shared.unknown_to} one has only a snapshot)" if shared.unknown_to > shared.up_to else ""
        yield f"    {a.path} and {b.path} are equal up to entry {shared.up_to}{unknown}"
    yield ""
    if plan.startable:
        yield from _startable(plan, names)
        return
    for choice in plan.choices:
        yield from _choice(choice, plan, names)
    if not plan.choices:
        yield "None of these can be kept. Restore one of them from a backup."
        return
    if plan.unseen:
        yield (
            "The missing servers are a majority: what they acknowledged without those here is lost with them, and"
            " nobody here can tell what it was. Before you decide: if one of their disks"
            f" ({', '.join(missing) or 'of an older list'}) can be read, bring its data directory too."
        )
        yield ""
    if plan.best is None:
        yield "No choice is safe. Whatever is kept, something may be lost that was acknowledged; it is up to you which."
    for choice in [plan.best] if plan.best else plan.choices:
        yield f"To go on from {names[choice.keep.path]} ({choice.keep.path}), with every server stopped:"
        yield f"    {_command(choice, plan, names)}"


def describe_change(change: Change, plan: RecoveryPlan, backup: Path) -> Iterator[str]:
    """What was done, and what is left to do."""
    kept = _shown(name_of(change.keep, plan.found))
    yield f"Written into {change.keep.path}: entry {change.index} of term {change.term}, which makes the members"
    for member in change.members:
        yield f"    {_member(member)}  {member.id}  {member.host}:{member.port}"
    yield f"What was there before is in {backup}."
    yield from change.remarks
    yield ""
    yield "Now, in this order:"
    for number, text in enumerate(_steps(change, plan, kept), 1):
        yield f"    {number}. {text}"


def _steps(change: Change, plan: RecoveryPlan, kept: str) -> Iterator[str]:
    if change.emptied:
        yield (
            f"{', '.join(map(_shown, change.emptied))}: must never be started again on the data that they have."
            " Empty their data directories."
        )
    yield f"Start {kept} on {change.keep.path} (or on a copy of it in its place, if that is not where it runs)."
    if change.followers:
        others = ", ".join(_shown(name_of(f, plan.found)) for f in change.followers)
        yield (
            f"Start {others} as well, each on the data that it has. {kept} leads as soon as a majority of the members"
            " is there."
        )
    if change.emptied:
        name = _shown(change.emptied[0])
        yield (
            "Start the emptied servers, one by one. When `rostra members` shows the old one as failed (it takes some"
            f" seconds), let the new one in: rostra operator raft add-peer {name}"
        )
    yield "Check: rostra operator raft list-peers"


def _startable(plan: RecoveryPlan, names: dict[str, str]) -> Iterator[str]:
    yield f"No recovery is needed: a majority is here. Start {', '.join(names[f.path] for f in plan.startable)}."
    ids = {m.id for m in plan.members}
    outside = [f for f in plan.found if f.node_id not in ids]
    if outside:
        told = ", ".join(f"{names[f.path]} ({f.path})" for f in outside)
        yield f"Not members any more: {told}. Empty these directories before those servers are started."


def _choice(choice: Choice, plan: RecoveryPlan, names: dict[str, str]) -> Iterator[str]:
    path = choice.keep.path
    mark = "  <- safe to keep" if choice is plan.best else ""
    yield f"Keep {path} ({names[path]}):{mark}"
    if not choice.losses:
        yield "    loses nothing that another directory here has"
    for loss in choice.losses:
        count = f"{loss.count} {'entry' if loss.count == 1 else 'entries'} ({_range(loss.first, loss.last)})"
        yield f"    loses {count} of {names[loss.of.path]}, {loss.of.path}:"
        yield f"        {standing(loss)}"
        for line in _contents(loss.contents):
            yield f"        {line}"
    if choice.followers:
        yield f"    can go on with it, on the data that they have: {', '.join(names[f.path] for f in choice.followers)}"
    yield ""


def _contents(contents: Contents) -> Iterator[str]:
    if contents.keys:
        shown = [_shown(key, KEY_CHARS) for key in list(contents.keys)[:KEYS_SHOWN]]
        more = len(contents.keys) - len(shown)
        yield f"keys: {', '.join(shown)}{f' and {more} more' if more else ''}"
    if contents.kinds:
        yield "commands: " + ", ".join(f"{count} {_shown(kind)}" for kind, count in contents.kinds.most_common())
    if contents.unreadable:
        yield f"{contents.unreadable} that this version cannot read"
    if not contents.commands and not contents.unreadable:
        yield "no commands among those that the log still has"


def _command(choice: Choice, plan: RecoveryPlan, names: dict[str, str]) -> str:
    """What applies this choice: every voter that can go on does, and all that is given up is named."""
    voting = {m.id for m in plan.members if m.votes}
    followers = [f for f in choice.followers if f.node_id in voting]
    members = ",".join(name_of(f, plan.found) for f in (choice.keep, *followers))
    words = ["rostra", "recover", "apply", f"-keep={choice.keep.path}", f"-members={members}"]
    words += dict.fromkeys(f"-lose={names[loss.of.path]}" for loss in choice.losses)
    words += [f.path for f in plan.found if f is not choice.keep]
    return shlex.join(words)


def _names(plan: RecoveryPlan) -> dict[str, str]:
    return {f.path: _shown(name_of(f, plan.found)) for f in plan.found}


def _member(member: Member) -> str:
    return _shown(member.name) if member.suffrage == VOTER else f"{_shown(member.name)} ({member.suffrage})"


def _shown(text: str, most: int = 120) -> str:
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= most else safe[: most - 1] + "…"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
