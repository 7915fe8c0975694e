"""Reads the fields of an object of a request's body by its table (`agent/schema.py`); errors are those of Go's decoder.

Called by `agent/definition.py` and `agent/http/catalog.py`. Each field is there afterwards, with an empty value where
nothing or null was given. A list of one object is an object, as HCL writes its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from rostra.agent.schema import Form, Many, MapOf, Table, Type
from rostra.agent.values import SWITCH, TEXT, TEXT_MAP, TEXTS, WHOLE
from rostra.wire.bounds import DEPTH_MAX
from rostra.wire.durations import parse_duration
from rostra.wire.errors import BadRequest

_JSON_NAMES = {
    str: "string",
    bool: "bool",
    int: "number",
    float: "number",
    list: "array",
    tuple: "array",
    type(None): "null",
}


class DecodeError(BadRequest):
    """The definition has an unknown field or a value of the wrong type. HTTP adds `Request decode failed: `."""


def read(table: Table, raw: Any, path: str = "", *, json: bool = False) -> dict[str, Any]:
    """The value of every field by its name; durations in nanoseconds, or None.

    `json`: it never was HCL, so 80.0 is no whole number and a list no object; who asks has looked for unknown fields.
    """
    raw = raw if json else _block(raw)
    if not isinstance(raw, Mapping):
        what = path.rstrip(".") or "a definition"
        raise DecodeError(f"json: cannot unmarshal {_json_name(raw)} into {what}: an object is needed")
    found = _nothing(table)
    for given, value in raw.items():
        field = table.in_body(str(given))
        if field is None:
            if not json:
                raise DecodeError(f'json: unknown field "{path}{given}"')
        elif value is not None:
            found[field.name] = _value(field.form, value, path + field.api, json)
    return found


def stored(given: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """What is set of an object that was read, as rows keep it."""
    kept: dict[str, Any] = {}
    for name, value in given.items():
        form = table.in_bodies[name].form
        if form is Type.MAP:
            kept[name] = frozen(value)
        elif isinstance(form, Table) and value is not None:
            kept[name] = stored(value, form)
        elif isinstance(form, Many):
            kept[name] = tuple(stored(one, form.table) for one in value or ())
        else:
            kept[name] = value
    return {name: value for name, value in kept.items() if value}


def frozen(value: Any) -> Any:
    """`value` with its lists as tuples, which is what comes back from the wire; so local and catalog rows compare."""
    if isinstance(value, Mapping):
        return {str(k): frozen(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value)  # as any JSON reader would take it; the wire has no such integer
    return value


def _value(form: Form, value: Any, where: str, json: bool) -> Any:
    if isinstance(form, Type):
        if json and form is Type.WHOLE and isinstance(value, float):
            raise _wrong(value, where, "int")
        return _plain(form, value, where)
    if isinstance(form, Table):
        return None if value == [] and not json else read(form, value, f"{where}.", json=json)
    if isinstance(form, MapOf):
        return {
            name: read(form.table, {} if one is None else one, f"{where}.{name}.", json=json)
            for name, one in _plain(Type.MAP, value, where).items()
        }
    many = [value] if isinstance(value, Mapping) and not json else value
    if not isinstance(many, list | tuple):
        raise _wrong(value, where, "array")
    return [read(form.table, one, f"{where}.", json=json) for one in many if one is not None]


def _plain(form: Type, value: Any, where: str) -> Any:
    reading = _READ[form]
    try:
        return reading.read(value)
    except TypeError:
        raise _wrong(value, where, reading.go) from None
    except ValueError as error:
        raise DecodeError(where.join(error.args)) from None


def _nothing(table: Table) -> dict[str, Any]:
    """What stands for the fields that are not given. Maps are made anew: they become part of rows."""
    empty, maps = _empties(table)
    return {**empty, **{name: {} for name in maps}}


@cache
def _empties(table: Table) -> tuple[dict[str, Any], list[str]]:
    empty = {
        name: _READ[field.form].empty if isinstance(field.form, Type) else {} if isinstance(field.form, MapOf) else None
        for name, field in table.in_bodies.items()
    }
    return empty, [name for name, value in empty.items() if value == {}]


def _block(raw: Any) -> Any:
    return raw[0] if isinstance(raw, list | tuple) and len(raw) == 1 else raw


def _duration(value: Any) -> int | None:
    """0s is given, and 0 and "" are not."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value) or None
    return parse_duration(TEXT.read(value)) if value != "" else None


def _free_map(value: Any) -> dict[str, Any]:
    value = _block(value)
    if not isinstance(value, Mapping):
        raise TypeError
    if _is_deeper(value, DEPTH_MAX):
        raise ValueError("json: ", f" is nested more than {DEPTH_MAX} deep")
    return {str(k): v for k, v in value.items()}


def _header(value: Any) -> dict[str, tuple[str, ...]]:
    given = _free_map(value).items()
    header = {key: TEXTS.read((v,) if isinstance(v, str) else () if v is None else v) for key, v in given}
    if any(c in text for key, values in header.items() for text in (key, *values) for c in "\r\n"):
        raise ValueError("json: a line break in ", "")
    return header


def _namespace(value: Any) -> str:
    """There is one, which an empty name and its own stand for."""
    if TEXT.read(value) not in ("", "default"):
        raise ValueError('json: unknown field "', '" - Namespaces are a Consul Enterprise feature')
    return ""


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether maps and lists in `value` are nested deeper: recursion could not follow them."""
    level = [value]
    while level and levels >= 0:
        holders = [v for v in level if isinstance(v, Mapping | list | tuple)]
        level = [v for holder in holders for v in (holder.values() if isinstance(holder, Mapping) else holder)]
        levels -= 1
    return bool(level)


def _wrong(value: Any, where: str, wanted: str) -> DecodeError:
    return DecodeError(f"json: cannot unmarshal {_json_name(value)} into field {where} of type {wanted}")


def _json_name(value: Any) -> str:
    return "object" if isinstance(value, Mapping) else _JSON_NAMES.get(type(value), type(value).__name__)


class _Reading(NamedTuple):
    go: str  # what Go's decoder calls it
    read: Callable[[Any], Any]  # raises TypeError, or ValueError with what comes before and after the field
    empty: Any


_READ = {
    Type.TEXT: _Reading("string", TEXT.read, ""),
    Type.STATUS: _Reading("string", TEXT.read, ""),
    Type.NAMESPACE: _Reading("string", _namespace, ""),
    Type.WHOLE: _Reading("int", WHOLE.read, 0),
    Type.SWITCH: _Reading("bool", SWITCH.read, False),
    Type.DURATION: _Reading("duration", _duration, None),
    Type.TEXTS: _Reading("[]string", TEXTS.read, ()),
    Type.TEXT_MAP: _Reading("map[string]string", lambda value: TEXT_MAP.read(_block(value)), {}),
    Type.HEADER: _Reading("map[string][]string", _header, {}),
    Type.MAP: _Reading("map", _free_map, {}),
}
