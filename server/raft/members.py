"""Who the servers are, as the log has it: members, how a change of them is written, and which changes are allowed.

The whole list stands in a log entry of kind MEMBERSHIP and counts from when it is in a server's log, committed or not
(Raft §4.1). One change at a time: the entry before must be committed. A change touches at most one voter, so that any
majority of the old list and any majority of the new one have a server in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from rostra.wire.errors import BadRequest, Conflict, Internal

#: First byte of the log entry; the list follows. The core's number for it, on disk for ever.
MEMBERSHIP = b"\x02"
FORMAT = 1
MEMBERS_MAX = 31

VOTER, LEARNER, REPLICA = "voter", "learner", "replica"


@dataclass(frozen=True, slots=True)
class Member:
    """One server of the cluster. A learner becomes a voter once it has caught up; a replica never does."""

    id: str
    host: str
    port: int
    key_hash: str
    name: str
    suffrage: str = VOTER

    @property
    def votes(self) -> bool:
        return self.suffrage == VOTER


Members = tuple[Member, ...]


def encode_members(members: Members) -> bytes:
    """The command of the log entry."""
    rows = [[m.id, m.host, m.port, m.key_hash, m.name, m.suffrage] for m in members]
    return MEMBERSHIP + msgpack.packb([FORMAT, rows], use_bin_type=True)  # type: ignore[no-any-return]


def decode_members(command: bytes) -> Members:
    """What `encode_members` wrote. Raises Internal: a list that cannot be read must stop the server."""
    try:
        version, rows = msgpack.unpackb(memoryview(command)[1:], use_list=False)
        if command[:1] != MEMBERSHIP or version != FORMAT:
            raise ValueError(f"format {version}")
        return tuple(_member(row) for row in rows)
    except (ValueError, TypeError) as e:
        raise Internal(f"a list of members in the log cannot be read: {e}") from None


def _member(row: Any) -> Member:
    member = Member(*row)
    if member.suffrage not in (VOTER, LEARNER, REPLICA):
        raise ValueError(f"suffrage {member.suffrage!r}")
    return member


def voters(members: Members) -> frozenset[str]:
    return frozenset(m.id for m in members if m.votes)


def check_change(old: Members, new: Members) -> None:
    """Raises BadRequest for a list that cannot be one, Conflict for a step that could make two majorities."""
    for what in ("id", "key_hash", "name"):
        values = [getattr(m, what) for m in new]
        if len(set(values)) != len(values):
            raise BadRequest(f"two servers have the same {what.replace('_', ' ')}")
    if len(new) > MEMBERS_MAX:
        raise BadRequest(f"{len(new)} servers; at most {MEMBERS_MAX} are allowed")
    if not voters(new):
        raise Conflict("the last voting server cannot be removed: nobody could decide anything afterwards")
    if len(voters(old) ^ voters(new)) > 1:
        raise Conflict("voters change one at a time")
