"""A cluster as its servers hold it before there is a log: who its members are, in `bootstrap.json` and on the wire.

Values, and their reading within bounds. Raises BadRequest for what is not what it should be.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rostra.server.raft.members import LEARNER, MEMBERS_MAX, REPLICA, VOTER, Member, Members
from rostra.wire.errors import BadRequest, Conflict, TooLarge

FILE_NAME = "bootstrap.json"
#: 2: members have a suffrage, and `started`.
FORMAT = 2
EXPECT_MAX = 15
PEERS_MAX = 64
REFUSED_MAX = 64


@dataclass(frozen=True, slots=True, order=True)
class ServerInfo:
    node_id: str
    name: str
    address: str
    rpc_port: int
    key_hash: str
    datacenter: str = "dc1"
    suffrage: str = VOTER  # in a list of members

    @property
    def host_port(self) -> str:
        return f"{self.address}:{self.rpc_port}"


@dataclass(frozen=True, slots=True)
class Membership:
    """A cluster as it was founded, or as it was when it let this server in: members by ascending node id.

    The first one of a founding proposed it. Later changes are in the log.
    """

    cluster_id: str
    datacenter: str
    members: tuple[ServerInfo, ...]

    def has_key(self, key_hash: str) -> bool:
        return any(m.key_hash == key_hash for m in self.members)

    def as_members(self) -> Members:
        """The same as the log has it."""
        return tuple(Member(m.node_id, m.address, m.rpc_port, m.key_hash, m.name, m.suffrage) for m in self.members)


@dataclass(frozen=True, slots=True)
class Stored:
    """The lasting notes of a server. Every answer is on the disk before it is given."""

    prepared: Membership | None = None
    committed: Membership | None = None
    refused: tuple[str, ...] = ()
    #: Its log exists: it may have voted. Without that log it must never vote again, see `Bootstrap`.
    started: bool = False


def load(path: Path) -> Stored:
    """What this server remembers. Raises BadRequest for a damaged file, Conflict for one of a newer version."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] > FORMAT:
            raise Conflict(f"{path}: format {data['format']} of a newer Rostra; this one knows up to {FORMAT}")
        return Stored(
            prepared=parse_membership(data["prepared"]) if data["prepared"] else None,
            committed=parse_membership(data["committed"]) if data["committed"] else None,
            refused=tuple(str(r) for r in data["refused"]),
            # Format 1 does not say; a server that has a cluster and nothing else has most likely lost the rest.
            started=bool(data["started"]) if data["format"] > 1 else data["committed"] is not None,
        )
    except FileNotFoundError:
        return Stored()
    except OSError as e:
        raise BadRequest(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, BadRequest) as e:
        raise BadRequest(f"{path}: damaged ({e}); restore it from a backup") from None


def dump(stored: Stored) -> bytes:
    data = {
        "format": FORMAT,
        "prepared": dump_membership(stored.prepared) if stored.prepared else None,
        "committed": dump_membership(stored.committed) if stored.committed else None,
        "refused": list(stored.refused),
        "started": stored.started,
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def dump_membership(membership: Membership) -> dict[str, Any]:
    return {
        "cluster_id": membership.cluster_id,
        "datacenter": membership.datacenter,
        "members": [
            {
                "id": m.node_id,
                "name": m.name,
                "address": m.address,
                "port": m.rpc_port,
                "key_hash": m.key_hash,
                "suffrage": m.suffrage,
            }
            for m in membership.members
        ],
    }


def parse_membership(data: Any) -> Membership:
    """Raises BadRequest for anything but a sound one: then no other part checks it again."""
    if not isinstance(data, Mapping):
        raise BadRequest("not a cluster")
    datacenter = text(data, "datacenter")
    listed = data.get("members")
    if not isinstance(listed, (list, tuple)) or not 1 <= len(listed) <= MEMBERS_MAX:
        raise BadRequest(f"a cluster has 1 to {MEMBERS_MAX} members")
    members = []
    for item in listed:
        if not isinstance(item, Mapping):
            raise BadRequest("not a member")
        suffrage = item.get("suffrage", VOTER)
        if suffrage not in (VOTER, LEARNER, REPLICA):
            raise BadRequest("suffrage is none that this version knows")
        members.append(
            ServerInfo(
                text(item, "id"),
                text(item, "name"),
                text(item, "address"),
                number(item, "port", 65535),
                text(item, "key_hash"),
                datacenter,
                suffrage,
            )
        )
    # Addresses may be the same for a while: a server moved to that of one that is gone. A founding refuses it.
    for values in ([getattr(m, f) for m in members] for f in ("node_id", "name", "key_hash")):
        if len(set(values)) != len(values):
            raise BadRequest("two members are the same")
    if [m.node_id for m in members] != sorted(m.node_id for m in members):
        raise BadRequest("members are not in order")
    return Membership(text(data, "cluster_id"), datacenter, tuple(members))


def parse_server(said: Any) -> ServerInfo:
    """Who a greeting says that it is from. Raises BadRequest."""
    if not isinstance(said, Mapping):
        raise BadRequest("not a greeting")
    return ServerInfo(
        text(said, "node_id"),
        text(said, "name"),
        text(said, "address"),
        number(said, "rpc_port", 65535),
        text(said, "key_hash"),
        text(said, "datacenter"),
    )


def text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
        raise BadRequest(f"{name} is missing or not a text")
    return value


def texts(data: Mapping[str, Any], name: str, most: int) -> list[str]:
    values = data.get(name, ())
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and len(v) <= 255 for v in values):
        raise BadRequest(f"{name} is not a list of texts")
    if len(values) > most:
        raise TooLarge(f"{name} has {len(values)} items, at most {most} allowed")
    return list(values)


def number(data: Mapping[str, Any], name: str, most: int) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadRequest(f"{name} is not a number from 0 to {most}")
    return value
