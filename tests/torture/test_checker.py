"""The checker against histories that are known to be good and bad, and against all orders by brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from tests.torture.checker import GaveUp, check, stale_reads, versions
from tests.torture.history import (
    CAS,
    CONSISTENT,
    DEFAULT,
    DELETE,
    DONE,
    NEVER,
    NOT_DONE,
    PUT,
    READ,
    REFUSED,
    STALE,
    UNKNOWN,
    Op,
)


def put(value: str, call: int, end: int = NEVER, outcome: str = "") -> Op:
    return Op(PUT, "k", call, end, outcome or (DONE if end != NEVER else UNKNOWN), value)


def cas(expected: str | None, value: str, call: int, end: int = NEVER, outcome: str = "") -> Op:
    return Op(CAS, "k", call, end, outcome or (DONE if end != NEVER else UNKNOWN), value, expected)


def delete(call: int, end: int = NEVER) -> Op:
    return Op(DELETE, "k", call, end, DONE if end != NEVER else UNKNOWN)


def read(value: str | None, call: int, end: int, mode: str = DEFAULT, version: int = 0) -> Op:
    return Op(READ, "k", call, end, DONE, value, mode=mode, version=version)


GOOD: dict[str, list[Op]] = {
    "nothing": [],
    "a key that is not there": [read(None, 1, 2)],
    "one after the other": [put("a", 1, 2), read("a", 3, 4), put("b", 5, 6), read("b", 7, 8)],
    "a read beside a write sees the old value": [put("a", 1, 2), put("b", 3, 9), read("a", 4, 5), read("b", 6, 7)],
    "two writes at once, either may win": [put("a", 1, 9), put("b", 2, 8), read("a", 10, 11)],
    "a write without an answer was done": [put("a", 1), read(None, 2, 3), read("a", 4, 5)],
    "a write without an answer was not done": [put("a", 1, 2), put("b", 3), read("a", 4, 5)],
    "a write without an answer is done very late": [
        put("a", 1),
        put("b", 2, 3),
        read("b", 4, 5),
        read("a", 6, 7),
    ],
    "a write that was not done": [put("a", 1, 2), put("b", 3, 4, NOT_DONE), read("a", 5, 6)],
    "compare and set": [put("a", 1, 2), cas("a", "b", 3, 4), cas("a", "c", 5, 6, REFUSED), read("b", 7, 8)],
    "create only if absent": [cas(None, "a", 1, 2), cas(None, "b", 3, 4, REFUSED), read("a", 5, 6)],
    "a compare and set without an answer that explains a refusal": [
        put("a", 1, 2),
        cas("a", "b", 3),
        cas("a", "c", 4, 5, REFUSED),
        read("b", 6, 7),
    ],
    "a delete": [put("a", 1, 2), delete(3, 4), read(None, 5, 6), cas(None, "b", 7, 8)],
    "a delete without an answer": [put("a", 1, 2), delete(3), read("a", 4, 5), read(None, 6, 7)],
    "stale reads of any past": [
        put("a", 1, 2),
        put("b", 3, 4),
        delete(5, 6),
        read("a", 7, 8, STALE),
        read(None, 7, 8, STALE),
        read("b", 9, 10, STALE),
        read("a", 11, 12, STALE),
    ],
    "a stale read shows what a later one does not see any more": [
        put("a", 1, 2),
        put("b", 3),
        put("c", 4, 9),
        read("b", 5, 6, STALE),
        read("c", 7, 8),
    ],
    "reads of two modes between concurrent writes": [
        put("a", 1, 20),
        put("b", 2, 19),
        read("b", 3, 4, CONSISTENT),
        read("a", 5, 6),
        read("a", 7, 8, CONSISTENT),
    ],
}

BAD: dict[str, list[Op]] = {
    "an acknowledged write is lost": [put("a", 1, 2), read(None, 3, 4)],
    "an older value comes back": [put("a", 1, 2), put("b", 3, 4), read("a", 5, 6)],
    "a stale read in default mode": [put("a", 1, 2), put("b", 3, 9), read("b", 4, 5), read("a", 6, 7)],
    "a value that nobody wrote": [put("a", 1, 2), read("x", 3, 4)],
    "a stale read of a value that nobody wrote": [put("a", 1, 2), read("x", 3, 4, STALE)],
    "a value before it was written": [read("a", 1, 2), put("a", 3, 4)],
    "a stale read of a value before it was written": [read("a", 1, 2, STALE), put("a", 3, 4)],
    "a write that was not done is seen": [put("a", 1, 2), put("b", 3, 4, NOT_DONE), read("b", 5, 6)],
    "two compare-and-sets succeed on one value": [
        put("a", 1, 2),
        cas("a", "b", 3, 10),
        cas("a", "c", 4, 9),
    ],
    "a compare and set is refused for no reason": [put("a", 1, 2), cas("a", "b", 3, 4, REFUSED)],
    "a deleted key comes back": [put("a", 1, 2), delete(3, 4), read("a", 5, 6)],
    "a write is applied a second time": [put("a", 1, 2), put("b", 3, 4), read("b", 5, 6), read("a", 7, 8)],
    "a write without an answer is done twice": [
        put("a", 1),
        read("a", 2, 3),
        put("b", 4, 5),
        read("b", 6, 7),
        read("a", 8, 9),
    ],
    "two readers disagree on the order of two writes": [
        put("a", 1, 20),
        put("b", 2, 20),
        read("a", 3, 4),
        read("b", 5, 6),
        read("a", 7, 8),
    ],
    # b was there (a stale read saw it) and a answered read saw c after it, so b cannot come later.
    "what a stale read has shown was done then": [
        put("a", 1, 2),
        put("b", 3),
        read("b", 4, 5, STALE),
        put("c", 6, 7),
        read("c", 8, 9),
        read("b", 10, 11),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_is_linearizable(name: str) -> None:
    assert check(GOOD[name]) is None


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_not(name: str) -> None:
    assert check(BAD[name]) is not None


# -- against brute force ----------------------------------------------------------------------------------------------


def explained(order: Sequence[Op]) -> bool:
    """Whether the outcomes fit when the operations are done in this order, and each later than what it follows."""
    value: str | None = None
    past: set[str | None] = {None}
    for i, op in enumerate(order):
        if any(later.end < op.call for later in order[i + 1 :]):
            return False
        if op.kind == READ:
            if (op.value not in past) if op.mode == STALE else (op.value != value):
                return False
        elif op.kind == CAS and op.outcome != UNKNOWN:
            if (op.expected == value) != (op.outcome == DONE):
                return False
            value = op.value if op.outcome == DONE else value
        elif op.kind == CAS:
            value = op.value if op.expected == value else value
        else:
            value = op.value if op.kind == PUT else None
        past.add(value)
    return True


def by_brute_force(ops: Sequence[Op]) -> bool:
    """All orders of the answered operations with each subset of the others. A stale read has no earliest time."""
    ops = [Op(op.kind, op.key, -1, *_rest(op)) if op.mode == STALE else op for op in ops]
    must = [op for op in ops if op.outcome != UNKNOWN]
    may = [op for op in ops if op.outcome == UNKNOWN]
    for n in range(len(may) + 1):
        for chosen in itertools.combinations(may, n):
            if any(explained(order) for order in itertools.permutations([*must, *chosen])):
                return True
    return False


def _rest(op: Op) -> tuple[int, str, str | None, str | None, str]:
    return op.end, op.outcome, op.value, op.expected, op.mode


def invented(rng: random.Random, size: int) -> list[Op]:
    """A small history with outcomes at random: about half of them can be explained."""
    ops: list[Op] = []
    for i in range(size):
        call = rng.randrange(20)
        end = call + 1 + rng.randrange(12)
        known = [None, *(op.value for op in ops if op.kind in (PUT, CAS))]
        kind = rng.choice([PUT, PUT, CAS, DELETE, READ, READ, READ])
        if kind == READ:
            ops.append(read(rng.choice(known), call, end, rng.choice([DEFAULT, CONSISTENT, STALE])))
        elif rng.random() < 0.3:
            ops.append(Op(kind, "k", call, value=f"v{i}" if kind != DELETE else None, expected=rng.choice(known)))
        else:
            outcome = REFUSED if kind == CAS and rng.random() < 0.5 else DONE
            value = f"v{i}" if kind != DELETE else None
            ops.append(Op(kind, "k", call, end, outcome, value, rng.choice(known) if kind == CAS else None))
    return ops


def test_the_search_agrees_with_all_orders() -> None:
    rng = random.Random(7)
    verdicts = set()
    for _ in range(1500):
        ops = invented(rng, rng.randrange(1, 6))
        expected = by_brute_force(ops)
        verdicts.add(expected)
        assert (check(ops) is None) == expected, "\n".join(map(str, ops))
    assert verdicts == {True, False}


def test_many_open_writes_are_given_up_on_and_not_called_good() -> None:
    ops = [put(f"v{i}", i) for i in range(30)]
    ops += [cas("x", f"w{i}", 100 + i, 300, REFUSED) for i in range(30)]
    ops.append(cas("v29", "z", 200, 201))
    ops += [read(f"v{i}", 400 + 2 * i, 401 + 2 * i) for i in range(29)]
    with pytest.raises(GaveUp):
        check(ops, pasts_max=500)


# -- with the store's index -------------------------------------------------------------------------------------------


def test_a_read_below_a_version_that_was_known_before_it_is_stale() -> None:
    ops = [
        put("a", 1, 2),
        put("b", 3, 9),
        read("b", 4, 5, version=8),
        read("a", 4, 8, version=7),  # began before b was seen
        read("a", 6, 7, version=7),
        read("a", 6, 7, STALE, version=7),
    ]
    assert stale_reads(ops) == [ops[4]]


def test_an_acknowledged_version_makes_an_older_read_stale() -> None:
    ops = [put("a", 1, 2), put("b", 3, 4), read("a", 5, 6, version=7), read("b", 9, 10, version=8)]
    assert stale_reads(ops) == [ops[2]]


def test_a_value_at_two_versions_was_applied_twice() -> None:
    ops = [put("a", 1, 2), read("a", 3, 4, version=7), read("a", 5, 6, version=9)]
    assert versions(ops[:2]) is None
    assert versions(ops) is not None
