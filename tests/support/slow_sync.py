"""A disk whose syncs are slow or fail, for real processes: `slow_sync.c`, compiled once and loaded by LD_PRELOAD.

Without a C compiler there is none; callers say so and go without.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class SlowSync:
    """What a process and its children are told about their disk; they need `env` from their start."""

    def __init__(self, library: Path, control: Path) -> None:
        self._control = control
        self.env = {"LD_PRELOAD": str(library), "SLOW_SYNC_FILE": str(control)}

    def slow(self, ms: int, errno: int = 0) -> None:
        """Each sync takes `ms` longer, and fails when `errno` is given."""
        new = self._control.with_suffix(".new")
        new.write_text(f"{ms} {errno}")
        new.rename(self._control)

    def normal(self) -> None:
        self._control.unlink(missing_ok=True)


def compiled(directory: Path) -> Path | None:
    """The library, made in `directory`; None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = directory / "slow_sync.so"
    if not library.exists():
        subprocess.run(
            [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"],
            check=True,
            timeout=60,
        )
    return library
