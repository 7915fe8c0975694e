"""A state machine for tests of the log alone: it remembers what was applied, in order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack

CHUNK_ENTRIES = 100


class AppliedEntries:
    """The result of an entry is its place among all, from 1."""

    def __init__(self) -> None:
        self.applied: list[bytes] = []

    def apply(self, entries: Sequence[bytes]) -> list[Any]:
        self.applied += entries
        return [len(self.applied) - len(entries) + at + 1 for at in range(len(entries))]

    def capture(self) -> Iterator[bytes | None]:
        applied = list(self.applied)
        yield None
        for at in range(0, max(1, len(applied)), CHUNK_ENTRIES):
            yield msgpack.packb(applied[at : at + CHUNK_ENTRIES])

    def loader(self) -> Loading:
        return Loading(self)


class Applying(AppliedEntries):
    """Applies as the test says."""

    def __init__(self, apply: Callable[[Sequence[bytes]], list[Any]]) -> None:
        super().__init__()
        self.apply = apply  # type: ignore[method-assign, assignment]


class Loading:
    def __init__(self, state: AppliedEntries) -> None:
        self._state = state
        self._loaded: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        self._loaded += msgpack.unpackb(chunk)

    def finish(self) -> Callable[[], None]:
        def swap() -> None:
            self._state.applied[:] = self._loaded

        return swap
