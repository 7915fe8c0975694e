"""Authorizers for tests: one that refuses all, and one that grants reads and writes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Nothing:
    """May do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: False


@dataclass(frozen=True)
class Only:
    """May do everything with what is called so, in its first letters, and nothing else."""

    prefix: str

    def __getattr__(self, name: str) -> Any:
        return lambda *names: all(each.startswith(self.prefix) for each in names) if names else False
