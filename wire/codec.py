"""Values by stable name: a dataclass with `kind` becomes (kind, {field: value}) and back, with the types checked.

Fields that hold their default are left out, so that a new field with a default does not trouble an older peer until it
is used; a default can therefore never change. A receiver ignores an unknown field of a query: the answer is the same as
before the field existed. It refuses one of a command: the effect would differ from what was asked for. Checks are
compiled once per type: this runs for every request and for every log entry. It knows no command by name.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rostra.wire.errors import BadRequest

R = TypeVar("R", bound=tuple[Any, ...])

#: (exact types that are accepted or None for any, what checks and converts the inside or None)
Shape = tuple[frozenset[type] | None, Callable[[Any], Any] | None]

_NAMES = {str: "a string", int: "an integer", bool: "true or false", bytes: "bytes", dict: "a map", float: "a number"}
_NAMES |= {tuple: "a list", list: "a list", type(None): "nothing"}


_FLAT = frozenset((str, bytes, int, bool, type(None)))


class Unknown(BadRequest):
    """A kind or a field that this version does not have."""


class _WrongInside(Exception):
    """A value inside a list or map has a wrong type."""


def encode_value(value: Any) -> tuple[str, dict[str, Any]]:
    """The stable name of a command or query and its fields, without those that hold their default."""
    cls: Any = type(value)
    required, optional = _encoding(cls)
    fields = {name: getattr(value, name) for name in required}
    for name, default in optional:
        field = getattr(value, name)
        if field is not default and field != default:
            fields[name] = field
    return cls.kind, fields


class Vocabulary:
    """The commands or queries that a receiver understands, by kind."""

    def __init__(self, known: Iterable[type]) -> None:
        self._specs: dict[str, _Spec] = {}
        #: kind -> what makes the value of a map of its fields; raises as `decode`.
        self.decoders: dict[str, Callable[[Any], Any]] = {}
        for cls in known:
            kind = cls.kind  # type: ignore[attr-defined]
            if kind in self._specs:
                raise ValueError(f"two types are called {kind!r}")
            self._specs[kind] = spec = _Spec(cls)
            self.decoders[kind] = _decoder(kind, spec)

    def __contains__(self, kind: object) -> bool:
        return kind in self._specs

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self._specs)

    def is_flat(self, kind: str) -> bool:
        """Whether every field of this kind is a text, bytes, an integer, true or false, or nothing."""
        return all(
            accepted is not None and accepted <= _FLAT and inside is None
            for accepted, inside in self._specs[kind].shapes.values()
        )

    def get(self, kind: str) -> type | None:
        spec = self._specs.get(kind)
        return spec.cls if spec is not None else None

    def decode(self, kind: str, fields: Any) -> Any:
        """The value that a peer sent. Raises BadRequest naming the kind or field that is wrong.

        What only a newer version can have sent raises the subclass Unknown.
        """
        try:
            decode = self.decoders[kind]
        except (KeyError, TypeError):
            raise Unknown(f"unknown kind {kind!r}: is the other side of a newer version?") from None
        return decode(fields)


def decode_fields(row_type: type[tuple[Any, ...]], fields: Any, what: str) -> dict[str, Any]:
    """The checked fields of a row, from a map that a peer sent. Raises BadRequest naming the one that is wrong."""
    if type(fields) is not dict:
        raise BadRequest(f"{what} must be a map, not {type(fields).__name__}")
    shapes = _row_shapes(row_type)
    given = {}
    for name, value in fields.items():
        try:
            accepted, inside = shapes[name]
        except (KeyError, TypeError):
            raise BadRequest(f"{what}: unknown field {name!r}") from None
        if accepted is not None and type(value) not in accepted:
            raise BadRequest(f"{what}: field {name!r} must be {_expected(accepted)}, not {type(value).__name__}")
        if inside is not None:
            try:
                value = inside(value)
            except _WrongInside as e:
                raise BadRequest(f"{what}: field {name!r}: {e}") from None
        given[name] = value
    return given


def decode_row(row_type: type[R], fields: Any, what: str, **fixed: Any) -> R:
    """A row from a map of its fields by name; `fixed` fields are not the sender's to choose. Raises BadRequest."""
    given = decode_fields(row_type, fields, what)
    given.update(fixed)
    try:
        return row_type(**given)
    except TypeError:
        defaults = row_type._field_defaults  # type: ignore[attr-defined]
        missing = [name for name in _row_shapes(row_type) if name not in given and name not in defaults]
        raise BadRequest(f"{what}: missing field {', '.join(missing)}") from None


