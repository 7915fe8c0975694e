"""Is what clients saw of one key linearizable? A search after Wing & Gong, in the order of answers as Lowe has it.

`check` walks over calls and answers in time. It keeps all *pasts* that explain what was seen so far: (the key's value,
which of the open operations have taken effect). At an answer, each past in which the operation has not yet taken
effect is continued by every order of open operations that ends with it; a history is not linearizable when no past is
left. An operation without an answer stays open to the end: it may take effect at any time after its call, or never.
What changes nothing (reads, refused compare-and-sets) takes effect in the first past that permits it, which loses no
explanation. A stale read may be of any past, so it says only that its value had been written when it was answered.

The search is exact; past `PASTS_MAX` it gives up and says so. `stale_reads` and `versions` are quick checks beside it
which use the store's own ModifyIndex.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.torture.history import CAS, DELETE, DONE, NEVER, NOT_DONE, PUT, READ, REFUSED, STALE, UNKNOWN, Op

PASTS_MAX = 200_000

#: (the key's value, bits of the open operations that have taken effect)
Past = tuple[str | None, int]


class GaveUp(Exception):
    """More pasts than the bound: nothing can be said."""


@dataclass(slots=True)
class Violation:
    """`op` cannot be explained by any order of the operations before it."""

    op: Op
    reason: str


def check(ops: Iterable[Op], *, pasts_max: int = PASTS_MAX) -> Violation | None:
    """None when the operations on one key, absent at first, are linearizable. Raises GaveUp."""
    ops = [op for op in ops if op.outcome != NOT_DONE and not (op.kind == READ and op.outcome == UNKNOWN)]
    writers = {op.value: op for op in ops if op.kind in (PUT, CAS) and op.outcome != REFUSED}
    search = _Search(pasts_max)
    for _, is_answer, _, op in _events(ops):
        if not is_answer:
            search.open(op)
        elif op.kind == READ and op.value is not None and (problem := _unwritten(op, writers)):
            return Violation(op, problem)
        elif op.mode == STALE:
            if op.value is not None and (writer := writers[op.value]).end > op.end:
                search.require(writer)
        else:
            search.require(op)
            search.close(op)
        if not search.pasts:
            return Violation(op, "no order of the operations explains it" if op.mode != STALE else "seen too early")
    return None


def _events(ops: Sequence[Op]) -> list[tuple[int, bool, int, Op]]:
    """Calls and answers in time; at the same time calls come first, which permits more and forbids nothing rightly."""
    events = [(op.call, False, i, op) for i, op in enumerate(ops) if op.mode != STALE]
    events += [(op.end, True, i, op) for i, op in enumerate(ops) if op.outcome != UNKNOWN and op.end != NEVER]
    return sorted(events, key=lambda event: event[:3])


def _unwritten(read: Op, writers: dict[str | None, Op]) -> str:
    writer = writers.get(read.value)
    if writer is None:
        return "nobody wrote this value, or its write was answered with: not done"
    return "this value was written later" if writer.call > read.end else ""


class _Search:
    def __init__(self, pasts_max: int) -> None:
        self.pasts: set[Past] = {(None, 0)}
        self._pasts_max = pasts_max
        self._open: dict[int, Op] = {}  # by bit
        self._bits: dict[int, int] = {}  # by id of the operation
        self._free: list[int] = []
        self._next = 1

    def open(self, op: Op) -> None:
        bit = self._free.pop() if self._free else self._next
        if bit == self._next:
            self._next <<= 1
        self._open[bit] = op
        self._bits[id(op)] = bit
        if _is_idle(op):
            self.pasts = {(value, done | bit) if _after(op, value) else (value, done) for value, done in self.pasts}

    def close(self, op: Op) -> None:
        """All pasts have it: its bit may be another's."""
        bit = self._bits.pop(id(op))
        del self._open[bit]
        self._free.append(bit)
        self.pasts = {(value, done & ~bit) for value, done in self.pasts}

    def require(self, op: Op) -> None:
        """Leave only pasts in which `op` has taken effect, continuing those in which it has not."""
        wanted = self._bits[id(op)]
        found: set[Past] = set()
        seen: set[Past] = set()
        todo = list(self.pasts)
        while todo:
            past = todo.pop()
            if past in seen:
                continue
            seen.add(past)
            value, done = past
            if done & wanted:
                found.add(past)
                continue
            if len(seen) > self._pasts_max:
                raise GaveUp(f"{len(seen)} pasts, {len(self._open)} operations open")
            for bit, other in self._open.items():
                if not done & bit and not _is_idle(other) and (after := _after(other, value)):
                    todo.append(self._settled(after[0], done | bit))
        self.pasts = found

    def _settled(self, value: str | None, done: int) -> Past:
        """With the operations that change nothing and are possible here."""
        for bit, op in self._open.items():
            if not done & bit and _is_idle(op) and _after(op, value):
                done |= bit
        return value, done


def _is_idle(op: Op) -> bool:
    """Whether it changes nothing, whenever it takes effect."""
    return op.kind == READ or op.outcome == REFUSED


def _after(op: Op, value: str | None) -> tuple[str | None] | None:
    """(The value after `op` took effect on `value`,), or None where its outcome would have been another one."""
    if op.kind == READ:
        return (value,) if value == op.value else None
    if op.kind == DELETE:
        return (None,)
    if op.kind == PUT:
        return (op.value,)
    matches = value == op.expected
    if op.outcome == REFUSED:
        return None if matches else (value,)
    return (op.value,) if matches else None  # an unknown one that does not match has no effect: as if never


# -- with the help of the store's index ---------------------------------------------------------------------------


def stale_reads(ops: Iterable[Op]) -> list[Op]:
    """Reads, not of mode stale, that saw an older version than was known to be there when they were called."""
    ops = sorted((op for op in ops if op.outcome == DONE), key=lambda op: op.end)
    version = {op.value: op.version for op in ops if op.kind == READ and op.value is not None}
    known: list[tuple[int, int]] = []  # (since, version)
    for op in ops:
        at = version.get(op.value or "", 0) if op.kind in (PUT, CAS) or (op.kind == READ and op.mode != STALE) else 0
        if op.value is not None and at > (known[-1][1] if known else 0):
            known.append((op.end, at))
    found = []
    reads = sorted((op for op in ops if op.kind == READ and op.mode != STALE), key=lambda op: op.call)
    at, newest = 0, 0
    for read in reads:
        while at < len(known) and known[at][0] < read.call:
            newest = known[at][1]
            at += 1
        if read.value is not None and read.version < newest:
            found.append(read)
    return found


def versions(ops: Iterable[Op]) -> Violation | None:
    """A value that was seen at two versions was written twice."""
    seen: dict[str, int] = {}
    for op in ops:
        if op.kind == READ and op.outcome == DONE and op.value is not None:
            first = seen.setdefault(op.value, op.version)
            if first != op.version:
                return Violation(op, f"one write was applied twice: at {first} and at {op.version}")
    return None
