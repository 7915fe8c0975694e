"""The result cache: how the HTTP API, DNS and proxy configuration read, so that a question is answered once per change.

`Results.fetch` gives rows proven fresh for a consistency mode: a barrier, then the cached entry if nothing that it read
was touched since, else one read for all who ask. `Results.live` gives a shared watch, kept up to date by row deltas.
Both are a `RowSet`, which renders views: each row is encoded once, each body is joined once per change, and long work
is cut into slices so that it never holds the loop. No HTTP here; what a fragment looks like is the view's business.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from rostra.agent.servers_port import Barrier, Delta, Key, Mode, ReadAnswer, Row, Servers
from rostra.runtime.log import get
from rostra.runtime.service import Tasks
from rostra.wire.errors import RostraError

log = get("agent.results")

#: A slice of encoding or filtering ends after so many rows or so long, whichever is first.
SLICE_ROWS = 50
SLICE_S = 0.0005
#: Waiters are resumed in batches of at most this many, and of at most so many bytes of bodies, per turn of the loop.
WAKE_BATCH = 25
WAKE_BYTES = 512 << 10
#: Different views (filters) kept per row set. A client that varies `?tag=` at random only loses its own.
VIEWS_MAX = 64
LIVES_MAX = 4096
TOUCHED_MAX = 65536


@dataclass(frozen=True, slots=True, eq=False)
class Rendering:
    """One way to show rows. `shape` names the encoding, `key` the whole view: equal keys give equal bodies.

    `encode(key, row)` is called once per row, shape and change; `keep(key, row)` once per row, view and change.
    `join` gets the fragments of the rows kept, in key order, never an empty one.
    """

    shape: str
    key: Hashable
    encode: Callable[[Key, Row], bytes]
    join: Callable[[list[bytes]], bytes]
    keep: Callable[[Key, Row], bool] | None = None


class Rendered:
    """A body. While it stays the same, it stays the same object."""

    __slots__ = ("body", "count")

    def __init__(self, body: bytes, count: int) -> None:
        self.body = body
        self.count = count

    def same_as(self, other: Rendered) -> bool:
        return self is other or self.body == other.body


class _ViewState:
    __slots__ = ("parts", "rendered", "stale", "task", "version", "view")

    def __init__(self, view: Rendering, stale: Iterable[Key]) -> None:
        self.view = view
        self.parts: dict[Key, bytes] = {}  # b"" where the row is not in the view
        self.stale: dict[Key, None] = dict.fromkeys(stale)  # rows whose part is missing or old
        self.rendered: Rendered | None = None
        self.version = -1  # of the row set, when `rendered` was made
        self.task: asyncio.Task[None] | None = None


class RowSet:
    """Rows in key order, at one index, with their rendered views."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.keys: list[Key] = []
        self.index = 0
        self.version = 0
        self._encoded: dict[str, dict[Key, bytes]] = {}
        self._views: dict[Hashable, _ViewState] = {}

    def rendered(self, view: Rendering) -> Rendered | None:
        """The view's body if it is ready now."""
        state = self._views.get(view.key)
        return state.rendered if state is not None and state.version == self.version else None

    async def render(self, view: Rendering) -> tuple[Rendered, int]:
        """The view's body and the index that it belongs to. Everybody who asks at once shares the work."""
        while True:
            state = self._views.get(view.key)
            if state is None:
                state = self._new_state(view)
            if state.version == self.version and state.rendered is not None:
                return state.rendered, self.index
            if state.task is None and len(state.stale) <= SLICE_ROWS:
                self._encode(state, SLICE_ROWS, SLICE_S)
                if not state.stale:
                    return self._join(state), self.index
            if state.task is None:
                state.task = asyncio.create_task(self._encode_in_slices(state), name="render slices")
            task = state.task
            try:
                await asyncio.shield(task)
            finally:
                if task.done() and state.task is task:
                    state.task = None

    def _new_state(self, view: Rendering) -> _ViewState:
        if len(self._views) >= VIEWS_MAX:
            del self._views[next(iter(self._views))]
        state = self._views[view.key] = _ViewState(view, self.keys)
        return state

    async def _encode_in_slices(self, state: _ViewState) -> None:
        while state.stale:
            self._encode(state, SLICE_ROWS, SLICE_S)
            if state.stale:
                await asyncio.sleep(0)
        self._join(state)

    def _encode(self, state: _ViewState, rows_max: int, seconds_max: float) -> None:
        view, rows, parts, stale = state.view, self.rows, state.parts, state.stale
        shape = self._encoded.setdefault(view.shape, {})
        keep, encode = view.keep, view.encode
        until = time.perf_counter() + seconds_max
        for _ in range(min(rows_max, len(stale))):
            key = next(iter(stale))
            row = rows[key]
            if keep is not None and not keep(key, row):
                parts[key] = b""
            else:
                part = shape.get(key)
                if part is None:
                    part = shape[key] = encode(key, row)
                parts[key] = part
            del stale[key]  # not before: where `encode` fails, the next caller tries again
            if time.perf_counter() > until:
                return

    def _join(self, state: _ViewState) -> Rendered:
        parts = state.parts
        kept = [part for part in map(parts.__getitem__, self.keys) if part]
        body = state.view.join(kept)
        if state.rendered is None or state.rendered.body != body:
            state.rendered = Rendered(body, len(kept))
        state.version = self.version
        self._joined(state)
        return state.rendered

    def _joined(self, state: _ViewState) -> None:
        """A body was made. Overridden by those who count bytes or drop what is not needed any more."""

    def _forget_rows(self, changed: Iterable[Key], removed: Iterable[Key]) -> None:
        """These rows' fragments are no longer theirs."""
        for shape in self._encoded.values():
            for key in changed:
                shape.pop(key, None)
            for key in removed:
                shape.pop(key, None)
        for state in self._views.values():
            for key in changed:
                state.stale[key] = None
            for key in removed:
                state.stale.pop(key, None)
                state.parts.pop(key, None)


