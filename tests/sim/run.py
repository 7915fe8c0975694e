"""Runs seeds: one with a trace, or many over several processes, with totals at the end.

python -m tests.sim.run --seeds 100            seeds 0 to 99
python -m tests.sim.run --seed 17              seed 17 again, with a trace of what happened
python -m tests.sim.run --seeds 100 --first 17
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import multiprocessing
import sys
import time
import warnings
from asyncio.events import _get_running_loop
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pysyncobj.syncobj as library

from rostra.runtime import log as logging
from rostra.server import endpoint, peers
from rostra.server.raft import core, journal, replication, snapshots, snapshotting
from rostra.server.raft import log as raft_log
from tests.sim.cluster import (
    CONVERGED_WITHIN_S,
    FAULTS_MIN,
    LEADERSHIPS_MIN,
    OPERATIONS_MIN,
    WRITE_WITHIN_S,
    Cluster,
    Profile,
)
from tests.sim.faults import Faults
from tests.sim.server import ObservedLinks
from tests.sim.world import World

WORKERS = 2
#: Collecting a run's garbage costs more than a new process every now and then.
SEEDS_OF_A_WORKER, CHUNK = 16, 4
TRACE_LINES = 60


@dataclass(slots=True)
class Outcome:
    """What became of one seed."""

    seed: int
    invariant: str = ""  # that was broken; empty: none
    detail: str = ""
    trace: list[str] = field(default_factory=list)
    digest: str = ""  # equal for equal runs
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    operations: int = 0
    faults: int = 0
    leaderships: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def counts_as_seed(self) -> bool:
        return (
            not self.invariant
            and self.operations >= OPERATIONS_MIN
            and self.faults >= FAULTS_MIN
            and self.leaderships >= LEADERSHIPS_MIN
        )

    @property
    def has_snapshots(self) -> bool:
        return self.counts["snapshots taken"] > 0

    @property
    def has_members(self) -> bool:
        return self.counts["member changes"] > 0

    @property
    def has_reads(self) -> bool:
        return self.counts["reads default"] > 0 and self.counts["reads consistent"] > 0

    def report(self) -> str:
        """For people, of a failure."""
        lines = [
            f"seed {self.seed} at {self.virtual_s:.6f} s: {self.invariant}",
            self.detail,
            *self.trace,
            f"replay: python -m tests.sim.run --seed {self.seed}",
        ]
        return "\n".join(lines)


def run_seed(
    seed: int,
    *,
    profile: Callable[[int, Any], Profile] = Profile.of,
    trace: int = 0,
    explain: bool = True,
) -> Outcome:
    """One run. `trace`: so many of the last lines are kept; `explain`: a failed run is run again for its trace."""
    started = time.process_time()
    outcome = _run(seed, profile, trace)
    if outcome.invariant and explain and not trace:
        again = _run(seed, profile, TRACE_LINES)
        outcome.trace = again.trace
        if again.digest != outcome.digest:
            outcome.detail += "\n(The run with a trace was another one: the simulator is not deterministic.)"
    outcome.cpu_s = time.process_time() - started
    return outcome


def _run(seed: int, profile: Callable[[int, Any], Profile], trace: int) -> Outcome:
    world = World(seed)
    if trace:
        world.trace = deque(maxlen=trace)
    with _virtual(world), _no_collections(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that a crash kept from beginning
        cluster = Cluster(world, profile(seed, world.chance))
        faults = Faults(cluster)
        try:
            _play(world, cluster, faults)
        except Exception as e:
            import traceback

            world.violated("no exceptions", f"in the simulator or the world: {e!r}\n{traceback.format_exc()}")
        outcome = _outcome(seed, world, cluster, faults)
        cluster.clear()
    return outcome


def _play(world: World, cluster: Cluster, faults: Faults) -> None:
    profile, oracle = cluster.profile, cluster.oracle
    for machine in cluster.machines:
        machine.start()
    world.after(0.2, cluster.offer)
    world.after(0.5, faults.begin)
    if profile.operator:
        world.after(0.6, cluster.operator.begin)

    def had_enough() -> bool:
        return (
            cluster.operations >= profile.operations
            and faults.count >= profile.faults
            and len(oracle.leaders) >= LEADERSHIPS_MIN
        )

    world.run(had_enough, profile.seconds_max)
    if world.violation is not None:
        return

    faults.heal()
    cluster.operator.is_stopping = True
    world.note("", "everything is healed")
    cluster.healed_at = world.now
    _must(world, cluster, "available after healing", WRITE_WITHIN_S, lambda: cluster.written_s > 0.0)
    cluster.counts["ms to first write"] = int(1000 * (cluster.written_s - cluster.healed_at))
    cluster.is_quiet = True
    _must(world, cluster, "converges after healing", CONVERGED_WITHIN_S, cluster.has_converged)


def _must(world: World, cluster: Cluster, invariant: str, within_s: float, until: Callable[[], bool]) -> None:
    if world.violation is not None:
        return
    is_done = False

    def ask() -> None:
        nonlocal is_done
        is_done = until()
        if not is_done:
            world.after(0.02, ask)

    world.after(0.02, ask)
    world.run(lambda: is_done, world.now + within_s)
    if not is_done:
        world.violated(invariant, f"not within {within_s} s: {cluster.describe()}")


def _outcome(seed: int, world: World, cluster: Cluster, faults: Faults) -> Outcome:
    oracle = cluster.oracle
    counts = cluster.counts
    counts["acknowledged writes"] = oracle.acknowledged
    counts["refused writes"] = oracle.refused
    counts["writes not done"] = oracle.denied
    for machine in cluster.machines:
        counts["syncs"] += machine.disk.syncs
        counts["files torn by power cuts"] += machine.disk.torn
        counts["segments begun"] += machine.disk.files
    counts["repeated in the log"] = oracle.repeated
    for mode, count in oracle.reads.items():
        counts[f"reads {mode}"] = count
    invariant, detail = world.violation or ("", "")
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((world.events, world.now, world.chance.random(), oracle.index_after[-3:])).encode())
    for entry in oracle.entries:
        digest.update(entry)
    return Outcome(
        seed=seed,
        invariant=invariant,
        detail=detail,
        trace=list(world.trace or ()),
        digest=digest.hexdigest(),
        virtual_s=world.now,
        operations=cluster.operations,
        faults=faults.count,
        leaderships=len(oracle.leaders),
        counts=counts,
    )


# -- the world instead of the machine's -------------------------------------------------------------------------------


class _Time:
    """Stands for the module `time` in the code under test."""

    @staticmethod
    def monotonic() -> float:
        loop = _get_running_loop()
        return loop._now if loop is not None else 0.0  # type: ignore[attr-defined]

    @staticmethod
    def time() -> float:
        return 1_700_000_000.0 + _get_running_loop().world.now  # type: ignore[union-attr]

    @staticmethod
    def perf_counter() -> float:
        return 0.0


class _Logger:
    """The core's: what it finds worth a line is a broken invariant."""

    def __init__(self, world: World) -> None:
        self._world = world

    def critical(self, text: str, *fields: Any) -> None:
        self._world.violated("what is applied stays in the log", text % fields)

    error = exception = warning = critical


