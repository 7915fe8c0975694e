"""Takes the fields of one object of a definition, each once and with its type; what nobody took is refused.

Called by `agent/definition.py`. CamelCase in any case and snake_case name the same field; null means absent. A list of
one object is an object, as HCL writes its blocks. Error texts are those of Go's decoder. It does not know which fields
there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rostra.wire.bounds import DEPTH_MAX
from rostra.wire.durations import SECOND, parse_duration
from rostra.wire.errors import BadRequest

_JSON_NAMES = {
    str: "string",
    bool: "bool",
    int: "number",
    float: "number",
    list: "array",
    tuple: "array",
    dict: "object",
}


class DecodeError(BadRequest):
    """The definition has an unknown field or a value of the wrong type. HTTP adds `Request decode failed: `."""


class DefinitionFields:
    """The fields of one object: each is taken by its name once, and `end` refuses what nobody took."""

    __slots__ = ("_left", "_path")

    def __init__(self, raw: Any, path: str) -> None:
        if isinstance(raw, list | tuple) and len(raw) == 1:  # an HCL block
            raw = raw[0]
        if not isinstance(raw, Mapping):
            kind = _JSON_NAMES.get(type(raw), "null")
            raise DecodeError(
                f"json: cannot unmarshal {kind} into {path.rstrip('.') or 'a definition'}: an object is needed"
            )
        self._path = path
        self._left: dict[str, tuple[str, Any]] = {_fold(str(k)): (str(k), v) for k, v in raw.items()}

    def is_empty(self) -> bool:
        return not any(value not in (None, "", [], {}, (), 0, False) for _, value in self._left.values())

    def has(self, name: str) -> bool:
        found = self._left.get(_fold(name))
        return found is not None and found[1] is not None

    def ignore(self, *names: str) -> None:
        for name in names:
            self._left.pop(_fold(name), None)

    def refuse_namespace(self) -> None:
        """There is one, which an empty name and its own stand for."""
        if self.text("namespace") not in ("", "default"):
            raise DecodeError(
                f'json: unknown field "{self._path}Namespace" - Namespaces are a Consul Enterprise feature'
            )

    def end(self) -> None:
        for given, _ in self._left.values():
            raise DecodeError(f'json: unknown field "{self._path}{given}"')

    def text(self, name: str) -> str:
        value = self._take(name)
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        raise self._wrong(name, value, "string")

    def integer(self, name: str) -> int:
        value = self._take(name)
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise self._wrong(name, value, "int")

    def boolean(self, name: str) -> bool:
        value = self._take(name)
        if value is None:
            return False
        if isinstance(value, bool):
            return value
        raise self._wrong(name, value, "bool")

    def duration(self, name: str) -> float:
        """Seconds. A number is nanoseconds, as Go writes its durations."""
        value = self._take(name)
        if value is None or value == "":
            return 0.0
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) / SECOND
        if not isinstance(value, str):
            raise self._wrong(name, value, "duration")
        try:
            return parse_duration(value) / SECOND
        except ValueError as error:
            raise DecodeError(str(error)) from None

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._take(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self._wrong(name, value, "[]string")
        for item in value:
            if not isinstance(item, str | None):
                raise self._wrong(name, item, "string")
        return tuple(item or "" for item in value)

    def text_map(self, name: str) -> dict[str, str]:
        pairs = self.free_map(name)
        for value in pairs.values():
            if not isinstance(value, str | None):
                raise self._wrong(name, value, "string")
        return {key: value or "" for key, value in pairs.items()}

    def header(self, name: str) -> dict[str, tuple[str, ...]]:
        header: dict[str, tuple[str, ...]] = {}
        for key, value in self.free_map(name).items():
            values = (value,) if isinstance(value, str) else value or ()
            if isinstance(values, list | tuple):
                values = [v or "" if isinstance(v, str | None) else v for v in values]
            if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
                raise self._wrong(name, value, "[]string")
            if any(c in text for text in (key, *values) for c in "\r\n"):
                raise DecodeError(f"json: a line break in {self._path}Header")
            header[key] = tuple(values)
        return header

    def free_map(self, name: str) -> dict[str, Any]:
        """A map whose keys belong to the user."""
        value = self._take(name)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "map")
        if _is_deeper(value, DEPTH_MAX):
            raise DecodeError(f"json: {self._path}{name} is nested more than {DEPTH_MAX} deep")
        return {str(k): v for k, v in value.items()}

    def object(self, name: str) -> DefinitionFields | None:
        given, value = self._left.pop(_fold(name), (name, None))
        if value is None or value == []:
            return None
        return DefinitionFields(value, f"{self._path}{given}.")

    def objects(self, name: str) -> list[DefinitionFields]:
        given, value = self._left.pop(_fold(name), (name, None))
        if value is None:
            return []
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list | tuple):
            raise self._wrong(name, value, "array")
        return [DefinitionFields(item, f"{self._path}{given}.") for item in value if item is not None]

    def _take(self, name: str) -> Any:
        return self._left.pop(_fold(name), (name, None))[1]

    def _wrong(self, name: str, value: Any, wanted: str) -> DecodeError:
        field_name = "".join(word.capitalize() for word in name.split("_"))
        kind = _JSON_NAMES.get(type(value), type(value).__name__)
        return DecodeError(f"json: cannot unmarshal {kind} into field {self._path}{field_name} of type {wanted}")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether maps and lists in `value` are nested deeper: recursion could not follow them."""
    level = [value]
    while level and levels >= 0:
        holders = [v for v in level if isinstance(v, Mapping | list | tuple)]
        level = [v for holder in holders for v in (holder.values() if isinstance(holder, Mapping) else holder)]
        levels -= 1
    return bool(level)


def _fold(key: str) -> str:
    return key.replace("_", "").lower()
