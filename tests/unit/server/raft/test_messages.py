"""Only whole, known, plausible messages of this cluster get past the decoder."""

from __future__ import annotations

import pickle

import pytest

from rostra.server.raft.messages import BadMessage, Message, decode, encode
from rostra.wire.frames import pack

APPEND: Message = {
    "type": "append_entries",
    "term": 3,
    "commit_index": 5,
    "prevLogIdx": 6,
    "prevLogTerm": 2,
    "r": 77,
    "entries": ((b"\0x", 7, 2), (b"\1", 8, 3)),
}
ALL: list[Message] = [
    {"type": "ready"},
    {"type": "ping"},
    APPEND,
    {"type": "next_node_idx", "term": 3, "r": 77, "next_node_idx": 9, "reset": False, "success": True},
    {"type": "request_vote", "term": 4, "last_log_index": 9, "last_log_term": 3, "transfer": True},
    {"type": "timeout_now", "term": 4},
    {
        "type": "snapshot",
        "term": 4,
        "r": 77,
        "id": "a:9:3:ff",
        "index": 9,
        "snap_term": 3,
        "size": 10,
        "offset": 4,
        "data": b"piece",
    },
    {"type": "snapshot_answer", "term": 4, "r": 77, "id": "a:9:3:ff", "index": 9, "offset": 9, "done": False},
    {"type": "response_vote", "term": 4},
    {"type": "pre_vote", "term": 4, "last_log_index": 9, "last_log_term": 3},
    {"type": "pre_vote_reply", "term": 4, "current": 3, "granted": True},
    {"type": "stale", "term": 9},
]


@pytest.mark.parametrize("message", ALL, ids=lambda message: message["type"])
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    assert decode("c1", encode("c1", message)) == message


def test_a_vote_looks_on_the_wire_as_in_the_first_release() -> None:
    assert encode("c1", {**ALL[4], "transfer": False}).hex() == "9505a26331040903"


def test_fields_of_a_later_release_are_ignored_and_kinds_are_dropped() -> None:
    assert decode("c1", pack([9, "c1", 4, "new"])) == {"type": "stale", "term": 4}
    assert decode("c1", pack([200, "c1", {"a": 1}])) is None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pickle.dumps(["add", 1]),
        pack([]),
        pack({"type": "stale"}),
        pack(["stale", "c1", 4]),
        pack([9, "c2", 4]),
        pack([9, "c1"]),
        pack([9, "c1", -1]),
        pack([9, "c1", True]),
        pack([9, "c1", 1 << 63]),
        pack([9, "c1", "4"]),
        pack([4, "c1", 3, 7, 9, 0, 1]),
        pack([3, "c1", 3, 5, 6, 2, 7, "entries"]),
        pack([3, "c1", 3, 5, 6, 2, 7, [[b"", 7, 2]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [["text", 7, 2]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [[b"\0", 8, 2]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [[b"\0", 7, 1]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [[b"\0", 7, 4]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [[b"\0", 7, 3], [b"\0", 8, 2]]]),
        pack([3, "c1", 3, 5, 6, 2, 7, [7]]),
    ],
)
def test_anything_else_is_a_bad_message(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        decode("c1", payload)


def test_a_request_for_a_vote_of_an_older_release_is_not_a_transfer() -> None:
    asked = decode("c1", pack([5, "c1", 4, 9, 3]))
    assert asked == {"type": "request_vote", "term": 4, "last_log_index": 9, "last_log_term": 3, "transfer": False}


def test_a_piece_of_a_snapshot_lies_within_it() -> None:
    piece = {"type": "snapshot", "term": 4, "r": 7, "id": "x", "index": 9, "snap_term": 3, "size": 4, "offset": 0}
    assert decode("c1", encode("c1", {**piece, "data": b"1234"})) is not None
    for bad in (
        {"data": b"12345"},
        {"data": b"1", "offset": 4},
        {"data": b"", "id": ""},
        {"data": b"", "id": "x" * 201},
    ):
        with pytest.raises(BadMessage):
            decode("c1", encode("c1", {**piece, **bad}))