class _Ordered(set[Any]):
    """A set of nodes that is walked in the order of their ids, whatever the hashes of this process are."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__()))

    def __or__(self, other: Any) -> _Ordered:
        return _Ordered(set.__or__(self, other))


def _in_order(set_peers: Callable[..., None]) -> Callable[..., None]:
    def set_peers_in_order(self: Any, *peers: Any) -> None:
        set_peers(self, *peers)
        self._SyncObj__otherNodes = _Ordered(self._SyncObj__otherNodes)
        self._SyncObj__readonlyNodes = _Ordered(self._SyncObj__readonlyNodes)

    return set_peers_in_order


@contextlib.contextmanager
def _virtual(world: World) -> Iterator[None]:
    """Clocks, chance and log lines of the code under test are the world's."""
    core.check_library()
    replaced: list[tuple[Any, str, Any]] = [
        (library, "monotonicTime", _Time.monotonic),
        (library, "random", world.chance),
        (library, "logger", _Logger(world)),
        (core.Core, "set_peers", _in_order(core.Core.set_peers)),
        (raft_log, "check_library", lambda: None),
        (raft_log, "Links", ObservedLinks),
        (endpoint, "time", _Time),
        # As small as everything else here, so that all of them matter.
        (raft_log, "BATCH_BYTES_MAX", 4 << 10),
        (raft_log, "PLACE_EVERY_S", 0.3),
        (replication, "MESSAGE_BYTES", 8 << 10),
        (replication, "WINDOW_BYTES", 24 << 10),
        (snapshotting, "RETRY_S", 0.5),
        (snapshotting, "ASK_AGAIN_S", 0.5),
        (snapshots, "BLOCK_BYTES", 512),
        (snapshots, "SYNC_BYTES", 2048),
        (journal, "time", _Time),
        (peers, "peer_key_hash", lambda end: end.other.key_hash),
        (logging, "_threshold", logging.LEVELS["debug"] if world.trace is not None else 1000),
        (logging.Log, "write", _writer(world)),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in replaced if hasattr(place, name)]
    for place, name, new in replaced:
        setattr(place, name, new)
    try:
        yield
    finally:
        world.leave()
        for place, name, old in before:
            setattr(place, name, old)


