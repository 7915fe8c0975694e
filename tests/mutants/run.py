"""`make mutants`: switch off one rule of the Raft layer at a time, in a copy of the tree, and see that a test notices.

Every mutant of the catalogue is an exact replacement of text; one that no longer fits its file stops the run. Its tests
must pass on the unmutated copy and fail on the mutated one by an assertion or a timeout: an import that fails proves
nothing. Prints a table and exits 1 when a mutant survives. The checkout itself is never written to.

    python -m tests.mutants.run [ID …] [--workers N] [--list] [--why]     ID: a hazard, "H2", or one mutant, "H2.1"
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".peers", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "node_modules"
)
#: For one mutant, and for one test in it.
BOUND_S, TEST_S = 240, 30
#: Exit status of tests/mutants/seeds.py when an invariant is broken.
BROKEN = 3
#: A failure of one of these says that the mutant is nonsense, not that a rule is missed.
NONSENSE = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError", "UnboundLocalError")


@dataclass
class Outcome:
    """`by`: the test that failed, "" when none did, and `why`. `trouble`: why the run says nothing at all."""

    mutant: Mutant
    by: str = ""
    why: str = ""
    trouble: str = ""
    seconds: float = 0.0


class Copy:
    """The tree in a directory of its own, with one mutant in it at most."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        shutil.copytree(ROOT, directory, symlinks=True, ignore=LEFT_OUT)

    def run(self, command: list[str], bound_s: float) -> tuple[int, str]:
        """(exit status, output); status -1 when it took longer than the bound."""
        path = f"{self.root / 'src'}{os.pathsep}{self.root}"
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=bound_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return -1, output
        return process.returncode, output

    def tests(self, node_ids: list[str], *, stop_early: bool) -> tuple[list[tuple[str, str]], str]:
        """[(failed test, first line of why)], and why the run says nothing, if so."""
        report = self.root / "report.xml"
        report.unlink(missing_ok=True)
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_S}", f"--junitxml={report}"]
        status, output = self.run([*command, *(["-x"] if stop_early else []), *node_ids], BOUND_S)
        if status == -1:
            return [], f"took longer than {BOUND_S} s"
        if status not in (0, 1) or not report.exists():
            return [], f"pytest ended with {status}: {_tail(output)}"
        failed, ran = [], 0
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            ran += case.find("skipped") is None
            for kind in ("failure", "error"):
                if (found := case.find(kind)) is not None:
                    why = (found.get("message") or "").strip().splitlines() or [""]
                    if kind == "error" or why[0].split(":")[0].rpartition(".")[2] in NONSENSE:
                        return [], f"{case.get('name')}: {kind}, {why[0]}"
                    failed.append((case.get("name") or "?", why[0]))
        if not ran:
            return [], "all tests were skipped"
        return failed, ""

    def simulation(self, seeds: range) -> tuple[str, str]:
        """(the invariant that was broken, why the run says nothing)."""
        status, output = self.run(["-m", "tests.mutants.seeds", str(seeds.start), str(len(seeds))], BOUND_S)
        if status in (0, BROKEN):
            return (output.strip().splitlines()[-1], "") if status else ("", "")
        return "", f"took longer than {BOUND_S} s" if status == -1 else f"it ended with {status}: {_tail(output)}"

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.mutated(original), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(original, encoding="utf-8")


def _tail(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-3:])[-300:]


def try_mutant(copy: Copy, mutant: Mutant) -> Outcome:
    outcome, began = Outcome(mutant), time.monotonic()
    with copy.mutated(mutant):
        if mutant.tests:
            failed, outcome.trouble = copy.tests(list(mutant.tests), stop_early=True)
            if failed:
                outcome.by, outcome.why = failed[0]
        if mutant.seeds and not outcome.trouble and (outcome.by or not mutant.tests):
            broken, outcome.trouble = copy.simulation(mutant.seeds)
            outcome.by = f"{outcome.by}; {broken}".removeprefix("; ") if broken else ""
    outcome.seconds = time.monotonic() - began
    return outcome


def check_unmutated(copies: list[Copy], mutants: list[Mutant]) -> list[str]:
    """What fails without any mutant: each test and each seed once."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    shares: list[list[str]] = [[] for _ in copies]
    for group in sorted(files.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    seeds = max((mutant.seeds for mutant in mutants), key=len)

    def check(at: int) -> list[str]:
        wrong = []
        if shares[at]:
            failed, trouble = copies[at].tests(shares[at], stop_early=False)
            wrong += [f"{name}: {why}" for name, why in failed] + ([trouble] if trouble else [])
        mine = seeds[at * len(seeds) // len(copies) : (at + 1) * len(seeds) // len(copies)]
        if mine:
            broken, trouble = copies[at].simulation(mine)
            wrong += [f"the simulator: {trouble or broken}"] if trouble or broken else []
        return wrong

    with ThreadPoolExecutor(len(copies)) as pool:
        return [line for lines in pool.map(check, range(len(copies))) for line in lines]


def chosen(wanted: list[str]) -> list[Mutant]:
    if not wanted:
        return list(MUTANTS)
    unknown = [w for w in wanted if not any(w in (m.id, m.hazard) for m in MUTANTS)]
    if unknown:
        sys.exit(f"no such mutant: {', '.join(unknown)}")
    return [m for m in MUTANTS if m.id in wanted or m.hazard in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("id", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument("--why", action="store_true", help="print what each failure said")
    options = parser.parse_args()
    mutants = chosen(options.id)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.id:<12} {mutant.file:<32} {mutant.what}")
        return 0
    rotten = [problem for mutant in mutants if (problem := mutant.problem(ROOT))]
    if rotten:
        print("\n".join(rotten))
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rostra-mutants-") as directory:
        copies = [Copy(Path(directory) / str(number)) for number in range(max(1, options.workers))]
        broken = check_unmutated(copies, mutants)
        if broken:
            print("these fail without any mutant:", *broken, sep="\n  ")
            return 1
        print(f"{len(mutants)} mutants; their tests pass on the unmutated tree ({time.monotonic() - began:.0f} s)\n")
        print(f"{'id':<12} {'what is switched off':<84} {'s':>5}  caught by", flush=True)
        free: SimpleQueue[Copy] = SimpleQueue()
        for copy in copies:
            free.put(copy)

        def work(mutant: Mutant) -> Outcome:
            copy = free.get()
            try:
                return try_mutant(copy, mutant)
            finally:
                free.put(copy)

        outcomes = []
        with ThreadPoolExecutor(len(copies)) as pool:
            for outcome in pool.map(work, mutants):
                verdict = outcome.by or (f"NO VERDICT: {outcome.trouble}" if outcome.trouble else "SURVIVES")
                print(
                    f"{outcome.mutant.id:<12} {outcome.mutant.what:<84} {outcome.seconds:5.1f}  {verdict}", flush=True
                )
                if options.why:
                    print(f"{'':<12} {outcome.why[:200]}", flush=True)
                outcomes.append(outcome)
    missed = [outcome.mutant.id for outcome in outcomes if not outcome.by]
    hazards = {outcome.mutant.hazard for outcome in outcomes}
    print(
        f"\n{len(outcomes)} mutants of {len(hazards)} hazards: {len(outcomes) - len(missed)} caught, {len(missed)} not"
        f"{' (' + ', '.join(missed) + ')' if missed else ''}; {time.monotonic() - began:.0f} s"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
