"""`/v1/operator/`: who the servers are and who leads, and autopilot's configuration and judgement of them.

The leader decides who may be a server, and every change of that. These are acts, asked through any server, and never
cached. A change is sent once; where its answer is lost, the list tells whether it was done. Fields and statuses are
Consul's; further ones (suffrage, servers that wait, AutoAdmitServers) stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rostra.agent.context import Agent
from rostra.agent.http.declared import Body, parameters, read_parameters
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.fields import Fields
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import read_options
from rostra.agent.http.routing import Request, Response, Route, json_response
from rostra.server.state.catalog import Nodes
from rostra.server.state.operator import COUNT_MAX, MILLISECONDS_MAX, Autopilot, SetAutopilot
from rostra.server.state.rows import AutopilotRow, NodeRow, read_row
from rostra.wire.durations import MILLISECOND, format_duration
from rostra.wire.errors import BadRequest, NoLeader, NotFound, RostraError, Timeout

#: What Consul says of servers that speak today's Raft; a text, as its clients decode it.
RAFT_PROTOCOL = "3"
VOTER, REPLICA = "voter", "replica"
Members = list[dict[str, Any]]
#: A change, and the looks at the list before and after it: all three fit into the time of a request.
CHANGE_S, LOOK_S = 14.0, 7.5
#: An election is over sooner; after that nobody is kept waiting for a leader who only asks who the servers are.
LEADERLESS_MS = 3000
_NEVER = "0001-01-01T00:00:00Z"
_DIGITS = re.compile(r"[0-9]{1,20}")

# -- servers -----------------------------------------------------------------------------------------------------------


async def raft_configuration(request: Request, agent: Agent) -> Response:
    """With `?stale` as the asked server has it, also where no leader can be found; only a leader knows who waits."""
    stale = read_options(request, agent).mode == "stale"
    if not stale:
        known = await agent.servers.barrier("stale")
        if not known.known_leader and known.last_contact_ms > LEADERLESS_MS:
            raise NoLeader("No cluster leader: ask with ?stale for what is known here")  # not after seconds of waiting
    answer = await agent.servers.act("raft.configuration", {"stale": stale}, caller=request.caller)
    waiting = () if stale else await agent.servers.act("raft.waiting", {}, caller=request.caller)
    servers = [
        {
            **_server(row),
            "Leader": row["leader"],
            "ProtocolVersion": RAFT_PROTOCOL,
            "Voter": row["suffrage"] == VOTER,
            "Suffrage": row["suffrage"],
        }
        for row in answer["members"]
    ]
    asking = [
        {
            **_server(row),
            "Suffrage": row["suffrage"],
            "WaitingFor": format_duration(int(row["waiting_s"] * 1000) * MILLISECOND),
            "LastHeard": format_duration(int(row.get("heard_s", 0) * 1000) * MILLISECOND),
            "Problem": row["problem"],
        }
        for row in waiting
    ]
    return json_response({"Servers": servers, "Index": answer["index"], "Waiting": asking})


async def remove_peer(request: Request, agent: Agent) -> Response:
    given = {name: value for name in ("id", "address") if (value := request.query.get(name))}
    if not given:
        raise BadRequest(
            "Bad request: Must specify either ?id with the server's ID or ?address with IP:port of peer to remove"
        )
    if len(given) > 1:
        raise BadRequest("Bad request: Must specify only one of ?id or ?address")
    ((name, value),) = given.items()
    answer = await _configuration(request, agent)
    members = list(answer["members"])
    # A name is taken for an id, as the list shows both: no node has another one's name as its id.
    meant = {row["id"] for row in members if row[name] == value or (name == "id" and row["name"] == value)}
    if not meant:
        there = ", ".join(f"{row['name']} ({row['address']})" for row in members)
        gone = next((r for r in answer.get("removed", ()) if value in (r["id"], r["name"], r["address"])), None)
        why = f"; autopilot removed {gone['name']} {gone['ago_s']} s ago, because it had failed" if gone else ""
        raise HttpError(500, f'{name} "{value}" was not found in the Raft configuration{why}; there are {there}')
    args = {"address": value} if name == "address" else {"id": next(iter(meant))}
    await _change(
        request, agent, "raft.remove-peer", args, lambda members: meant.isdisjoint(row["id"] for row in members)
    )
    return Response(200)


async def add_peer(request: Request, agent: Agent) -> Response:
    """Ours: lets a server in that waits for it. Consul takes whoever joins; here a server gets every secret."""
    args = _one_of(request, "name", "id", what="the waiting server to let in")
    ((name, value),) = args.items()
    row = await _change(
        request, agent, "raft.add-peer", args, lambda members: next((m for m in members if m[name] == value), None)
    )
    return json_response({**_server(row), "Voter": row["suffrage"] == VOTER, "Suffrage": row["suffrage"]})


async def transfer_leader(request: Request, agent: Agent) -> Response:
    wanted = request.query.get("id")

    def done(members: Members) -> Any:
        return next((m for m in members if wanted in (m["id"], m["name"]) and m["leader"]), None)

    try:
        row = await _change(request, agent, "raft.transfer-leader", {"id": wanted} if wanted else {}, done)
    except NotFound:
        try:  # the list shows names beside ids, and one is taken for the other
            row = await _change(request, agent, "raft.transfer-leader", {"name": wanted}, done)
        except NotFound as e:
            raise HttpError(500, f'id "{wanted}" was not found in the Raft configuration: {e.message}') from None
    return json_response({"Success": True, "Leader": _server(row)})


async def _change(
    request: Request, agent: Agent, kind: str, args: dict[str, Any], done: Callable[[Members], Any]
) -> Any:
    """The act's answer, or what `done` makes of the list of servers where that shows that it was done."""
    try:
        return await agent.servers.act(kind, args, caller=request.caller, timeout_s=CHANGE_S, once=True)
    except (NotFound, Timeout) as e:
        # The change itself may have cost the answer: the leader went, or the server that this agent speaks to.
        try:
            found = done(await _members(request, agent))
        except RostraError:
            raise e from None
        if not found:
            raise
        return found


