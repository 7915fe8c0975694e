"""Which list of members is in force: the newest in this server's log, committed or not (Raft §4.1).

Entries come and are truncated again. So the lists are kept with the index of their entry: a truncation brings back the
one before, and a snapshot carries the one of its own index. H21: the core would take its configuration from its
constructor until entries are applied, two views of what a majority is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rostra.server.raft.members import MEMBERSHIP, Members, decode_members

Entry = tuple[bytes, int, int]


class Membership:
    """`on_change()` is called whenever another list is in force."""

    def __init__(self, index: int, members: Members) -> None:
        """The list that counts before anything in the log says otherwise; `index` of the entry or snapshot it is of."""
        self._lists: list[tuple[int, Members]] = [(index, members)]
        self.on_change: Callable[[], None] = lambda: None

    @property
    def members(self) -> Members:
        return self._lists[-1][1]

    @property
    def index(self) -> int:
        """Of the log entry that put the present list in force."""
        return self._lists[-1][0]

    @property
    def before(self) -> Members:
        """The list that a truncation would bring back."""
        return self._lists[-2][1] if len(self._lists) > 1 else ()

    def appended(self, entries: Iterable[Entry]) -> None:
        found = [(index, decode_members(command)) for command, index, _ in entries if command[:1] == MEMBERSHIP]
        if found:
            self._lists += found
            self.on_change()

    def truncated(self, first: int) -> None:
        """The entries from `first` on are gone."""
        if self._lists[-1][0] >= first and len(self._lists) > 1:
            while self._lists[-1][0] >= first and len(self._lists) > 1:
                self._lists.pop()
            self.on_change()

    def at(self, index: int) -> tuple[int, Members]:
        """The list that was in force at `index`, and the index of its entry."""
        return next((each for each in reversed(self._lists) if each[0] <= index), self._lists[0])

    def forget_before(self, index: int) -> None:
        """A snapshot at `index` is kept: lists older than the one that it carries are not needed any more."""
        while len(self._lists) > 1 and self._lists[1][0] <= index:
            del self._lists[0]

    def replaced(self, index: int, members: Members, tail: Iterable[Entry]) -> None:
        """A snapshot was installed; `tail` is what is left of the log after it."""
        before = self.members
        self._lists = [(index, members)]
        self._lists += [(at, decode_members(command)) for command, at, _ in tail if command[:1] == MEMBERSHIP]
        if self.members != before:
            self.on_change()
