"""What a route reads of a request, declared beside it: the names of its parameters and of the fields of its body.

A field or parameter that nobody reads is refused where Consul refuses it. Where Consul ignores it, so does Rostra, and
the answer says so in `X-Rostra-Warning`. A parameter or field that has an effect in Consul and none here is no name
that a route declares. `ns` is declared by the routes where Consul's own edition without namespaces refuses it.
"""

from __future__ import annotations

import json
from typing import Any

from rostra.agent import schema
from rostra.agent.http.errors import HttpError
from rostra.agent.http.fields import Fields
from rostra.agent.http.routing import JsonObject, Request, Route
from rostra.wire.errors import BadRequest

WARNING_HEADER = "X-Rostra-Warning"
ENTERPRISE = "Namespaces are a Consul Enterprise feature"
#: So many names are shown, and so much of each.
_SHOWN_MAX, _NAME_CHARS_MAX = 8, 64
_NAMESPACE_HEADER = "X-Consul-Namespace"

#: What every route takes, and what those take besides that answer with rows of the state.
_EVERYWHERE = frozenset(("dc", "token", "pretty"))
_READ = _EVERYWHERE | {"stale", "consistent", "cached", "index", "wait", "filter"}


def parameters(names: str = "") -> frozenset[str]:
    """`names`, with spaces between them, besides those of every route."""
    return _EVERYWHERE.union(names.split())


def read_parameters(names: str = "") -> frozenset[str]:
    """As `parameters`, for a route that answers by `reads.answer`."""
    return _READ.union(names.split())


def check_parameters(request: Request, route: Route, datacenter: str) -> None:
    """Refuse namespaces and other datacenters, and note what the route does not read. Raises BadRequest, HttpError."""
    if route.datacenter and request.query and request.query.get("dc", datacenter) not in ("", datacenter):
        raise HttpError(500, "No path to datacenter")
    declared = route.query
    if declared is None:
        return
    query = request.query
    if query:
        if "ns" in declared and query.get("ns"):
            raise BadRequest(f'Bad request: Invalid query parameter: "ns" - {ENTERPRISE}')
        for name in query.names():
            if name not in declared:
                request.ignored.append(f"parameter {shown(name)}")
    if request.headers.get(_NAMESPACE_HEADER):
        if "ns" in declared:
            raise BadRequest(f'Bad request: Invalid header: "{_NAMESPACE_HEADER}" - {ENTERPRISE}')
        request.ignored.append(f"header {_NAMESPACE_HEADER}")


def warning(ignored: list[str]) -> str:
    """What the header says."""
    more = len(ignored) - _SHOWN_MAX
    names = ", ".join(ignored[:_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
    return f"{names} {'was' if len(ignored) == 1 else 'were'} ignored"


def shown(name: str) -> str:
    """A name that a client chose, as printable ASCII in quotes."""
    return json.dumps(name[:_NAME_CHARS_MAX])


class Body:
    """The fields of an object, found whatever their case; the same for each object of a list.

    `names`: fields whose inside is read, or kept, as it is. `inside`: fields that are objects of known fields.
    """

    def __init__(self, names: str = "", *, is_strict: bool = True, **inside: Body | MapOf) -> None:
        self._fields: dict[str, Body | MapOf | None] = {name.lower(): None for name in names.split()}
        self._fields |= {name.lower(): body for name, body in inside.items()}
        self._is_strict = is_strict

    @classmethod
    def of(
        cls, table: schema.Table, names: str = "", *, is_strict: bool = True, takes_snake: bool = False, **inside: Body
    ) -> Body:
        """Of the fields of a definition. `takes_snake`: Consul knows the names of its plain values in files, too."""
        nested: dict[str, Body | MapOf] = {**inside}
        for name, field in table.in_bodies.items():
            if isinstance(field.form, schema.MapOf):
                nested[field.api] = MapOf(" ".join(f.api for f in field.form.table.in_bodies.values()))
            elif isinstance(field.form, schema.Type):
                is_plain = takes_snake and field.form in (schema.Type.TEXT, schema.Type.WHOLE)
                names += f" {field.api} {name if is_plain else ''}"
            else:
                inner = field.form.table if isinstance(field.form, schema.Many) else field.form
                nested[field.api] = cls.of(inner, takes_snake=takes_snake)
        return cls(names, is_strict=is_strict, **nested)

    def read(self, request: Request, *, empty: bool = False) -> Fields:
        """The request's body. Raises BadRequest for what is no such object; `empty`: no body at all is {}."""
        value = JsonObject() if empty and not request.body else request.json_object()
        unread: list[str] = []
        self.look(value, unread)
        request.ignored += [f"unknown field {shown(name)}" for name in unread]
        return Fields(value)

    def look(self, value: Any, unread: list[str]) -> None:
        """Add the unknown fields of `value` that are ignored. Raises BadRequest for one that is not."""
        for item in value if isinstance(value, list) else (value,):
            if not isinstance(item, dict):
                continue
            for name, inner in item.items():
                try:
                    known = self._fields[name.lower()]
                except KeyError:
                    self._refuse_unless_lenient(name)
                    unread.append(name)
                else:
                    if known is not None:
                        known.look(inner, unread)

    def _refuse_unless_lenient(self, name: str) -> None:
        if self._is_strict:
            why = f" - {ENTERPRISE}" if name.lower() == "namespace" else ""
            raise BadRequest(f"Request decode failed: json: unknown field {shown(name)}{why}")


class MapOf:
    """A map whose names are the user's and whose values are objects of known fields."""

    def __init__(self, names: str) -> None:
        self._each = Body(names)

    def look(self, value: Any, unread: list[str]) -> None:
        for inner in value.values() if isinstance(value, dict) else ():
            self._each.look(inner, unread)