async def _configuration(request: Request, agent: Agent) -> dict[str, Any]:
    try:
        answer = await agent.servers.act("raft.configuration", {}, caller=request.caller, timeout_s=LOOK_S)
    except Timeout:
        raise NoLeader from None  # only a question: nothing was done
    return dict(answer)


async def _members(request: Request, agent: Agent) -> Members:
    return list((await _configuration(request, agent))["members"])


def _one_of(request: Request, *names: str, what: str) -> dict[str, str]:
    given = {name: value for name in names if (value := request.query.get(name))}
    if len(given) != 1:
        ways = " or ".join(f"?{name}=" for name in names)
        raise BadRequest(f"Bad request: {what} must be named by {'either ' if not given else 'only one of '}{ways}")
    return given


def _server(row: dict[str, Any]) -> dict[str, Any]:
    return {"ID": row["id"], "Node": row["name"] or "(unknown)", "Address": row["address"]}


# -- autopilot ---------------------------------------------------------------------------------------------------------


async def health(request: Request, agent: Agent) -> Response:
    """200 while every server is well, else 429 with the same body, for probes that look at the status alone."""
    answer = await _health(request, agent)
    servers = [
        {
            "ID": row["id"],
            "Name": row["name"],
            "Address": row["address"],
            "SerfStatus": row["serf_status"],
            "Version": row["version"],
            "Leader": row["leader"],
            **_condition(row),
            "Voter": row["suffrage"] == VOTER,
            "Suffrage": row["suffrage"],
        }
        for row in answer["servers"]
    ]
    body = {"Healthy": answer["healthy"], "FailureTolerance": answer["failure_tolerance"], "Servers": servers}
    return json_response(body, status=200 if answer["healthy"] else 429)


async def state(request: Request, agent: Agent) -> Response:
    """The same in the form that Consul has since 1.9: servers by id, always 200."""
    answer = await _health(request, agent)
    nodes = (await agent.results.fetch(Nodes(), token=request.token)).rows
    metas = {name: read_row(NodeRow, row).meta for name, row in nodes.items()}
    servers = {
        row["id"]: {
            "ID": row["id"],
            "Name": row["name"],
            "Address": row["address"],
            "NodeStatus": row["serf_status"],
            "Version": row["version"],
            **_condition(row),
            "ReadReplica": row["suffrage"] == REPLICA,
            "Status": _status(row),
            "Meta": metas.get(row["name"], {}),
            "NodeType": "read-replica" if row["suffrage"] == REPLICA else VOTER,
        }
        for row in answer["servers"]
    }
    body = {
        "Healthy": answer["healthy"],
        "FailureTolerance": answer["failure_tolerance"],
        "OptimisticFailureTolerance": answer["failure_tolerance"],
        "Servers": servers,
        "Leader": answer["leader"],
        "Voters": [row["id"] for row in answer["servers"] if row["suffrage"] == VOTER],
        "ReadReplicas": [row["id"] for row in answer["servers"] if row["suffrage"] == REPLICA],
    }
    return json_response(body)


async def _health(request: Request, agent: Agent) -> Any:
    read_options(request, agent)
    return await agent.servers.act("autopilot.health", {}, caller=request.caller)


def _condition(row: dict[str, Any]) -> dict[str, Any]:
    contact_ms = row["last_contact_ms"]
    return {
        "LastContact": "-1ns" if contact_ms is None else format_duration(contact_ms * MILLISECOND),
        "LastTerm": row["last_term"],
        "LastIndex": row["last_index"],
        "Healthy": row["healthy"],
        "StableSince": _time(row["stable_since_ms"]) if row["healthy"] else _NEVER,
    }


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _status(row: dict[str, Any]) -> str:
    if row["leader"]:
        return "leader"
    return VOTER if row["suffrage"] == VOTER else "non-voter"