def _writer(world: World) -> Callable[..., None]:
    def write(self: Any, level: str, event: str, fields: Any) -> None:
        if world.trace is not None:
            loop = _get_running_loop()
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            world.note(getattr(loop, "name", ""), f"[{self.name} {level}] {event} {shown}")

    return write


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Finalizers run when a run is over, and not in the middle of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# -- many seeds -------------------------------------------------------------------------------------------------------


def _work(seed: int) -> Outcome:
    warnings.simplefilter("ignore", RuntimeWarning)
    gc.disable()  # the process ends before its garbage matters
    return run_seed(seed)


def run_many(first: int, seeds: int, workers: int = WORKERS) -> int:
    """Runs the seeds and prints totals. The exit status: 0 when none failed."""
    started = time.monotonic()
    totals: Counter[str] = Counter()
    failures: list[Outcome] = []
    shown_s = started
    counted = snapshots = members = reads = done = 0
    cpu_s = virtual_s = 0.0
    slowest = (0.0, 0)
    write_ms: list[int] = []
    context = multiprocessing.get_context("fork")
    gc.freeze()
    with context.Pool(workers, maxtasksperchild=SEEDS_OF_A_WORKER // CHUNK) as pool:
        for outcome in pool.imap_unordered(_work, range(first, first + seeds), chunksize=CHUNK):
            done += 1
            cpu_s += outcome.cpu_s
            virtual_s += outcome.virtual_s
            slowest = max(slowest, (outcome.cpu_s, outcome.seed))
            write_ms.append(outcome.counts.pop("ms to first write", 0))
            totals.update(outcome.counts)
            totals["operations"] += outcome.operations
            totals["faults"] += outcome.faults
            totals["leaderships"] += outcome.leaderships
            if outcome.invariant:
                failures.append(outcome)
                print(outcome.report(), flush=True)
                if len(failures) >= 20:
                    pool.terminate()
                    break
            if outcome.counts_as_seed:
                counted += 1
                snapshots += outcome.has_snapshots
                members += outcome.has_members
                reads += outcome.has_reads
            if time.monotonic() - shown_s > 30:
                shown_s = time.monotonic()
                print(f"… {done} seeds, {len(failures)} failed, {shown_s - started:.0f} s", flush=True)
    wall_s = time.monotonic() - started
    print(f"\n{done} seeds from {first} on in {wall_s:.0f} s of wall time, {cpu_s:.0f} s of CPU; {workers} workers")
    print(f"{counted} count ({OPERATIONS_MIN} operations, {FAULTS_MIN} faults, {LEADERSHIPS_MIN} leaderships)")
    if counted:
        print(
            f"of these with snapshots {100 * snapshots / counted:.0f} %, membership changes "
            f"{100 * members / counted:.0f} %, reads of both modes {100 * reads / counted:.0f} %"
        )
    write_ms.sort()
    print(
        f"a seed: {1000 * cpu_s / max(1, done):.0f} ms of CPU (worst {slowest[0]:.2f} s: seed {slowest[1]}), "
        f"{virtual_s / max(1, done):.1f} virtual seconds; first write after healing: median "
        f"{write_ms[len(write_ms) // 2]} ms, worst {write_ms[-1]} ms"
    )
    for name, count in sorted(totals.items()):
        print(f"  {count:>10}  {name}")
    print(f"{len(failures)} failed" + "".join(f"\n  seed {f.seed}: {f.invariant}" for f in failures))
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--lines", type=int, default=100_000)
    options = parser.parse_args()
    if options.seed is not None and options.seeds <= 1:
        outcome = run_seed(options.seed, trace=options.lines)
        print("\n".join(outcome.trace))
        print(f"digest {outcome.digest}, {outcome.virtual_s:.3f} s, {outcome.cpu_s:.2f} s of CPU, {outcome.counts}")
        print(f"{outcome.operations} operations, {outcome.faults} faults, {outcome.leaderships} leaderships")
        print(f"VIOLATION of {outcome.invariant!r}: {outcome.detail}" if outcome.invariant else "nothing was broken")
        return 1 if outcome.invariant else 0
    return run_many(options.seed or options.first, options.seeds or 100, options.workers)


if __name__ == "__main__":
    sys.exit(main())
