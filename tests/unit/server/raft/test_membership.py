"""Which list of members is in force, and which changes of it are allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rostra.server.raft.members import (
    LEARNER,
    MEMBERS_MAX,
    MEMBERSHIP,
    REPLICA,
    VOTER,
    Member,
    Members,
    check_change,
    decode_members,
    encode_members,
    voters,
)
from rostra.server.raft.membership import Membership
from rostra.wire.errors import BadRequest, Conflict, Internal


def members(**suffrages: str) -> Members:
    return tuple(
        Member(each, "127.0.0.1", 8300, f"key-{each}", f"name-{each}", suffrage) for each, suffrage in suffrages.items()
    )


THREE = members(a=VOTER, b=VOTER, c=VOTER)
FOUR = members(a=VOTER, b=VOTER, c=VOTER, d=LEARNER)
PROMOTED = members(a=VOTER, b=VOTER, c=VOTER, d=VOTER)


def entry(index: int, listed: Members) -> tuple[bytes, int, int]:
    return (encode_members(listed), index, 1)


# -- the list -------------------------------------------------------------------------------------------------------


def test_a_list_is_read_as_it_was_written() -> None:
    listed = members(a=VOTER, b=LEARNER, c=REPLICA)
    assert decode_members(encode_members(listed)) == listed
    assert voters(listed) == {"a"}


@pytest.mark.parametrize(
    "command",
    [
        b"\x00" + encode_members(THREE)[1:],
        MEMBERSHIP,
        MEMBERSHIP + b"\x92\x02\x90",
        MEMBERSHIP + b"\x92\x01\x91\x91\xa1a",
        encode_members(members(a="king")),
        MEMBERSHIP + b"\x80\x04\x95garbage",
    ],
)
def test_h20_a_list_that_cannot_be_read_stops_the_server(command: bytes) -> None:
    with pytest.raises(Internal, match="cannot be read"):
        decode_members(command)


# -- in force -------------------------------------------------------------------------------------------------------


def test_h21_a_list_counts_from_when_it_is_in_the_log() -> None:
    changes: list[Members] = []
    membership = Membership(0, THREE)
    membership.on_change = lambda: changes.append(membership.members)
    membership.appended([(b"\0x", 7, 1), entry(8, FOUR), (b"\0y", 9, 1)])
    assert (membership.index, membership.members) == (8, FOUR)
    membership.appended([(b"\0z", 10, 1)])
    assert changes == [FOUR]


def test_h21_when_its_entry_is_replaced_the_list_before_is_in_force_again() -> None:
    membership = Membership(0, THREE)
    changes: list[Members] = []
    membership.appended([entry(8, FOUR), entry(12, PROMOTED)])
    membership.on_change = lambda: changes.append(membership.members)
    membership.truncated(13)
    assert changes == []
    membership.truncated(12)
    assert membership.members == FOUR
    membership.truncated(3)
    assert (membership.index, membership.members) == (0, THREE)
    assert changes == [FOUR, THREE]
    membership.truncated(1)
    assert membership.members == THREE, "what counted before the log stays"


def test_a_snapshot_carries_the_list_of_its_own_index() -> None:
    membership = Membership(0, THREE)
    membership.appended([entry(8, FOUR), entry(12, PROMOTED)])
    assert membership.at(7) == (0, THREE)
    assert membership.at(8) == (8, FOUR)
    assert membership.at(99) == (12, PROMOTED)
    membership.forget_before(10)
    assert membership.at(10) == (8, FOUR)
    membership.truncated(12)
    assert membership.members == FOUR


def test_an_installed_snapshot_brings_its_list_and_what_follows_it_in_the_log_counts() -> None:
    membership = Membership(0, THREE)
    membership.replaced(8, FOUR, [])
    assert (membership.index, membership.members) == (8, FOUR)
    membership.replaced(8, FOUR, [entry(12, PROMOTED)])
    assert (membership.index, membership.members) == (12, PROMOTED)


# -- changes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "new",
    [
        members(a=VOTER, b=VOTER),
        PROMOTED,
        members(a=VOTER, b=VOTER, c=LEARNER),
        members(a=VOTER, b=VOTER, c=VOTER, d=LEARNER, e=REPLICA),
        tuple(replace(m, host="127.0.0.9") for m in THREE),
    ],
)
def test_one_voter_and_any_number_of_others_may_change_at_once(new: Members) -> None:
    check_change(THREE, new)


@pytest.mark.parametrize(
    "new",
    [
        members(a=VOTER),
        members(a=VOTER, b=VOTER, d=VOTER),
        members(a=VOTER, b=VOTER, c=VOTER, d=VOTER, e=VOTER),
        members(a=VOTER, b=LEARNER, c=LEARNER),
    ],
)
def test_two_voters_never_change_at_once(new: Members) -> None:
    with pytest.raises(Conflict, match="one at a time"):
        check_change(THREE, new)


def test_the_last_voter_stays() -> None:
    with pytest.raises(Conflict, match="last voting server"):
        check_change(members(a=VOTER, b=LEARNER), members(a=LEARNER, b=LEARNER))


@pytest.mark.parametrize("what", ["id", "key_hash", "name"])
def test_two_servers_never_share_what_tells_them_apart(what: str) -> None:
    twin = replace(Member("d", "127.0.0.1", 8300, "key-d", "name-d", LEARNER), **{what: getattr(THREE[0], what)})
    with pytest.raises(BadRequest, match="same"):
        check_change(THREE, (*THREE, twin))


def test_the_number_of_servers_is_bounded() -> None:
    many = members(a=VOTER, **{f"r{number}": REPLICA for number in range(MEMBERS_MAX)})
    with pytest.raises(BadRequest, match="at most"):
        check_change(members(a=VOTER), many)


def test_any_two_majorities_before_and_after_an_allowed_change_share_a_server() -> None:
    from itertools import combinations

    servers = "abcde"
    lists = [frozenset(c) for size in range(1, 6) for c in combinations(servers, size)]
    for old in lists:
        for new in lists:
            listed = [members(**dict.fromkeys(sorted(each), VOTER)) for each in (old, new)]
            try:
                check_change(*listed)
            except Conflict:
                continue
            majorities = [[set(c) for c in combinations(sorted(each), len(each) // 2 + 1)] for each in (old, new)]
            assert all(one & other for one in majorities[0] for other in majorities[1])
