"""`/v1/session/`: what locks are held by. Clients (Patroni) match these texts and statuses, so they are kept."""

from __future__ import annotations

import uuid

from rostra.agent.context import Agent
from rostra.agent.http.durations import HOUR, MILLISECOND, SECOND, format_duration, parse_duration
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.fields import Fields
from rostra.agent.http.reads import answer, check_datacenter
from rostra.agent.http.routing import JSON_TYPE, JsonObject, Request, Response, Route, dump_json, json_response
from rostra.agent.http.shapes import as_array, session_json
from rostra.agent.results import View
from rostra.server.state.session import CreateSession, DestroySession, NodeSessions, SessionInfo, Sessions

TTL_MAX_NS = 24 * HOUR
#: A LockDelay given as a number below this is seconds, else nanoseconds.
_SECONDS_BELOW = 1000

_SESSIONS = View("session", "session", lambda key, row: dump_json(session_json(row)), as_array)


async def create(request: Request, agent: Agent) -> Response:
    check_datacenter(request, agent)
    body = Fields(request.json_object() if request.body.strip() else JsonObject())
    if body.text("Datacenter") not in ("", agent.datacenter):
        raise HttpError(500, "No path to datacenter")
    behavior = body.text("Behavior") or "release"
    if behavior not in ("release", "delete"):
        raise HttpError(500, f"Invalid Behavior setting '{behavior}'")
    checks = ("serfHealth",)
    for name in ("Checks", "NodeChecks"):
        if body.has(name):
            checks = body.texts(name)  # type: ignore[assignment]
    command = CreateSession(
        id=str(uuid.uuid4()),
        node=body.text("Node") or agent.node_name,
        name=body.text("Name"),
        lock_delay_ms=_round_up_ms(body.duration_ns("LockDelay", 15 * SECOND, seconds_below=_SECONDS_BELOW)),
        behavior=behavior,
        ttl_ms=_ttl_ms(body.text("TTL"), agent),
        node_checks=checks,
        service_checks=tuple(c.text("ID") for c in body.objects("ServiceChecks")),
    )
    return json_response({"ID": await write(agent.servers, command, request.token)})


async def destroy(request: Request, agent: Agent) -> Response:
    check_datacenter(request, agent)
    command = DestroySession(_session_id(request))
    return json_response(bool(await write(agent.servers, command, request.token)))


async def renew(request: Request, agent: Agent) -> Response:
    check_datacenter(request, agent)
    session_id = _session_id(request)
    row = await agent.servers.act("session.renew", {"id": session_id}, token=request.token)
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
    return session_id


def _ttl_ms(text: str, agent: Agent) -> int:
    if not text:
        return 0
    try:
        ns = parse_duration(text)
    except ValueError as e:
        raise HttpError(500, f"Session TTL '{text}' invalid: {e}") from None
    min_ns = int(float(getattr(agent.config, "session_ttl_min_s", 10.0)) * SECOND)
    if ns and not min_ns <= ns <= TTL_MAX_NS:
        allowed = f"[{format_duration(min_ns)}={format_duration(TTL_MAX_NS)}]"
        raise HttpError(500, f"Invalid Session TTL '{ns}', must be between {allowed}")
    return _round_up_ms(ns)


def _round_up_ms(ns: int) -> int:
    """Never shorter than asked: a lock-delay of microseconds is still one."""
    return max(0, -(-ns // MILLISECOND))


ROUTES = (
    Route("PUT", "/v1/session/create", create),
    Route("PUT", "/v1/session/destroy/{session}", destroy),
    Route("PUT", "/v1/session/renew/{session}", renew),
    Route("GET", "/v1/session/info/{session}", info),
    Route("GET", "/v1/session/node/{node}", node),
    Route("GET", "/v1/session/list", every),
)