# -- compiled once per type ---------------------------------------------------------------------------------------


class _Spec:
    __slots__ = ("cls", "is_strict", "required", "shapes")

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.is_strict = hasattr(cls, "apply")  # a command
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        self.shapes: dict[str, Shape] = {f.name: _shape(hints[f.name]) for f in fields}
        self.required = frozenset(f.name for f in fields if _default(f) is dataclasses.MISSING)


def _decoder(kind: str, spec: _Spec) -> Callable[[Any], Any]:
    """Reads the fields as most senders write them; whatever is otherwise goes to `_decode_slowly`, which says what.

    Written as source, as dataclasses do it: each field is looked up once, by name, and checked where it was given.
    """
    names: dict[str, Any] = {"cls": spec.cls, "slowly": functools.partial(_decode_slowly, kind, spec)}
    names["WrongInside"] = _WrongInside
    head, optional, arguments = [], [], []
    fields = dataclasses.fields(spec.cls)  # type: ignore[arg-type]
    for at, field in enumerate(fields):
        accepted, inside = spec.shapes[field.name]
        names[f"accepted{at}"], names[f"inside{at}"] = accepted, inside
        check = []
        if accepted is not None:
            if len(accepted) == 1:
                (names[f"accepted{at}"],) = accepted
                check.append(f"if type(v{at}) is not accepted{at}: return slowly(fields)")
            else:
                check.append(f"if type(v{at}) not in accepted{at}: return slowly(fields)")
        if inside is not None:
            check.append(f"v{at} = inside{at}(v{at})")
        if field.name in spec.required:
            head += [f"v{at} = fields[{field.name!r}]", *check]
        else:
            names[f"default{at}"] = field.default
            if field.default_factory is not dataclasses.MISSING:
                names[f"default{at}"] = field.default_factory
                head.append(f"v{at} = default{at}()")
            else:
                head.append(f"v{at} = default{at}")
            optional += [f"if {field.name!r} in fields:", f"    v{at} = fields[{field.name!r}]"]
            optional += [f"    {line}" for line in ("given += 1", *check)]
        arguments.append(f"v{at}")
    twin = _twin(spec.cls)
    if twin is None:
        make = [f"return cls({', '.join(arguments)})"]
    else:
        names["twin"] = twin
        make = ["made = twin()", *(f"made.{field.name} = v{at}" for at, field in enumerate(fields))]
        make += ["made.__class__ = cls", "return made"]
    lines = [
        "def decode(fields):",
        "    if type(fields) is not dict: return slowly(fields)",
        "    try:",
        *(f"        {line}" for line in head or ["pass"]),
        f"        given = {len(spec.required)}",
        "        if len(fields) != given:",
        *(f"            {line}" for line in optional),
        "            if len(fields) != given: return slowly(fields)",
        "    except (KeyError, WrongInside): return slowly(fields)",
        *(f"    {line}" for line in make),
    ]
    exec("\n".join(lines), names)  # noqa: S102  nothing in it comes from outside
    return names["decode"]  # type: ignore[no-any-return]


def _twin(cls: Any) -> type | None:
    """A class whose instances can be filled plainly and then become one of `cls`; None where that is not the same.

    A frozen dataclass sets each of its fields by a call, which takes as long as all the rest of decoding.
    """
    slots = cls.__dict__.get("__slots__")
    if cls.__bases__ != (object,) or slots is None or hasattr(cls, "__post_init__"):
        return None
    return type(cls.__name__, (), {"__slots__": tuple(slots)})


