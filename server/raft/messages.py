"""The messages between servers: which kinds there are, what is in them, and nothing else gets through. Sans-IO.

    message := [kind: int, cluster id: str, field...]            msgpack; kinds and the order of fields are for ever

A message is a dict in pysyncobj's shape inside the process and an array outside. A newer release may append fields
(they are ignored) and kinds (they are dropped). Anything malformed raises BadMessage: the connection is closed, never
guessed.
"""

from __future__ import annotations

from typing import Any

from rostra.wire.frames import pack, unpack

Message = dict[str, Any]

#: Bound on every number: indexes, terms and rounds stay far below.
_INT_MAX = 1 << 62

SNAPSHOT_ID_CHARS_MAX = 200
TEXT_CHARS_MAX = 300
#: So many of its processes a server names.
LINEAGE_MAX, PROCESS_CHARS_MAX = 64, 64

_FIELDS: dict[str, tuple[int, tuple[tuple[str, type], ...]]] = {
    # The dialling side is ready to receive; nothing is sent to it before.
    "ready": (1, ()),
    # So that a link with nothing to say is not taken for dead.
    "ping": (2, ()),
    # Leader → follower. `r`: the round, echoed in the answer; `entries`: [command, index, term] each.
    "append_entries": (
        3,
        (
            ("term", int),
            ("commit_index", int),
            ("prevLogIdx", int),
            ("prevLogTerm", int),
            ("r", int),
            ("entries", tuple),
        ),
    ),
    # Follower → leader. Neither success nor reset: "heard you", while the disk is still working.
    "next_node_idx": (4, (("term", int), ("r", int), ("next_node_idx", int), ("reset", bool), ("success", bool))),
    # `transfer`: the leader of the term before asked for this election (a later addition: may be absent).
    "request_vote": (5, (("term", int), ("last_log_index", int), ("last_log_term", int), ("transfer", bool))),
    "response_vote": (6, (("term", int),)),
    # "Would you vote for me in `term`?" Changes nothing at the other side.
    "pre_vote": (7, (("term", int), ("last_log_index", int), ("last_log_term", int))),
    "pre_vote_reply": (8, (("term", int), ("current", int), ("granted", bool))),
    # "You are behind: the term is at least `term`." The answer to a leader or candidate of the past.
    "stale": (9, (("term", int),)),
    # Leader → the follower that shall follow it: stand for election at once.
    "timeout_now": (10, (("term", int),)),
    # Leader → follower: a piece of the snapshot file `id` of `size` bytes that ends with entry (index, snap_term).
    # Without data: how much of it do you have?
    "snapshot": (
        11,
        (
            ("term", int),
            ("r", int),
            ("id", str),
            ("index", int),
            ("snap_term", int),
            ("size", int),
            ("offset", int),
            ("data", bytes),
        ),
    ),
    # Follower → leader: the next piece wanted begins at `offset`; `done`: everything up to `index` is here for good.
    "snapshot_answer": (
        12,
        (("term", int), ("r", int), ("id", str), ("index", int), ("offset", int), ("done", bool)),
    ),
    # The first word on each connection, both ways: how many-th start of the server this is, the names of its latest
    # processes (this one last), and the last entry that is on its disk.
    "lived": (13, (("starts", int), ("lineage", tuple), ("last_index", int))),
    # The answer to that: you have been further before, and promised what you do not know any more.
    "outlived": (14, (("reason", str),)),
}
#: What an older release does not send, and what it means then.
_DEFAULTS: dict[str, tuple[Any, ...]] = {"request_vote": (False,)}
_BY_NUMBER = {number: (kind, fields) for kind, (number, fields) in _FIELDS.items()}


class BadMessage(ValueError):
    """Not a message of this cluster."""


def encode(cluster_id: str, message: Message) -> bytes:
    kind = message["type"]
    number, fields = _FIELDS[kind]
    values = [message[name] for name, _ in fields]
    for default in reversed(_DEFAULTS.get(kind, ())):
        if values[-1] != default:
            break
        values.pop()
    return pack([number, cluster_id, *values])


def decode(cluster_id: str, payload: bytes) -> Message | None:
    """The message in `payload`; None for a kind of a later release. Raises BadMessage."""
    try:
        parts = unpack(payload)
    except ValueError as e:
        raise BadMessage(str(e)) from None
    if not isinstance(parts, tuple) or len(parts) < 2 or type(parts[0]) is not int:
        raise BadMessage("not a raft message")
    if parts[1] != cluster_id:
        raise BadMessage(f"a message of cluster {parts[1]!r}")
    known = _BY_NUMBER.get(parts[0])
    if known is None:
        return None
    kind, fields = known
    missing = 2 + len(fields) - len(parts)
    if missing > 0:
        defaults = _DEFAULTS.get(kind, ())
        if missing > len(defaults):
            raise BadMessage(f"{kind} with {len(parts) - 2} fields")
        parts += defaults[-missing:]
    message: Message = {"type": kind}
    for (name, wanted), value in zip(fields, parts[2:]):
        if type(value) is not wanted or (type(value) is int and not 0 <= value < _INT_MAX):
            raise BadMessage(f"{kind} with a bad {name}")
        message[name] = value
    if kind == "append_entries":
        _check_entries(message)
    elif kind == "snapshot":
        _check_piece(message)
    elif kind == "lived":
        _check_lineage(message["lineage"])
    elif kind == "outlived" and len(message["reason"]) > TEXT_CHARS_MAX:
        raise BadMessage("outlived with a long reason")
    return message


def _check_entries(message: Message) -> None:
    """The entries follow one another and `prevLogIdx`; terms never fall and are not of the future."""
    index, term = message["prevLogIdx"], message["prevLogTerm"]
    for entry in message["entries"]:
        if type(entry) is not tuple or len(entry) != 3 or type(entry[0]) is not bytes or not entry[0]:
            raise BadMessage("append_entries with a bad entry")
        index += 1
        if entry[1] != index or type(entry[2]) is not int or not term <= entry[2] <= message["term"]:
            raise BadMessage("append_entries with entries out of order")
        term = entry[2]


def _check_lineage(lineage: tuple[Any, ...]) -> None:
    if not 0 < len(lineage) <= LINEAGE_MAX:
        raise BadMessage("lived with a bad lineage")
    if not all(type(process) is str and 0 < len(process) <= PROCESS_CHARS_MAX for process in lineage):
        raise BadMessage("lived with a bad lineage")


def _check_piece(message: Message) -> None:
    if not 0 < len(message["id"]) <= SNAPSHOT_ID_CHARS_MAX:
        raise BadMessage("snapshot with a bad id")
    if message["offset"] + len(message["data"]) > message["size"]:
        raise BadMessage("snapshot with a piece beyond its end")