async def configuration(request: Request, agent: Agent) -> Response:
    options = read_options(request, agent)
    entry = await agent.results.fetch(Autopilot(), mode=options.mode, token=request.token)
    row = read_row(AutopilotRow, entry.rows[""])
    return json_response(
        {
            "CleanupDeadServers": row.cleanup_dead_servers,
            "LastContactThreshold": format_duration(row.last_contact_threshold_ms * MILLISECOND),
            "MaxTrailingLogs": row.max_trailing_logs,
            "MinQuorum": row.min_quorum,
            "ServerStabilizationTime": format_duration(row.server_stabilization_time_ms * MILLISECOND),
            "AutoAdmitServers": row.auto_admit_servers,
            **_WITHOUT_USE,
            "CreateIndex": row.create_index,
            "ModifyIndex": row.modify_index,
        }
    )


async def set_configuration(request: Request, agent: Agent) -> Response:
    """true, or false where `?cas=` is not the present ModifyIndex. What is not given gets its default."""
    command = _configuration_of(request, _cas(request))
    return json_response(bool(await write(agent.servers, command, request.caller)))


#: Settings of Consul's Enterprise edition that its API always shows.
_WITHOUT_USE: dict[str, Any] = {"RedundancyZoneTag": "", "DisableUpgradeMigration": False, "UpgradeVersionTag": ""}
_CONFIGURATION = Body(
    "CleanupDeadServers LastContactThreshold MaxTrailingLogs MinQuorum ServerStabilizationTime AutoAdmitServers "
    "RedundancyZoneTag DisableUpgradeMigration UpgradeVersionTag CreateIndex ModifyIndex"
)


def _configuration_of(request: Request, cas: int | None) -> SetAutopilot:
    try:
        fields, default = _CONFIGURATION.read(request), AutopilotRow()
    except BadRequest as e:
        problem = e.message.removeprefix("Request decode failed: ")
        raise BadRequest(f"Bad request: Error parsing autopilot config: {problem}") from None
    for name, unused in _WITHOUT_USE.items():
        if (fields.flag(name) if unused is False else fields.text(name)) != unused:
            raise BadRequest(f"{name} is a setting of Consul Enterprise and not supported: leave it out")
    return SetAutopilot(
        cleanup_dead_servers=fields.flag("CleanupDeadServers", default.cleanup_dead_servers),
        last_contact_threshold_ms=_ms(fields, "LastContactThreshold", default.last_contact_threshold_ms),
        max_trailing_logs=_count(fields, "MaxTrailingLogs", default.max_trailing_logs),
        min_quorum=_count(fields, "MinQuorum", default.min_quorum),
        server_stabilization_time_ms=_ms(fields, "ServerStabilizationTime", default.server_stabilization_time_ms),
        # Clients of Consul read, change and write back what they know: this is not among it.
        auto_admit_servers=fields.flag("AutoAdmitServers") if fields.has("AutoAdmitServers") else None,
        cas=cas,
    )


def _ms(fields: Fields, name: str, default_ms: int) -> int:
    """Whole milliseconds, never shorter than asked."""
    ms = -(-fields.duration_ns(name, default_ms * MILLISECOND) // MILLISECOND)
    if not 0 <= ms <= MILLISECONDS_MAX:
        most = format_duration(MILLISECONDS_MAX * MILLISECOND)
        raise BadRequest(f"Request decode failed: {name} must be a duration from 0s to {most}")
    return ms


def _count(fields: Fields, name: str, default: int) -> int:
    value = fields.integer(name, default)
    if not 0 <= value <= COUNT_MAX:
        raise BadRequest(f"Request decode failed: {name} must be a number from 0 to {COUNT_MAX}")
    return value


def _cas(request: Request) -> int | None:
    if not request.query.has("cas"):
        return None
    text = request.query.get("cas")
    if not _DIGITS.fullmatch(text) or int(text) >= 2**64:
        raise BadRequest(f'Bad request: ?cas must be an index (ModifyIndex), not "{text}"')
    return int(text)


ROUTES = (
    Route("GET", "/v1/operator/raft/configuration", raft_configuration, at_servers, query=read_parameters()),
    Route("DELETE", "/v1/operator/raft/peer", remove_peer, at_servers, query=parameters("id address")),
    Route("POST", "/v1/operator/raft/peer", add_peer, at_servers, query=parameters("id name")),
    Route("POST", "/v1/operator/raft/transfer-leader", transfer_leader, at_servers, query=parameters("id")),
    Route("PUT", "/v1/operator/raft/transfer-leader", transfer_leader, at_servers, query=parameters("id")),
    Route("GET", "/v1/operator/autopilot/configuration", configuration, at_servers, query=read_parameters()),
    Route("PUT", "/v1/operator/autopilot/configuration", set_configuration, at_servers, query=parameters("cas")),
    Route("GET", "/v1/operator/autopilot/health", health, at_servers, query=read_parameters()),
    Route("GET", "/v1/operator/autopilot/state", state, at_servers, query=read_parameters()),
)