class Entry(RowSet):
    """One answer of a server, never changed. `valid` turns False when something that it read is touched."""

    def __init__(self, answer: ReadAnswer) -> None:
        super().__init__()
        self.index = max(1, answer.index)
        # A server that keeps the list for watches has new keys at its end.
        self.rows = dict(sorted(answer.rows, key=itemgetter(0)))
        self.keys = list(self.rows)
        self.granules = answer.granules
        self.valid = True
        self.bytes_used = 256 + _estimate(answer.rows)
        self._on_grown: Callable[[Entry, int], None] | None = None

    def _joined(self, state: _ViewState) -> None:
        state.parts.clear()
        assert state.rendered is not None
        shape = self._encoded.get(state.view.shape, {})
        if len(shape) <= 1:
            self._encoded.pop(state.view.shape, None)  # one fragment is the body again
        grown = 200 + 2 * len(state.rendered.body)
        self.bytes_used += grown
        if self._on_grown is not None:
            self._on_grown(self, grown)


def _estimate(rows: list[tuple[Key, Row]]) -> int:
    """Roughly the memory of decoded rows: a sample's fields, and the bytes of all values."""
    if not rows:
        return 0
    step = max(1, len(rows) // 16)
    sample = rows[::step]
    size = sum(sum(60 + len(f) if isinstance(f, (str, bytes)) else 120 for f in row) + 200 for _, row in sample)
    size = size * len(rows) // len(sample)
    if any(isinstance(f, bytes) for f in rows[0][1]):
        size += sum(len(f) for _, row in rows for f in row if isinstance(f, bytes))
    return size


class Live(RowSet):
    """A watch shared by all who ask the same with the same token. Rows are only replaced, never changed in place.

    `version` grows with each change that altered rows; `epoch` grows when the index went back (a restored snapshot).
    """

    def __init__(self, results: Results, query: Any, token: str) -> None:
        super().__init__()
        self._results = results
        self._query = query
        self._token = token
        self._loop = asyncio.get_running_loop()
        self.is_ready = False
        self._ready_or_error = asyncio.Event()
        self.error: RostraError | None = None
        self.epoch = 0
        self.last_used = self._loop.time()
        self.granules: tuple[int, ...] = ()
        self._fresh_at = self._loop.time()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._waiters: dict[asyncio.Future[bool], int] = {}  # → the version that it has seen
        self._waking = False
        self._building: tuple[bool, list[tuple[Key, Row]], list[Key]] | None = None
        self._task = results.tasks.keep(f"watch {type(query).__name__}", self._follow)

    # -- for readers ----------------------------------------------------------------------------------------------

    @property
    def age_s(self) -> float:
        """Seconds since the rows were last known to be the newest: 0 while the servers are connected."""
        now = self._loop.time()
        if self._results.connected and self.is_ready and self.error is None:
            return 0.0
        return now - max(self._fresh_at, self._results.connected_at if self.is_ready else 0.0)

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first answer. Raises what the servers refused it with."""
        self.touch()
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_ready:
                    if self.error is not None:
                        raise self.error
                    await self._ready_or_error.wait()
        except TimeoutError:
            return False
        return True

    async def wait_change(self, version: int, timeout_s: float) -> bool:
        """True once `self.version` differs from `version`; False after `timeout_s`. Raises what ended the watch."""
        self.touch()
        if self.version != version:
            return True
        if self.error is not None:
            raise self.error
        waiter: asyncio.Future[bool] = self._loop.create_future()
        timer = self._loop.call_later(max(0.0, timeout_s), _resolve, waiter, False)
        self._waiters[waiter] = version
        try:
            moved = await waiter
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)
            self.touch()
        if moved and self.version == version and self.error is not None:
            raise self.error
        return moved

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after each change, until the function returned is called. Keeps the watch alive."""
        handle = object()
        self._callbacks[handle] = callback

        def remove() -> None:
            self._callbacks.pop(handle, None)
            self.touch()

        return remove

    def touch(self) -> None:
        self.last_used = self._loop.time()

    @property
    def held(self) -> bool:
        return bool(self._callbacks or self._waiters)

    # -- the watch ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        self._building, pause_s = None, 0.2
        while True:
            try:
                async for delta in self._results.servers.watch(self._query, token=self._token):
                    pause_s = 0.2
                    if self.error is not None:
                        self.error = None
                        if not self.is_ready:
                            self._ready_or_error.clear()
                    self._take(delta)
            except RostraError as e:
                self.error = e
                self._ready_or_error.set()
                self._schedule_wake()
            self._building = None
            await asyncio.sleep(pause_s)
            pause_s = min(5.0, pause_s * 2)

    def _take(self, delta: Delta) -> None:
        if delta.full or self._building is None:
            self._building = (delta.full, [], [])
        full, rows, removed = self._building
        if full:
            # An answer that begins anew is compared chunk by chunk; rows that are as they were stay the same objects,
            # so that whoever made something of them need not do it again.
            old = self.rows
            rows.extend(
                (key, row if (known := old.get(key)) != row or known is None else known) for key, row in delta.rows
            )
        else:
            rows.extend(delta.rows)
        removed.extend(delta.removed)
        if not delta.done:
            return
        self._building = None
        self.granules = delta.granules or self.granules
        if full:
            self._replace(delta.index, rows)
        else:
            self._change(max(1, delta.index), rows, removed)
        self._fresh_at = self._loop.time()
        self.is_ready = True
        self._ready_or_error.set()

    def _replace(self, index: int, rows: list[tuple[Key, Row]]) -> None:
        new = dict(rows)
        changed = [key for key, row in rows if self.rows.get(key) is not row]
        removed = [key for key in self.keys if key not in new]
        went_back = self.is_ready and index < self.index
        self.rows, self.keys, self.index = new, sorted(new), max(1, index)
        self._forget_rows(changed, removed)
        if went_back:
            self.epoch += 1
        if changed or removed or went_back:
            self._changed()

    def _change(self, index: int, rows: list[tuple[Key, Row]], removed: list[Key]) -> None:
        came = {key for key, _ in rows}
        gone = [key for key in dict.fromkeys(removed) if key in self.rows and key not in came]
        changed = [(key, row) for key, row in rows if self.rows.get(key) != row]
        self.index = index
        if not gone and not changed:
            return
        new_keys = [key for key, _ in changed if key not in self.rows]
        for key in gone:
            del self.rows[key]
        for key, row in changed:
            self.rows[key] = row
        if len(gone) + len(new_keys) > 64:
            self.keys = sorted(self.rows)
        else:
            for key in gone:
                del self.keys[bisect_left(self.keys, key)]
            for key in new_keys:
                insort(self.keys, key)
        self._forget_rows([key for key, _ in changed], gone)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        for callback in list(self._callbacks.values()):
            try:
                callback()
            except Exception:
                log.err("a watch's callback failed", query=type(self._query).__name__, exc_info=True)
        self._schedule_wake()

    def _schedule_wake(self) -> None:
        if self._waiters and not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        """Resume a few of those who wait for an older version, then let the loop turn before the next few."""
        heaviest = max((len(s.rendered.body) for s in self._views.values() if s.rendered), default=0)
        batch = max(1, min(WAKE_BATCH, WAKE_BYTES // (heaviest + 1)))
        due = [w for w, seen in self._waiters.items() if (seen != self.version or self.error) and not w.done()]
        for waiter in due[:batch]:
            waiter.set_result(True)
        self._waking = len(due) > batch
        if self._waking:
            self._loop.call_soon(self._wake)

    async def close(self) -> None:
        self._task.cancel()
        for waiter in list(self._waiters):
            _resolve(waiter, False)
        await asyncio.gather(self._task, return_exceptions=True)


def _resolve(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


@dataclass(slots=True, eq=False)
class _Read:
    """A read on its way. Requests may join it whose barrier it satisfies."""

    min_index: int
    epoch: int
    task: asyncio.Task[Entry]


class Results:
    def __init__(self, servers: Servers, *, bytes_max: int = 32 << 20, idle_s: float = 600.0) -> None:
        self.servers = servers
        self.bytes_max = bytes_max
        self.idle_s = idle_s
        self.connected_at = 0.0
        self.hits = 0
        self.misses = 0
        self.bytes_used = 0
        self.last_barrier = Barrier(index=0, known_leader=False, last_contact_ms=0)
        self._entries: dict[tuple[Any, bytes], Entry] = {}  # least recently used first
        self._by_granule: dict[int, dict[tuple[Any, bytes], None]] = {}
        self._touched: dict[int, int] = {}  # granule → index at or after its last touch; oldest first
        self._floor = 0  # every granule not in _touched may have been touched up to here
        self._epoch = 0
        self._reads: dict[tuple[Any, bytes], _Read] = {}
        self._lives: dict[tuple[Any, bytes], Live] = {}
        self._token_keys: dict[str, bytes] = {"": b""}
        self._janitor: asyncio.Task[None] | None = None
        self.tasks = Tasks("agent.results")
        servers.on_touched(self._on_touched)

    # -- one answer -----------------------------------------------------------------------------------------------

    async def fetch(self, query: Any, *, mode: Mode = "default", token: str = "") -> Entry:
        """Rows as new as `mode` demands at the time of the call. Raises RostraError."""
        entry, _ = await self.fetch_with_barrier(query, mode=mode, token=token)
        return entry

    async def fetch_with_barrier(self, query: Any, *, mode: Mode = "default", token: str = "") -> tuple[Entry, Barrier]:
        """As `fetch`, with what the server said about itself."""
        barrier = self.last_barrier = await self.servers.barrier(mode)
        key = (query, self._token_key(token))
        entry = self._entries.get(key)
        if entry is not None and entry.valid:
            self.hits += 1
            self._entries[key] = self._entries.pop(key)
            return entry, barrier
        self.misses += 1
        read = self._reads.get(key)
        if read is None or read.min_index < barrier.index or read.epoch != self._epoch:
            task = asyncio.create_task(self._read(key, token, barrier.index, self._epoch), name="read")
            read = self._reads[key] = _Read(barrier.index, self._epoch, task)
            task.add_done_callback(lambda _: self._read_done(key, read))
        return await asyncio.shield(read.task), barrier

    async def _read(self, key: tuple[Any, bytes], token: str, min_index: int, epoch: int) -> Entry:
        answer = await self.servers.read(key[0], min_index=min_index, token=token)
        entry = Entry(answer)
        # The answer was evaluated at min_index or later, and every touch up to there was reported before the read left.
        evaluated_at = max(answer.index, min_index)
        if epoch != self._epoch or not answer.granules or not self._untouched_since(answer.granules, evaluated_at):
            entry.valid = False
        else:
            self._store(key, entry)
        return entry

    def _read_done(self, key: tuple[Any, bytes], read: _Read) -> None:
        if self._reads.get(key) is read:
            del self._reads[key]
        if not read.task.cancelled():
            read.task.exception()  # seen by those who still wait; nobody may be left

    # -- validity -------------------------------------------------------------------------------------------------

    def _untouched_since(self, granules: tuple[int, ...], index: int) -> bool:
        touched, floor = self._touched, self._floor
        return all(touched.get(granule, floor) <= index for granule in granules)

    def _on_touched(self, index: int, hashes: frozenset[int] | None) -> None:
        if hashes is None:
            self._forget_everything(index)
            return
        touched, by_granule = self._touched, self._by_granule
        for granule in hashes:
            # Barriers of two modes can overlap: what the later one reports may be older.
            touched[granule] = max(index, touched.pop(granule, 0))
            keys = by_granule.get(granule)
            if keys:
                for key in list(keys):
                    self._drop(key)
        while len(touched) > TOUCHED_MAX:
            oldest = next(iter(touched))
            self._floor = max(self._floor, touched.pop(oldest))

    def _forget_everything(self, index: int) -> None:
        for entry in self._entries.values():
            entry.valid = False
            entry._on_grown = None
        self._entries.clear()
        self._by_granule.clear()
        self._touched.clear()
        self._floor = index
        self._epoch += 1
        self.bytes_used = 0

    def _store(self, key: tuple[Any, bytes], entry: Entry) -> None:
        if key in self._entries:
            self._drop(key)
        if entry.bytes_used > self.bytes_max // 2:
            entry.valid = False
            return
        self._entries[key] = entry
        self.bytes_used += entry.bytes_used
        entry._on_grown = self._grown
        for granule in entry.granules:
            self._by_granule.setdefault(granule, {})[key] = None
        self._evict()

    def _grown(self, entry: Entry, n: int) -> None:
        self.bytes_used += n
        self._evict()

    def _evict(self) -> None:
        while self.bytes_used > self.bytes_max and self._entries:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[Any, bytes]) -> None:
        entry = self._entries.pop(key)
        entry.valid = False
        entry._on_grown = None
        self.bytes_used -= entry.bytes_used
        for granule in entry.granules:
            keys = self._by_granule.get(granule)
            if keys is not None:
                keys.pop(key, None)
                if not keys:
                    del self._by_granule[granule]

    def _token_key(self, token: str) -> bytes:
        found = self._token_keys.get(token)
        if found is None:
            if len(self._token_keys) > 1024:
                self._token_keys = {"": b""}
            found = self._token_keys[token] = hashlib.sha256(token.encode()).digest()
        return found

    # -- watches --------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.servers.connected

    def live(self, query: Any, *, token: str = "") -> Live:
        """The shared watch of `query`. It ends when nobody used it for `idle_s`."""
        key = (query, self._token_key(token))
        found = self._lives.get(key)
        if found is None:
            if len(self._lives) >= LIVES_MAX:
                self._end_one()
            found = self._lives[key] = Live(self, query, token)
            if self._janitor is None:
                self._janitor = self.tasks.keep("watch janitor", self._sweep)
        found.touch()
        return found

    def live_if_ready(self, query: Any, *, token: str = "") -> Live | None:
        """The watch if there is one that has its answer and its servers. Never starts one."""
        found = self._lives.get((query, self._token_key(token)))
        if found is None or not found.is_ready or found.error is not None or not self.connected:
            return None
        found.touch()
        return found

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.idle_s))
            now = asyncio.get_running_loop().time()
            if self.connected:
                self.connected_at = now
            for key, live in list(self._lives.items()):
                if not live.held and now - live.last_used > self.idle_s:
                    del self._lives[key]
                    await live.close()

    def _end_one(self) -> None:
        idle = [(live.last_used, i, key) for i, (key, live) in enumerate(self._lives.items()) if not live.held]
        if idle:
            live = self._lives.pop(min(idle)[2])
            live._task.cancel()

    async def close(self) -> None:
        """End every watch and read."""
        tasks = [read.task for read in self._reads.values()]
        if self._janitor is not None:
            tasks.append(self._janitor)  # type: ignore[arg-type]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(live.close() for live in self._lives.values()), return_exceptions=True)
        self._lives.clear()
        self._forget_everything(0)
