"""What a resource module of the HTTP API is written with: routes, requests, responses, and the table that joins them.

A module has `ROUTES = (Route("GET", "/v1/kv/{key}", read, at_servers), …)`; `async def read(request, agent)` gives a
Response.
A placeholder in the middle of a path is one segment; at the end it is everything that follows, slashes included, and
may be empty: the handler then says what is missing (`request.require`). Nothing here knows aiohttp or the servers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_plus

import orjson

from rostra.acl.authorizer import EVERYTHING, Authorizer
from rostra.wire.caller import TRACE_CHARS_MAX, Caller
from rostra.wire.errors import BadRequest

if TYPE_CHECKING:
    from rostra.agent.context import Agent

JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; charset=utf-8"

#: No request nests deeper: our work on it takes stack for each level.
JSON_DEPTH_MAX = 100
#: What a body may hold, whatever its bytes: 170,000 empty objects in 512 KiB hold the loop for 0.3 s.
JSON_CONTAINERS_MAX, JSON_ITEMS_MAX, _COUNTED_BYTES = 5_000, 20_000, 8 << 10
#: Parameters of one request: a target of 64 KiB could name 30,000.
PARAMETERS_MAX = 1_000
_TOO_DEEP = f"Request decode failed: nested deeper than {JSON_DEPTH_MAX}"
_WRONG_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)

#: Bodies of ordinary requests. A route with its own bound says so.
BODY_BYTES_MAX = 512 * 1024

Handler = Callable[["Request", "Agent"], Awaitable["Response"]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` has literal segments and `{placeholders}`. `may(can, request, agent)`: what it asks of its caller,
    see permissions.py. `body_bytes_max`: larger bodies are 413 before the handler.

    `query`: the parameters that the handler reads, see declared.py; None: whatever there is. `datacenter`: it answers
    for this one, so that `?dc=` with another one is refused; else it answers for this agent, and `?dc=` says nothing.
    """

    method: str
    path: str
    handler: Handler
    may: Callable[[Authorizer, Request, Any], bool]
    body_bytes_max: int = BODY_BYTES_MAX
    query: frozenset[str] | None = None
    datacenter: bool = True


@dataclass(slots=True, eq=False)
class Response:
    """`body` is sent as it is. `hot` is set by plain cached reads only, see hot.py."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hot: Any = None


def json_response(obj: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, dump_json(obj), {"Content-Type": JSON_TYPE, **(headers or {})})


def text_response(text: str, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, text.encode(), {"Content-Type": TEXT_TYPE, **(headers or {})})


def dump_json(obj: Any) -> bytes:
    """JSON as the API speaks it. Tuples are arrays, bytes are base64 by the caller, keys are strings."""
    return orjson.dumps(obj)


class JsonObject(dict[str, Any]):
    """A decoded JSON object whose fields are found whatever their case, as Go decodes them.

    Iteration shows the keys as they were sent, so that maps of users' data (Meta, tags) keep theirs.
    """

    __slots__ = ("_folded",)
    _folded: dict[str, str]

    def _find(self, key: str) -> str | None:
        if not hasattr(self, "_folded"):
            self._folded = {k.lower(): k for k in self}
        return self._folded.get(key.lower())

    def __missing__(self, key: str) -> Any:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return dict.__getitem__(self, found)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (isinstance(key, str) and self._find(key) is not None)

    def get(self, key: str, default: Any = None) -> Any:
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        found = self._find(key)
        return default if found is None else dict.__getitem__(self, found)


def load_json(body: bytes) -> Any:
    """The decoded body, objects as JsonObject. Raises BadRequest that names the position of the mistake."""
    if len(body) > _COUNTED_BYTES and _is_too_much(body):
        raise BadRequest(
            f"Request decode failed: more than {JSON_CONTAINERS_MAX} arrays and objects,"
            f" or {JSON_ITEMS_MAX} items in them"
        )
    try:
        return _fold(orjson.loads(body), JSON_DEPTH_MAX)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"Request decode failed: {e.msg} at line {e.lineno} column {e.colno}") from None


def _is_too_much(body: bytes) -> bool:
    if not _seems_too_much(body):
        return False
    # An item is two texts at most. Fewer are left out quickly: what is in them counts for nothing.
    quotes = body.count(b'"') - body.count(b'\\"')
    return quotes > 4 * JSON_ITEMS_MAX or _seems_too_much(_outside_texts(body))


def _outside_texts(body: bytes) -> bytes:
    """Without what stands between quotes. With splits this takes 3 ms at most, with a pattern it took 28."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(unescaped.split(b'"')[::2])


