"""What must never happen, checked as it happens: the one order of all writes, and what everyone was told of it.

The order is what the first server to reach a position has applied there; every other server, at any later time, after
any restart and any snapshot, has to apply the same. A small model of keys, versions and remembered results, written
anew from what the product promises, says what the result of each write has to be and what a read at an index has to
show. So an acknowledgement, a refusal, a "not done" and a read can each be judged at the moment when it is given.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from rostra.server.state.entry import decode_entry
from tests.sim.world import World

Origin = tuple[str, int]

#: Servers compare the hashes of their states whenever they cross a multiple of this.
HASH_EVERY = 64


class Oracle:
    def __init__(self, world: World) -> None:
        self._world = world
        # -- the order
        self.entries: list[bytes] = []
        self.results: list[tuple[Any, ...]] = []
        self.index_after: list[int] = []  # the state's index after each entry
        self.position_of: dict[Origin, int] = {}  # of the first that was applied
        self.hashes: dict[int, tuple[int, int]] = {}  # position -> (hash of the state, of all that led to it)
        self._histories: dict[int, int] = {}
        # -- the model
        self._index = 1
        self._founded = False
        self._kv: dict[str, tuple[bytes, int]] = {}
        self._versions: dict[str, tuple[list[int], list[bytes | None]]] = {}
        self._first: dict[str, int] = {}
        self._kept: dict[Origin, tuple[Any, ...]] = {}
        # -- what was said
        self.floor = 1  # what every read that begins now has to have seen
        self.not_done: set[Origin] = set()
        self.acknowledged = self.refused = self.denied = 0
        self.reads = {"default": 0, "consistent": 0, "stale": 0}
        self.repeated = 0  # entries of the log that had been applied before
        # -- terms
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[str, int], str] = {}
        self._spoken_terms: dict[str, int] = {}

    # -- elections

    def leads(self, server_id: str, term: int) -> None:
        other = self.leaders.setdefault(term, server_id)
        if other != server_id:
            self._world.violated("one leader a term", f"{other} and {server_id} lead term {term}")

    def votes_for(self, server_id: str, term: int, candidate: str) -> None:
        """`server_id` has told somebody that its vote of `term` is `candidate`'s."""
        self.speaks(server_id, term)
        other = self.votes.setdefault((server_id, term), candidate)
        if other != candidate:
            self._world.violated("one vote a term", f"{server_id} voted for {other} and {candidate} in term {term}")

    def speaks(self, server_id: str, term: int) -> None:
        """`server_id` has given a promise under `term`: it may never come back with a lower one."""
        if self._spoken_terms.get(server_id, 0) < term:
            self._spoken_terms[server_id] = term

    def restarted(self, server_id: str, term: int) -> None:
        spoken = self._spoken_terms.get(server_id, 0)
        if term < spoken:
            self._world.violated("terms never fall", f"{server_id} had promised term {spoken}, and is at {term}")

    # -- applying

    def applied(self, server_id: str, position: int, entries: Any, results: list[tuple[Any, ...]], store: Any) -> int:
        """A server has applied these at `position`, with these results. The position afterwards."""
        known, known_results = self.entries, self.results
        before = position
        for entry, result in zip(entries, results):
            if position < len(known):
                if known[position] != entry:
                    self._differs(server_id, position, entry)
                    return position
                if known_results[position] != result:
                    self._world.violated(
                        "equal results",
                        f"{server_id} at {position}: {result!r}, another server: {known_results[position]!r}",
                    )
            else:
                self._extend(server_id, entry, result)
            position += 1
        if store.index != self.index_after[position - 1]:
            self._world.violated(
                "applied exactly once",
                f"{server_id}'s index is {store.index} at {position}, expected {self.index_after[position - 1]}",
            )
        if self._histories.setdefault(position, store.history) != store.history:
            self._world.violated("equal states", f"{server_id}'s changes differ within {position} entries")
        if before // HASH_EVERY != position // HASH_EVERY:
            self.compare_hash(server_id, position, store)
        return position

    def compare_hash(self, server_id: str, position: int, store: Any) -> None:
        found = (store.hash(), store.history)
        expected = self.hashes.setdefault(position, found)
        if found != expected:
            self._world.violated("equal states", f"{server_id}'s state differs after {position} entries")

    def _differs(self, server_id: str, position: int, entry: bytes) -> None:
        self._world.violated(
            "equal applied sequences",
            f"{server_id} applied {_shown(entry)} at {position}, another server {_shown(self.entries[position])}",
        )

    def _extend(self, server_id: str, data: bytes, result: tuple[Any, ...]) -> None:
        """The order grows by an entry, whose result the model foretells."""
        entry = decode_entry(data)
        position = len(self.entries)
        self.entries.append(data)
        self.results.append(result)
        expected = self._model(position, entry)
        self.index_after.append(self._index)
        if expected is not None and result[: len(expected)] != expected:
            self._world.violated(
                "results follow the order", f"{server_id} at {position}: {_shown(data)}: {result!r}, not {expected!r}"
            )

    def _model(self, position: int, entry: Any) -> tuple[Any, ...] | None:
        """The result; None: whatever it is. Refusals without their texts."""
        origin = (entry.client_id, entry.sequence)
        if origin in self._kept:
            self.repeated += 1
            return self._kept[origin]
        first = self._first.get(entry.client_id, entry.first_outstanding)
        if entry.sequence < first:
            self.repeated += 1
            return ("err", "conflict")
        if origin in self.position_of:
            self._world.violated("applied exactly once", f"{origin} is applied a second time, at {position}")
        self.position_of[origin] = position
        if origin in self.not_done:
            self._world.violated("not done is never done", f"{origin} was reported as not done, and is at {position}")
        self._index += 1
        expected = self._change(entry)
        for sequence in range(first, entry.first_outstanding):
            self._kept.pop((entry.client_id, sequence), None)
        self._first[entry.client_id] = max(first, entry.first_outstanding)
        self._kept[origin] = expected if expected is not None else ()
        return expected

    def _change(self, entry: Any) -> tuple[Any, ...] | None:
        args = entry.args
        if entry.kind == "kv.set":
            if args.get("acquire") is not None:
                return ("err", "bad_request")  # there are no sessions here
            old = self._kv.get(args["key"])
            if args.get("cas") is not None and args["cas"] != (old[1] if old else 0):
                return ("ok", False)
            if old is None or old[0] != args["value"]:
                self._put(args["key"], args["value"])
            return ("ok", True)
        if entry.kind == "kv.delete":
            old = self._kv.get(args["key"])
            if old is not None:
                if args.get("cas") is not None and args["cas"] != old[1]:
                    return ("ok", False)
                self._put(args["key"], None)
            return ("ok", True)
        return None

    def _put(self, key: str, value: bytes | None) -> None:
        if value is None:
            del self._kv[key]
        else:
            self._kv[key] = (value, self._index)
        indexes, values = self._versions.setdefault(key, ([], []))
        indexes.append(self._index)
        values.append(value)

    def version(self, key: str) -> int:
        """The key's modify index now, for a CAS that is likely to succeed."""
        row = self._kv.get(key)
        return row[1] if row else 0

    # -- what clients were told

    def was_acknowledged(self, origin: Origin, result: tuple[Any, ...]) -> None:
        """A client was told ("ok", value) or ("err", code)."""
        position = self.position_of.get(origin)
        if position is None:
            self._world.violated("acknowledged means applied", f"{origin} was answered {result!r}, and is nowhere")
            return
        if self.results[position][:2] != result:
            self._world.violated(
                "acknowledged means applied", f"{origin} was answered {result!r}, not {self.results[position]!r}"
            )
        if result[0] == "ok":
            self.acknowledged += 1
        else:
            self.refused += 1
        self.floor = max(self.floor, self.index_after[position])

    def was_not_done(self, origin: Origin) -> None:
        """A client was told that its write was not done and never will be."""
        self.denied += 1
        self.not_done.add(origin)
        if origin in self.position_of:
            self._world.violated(
                "not done is never done", f"{origin} was reported as not done, and is at {self.position_of[origin]}"
            )

    def was_read(self, server_id: str, mode: str, floor: int, key: str, answer: tuple[int, int, bytes | None]) -> None:
        """A read that began when the floor was `floor` has shown (index of the state, index of the answer, value)."""
        index, changed_index, value = answer
        self.reads[mode] += 1
        if mode != "stale":
            if index < floor:
                self._world.violated(
                    "linearizable reads", f"{mode} at {server_id}: index {index}, but {floor} had been seen before"
                )
            self.floor = max(self.floor, index)
        indexes, values = self._versions.get(key, ([], []))
        at = bisect_right(indexes, index)
        expected = (indexes[at - 1], values[at - 1]) if at else (1, None)
        if (changed_index, value) != expected:
            self._world.violated(
                "reads show the state",
                f"{mode} of {key} at {server_id}: {value!r} of {changed_index} at {index}, not {expected!r}",
            )


def _shown(data: bytes) -> str:
    entry = decode_entry(data)
    return f"{entry.kind} {entry.client_id}/{entry.sequence} {entry.args}"
