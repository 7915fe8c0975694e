"""`/v1/kv/`: keys, values, trees, locks. Rules of versions and locks are the state's; here are parameters and texts."""

from __future__ import annotations

import re

import orjson

from rostra.agent.context import Agent
from rostra.agent.http.declared import parameters, read_parameters
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import answer
from rostra.agent.http.routing import JSON_TYPE, Request, Response, Route
from rostra.agent.http.shapes import as_array, kv_fragment
from rostra.agent.results import Rendering
from rostra.agent.servers_port import Key, Row
from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, KeyNames, ListKeys, SetKey
from rostra.wire.errors import BadRequest

VALUE_BYTES_MAX = 512 * 1024
_ROWS = Rendering("kv", "kv", kv_fragment, as_array)
_RAW_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
#: A fragment is never empty, so that an empty value is not taken for a missing key.
_RAW = Rendering("kv-raw", "kv-raw", lambda key, row: b"=" + row[1], lambda parts: parts[0][1:] if parts else b"")
_DIGITS = re.compile(r"[0-9]{1,20}")
_UUID_LENGTH = 36


async def read(request: Request, agent: Agent) -> Response:
    prefix, query = request.params["key"], request.query
    if query.has("keys"):
        view = _names(len(prefix), query.get("separator"))
        return await answer(request, agent, KeyNames(prefix), view, missing_is_404=bool(prefix))
    if query.has("recurse"):
        return await answer(request, agent, ListKeys(prefix), _ROWS, missing_is_404=True)
    key = request.require("key", "Missing key name")
    if query.has("raw"):
        return await answer(
            request, agent, GetKey(key), _RAW, missing_is_404=True, content_type="text/plain", headers=_RAW_HEADERS
        )
    return await answer(request, agent, GetKey(key), _ROWS, missing_is_404=True)


async def put(request: Request, agent: Agent) -> Response:
    key = request.require("key", "Missing key name")
    query = request.query
    _refuse_together(request, "acquire", "cas", "release")
    command = SetKey(
        key,
        request.body,
        flags=_uint(query.get("flags")) if query.has("flags") else 0,
        cas=_uint(query.get("cas")) if query.has("cas") else None,
        acquire=_session(query.get("acquire")) if query.has("acquire") else None,
        release=_given(query.get("release")) if query.has("release") else None,
    )
    return _truth(await write(agent.servers, command, request.caller))


async def delete(request: Request, agent: Agent) -> Response:
    query = request.query
    if query.has("recurse"):
        _refuse_together(request, "cas", "recurse")
        return _truth(await write(agent.servers, DeleteTree(request.params["key"]), request.caller))
    key = request.require("key", "Missing key name")
    cas = _uint(query.get("cas")) if query.has("cas") else None
    return _truth(await write(agent.servers, DeleteKey(key, cas), request.caller))


def _names(prefix_length: int, separator: str) -> Rendering:
    if not separator:
        return Rendering("kv-names", "kv-names", lambda key, row: orjson.dumps(key), as_array)

    def encode(key: Key, row: Row) -> bytes:
        assert isinstance(key, str)
        at = key.find(separator, prefix_length)
        return orjson.dumps(key if at < 0 else key[: at + len(separator)])

    def join(parts: list[bytes]) -> bytes:
        return as_array(list(dict.fromkeys(parts)))

    name = f"kv-names:{prefix_length}:{separator}"
    return Rendering(name, name, encode, join)


def _refuse_together(request: Request, *names: str) -> None:
    given = [n for n in names if request.query.has(n)]
    if len(given) > 1:
        raise BadRequest("Conflicting flags: " + "&".join(f"{n}={request.query.get(n)}" for n in given))


def _uint(text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise HttpError(500, f'strconv.ParseUint: parsing "{text}": invalid syntax')
    if int(text) >= 2**64:
        raise HttpError(500, f'strconv.ParseUint: parsing "{text}": value out of range')
    return int(text)


def _given(session: str) -> str:
    if not session:
        raise HttpError(500, "missing session")
    return session.lower()


def _session(text: str) -> str:
    if len(_given(text)) != _UUID_LENGTH:
        raise HttpError(500, "failed session lookup: index error: UUID must be 36 characters")
    return text.lower()


def _truth(value: bool) -> Response:
    return Response(200, b"true" if value else b"false", {"Content-Type": JSON_TYPE})


ROUTES = (
    Route("GET", "/v1/kv/{key}", read, at_servers, query=read_parameters("recurse raw keys separator ns")),
    Route("PUT", "/v1/kv/{key}", put, at_servers, VALUE_BYTES_MAX, parameters("flags cas acquire release ns")),
    Route("DELETE", "/v1/kv/{key}", delete, at_servers, query=parameters("recurse cas ns")),
)
