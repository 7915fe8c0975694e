"""Shared watches: each distinct query is evaluated once per change, whoever and however many watch it.

A watch keeps the rows of its last answer. What apply touched says which row keys to look at again; the changed rows go
to every subscriber as one packed chunk, one for each group of those that may see the same. A first answer is filled in
slices between which the loop runs, and rows that were touched meanwhile are looked at again before it counts as
complete. So an answer is always that of one index. For a subscriber that cannot take changes as they come, only the
keys that it missed are kept. Large one-shot reads are watches that end after the first answer. Called on the loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from rostra.acl.authorizer import EVERYTHING, Authorizer
from rostra.server.state.granules import granule_hash, parent_directories
from rostra.server.state.store import Store, Touches
from rostra.wire.errors import RostraError, Timeout
from rostra.wire.rpc import CHUNK_BYTES, DONE, END, FULL, ServedStream, pack_rows
from rostra.wire.turns import turns

#: Rows looked at in one step of the loop: about 0.3 ms for joined rows.
SLICE_ROWS = 100
#: Deltas are sent to this many subscribers in one step of the loop.
SLICE_SUBSCRIBERS = 64
#: A subscriber that owes credit for this many chunks gets no more until it has taken some.
LAG_CHUNKS = 64
#: One that has missed more keys than this has to begin anew.
MISSED_MAX = 65_536


#: (key, the row, the one before or None) of what changed; (key, the row that was there) of what went.
Changes = list[tuple[Any, Any, Any]]
Removals = list[tuple[Any, Any]]


class _Subscriber:
    __slots__ = ("can", "missed", "once", "started", "stream")

    def __init__(self, stream: ServedStream, can: Authorizer, once: bool) -> None:
        self.stream, self.can, self.once = stream, can, once
        self.started = False  # its first answer has been taken
        #: keys that changed while the first answer went out, or while it took nothing; None: it gets every change
        self.missed: set[Any] | None = set()


class SharedWatch:
    """One query's rows, kept current, and those who want to know.

    `_busy` means that a refresh is scheduled or running; there is never more than one, so rows never go back.
    """

    def __init__(self, hub: Watches, query: Any) -> None:
        self._hub, self.query = hub, query
        self.rows: dict[Any, tuple[Any, ...]] = {}
        self._copy: list[tuple[Any, Any]] | None = None  # of `rows`, for those who get their first answer
        self.granules: tuple[str, ...] = ()
        self.index = 0
        self._touched_index = 0
        self.subscribers: dict[_Subscriber, None] = {}
        self._dirty: set[Any] = set()
        self._dirty_all = True
        self._filled = False
        self._busy = False
        #: ([(a subscriber, its chunks of a change), ...], how many have it); the next change waits until all have it.
        self._sending: tuple[list[tuple[_Subscriber, list[bytes]]], int] | None = None
        self._is_due = False  # a refresh waits for that

    # -- being told -------------------------------------------------------------------------------------------

    def touched(self, key: Any, index: int) -> None:
        """Apply touched one of our granules at `index`; `key` None means: any row may have changed."""
        self._touched_index = index
        if key is None:
            self._dirty_all = True
        else:
            self._dirty.add(key)
        if not self._busy:
            self._busy = True
            self._hub.turns.queue(self._refresh, of_many=True)

    def touch_all(self) -> None:
        """Everything may differ, and nothing is known of when it changed: the next evaluation says."""
        self.touched(None, self._touched_index)

    def subscribe(self, stream: ServedStream, can: Authorizer, *, once: bool) -> None:
        subscriber = _Subscriber(stream, can, once)
        self.subscribers[subscriber] = None
        stream.on_cancel = lambda: self._unsubscribe(subscriber)
        if self._busy:
            return  # answered when the refresh is done
        if self._filled:
            self._call(subscriber)
        else:
            self._busy = True
            self._refresh()

    def _unsubscribe(self, subscriber: _Subscriber) -> None:
        self.subscribers.pop(subscriber, None)
        if not self.subscribers:
            self._hub.forget(self)

    # -- evaluating -------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        if not self.subscribers:
            return  # forgotten meanwhile
        if self._sending is not None:
            self._is_due = True
        elif self._filled and not self._dirty_all and len(self._dirty) <= SLICE_ROWS:
            keys, self._dirty = self._dirty, set()
            changed, removed = self._look_again(keys)
            self._busy = False
            self._publish(changed, removed)
            self._answer_waiting()
        else:
            self._hub.spawn(self._refresh_sliced())

    async def _refresh_sliced(self) -> None:
        """Evaluate in slices, then look again at what was touched meanwhile, until nothing was."""
        before: dict[Any, Any] = {}  # of each key that differs, the row that was published; None: there was none
        first = not self._filled
        try:
            while self.subscribers and (self._dirty_all or self._dirty):
                if self._dirty_all:
                    self._dirty_all = False
                    self._dirty.clear()
                    fresh = await self._evaluate()
                    for key, row in fresh.items():
                        if (old := self.rows.get(key)) != row:
                            before.setdefault(key, old)
                    for key, row in self.rows.items():
                        if key not in fresh:
                            before.setdefault(key, row)
                    self.rows = fresh
                dirty, self._dirty = list(self._dirty), set()
                for at in range(0, len(dirty), SLICE_ROWS):
                    if at:  # and not after the last: where something is touched in every turn, this has to end
                        await self._hub.turns.turn()
                    some, gone = self._look_again(dirty[at : at + SLICE_ROWS])
                    for key, _, old in some:
                        before.setdefault(key, old)
                    for key, old in gone:
                        before.setdefault(key, old)
        except RostraError as e:
            for subscriber in list(self.subscribers):
                subscriber.stream.fail(e)
            self.subscribers.clear()
            self._hub.forget(self)
            return
        if not self.subscribers:
            return  # forgotten meanwhile
        self._filled = True
        self._busy = False
        if not first:
            rows = self.rows
            changed = [(key, rows[key], old) for key, old in before.items() if key in rows and rows[key] != old]
            removed = [(key, old) for key, old in before.items() if key not in rows and old is not None]
            self._publish(changed, removed)
        self._answer_waiting()

    async def _evaluate(self) -> dict[Any, tuple[Any, ...]]:
        rows: dict[Any, tuple[Any, ...]] = {}
        evaluation = self._hub.store.evaluate(self.query)
        self._listen(evaluation.granules)
        if not self._filled:
            self.index = evaluation.index
        self._touched_index = max(self._touched_index, evaluation.index)
        while self.subscribers and (part := evaluation.step(SLICE_ROWS)):
            rows.update(part)
            await self._hub.turns.turn()
        return rows

    def _answer_waiting(self) -> None:
        self._copy = None
        for subscriber in self.subscribers:
            self._call(subscriber)

    def _listen(self, granules: Iterable[str]) -> None:
        new = tuple(granules)
        if new != self.granules and self.subscribers:
            self._hub.move(self, self.granules, new)
            self.granules = new

    def _look_again(self, keys: Iterable[Any]) -> tuple[Changes, Removals]:
        """Bring `rows` up to date for `keys`; what changed and what went."""
        view, rows, query = self._hub.store.view(), self.rows, self.query
        changed: Changes = []
        removed: Removals = []
        for key in keys:
            row = query.row(view, key)
            if row is None:
                if (old := rows.pop(key, None)) is not None:
                    removed.append((key, old))
            elif (old := rows.get(key)) != row:
                rows[key] = row
                changed.append((key, row, old))
        return changed, removed

    # -- telling ----------------------------------------------------------------------------------------------

    def _publish(self, changed: Changes, removed: Removals) -> None:
        """One packed delta for each group of those that may see the same; nothing for those that see none of it.

        The index moves with the rows; a directory's neighbours do not move it.
        """
        if not changed and not removed:
            return
        self.index = max(self.index, self._touched_index)
        self._hub.deltas += 1
        groups: dict[Authorizer, tuple[list[tuple[Any, Any]], list[Any], list[bytes]]] = {}
        ready: list[tuple[_Subscriber, list[bytes]]] = []
        lost: list[_Subscriber] = []
        for subscriber in self.subscribers:
            group = groups.get(subscriber.can)
            if group is None:
                shown, gone = self._seen(subscriber.can, changed, removed)
                group = groups[subscriber.can] = shown, gone, list(self._delta(shown, gone, self.index))
            shown, gone, chunks = group
            if not chunks:
                continue
            if subscriber.missed is None:
                if subscriber.stream.credit > -LAG_CHUNKS:
                    ready.append((subscriber, chunks))
                    continue
                subscriber.missed = set()
                self._hub.spawn(self._catch_up(subscriber))
            if subscriber.started and not subscriber.once:
                subscriber.missed.update(key for key, _ in shown)
                subscriber.missed.update(gone)
                if len(subscriber.missed) > MISSED_MAX:
                    lost.append(subscriber)
        for subscriber in lost:
            subscriber.stream.fail(Timeout("the watch fell too far behind its changes"))
            self._unsubscribe(subscriber)
        if ready:
            self._sending = ready, 0
            self._send_some()

    def _seen(self, can: Authorizer, changed: Changes, removed: Removals) -> tuple[list[tuple[Any, Any]], list[Any]]:
        """The part of a change that `can` sees: a row that it may not see any more has gone."""
        if can is EVERYTHING:
            return [(key, row) for key, row, _ in changed], [key for key, _ in removed]
        visible = self.query.visible
        shown: list[tuple[Any, Any]] = []
        gone = [key for key, row in removed if visible(can, key, row)]
        for key, row, old in changed:
            if visible(can, key, row):
                shown.append((key, row))
            elif old is not None and visible(can, key, old):
                gone.append(key)
        return shown, gone

    def _shows(self, can: Authorizer, key: Any) -> bool:
        """Whether there is such a row, for `can`."""
        row = self.rows.get(key)
        return row is not None and (can is EVERYTHING or self.query.visible(can, key, row))

    def _delta(
        self, changed: list[tuple[Any, Any]], removed: list[Any], index: int, *, done: bool = True
    ) -> Iterator[bytes]:
        hashes = tuple(map(granule_hash, self.granules))
        parts: list[tuple[Any, Any]] = [(part, ()) for part in _slices(changed)]
        parts += [((), [key for key, _ in part]) for part in _slices([(key, ()) for key in removed])]
        for i, (rows, gone) in enumerate(parts, 1):
            yield pack_rows(DONE if done and i == len(parts) else 0, index, hashes, rows, gone)

    def _send_some(self) -> None:
        assert self._sending is not None
        ready, at = self._sending
        for subscriber, chunks in ready[at : at + SLICE_SUBSCRIBERS]:
            for chunk in chunks:
                subscriber.stream.send(chunk)
        at += SLICE_SUBSCRIBERS
        if at < len(ready):
            self._sending = ready, at
            self._hub.turns.queue(self._send_some, of_many=True)
            return
        self._sending = None
        if self._is_due:
            self._is_due = False
            self._hub.turns.queue(self._refresh, of_many=True)

    def _filter(self, can: Authorizer) -> Callable[[Any, Any], bool] | None:
        return None if can is EVERYTHING else partial(self.query.visible, can)

    def _call(self, subscriber: _Subscriber) -> None:
        """Now, before anything changes: a refresh in slices leaves `rows` between two moments."""
        if subscriber.started:
            return
        subscriber.started = True
        if self._copy is None:
            self._copy = list(self.rows.items())
        hashes = tuple(map(granule_hash, self.granules))
        self._hub.spawn(self._first_answer(subscriber, self._copy, self.index, hashes))

    async def _first_answer(
        self, subscriber: _Subscriber, rows: list[tuple[Any, Any]], index: int, hashes: tuple[int, ...]
    ) -> None:
        await self._hub.turns.turn()
        stream = subscriber.stream
        if stream.cancelled:
            return
        slices = iter(_slices(rows, self._filter(subscriber.can)))
        part, flags = next(slices, []), FULL
        while True:
            following = next(slices, None)
            if following is None:
                flags |= DONE | (END if subscriber.once else 0)
            if part or flags:
                if not await stream.more():
                    return
                stream.send(pack_rows(flags, index, hashes, part, ()), end=bool(flags & END))
            if following is None:
                break
            part, flags = following, 0
            await self._hub.turns.turn()
        del rows, slices
        self._copy = None
        if subscriber.once:
            self._unsubscribe(subscriber)
        else:
            await self._catch_up(subscriber)

    async def _catch_up(self, subscriber: _Subscriber) -> None:
        """Send what `subscriber` missed, as it is now, at the pace at which it takes it."""
        stream = subscriber.stream
        while missed := subscriber.missed:
            subscriber.missed = set()  # a key comes once in a delta: what it misses meanwhile is for the next
            keys = list(missed)
            index = self.index  # not that of the last part: a change that comes meanwhile is for the next delta
            for at in range(0, len(keys), SLICE_ROWS):
                if not await stream.more():
                    return
                part = keys[at : at + SLICE_ROWS]
                shown = {key for key in part if self._shows(subscriber.can, key)}
                changed = [(key, self.rows[key]) for key in part if key in shown]
                removed = [key for key in part if key not in shown]
                for chunk in self._delta(changed, removed, index, done=at + SLICE_ROWS >= len(keys)):
                    stream.send(chunk)
                await self._hub.turns.turn()
        subscriber.missed = None


def _slices(
    rows: list[tuple[Any, Any]], keep: Callable[[Any, Any], bool] | None = None
) -> Iterable[list[tuple[Any, Any]]]:
    """`rows`, as far as `keep(key, row)`, cut so that a chunk stays near CHUNK_BYTES and takes not long to be made."""
    part: list[tuple[Any, Any]] = []
    size = 0
    for n, (key, row) in enumerate(rows, 1):
        if keep is None or keep(key, row):
            part.append((key, row))
            size += 100 + len(key) + bytes_of(row)
        if size >= CHUNK_BYTES or n % SLICE_ROWS == 0:
            yield part
            part, size = [], 0
    if part:
        yield part


def bytes_of(row: Any) -> int:
    """About how many bytes `row` is on the wire; what lies inside its lists and maps counts too."""
    size = 0
    for value in row.values() if type(row) is dict else row:
        kind = type(value)
        if kind is str or kind is bytes:
            size += 2 + len(value)
        elif value and isinstance(value, (tuple, list, dict)):
            size += 3 + bytes_of(value)
        else:
            size += 3
    return size


class Watches:
    """All shared watches of a server, found by query and by granule."""

    def __init__(self, store: Store, spawn: Callable[[Any], asyncio.Task[None]]) -> None:
        self.store, self.spawn = store, spawn
        self.turns = turns()
        self._by_query: dict[Any, SharedWatch] = {}
        self._by_granule: dict[str, set[SharedWatch]] = {}
        self._of_keys = 0  # how many of these granules are of the KV table
        self.deltas = 0

    def __len__(self) -> int:
        return len(self._by_query)

    def subscribe(self, query: Any, stream: ServedStream, can: Authorizer, *, once: bool = False) -> None:
        """Send to `stream` what `can` may see of the answer, and of its changes."""
        watch = self._by_query.get(query)
        if watch is None:
            watch = self._by_query[query] = SharedWatch(self, query)
        watch.subscribe(stream, can, once=once)

    def forget(self, watch: SharedWatch) -> None:
        if self._by_query.get(watch.query) is watch:
            del self._by_query[watch.query]
        self.move(watch, watch.granules, ())

    def move(self, watch: SharedWatch, old: Iterable[str], new: Iterable[str]) -> None:
        for granule in old:
            watches = self._by_granule.get(granule)
            if watches is not None:
                watches.discard(watch)
                if not watches:
                    del self._by_granule[granule]
                    self._of_keys -= granule.startswith(_OF_KEYS)
        for granule in new:
            if granule not in self._by_granule:
                self._by_granule[granule] = set()
                self._of_keys += granule.startswith(_OF_KEYS)
            self._by_granule[granule].add(watch)

    def applied(self, touches: Iterable[Touches]) -> None:
        """What entries of the log touched, in their order."""
        by_granule = self._by_granule
        if not by_granule:
            return
        for index, touched, keys in touches:
            for granule, row_key in touched:
                for watch in by_granule.get(granule, ()):
                    watch.touched(row_key, index)
            if keys and self._of_keys:
                for key in keys:
                    for watch in by_granule.get("kv:" + key, ()):
                        watch.touched(key, index)
                    for directory in parent_directories(key):
                        for watch in by_granule.get("kvdir:" + directory, ()):
                            watch.touched(key, index)

    def touch_all(self) -> None:
        """The store has become another one: every watch looks at everything again and tells what differs."""
        for watch in self._by_query.values():
            watch.touch_all()


_OF_KEYS = ("kv:", "kvdir:")