def _decode_slowly(kind: str, spec: _Spec, fields: Any) -> Any:
    """As a decoder does it, one field after the other. Raises BadRequest naming the field that is wrong, or Unknown."""
    if type(fields) is not dict:
        raise BadRequest(f"{kind}: the fields must be a map, not {type(fields).__name__}")
    given = {}
    shapes = spec.shapes
    for name, value in fields.items():
        try:
            accepted, inside = shapes[name]
        except (KeyError, TypeError):
            if spec.is_strict:
                raise Unknown(f"{kind}: unknown field {name!r}: is the sender of a newer version?") from None
            continue
        if accepted is not None and type(value) not in accepted:
            raise BadRequest(f"{kind}: field {name!r} must be {_expected(accepted)}, not {type(value).__name__}")
        if inside is not None:
            try:
                value = inside(value)
            except _WrongInside as e:
                raise BadRequest(f"{kind}: field {name!r}: {e}") from None
        given[name] = value
    if not spec.required <= given.keys():
        missing = ", ".join(sorted(spec.required - given.keys()))
        raise BadRequest(f"{kind}: missing field {missing}")
    return spec.cls(**given)


@functools.cache
def _encoding(cls: type) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    fields = dataclasses.fields(cls)
    required = tuple(f.name for f in fields if _default(f) is dataclasses.MISSING)
    return required, tuple((f.name, _default(f)) for f in fields if f.name not in required)


@functools.cache
def _row_shapes(row_type: type) -> dict[str, Shape]:
    hints = typing.get_type_hints(row_type)
    return {name: _shape(hints[name]) for name in row_type._fields}  # type: ignore[attr-defined]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shape(hint: Any) -> Shape:
    if hint is Any:
        return None, None
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        return _union([_shape(a) for a in arguments])
    if origin is typing.Literal:
        return frozenset(type(a) for a in arguments), None
    if origin is tuple or hint is tuple:
        if not arguments:
            return frozenset((tuple, list)), tuple
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return frozenset((tuple, list)), _list_of(_shape(arguments[0]))
        return frozenset((tuple, list)), _record_of([_shape(a) for a in arguments])
    if origin is dict or hint is dict or origin is Mapping:
        if not arguments or arguments == (str, Any):
            return frozenset((dict,)), None
        return frozenset((dict,)), _map_of(_shape(arguments[0]), _shape(arguments[1]))
    if hint is None:
        return frozenset((type(None),)), None
    if hint is float:
        return frozenset((float, int)), None
    return frozenset((hint,)), None


def _union(shapes: list[Shape]) -> Shape:
    accepted: frozenset[type] = frozenset()
    insides: dict[type, Callable[[Any], Any]] = {}
    for types_, inside in shapes:
        if types_ is None:
            return None, None
        accepted |= types_
        if inside is not None:
            insides.update(dict.fromkeys(types_, inside))
    if not insides:
        return accepted, None
    return accepted, lambda value: insides[type(value)](value) if type(value) in insides else value


def _checked(shape: Shape, value: Any) -> Any:
    accepted, inside = shape
    if accepted is not None and type(value) not in accepted:
        raise _WrongInside(f"expected {_expected(accepted)}, not {type(value).__name__}")
    return inside(value) if inside is not None else value


def _list_of(shape: Shape) -> Callable[[Any], Any]:
    accepted, inside = shape
    if accepted is None:
        return tuple

    def check(values: Any) -> Any:
        if inside is not None:
            return tuple([_checked(shape, value) for value in values])
        for value in values:
            if type(value) not in accepted:
                raise _WrongInside(f"expected {_expected(accepted)}, not {type(value).__name__}")
        return tuple(values)

    return check


def _record_of(shapes: list[Shape]) -> Callable[[Any], Any]:
    def check(values: Any) -> Any:
        if len(values) != len(shapes):
            raise _WrongInside(f"expected {len(shapes)} items, not {len(values)}")
        return tuple([_checked(shape, value) for shape, value in zip(shapes, values)])

    return check


def _map_of(key: Shape, value: Shape) -> Callable[[Any], Any]:
    def check(given: Any) -> Any:
        if not given:
            return given
        return {_checked(key, k): _checked(value, v) for k, v in given.items()}

    return check


def _expected(accepted: frozenset[type]) -> str:
    return " or ".join(sorted({_NAMES.get(t, t.__name__) for t in accepted}))
