"""Reads typed fields from a decoded JSON object, at the edge, once; errors name the field.

null means absent, as in Go. Field names are found whatever their case; which names there may be is declared.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from rostra.agent.http.routing import JsonObject
from rostra.agent.values import MAP, SWITCH, TEXT_MAP, TEXTS, WHOLE, Kind
from rostra.wire.durations import SECOND, parse_duration
from rostra.wire.errors import BadRequest


class Fields:
    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"Request decode failed: {where or 'the body'} must be an object")
        self._values = {k.lower(): v for k, v in value.items()}
        self._where = where

    def names(self) -> Iterable[str]:
        """Those that are given, in lower case."""
        return self._values

    def has(self, name: str) -> bool:
        return self._values.get(name.lower()) is not None

    def given(self, name: str) -> bool:
        """As `has`, where null is given too."""
        return name.lower() in self._values

    def raw(self, name: str) -> Any:
        return self._values.get(name.lower())

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name.lower())  # most fields are texts: no detour
        if isinstance(value, str):
            return value
        if value is None:
            return default
        raise self._wrong(name, "a string")

    def integer(self, name: str, default: int = 0) -> int:
        value = self._read(name, WHOLE, "an integer", default)
        if isinstance(self.raw(name), float):
            raise self._wrong(name, "an integer")
        if not -(2**63) <= value < 2**64:
            raise self._wrong(name, "a 64-bit integer")
        return cast(int, value)

    def flag(self, name: str, default: bool = False) -> bool:
        return cast(bool, self._read(name, SWITCH, "true or false", default))

    def texts(self, name: str) -> tuple[str, ...]:
        return cast(tuple[str, ...], self._read(name, TEXTS, "a list of strings", ()))

    def text_map(self, name: str) -> dict[str, str]:
        return cast(dict[str, str], self._read(name, TEXT_MAP, "an object of strings", {}))

    def plain_map(self, name: str) -> dict[str, Any]:
        """An object as it is, for users' own data."""
        return {k: plain(v) for k, v in self._read(name, MAP, "an object", {}).items()}

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

    def _read(self, name: str, kind: Kind, expected: str, default: Any) -> Any:
        value = self.raw(name)
        try:
            return default if value is None else kind.read(value)
        except TypeError:
            raise self._wrong(name, expected) from None

    def _wrong(self, name: str, expected: str) -> BadRequest:
        return BadRequest(f"Request decode failed: {self._named(name)} must be {expected}")

    def _named(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name


def plain(value: Any) -> Any:
    """JSON as ordinary dicts and lists all the way down."""
    if isinstance(value, JsonObject):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value