def _seems_too_much(body: bytes) -> bool:
    return body.count(b"{") + body.count(b"[") > JSON_CONTAINERS_MAX or body.count(b",") > JSON_ITEMS_MAX


def _fold(value: Any, depth: int) -> Any:
    if type(value) is dict:
        if not depth:
            raise BadRequest(_TOO_DEEP)
        found = JsonObject(value)
        for name, inner in value.items():
            if type(inner) is dict or type(inner) is list:
                found[name] = _fold(inner, depth - 1)
        return found
    if type(value) is list:
        if not depth:
            raise BadRequest(_TOO_DEEP)
        return [_fold(v, depth - 1) if type(v) is dict or type(v) is list else v for v in value]
    return value


def check_escapes(text: str) -> None:
    """Raises BadRequest where a `%` in a path or query begins no escape: it would be taken for itself, or for none."""
    wrong = _WRONG_ESCAPE.search(text)
    if wrong is not None:
        raise BadRequest(f'invalid URL escape "{_shown(wrong[0])}": a % itself is written %25')


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


class Query:
    """The parameters after the `?`, decoded; a name without `=` has the value "". Raises BadRequest."""

    __slots__ = ("_pairs",)

    def __init__(self, text: str) -> None:
        pairs: dict[str, list[str]] = {}
        if text.count("&") >= PARAMETERS_MAX:
            raise BadRequest(f"more than {PARAMETERS_MAX} parameters")
        for part in text.split("&") if text else ():
            if not part:
                continue
            name, _, value = part.partition("=")
            if "%" in part or "+" in part:
                check_escapes(part)
                try:
                    name, value = unquote_plus(name, errors="strict"), unquote_plus(value, errors="strict")
                except UnicodeDecodeError:
                    raise BadRequest("the query is not UTF-8") from None
            if name in pairs:
                pairs[name].append(value)
            else:
                pairs[name] = [value]
        self._pairs = pairs

    def has(self, name: str) -> bool:
        return name in self._pairs

    def get(self, name: str, default: str = "") -> str:
        values = self._pairs.get(name)
        return values[0] if values else default

    def all(self, name: str) -> list[str]:
        return self._pairs.get(name, [])

    def flag(self, name: str) -> bool:
        """`?name`, `?name=1`, `?name=true` … but not `?name=false`. Raises BadRequest for anything else."""
        values = self._pairs.get(name)
        if not values:
            return False
        if values[0] in ("", "1", "t", "T", "true", "True", "TRUE"):
            return True
        if values[0] in ("0", "f", "F", "false", "False", "FALSE"):
            return False
        raise BadRequest(f"Invalid value for ?{name}")

    def names(self) -> Iterable[str]:
        return self._pairs.keys()

    def __bool__(self) -> bool:
        return bool(self._pairs)


_EMPTY_QUERY = Query("")


class Request:
    """One request, already complete. `path` is decoded, `target` is what stood on the request line."""

    __slots__ = (
        "_caller",
        "_token",
        "body",
        "can",
        "headers",
        "ignored",
        "method",
        "params",
        "path",
        "query",
        "remote",
        "target",
    )

    def __init__(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str],
        body: bytes = b"",
        remote: str = "",
        params: dict[str, str] | None = None,
    ) -> None:
        path, _, query = target.partition("?")
        self.method = method
        self.target = target
        self.path = unquote(path) if "%" in path else path
        self.params = params if params is not None else {}
        self.query = Query(query) if query else _EMPTY_QUERY
        self.headers = headers
        self.body = body
        self.remote = remote
        self.ignored: list[str] = []  # what nobody reads, for the answer to say so
        self._token: str | None = None
        self._caller: Caller | None = None
        self.can: Authorizer = EVERYTHING

    @property
    def token(self) -> str:
        """The caller's token: `?token=`, else `X-Consul-Token`, else `Authorization: Bearer`."""
        if self._token is None:
            token = self.query.get("token") or self.headers.get("X-Consul-Token", "")
            if not token:
                scheme, _, rest = self.headers.get("Authorization", "").partition(" ")
                token = rest.strip() if scheme.lower() == "bearer" else ""
            self._token = token
        return self._token

    @property
    def caller(self) -> Caller:
        """Who asks, as the servers are told."""
        if self._caller is None:
            self._caller = Caller(self.token, self.headers.get("traceparent", "")[:TRACE_CHARS_MAX])
        return self._caller

    def require(self, name: str, missing: str) -> str:
        """The path's placeholder `name`; BadRequest with the text `missing` where it is empty."""
        value = self.params.get(name, "")
        if not value:
            raise BadRequest(missing)
        return value

    def json(self) -> Any:
        """The decoded body; objects find their fields whatever the case. Raises BadRequest."""
        return load_json(self.body)

    def json_object(self) -> JsonObject:
        """As `json`, where only an object makes sense; an empty body is an error as in Go (`EOF`)."""
        if not self.body.strip():
            raise BadRequest("Request decode failed: EOF")
        value = self.json()
        if value is None:
            return JsonObject()
        if not isinstance(value, JsonObject):
            raise BadRequest("Request decode failed: expected a JSON object")
        return value


