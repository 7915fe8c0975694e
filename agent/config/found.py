"""What a load has found so far: values, where each was set, and all that is wrong.

`loading.py` fills it from flags and files, `rules.py` settles what belongs together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rostra.agent.config.settings import SETTINGS, Definition
from rostra.agent.values import Kind

BAD: Any = object()


class Problem(NamedTuple):
    """One thing that is wrong: `where` is `file:line:column`, `-flag` or empty; `key` is the dotted key or empty."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigErrors(Exception):
    """All problems of a configuration; `str(e)` has one line for each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = tuple(problems)


class Found:
    """Of one load."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, tuple[str, str]] = {}  # field → (where, key)
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.unused: dict[str, None] = {}
        self.services: list[Definition] = []
        self.checks: list[Definition] = []
        self.files: list[str] = []
        self.is_incomplete = False  # something could not be read at all: what is missing is then no problem

    def problem(self, where: str, key: str, message: str) -> None:
        self.problems.append(Problem(where, key, message))

    def named(self, key: str) -> bool:
        return any(p.key == key for p in self.problems)

    def put(self, field_name: str, value: Any, where: str, key: str) -> None:
        combine = SETTINGS[field_name].kind.combine
        if combine and field_name in self.values:
            value = combine(self.values[field_name], value)
        self.values[field_name] = value
        self.origins[field_name] = (where, key)

    def convert(self, read: Callable[[Any], Any], kind: Kind, raw: Any, where: str, key: str) -> Any:
        try:
            return read(raw)
        except TypeError:
            shown = f'"{raw}"' if where.startswith("-") and not key and isinstance(raw, str) else describe(raw)
            self.problem(where, key, f"must be {kind.expects}, not {shown}")
        except ValueError as e:
            self.problem(where, key, str(e))
        return BAD

    def complain(self, field_name: str, message: str) -> None:
        """A problem with a setting's value, told where it was set."""
        where, key = self.origins.get(field_name, ("", SETTINGS[field_name].keys[0]))
        self.problem(where, key, message)


def describe(value: Any) -> str:
    """What a value is, in words; not the value itself where it may be a secret or long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "a block"
