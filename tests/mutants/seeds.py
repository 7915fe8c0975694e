"""The simulator until the first broken invariant: `python -m tests.mutants.seeds FIRST COUNT`. Exit status 3: broken.

What the simulator says of itself ("no exceptions", "sync on the loop") does not count: it is the mutant's clumsiness.
"""

from __future__ import annotations

import gc
import sys

from tests.sim.run import run_seed

BROKEN, CLUMSY = 3, 4
NO_INVARIANTS = ("no exceptions", "sync on the loop")


def main(first: int, count: int) -> int:
    clumsy = ""
    for seed in range(first, first + count):
        outcome = run_seed(seed, explain=False)
        if outcome.invariant and outcome.invariant not in NO_INVARIANTS:
            print(f"seed {seed}: {outcome.invariant}")
            return BROKEN
        clumsy = clumsy or (f"seed {seed}: {outcome.invariant}: {outcome.detail}" if outcome.invariant else "")
        if seed % 8 == 7:
            gc.collect()
    if clumsy:
        print(clumsy)
        return CLUMSY
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