@dataclass(frozen=True, slots=True)
class Match:
    """What a path leads to. `routes` is by method; it is empty where `redirect` is set (the last slash is missing)."""

    routes: Mapping[str, Route]
    params: dict[str, str]
    redirect: str = ""

    @property
    def allow(self) -> str:
        """The Allow header: OPTIONS first, then the methods in the order in which they were registered."""
        return ",".join(("OPTIONS", *self.routes))


class _Place:
    """A node of the tree of segments."""

    __slots__ = ("names", "one", "rest", "routes", "static")

    def __init__(self) -> None:
        self.static: dict[str, _Place] = {}
        self.routes: dict[str, Route] = {}
        self.one: _Place | None = None
        self.rest: dict[str, Route] = {}
        self.names: tuple[str, ...] | None = None


class Router:
    """Finds routes by path. Paths without placeholders cost one dictionary look-up."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Place()
        self._exact: dict[str, Match] = {}
        for route in routes:
            self._add(route)

    def find(self, raw_path: str) -> Match | None:
        """`raw_path` is the path as it was sent. Literal segments win over placeholders. None: no such endpoint."""
        exact = self._exact.get(raw_path)
        if exact is not None:
            return exact
        if not raw_path.startswith("/"):
            return None
        return self._walk(self._root, raw_path, 1, ())

    def _add(self, route: Route) -> None:
        segments = route.path.strip("/").split("/")
        place = self._root
        for i, segment in enumerate(segments):
            if segment.startswith("{"):
                if i == len(segments) - 1:
                    place.rest[route.method] = route
                    place.names = _names(route.path)
                    return
                place.one = place.one or _Place()
                place = place.one
            else:
                place = place.static.setdefault(segment, _Place())
        place.routes[route.method] = route
        place.names = place.names or _names(route.path)
        if "{" not in route.path:
            self._exact[route.path] = Match(place.routes, {})

    def _walk(self, place: _Place, path: str, at: int, values: tuple[str, ...]) -> Match | None:
        end = path.find("/", at)
        segment = path[at:] if end < 0 else path[at:end]
        child = place.static.get(segment)
        if child is not None:
            if end < 0:
                if child.routes:
                    return self._matched(child, child.routes, values)
                if child.rest:
                    return Match({}, {}, redirect=path + "/")
            else:
                found = self._walk(child, path, end + 1, values)
                if found is not None:
                    return found
        if place.one is not None and segment:
            if end < 0:
                if place.one.routes:
                    return self._matched(place.one, place.one.routes, (*values, segment))
            else:
                found = self._walk(place.one, path, end + 1, (*values, segment))
                if found is not None:
                    return found
        if place.rest:
            return self._matched(place, place.rest, (*values, path[at:]))
        return None

    @staticmethod
    def _matched(place: _Place, routes: dict[str, Route], values: tuple[str, ...]) -> Match:
        names = place.names or ()
        if len(values) == 1:
            value = values[0]
            return Match(routes, {names[0]: unquote(value) if "%" in value else value})
        return Match(routes, {n: unquote(v) if "%" in v else v for n, v in zip(names, values)})


def _names(path: str) -> tuple[str, ...]:
    return tuple(s[1:-1] for s in path.split("/") if s.startswith("{"))
