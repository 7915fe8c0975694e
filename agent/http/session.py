"""`/v1/session/`: what locks are held by. Clients (Patroni) match these texts and statuses, so they are kept."""

from __future__ import annotations

import uuid

from rostra.agent.context import Agent
from rostra.agent.http.declared import Body, parameters, read_parameters
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.fields import Fields
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import answer
from rostra.agent.http.routing import JSON_TYPE, Request, Response, Route, dump_json, json_response
from rostra.agent.http.shapes import as_array, session_json, ttl_text
from rostra.agent.results import Rendering
from rostra.server.state.catalog import SERF_HEALTH
from rostra.server.state.session import (
    LOCK_DELAY_MS_MAX,
    CreateSession,
    DestroySession,
    NodeSessions,
    SessionInfo,
    Sessions,
)
from rostra.wire.durations import HOUR, MILLISECOND, SECOND, format_duration, parse_duration

TTL_MAX_NS = 24 * HOUR
#: A LockDelay given as a number below this is seconds, else nanoseconds.
_SECONDS_BELOW = 1000

_SESSION = Body(
    "LockDelay Name Node Behavior TTL Checks NodeChecks Datacenter",
    is_strict=False,
    ServiceChecks=Body("ID", is_strict=False),
)
_SESSIONS = Rendering("session", "session", lambda key, row: dump_json(session_json(row)), as_array)


async def create(request: Request, agent: Agent) -> Response:
    body = _SESSION.read(request, empty=True)
    if body.text("Datacenter") not in ("", agent.datacenter):
        raise HttpError(500, "No path to datacenter")
    behavior = body.text("Behavior") or "release"
    if behavior not in ("release", "delete"):
        raise HttpError(500, f"Invalid Behavior setting '{behavior}'")
    node_name = body.text("Node") if body.has("Node") else agent.node_name
    if not node_name:
        raise HttpError(500, "Must provide Node")
    node_checks, checks = _checks(body)
    delay_ns, ttl = body.duration_ns("LockDelay", 15 * SECOND, seconds_below=_SECONDS_BELOW), body.text("TTL")
    delay_ms, ttl_ms = _round_up_ms(delay_ns), _ttl_ms(ttl, agent)
    command = CreateSession(
        id=str(uuid.uuid4()),
        node=node_name,
        name=body.text("Name"),
        lock_delay_ms=delay_ms,
        behavior=behavior,
        ttl_ms=ttl_ms,
        node_checks=node_checks,
        service_checks=tuple(c.text("ID") for c in body.objects("ServiceChecks")),
        checks=checks,
        ttl="" if ttl == ttl_text(ttl_ms) else ttl,
        lock_delay_ns=-1 if delay_ns == min(delay_ms, LOCK_DELAY_MS_MAX) * MILLISECOND else max(0, delay_ns),
    )
    return json_response({"ID": await write(agent.servers, command, request.caller)})


def _checks(body: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what is relied on of the node, what is relied on besides): `Checks` adds, an empty list means nothing at all."""
    if any(body.given(name) and not body.texts(name) for name in ("Checks", "NodeChecks")):
        return (), ()
    checks = body.texts("Checks")
    return body.texts("NodeChecks") or (SERF_HEALTH,), () if checks == (SERF_HEALTH,) else checks


async def destroy(request: Request, agent: Agent) -> Response:
    command = DestroySession(_session_id(request))
    return json_response(bool(await write(agent.servers, command, request.caller)))


async def renew(request: Request, agent: Agent) -> Response:
    session_id = _session_id(request)
    row = await agent.servers.act("session.renew", {"id": session_id}, caller=request.caller)
    if row is None:
        raise HttpError(404, f"Session id '{session_id}' not found")
    return Response(200, b"[" + dump_json(session_json(row)) + b"]", {"Content-Type": JSON_TYPE})


async def info(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, SessionInfo(_session_id(request)), _SESSIONS)


async def node(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, NodeSessions(request.require("node", "Missing node name")), _SESSIONS)


async def every(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, Sessions(), _SESSIONS)


def _session_id(request: Request) -> str:
    session_id = request.require("session", "Missing session")
    if len(session_id) != 36:
        raise HttpError(500, "failed session lookup: index error: UUID must be 36 characters")
    return session_id.lower()


def _ttl_ms(text: str, agent: Agent) -> int:
    if not text:
        return 0
    try:
        ns = parse_duration(text)
    except ValueError as e:
        raise HttpError(500, f"Session TTL '{text}' invalid: {e}") from None
    min_ns = int(agent.config.session_ttl_min_s * SECOND)
    if ns and not min_ns <= ns <= TTL_MAX_NS:
        allowed = f"[{format_duration(min_ns)}={format_duration(TTL_MAX_NS)}]"
        raise HttpError(500, f"Invalid Session TTL '{ns}', must be between {allowed}")
    return _round_up_ms(ns)


def _round_up_ms(ns: int) -> int:
    """Never shorter than asked: a lock-delay of microseconds is still one."""
    return max(0, -(-ns // MILLISECOND))


ROUTES = (
    Route("PUT", "/v1/session/create", create, at_servers, query=parameters("ns")),
    Route("PUT", "/v1/session/destroy/{session}", destroy, at_servers, query=parameters("ns")),
    Route("PUT", "/v1/session/renew/{session}", renew, at_servers, query=parameters("ns")),
    Route("GET", "/v1/session/info/{session}", info, at_servers, query=read_parameters("ns")),
    Route("GET", "/v1/session/node/{node}", node, at_servers, query=read_parameters("ns")),
    Route("GET", "/v1/session/list", every, at_servers, query=read_parameters("ns")),
)
