"""Reads typed fields from a decoded JSON object, at the edge, once; errors name the field.

null means absent, as in Go. Field names are found whatever their case; which names there may be is declared.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rostra.agent.http.routing import JsonObject
from rostra.wire.durations import SECOND, parse_duration
from rostra.wire.errors import BadRequest


class Fields:
    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"Request decode failed: {where or 'the body'} must be an object")
        self._values = {k.lower(): v for k, v in value.items()}
        self._where = where

    def has(self, name: str) -> bool:
        return self._values.get(name.lower()) is not None

    def given(self, name: str) -> bool:
        """As `has`, where null is given too."""
        return name.lower() in self._values

    def raw(self, name: str) -> Any:
        return self._values.get(name.lower())

    def text(self, name: str, default: str = "") -> str:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def integer(self, name: str, default: int = 0) -> int:
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        if not -(2**63) <= value < 2**64:
            raise self._wrong(name, "a 64-bit integer")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.raw(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def text_map(self, name: str) -> dict[str, str]:
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise self._wrong(name, "an object of strings")
        return dict(value)

    def plain_map(self, name: str) -> dict[str, Any]:
        """An object as it is, for users' own data."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return {k: plain(v) for k, v in value.items()}

    def object(self, name: str) -> Fields | None:
        value = self.raw(name)
        return None if value is None else Fields(value, self._named(name))

    def objects(self, name: str) -> Iterator[Fields]:
        value = self.raw(name)
        if value is None:
            return
        if not isinstance(value, list):
            raise self._wrong(name, "a list of objects")
        for i, item in enumerate(value):
            yield Fields(item, f"{self._named(name)}[{i}]")

    def duration_ns(self, name: str, default: int = 0, *, seconds_below: int = 0) -> int:
        """A Go duration, or a number of nanoseconds; numbers below `seconds_below` are seconds."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, str):
            try:
                return parse_duration(value)
            except ValueError as e:
                raise BadRequest(f"Request decode failed: {e}") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a duration such as 10s")
        return int(value) * SECOND if abs(value) < seconds_below else int(value)

    def _wrong(self, name: str, expected: str) -> BadRequest:
        return BadRequest(f"Request decode failed: {self._named(name)} must be {expected}")

    def _named(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name


def plain(value: Any) -> Any:
    """JSON as ordinary dicts and lists all the way down."""
    if isinstance(value, JsonObject):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value
