"""`/v1/agent/`: this node's own services, checks, maintenance, leaves and proxies, and what the agent says of itself.

Statuses and texts are Consul's 1.8, also where they are odd: deregistering what is not there succeeds, a check that is
no TTL check is a 500. A change is answered when the catalog has it, or after a bounded wait with a header that says why
it has not. Long polls on one service or one proxy wait for another content hash (`?hash=`), the leaf for
another index.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rostra import CONSUL_API_VERSION, __version__
from rostra.acl.authorizer import DENIED
from rostra.agent.checks.check import CRITICAL, MAINTENANCE, PASSING, WARNING, aggregate
from rostra.agent.context import Agent
from rostra.agent.definition import SIDECAR_SUFFIX, STATUSES, ScriptsDisabled
from rostra.agent.definition_fields import DecodeError
from rostra.agent.http import permissions
from rostra.agent.http.declared import Body, parameters, read_parameters
from rostra.agent.http.errors import SYNC_ERROR_HEADER, SYNCED_HEADER, HttpError
from rostra.agent.http.machine import describe
from rostra.agent.http.reads import how_long
from rostra.agent.http.routing import Request, Response, Route, dump_json, json_response, text_response
from rostra.agent.http.shapes import check_json, proxy_json, tagged_json
from rostra.agent.local import LocalAgent
from rostra.agent.metrics import Metrics
from rostra.runtime.steps import BUCKETS_MS as STEP_BUCKETS_MS
from rostra.server.state.cluster import Members
from rostra.server.state.health import sees_check
from rostra.server.state.rows import MemberRow, ServiceRow, read_row
from rostra.wire.durations import SECOND, format_duration
from rostra.wire.errors import BadRequest, Denied, NoLeader, NotFound, RostraError

Json = dict[str, Any]

#: How long the list of members waits to be told how old it is.
HOW_OLD_S = 1.0
#: There is one datacenter and no listener there: what Consul's clients expect to see.
WAN_PORT = 8302
SYNC_ERROR_CHARS_MAX = 300
_ASK_SERVERS_S = 1.0  # how long /self waits for what only servers know
#: The core is not asked for its numbers more often, however many ask for metrics.
CORE_METRICS_EVERY_S = 0.5
_MEMBER_STATUS = {"alive": 1, "leaving": 2, "left": 3, "failed": 4}
_HEALTH_STATUS = {PASSING: 200, WARNING: 429, CRITICAL: 503, MAINTENANCE: 503}


# -- registration -------------------------------------------------------------------------------------------------


async def register_service(request: Request, agent: Agent) -> Response:
    service_id = await _changed(
        agent.local.register_service(
            request.json_object(),
            replace_existing_checks=request.query.flag("replace-existing-checks"),
            token=request.token,
        )
    )
    return await _settled(agent, service_id)


async def deregister_service(request: Request, agent: Agent) -> Response:
    service_id = request.params["id"]
    if not service_id:
        raise HttpError(500, "ServiceID missing")
    try:
        await agent.local.deregister_service(service_id)
    except NotFound:
        pass
    return await _settled(agent, service_id)


async def register_check(request: Request, agent: Agent) -> Response:
    service_id = await _changed(agent.local.register_check(request.json_object(), token=request.token))
    return await _settled(agent, service_id)


async def deregister_check(request: Request, agent: Agent) -> Response:
    check_id = request.params["id"]
    if not check_id:
        raise HttpError(500, "CheckID missing")
    service_id = _service_of(agent, check_id)
    try:
        await agent.local.deregister_check(check_id)
    except NotFound:
        pass
    return await _settled(agent, service_id)


async def pass_check(request: Request, agent: Agent) -> Response:
    return await _set_ttl(agent, request.params["id"], PASSING, request.query.get("note"))


async def warn_check(request: Request, agent: Agent) -> Response:
    return await _set_ttl(agent, request.params["id"], WARNING, request.query.get("note"))


async def fail_check(request: Request, agent: Agent) -> Response:
    return await _set_ttl(agent, request.params["id"], CRITICAL, request.query.get("note"))


_UPDATE = Body("Status Output")


async def update_check(request: Request, agent: Agent) -> Response:
    fields = _UPDATE.read(request)
    status = fields.text("Status")
    if status not in STATUSES:
        raise BadRequest(f"Invalid check status: '{status}'")
    return await _set_ttl(agent, request.params["id"], status, fields.text("Output"))


async def _set_ttl(agent: Agent, check_id: str, status: str, output: str) -> Response:
    try:
        await agent.local.set_ttl_status(check_id, status, output)
    except NotFound as error:
        raise HttpError(500, error.message) from None
    return await _settled(agent, _service_of(agent, check_id))


async def service_maintenance(request: Request, agent: Agent) -> Response:
    service_id = request.require("id", "Missing service ID")
    enable = _enable(request)
    await agent.local.service_maintenance(service_id, enable, request.query.get("reason"), token=request.token)
    return await _settled(agent, service_id)


async def node_maintenance(request: Request, agent: Agent) -> Response:
    await agent.local.node_maintenance(_enable(request), request.query.get("reason"), token=request.token)
    return await _settled(agent, "")


def _enable(request: Request) -> bool:
    if not request.query.has("enable"):
        raise BadRequest("Missing value for enable")
    value = request.query.get("enable")
    if value not in ("1", "t", "T", "true", "True", "TRUE", "0", "f", "F", "false", "False", "FALSE"):
        raise BadRequest(f'Invalid value for enable: "{value}"')
    return value[0] in "1tT"


async def _changed(change: Awaitable[str]) -> str:
    try:
        return await change
    except DecodeError as error:
        raise BadRequest(f"Request decode failed: {error.message}") from None
    except (ScriptsDisabled, NotFound) as error:
        raise HttpError(500, error.message) from None


async def _settled(agent: Agent, service_id: str) -> Response:
    """200 once the catalog has what was changed, or says why it has not: the change is kept here and tried again."""
    sync = agent.sync
    why = await sync.settled(service_id, service_id + SIDECAR_SUFFIX) if sync is not None else ""
    if not why:
        return Response()
    line = "".join(c for c in " ".join(why.split()) if c.isprintable())
    return Response(headers={SYNCED_HEADER: "false", SYNC_ERROR_HEADER: line[:SYNC_ERROR_CHARS_MAX]})


def _service_of(agent: Agent, check_id: str) -> str:
    check = agent.local.checks.get(check_id)
    return check.row.service_id if check is not None else ""


# -- what is registered -------------------------------------------------------------------------------------------


async def services(request: Request, agent: Agent) -> Response:
    _no_filter(request)
    local = agent.local
    rows = (local.services[i].row for i in sorted(local.services))
    return json_response({row.id: service_json(row) for row in rows if request.can.service_read(row.name)})


async def service(request: Request, agent: Agent) -> Response:
    """One service; with `?hash=` it waits until the service differs from what had that hash."""
    local, service_id = agent.local, request.params["id"]

    def now() -> tuple[Json, str]:
        found = local.services.get(service_id)
        if found is None:
            raise NotFound(f"unknown service ID: {service_id}")
        if not request.can.service_read(found.row.name):
            raise Denied(DENIED)
        return _hashed_service(found.row)

    shown, digest = now()
    known = request.query.get("hash")
    if known and known == digest:
        changed = asyncio.Event()
        remove = local.on_change(changed.set)
        try:
            async with asyncio.timeout(how_long(request, agent)):
                while digest == known:
                    await changed.wait()
                    changed.clear()
                    shown, digest = now()
        except TimeoutError:
            pass
        finally:
            remove()
    return json_response(shown, headers={"X-Consul-ContentHash": digest})


async def checks(request: Request, agent: Agent) -> Response:
    _no_filter(request)
    local = agent.local
    rows = (local.checks[i].row for i in sorted(local.checks))
    return json_response({row.id: check_json(row) for row in rows if sees_check(request.can, row)})


async def health_by_id(request: Request, agent: Agent) -> Response:
    local = agent.local
    service_id = request.require("id", "Missing serviceID")
    found = local.services.get(service_id)
    if found is None or not request.can.service_read(found.row.name):
        reason = f"ServiceId {service_id} not found"
        if _wants_text(request):
            return text_response(reason, status=404, headers={"X-Consul-Reason": reason})
        empty = {"AggregatedStatus": CRITICAL, "Service": None, "Checks": None}
        return json_response(empty, status=404, headers={"X-Consul-Reason": reason})
    shown = _health_json(local, service_id)
    return _health_response(request, shown["AggregatedStatus"], shown)


async def health_by_name(request: Request, agent: Agent) -> Response:
    local = agent.local
    name = request.require("name", "Missing service Name")
    named = [i for i in sorted(local.services) if local.services[i].row.name == name]
    shown = [_health_json(local, i) for i in named] if request.can.service_read(name) else []
    if not shown:
        reason = f"ServiceName {name} Not Found"
        if _wants_text(request):
            return text_response(reason, status=404, headers={"X-Consul-Reason": reason})
        return json_response([], status=404, headers={"X-Consul-Reason": reason})
    order = (PASSING, WARNING, CRITICAL, MAINTENANCE)
    return _health_response(request, max((s["AggregatedStatus"] for s in shown), key=order.index), shown)


def _health_json(local: LocalAgent, service_id: str) -> Json:
    rows = [c.row for c in local.checks.values() if c.row.service_id in ("", service_id)]
    return {
        "AggregatedStatus": aggregate(rows),
        "Service": service_json(local.services[service_id].row),
        "Checks": [check_json(row) for row in rows],
    }


def _health_response(request: Request, status: str, shown: Any) -> Response:
    code, headers = _HEALTH_STATUS[status], {"X-Consul-Reason": status}
    if _wants_text(request):
        return Response(code, status.encode(), {"Content-Type": "text/plain", **headers})
    return json_response(shown, status=code, headers=headers)


def _wants_text(request: Request) -> bool:
    return request.query.get("format") == "text"


def service_json(row: ServiceRow) -> Json:
    """A service as the agent shows its own: no indexes, and the proxy part of proxies only."""
    out: Json = {"Kind": row.kind} if row.kind else {}
    out |= {
        "ID": row.id,
        "Service": row.name,
        "Tags": row.tags,
        "Meta": row.meta,
        "Port": row.port,
        "Address": row.address,
    }
    if row.tagged_addresses:
        out["TaggedAddresses"] = tagged_json(row.tagged_addresses)
    out |= {
        "Weights": {"Passing": row.weight_passing, "Warning": row.weight_warning},
        "EnableTagOverride": row.enable_tag_override,
    }
    if row.kind:
        out["Proxy"] = proxy_json(row.proxy)
        for upstream in out["Proxy"].get("Upstreams") or ():
            for name in ("Datacenter", "Config"):
                if not upstream.get(name):
                    upstream.pop(name, None)
    if row.native:
        out["Connect"] = {"Native": True}
    return out


def _hashed_service(row: ServiceRow) -> tuple[Json, str]:
    shown = service_json(row)
    digest = hashlib.blake2b(dump_json(shown), digest_size=8).hexdigest()
    return {**shown, "ContentHash": digest}, digest


# -- the agent and its cluster ------------------------------------------------------------------------------------


async def self_(request: Request, agent: Agent) -> Response:
    config = agent.config
    is_server = _is_server(agent)
    row, leader, core = await asyncio.gather(
        _own_member(agent, is_server), _ask(agent, "status.leader", ""), _core_metrics(agent, is_server)
    )
    ttl_min_ns = int(config.session_ttl_min_s * SECOND)
    return json_response(
        {
            "Config": {
                "Datacenter": agent.datacenter,
                "NodeName": agent.node_name,
                "NodeID": agent.node_id,
                "Revision": "",
                "Server": is_server,
                "Version": CONSUL_API_VERSION,
                "SessionTTLMin": ttl_min_ns,
            },
            "DebugConfig": _debug_config(agent, is_server, ttl_min_ns),
            "Coord": {"Vec": [0, 0, 0, 0, 0, 0, 0, 0], "Error": 1.5, "Adjustment": 0, "Height": 1e-05},
            "Member": member_json(row, agent.datacenter),
            "Stats": _stats(agent, is_server, leader, core.get("raft") or {}),
            "Meta": dict(config.node_meta),
        }
    )


async def members(request: Request, agent: Agent) -> Response:
    live = agent.results.live(Members())
    if not await live.ready(5.0):
        raise NoLeader
    rows = [read_row(MemberRow, live.rows[key]) for key in live.keys if request.can.node_read(str(key))]
    if request.query.get("wan"):
        found = [_wan_member_json(row, agent.datacenter) for row in rows if row.role == "server"]
    else:
        found = [member_json(row, agent.datacenter) for row in rows]
    return json_response(found, headers=await _how_old(agent))


async def _how_old(agent: Agent) -> dict[str, str]:
    """As the headers of a stale read: who is alive is the leader's judgement, and there may be none."""
    try:
        async with asyncio.timeout(HOW_OLD_S):
            barrier = await agent.servers.barrier("stale")
    except (NoLeader, TimeoutError):
        return {"X-Consul-KnownLeader": "false"}
    known = "true" if barrier.known_leader else "false"
    return {"X-Consul-KnownLeader": known, "X-Consul-LastContact": str(barrier.last_contact_ms)}


async def version(request: Request, agent: Agent) -> Response:
    return json_response(
        {"SHA": "", "BuildDate": "0001-01-01T00:00:00Z", "HumanVersion": CONSUL_API_VERSION, "Rostra": __version__}
    )


async def metrics(request: Request, agent: Agent) -> Response:
    """The agent's numbers and, where a core runs beside it, the core's as gauges named `server.…`."""
    core = Metrics()
    add_gauges(core, "server", await _core_metrics(agent, _is_server(agent)))
    if request.query.get("format") == "prometheus":
        text = agent.metrics.to_prometheus() + core.to_prometheus().lstrip("\n")
        return Response(200, text.encode(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
    shown = agent.metrics.to_json()
    shown["Gauges"] += core.to_json()["Gauges"]
    return json_response(shown)


def add_gauges(metrics: Metrics, name: str, value: Any) -> None:
    """Numbers of a nested map as gauges with dotted names; `buckets` become cumulative counts labelled `le`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "buckets":
                seen = 0
                named = inner if isinstance(inner, dict) else dict(zip((*STEP_BUCKETS_MS, "inf"), inner))
                for bound, count in named.items():
                    seen += count
                    metrics.gauge(f"{name}.bucket", seen, {"le": "+Inf" if bound == "inf" else str(bound)})
            else:
                add_gauges(metrics, f"{name}.{key}", inner)
    elif isinstance(value, bool | int | float):
        metrics.gauge(name, float(value))


def _is_server(agent: Agent) -> bool:
    return agent.config.server or agent.config.dev


async def host(request: Request, agent: Agent) -> Response:
    return json_response(await asyncio.to_thread(describe, agent.config.data_dir or "/"))


def _wan_member_json(row: MemberRow, datacenter: str) -> Json:
    """A server as those of other datacenters would know it."""
    member = member_json(row, datacenter)
    tags = {name: value for name, value in member["Tags"].items() if name != "wan_join_port"}
    return member | {"Name": f"{row.name}.{datacenter}", "Port": WAN_PORT, "Tags": tags}


def member_json(row: MemberRow, datacenter: str) -> Json:
    is_server = row.role == "server"
    tags = {
        "acls": "0",
        "build": f"{CONSUL_API_VERSION}:",
        "dc": datacenter,
        "id": row.node_id,
        "role": "consul" if is_server else "node",
        "segment": "",
        "vsn": "2",
        "vsn_max": "3",
        "vsn_min": "2",
    }
    if is_server:
        tags |= {"ft_fs": "1", "port": str(row.rpc_port), "raft_vsn": "3", "wan_join_port": str(WAN_PORT)}
    return {
        "Name": row.name,
        "Addr": row.address,
        "Port": row.serf_port,
        "Tags": dict(sorted(tags.items())),
        "Status": _MEMBER_STATUS.get(row.status, 0),
        "ProtocolMin": 1,
        "ProtocolMax": 5,
        "ProtocolCur": 2,
        "DelegateMin": 2,
        "DelegateMax": 5,
        "DelegateCur": 4,
    }


async def _own_member(agent: Agent, is_server: bool) -> MemberRow:
    """From the members if they are known already; what the agent knows of itself otherwise."""
    live = agent.results.live(Members())
    try:
        if await live.ready(_ASK_SERVERS_S) and agent.node_name in live.rows:
            return read_row(MemberRow, live.rows[agent.node_name])
    except RostraError:
        pass
    role = "server" if is_server else "client"
    return MemberRow(agent.node_name, agent.node_id, role, _own_address(agent), "")


async def _ask(agent: Agent, what: str, default: Any) -> Any:
    """What the servers say, or `default`: a page about this agent must not fail for want of a server."""
    try:
        return await agent.servers.act(what, {}, timeout_s=_ASK_SERVERS_S) or default
    except (RostraError, TimeoutError):
        return default


async def _core_metrics(agent: Agent, is_server: bool) -> Json:
    """The numbers of the core on this host; another host's would be shown in the wrong place."""
    if not is_server:
        return {}
    now = time.monotonic()
    core = agent.core_numbers
    if now - core.asked_at >= CORE_METRICS_EVERY_S:
        core.numbers = await _ask(agent, "server.metrics", {})
        core.asked_at = now
    return core.numbers


def _stats(agent: Agent, is_server: bool, leader: str, raft: Json) -> Json:
    local = agent.local
    types = [c.row.type for c in local.checks.values()] if local is not None else []
    own = _own_address(agent)
    stats: Json = {
        "agent": {
            "check_monitors": str(types.count("script")),
            "check_ttls": str(types.count("ttl")),
            "checks": str(len(types)),
            "services": str(len(local.services)) if local is not None else "0",
        },
        "build": {"prerelease": "", "revision": "", "version": CONSUL_API_VERSION, "rostra": __version__},
        "consul": {
            "server": str(is_server).lower(),
            "known_datacenters": "1",
            "leader_addr": leader,
            "leader": str(is_server and bool(own) and leader.rpartition(":")[0] == own).lower(),
        },
        "runtime": {
            "arch": platform.machine(),
            "cpu_count": str(os.cpu_count() or 1),
            "os": platform.system().lower(),
            "version": f"python{platform.python_version()}",
        },
    }
    core = agent.core
    if core is not None:
        is_up = agent.servers.connected if core.attached else core.is_up
        stats["core"] = {"state": "up" if is_up else "away", "pid": str(core.pid)}
    if raft:
        stats["raft"] = {k: str(v).lower() for k, v in raft.items() if isinstance(v, str | int | float)}
    return stats


def _own_address(agent: Agent) -> str:
    return agent.config.advertise_addr or agent.config.bind_addr


def _debug_config(agent: Agent, is_server: bool, ttl_min_ns: int) -> Json:
    config = agent.config
    return {
        "BindAddr": config.bind_addr,
        "AdvertiseAddrLAN": config.advertise_addr,
        "ClientAddrs": list(config.client_addrs),
        "Datacenter": agent.datacenter,
        "DataDir": config.data_dir,
        "DevMode": config.dev,
        "DNSDomain": f"{config.domain}.",
        "DNSPort": config.dns_port,
        "HTTPPort": config.http_port,
        "NodeID": agent.node_id,
        "NodeName": agent.node_name,
        "ServerMode": is_server,
        "ServerPort": config.server_port,
        "SerfPortLAN": config.join_port,
        "SessionTTLMin": format_duration(ttl_min_ns),
        "EnableRemoteScriptChecks": config.enable_script_checks,
        "EnableLocalScriptChecks": config.enable_local_script_checks,
        "Version": CONSUL_API_VERSION,
        "VersionPrerelease": "",
        "RostraVersion": __version__,
    }


# -- membership by hand -------------------------------------------------------------------------------------------


async def join(request: Request, agent: Agent) -> Response:
    request.require("address", "Missing address")
    raise _not_yet("join")


async def force_leave(request: Request, agent: Agent) -> Response:
    node = request.require("node", "Missing node name")
    try:
        await agent.force_leave(node, request.query.has("prune"))
    except NotFound:
        raise HttpError(500, f"agent: No node found with name '{node}'") from None
    return Response()


async def leave(request: Request, agent: Agent) -> Response:
    raise _not_yet("leave")


async def reload(request: Request, agent: Agent) -> Response:
    raise _not_yet("reload")


def _not_yet(what: str) -> HttpError:
    return HttpError(500, f"{what} is not yet available on this agent")


# -- parameters ---------------------------------------------------------------------------------------------------


def _no_filter(request: Request) -> None:
    if request.query.get("filter"):
        raise BadRequest("?filter is not supported yet by this agent: filter the answer")


#: path → method, handler, the parameters that it reads besides those of every route, and what it asks of the caller.
_TABLE: Mapping[str, tuple[str, Callable[[Request, Agent], Awaitable[Response]], str, permissions.May]] = {
    "self": ("GET", self_, "", permissions.agent_read),
    "members": ("GET", members, "wan segment", permissions.row_by_row),
    "version": ("GET", version, "", permissions.anybody),
    "metrics": ("GET", metrics, "format", permissions.agent_read),
    "host": ("GET", host, "", permissions.operator_read),
    "services": ("GET", services, "ns", permissions.row_by_row),
    "service/{id}": ("GET", service, "hash ns", permissions.row_by_row),
    "checks": ("GET", checks, "ns", permissions.row_by_row),
    "health/service/id/{id}": ("GET", health_by_id, "format ns", permissions.row_by_row),
    "health/service/name/{name}": ("GET", health_by_name, "format ns", permissions.row_by_row),
    "service/register": ("PUT", register_service, "replace-existing-checks ns", permissions.registers_service),
    "service/deregister/{id}": ("PUT", deregister_service, "ns", permissions.writes_service),
    "service/maintenance/{id}": ("PUT", service_maintenance, "enable reason ns", permissions.writes_service),
    "maintenance": ("PUT", node_maintenance, "enable reason", permissions.node_write),
    "check/register": ("PUT", register_check, "ns", permissions.registers_check),
    "check/deregister/{id}": ("PUT", deregister_check, "ns", permissions.writes_check),
    "check/pass/{id}": ("PUT", pass_check, "note ns", permissions.writes_check),
    "check/warn/{id}": ("PUT", warn_check, "note ns", permissions.writes_check),
    "check/fail/{id}": ("PUT", fail_check, "note ns", permissions.writes_check),
    "check/update/{id}": ("PUT", update_check, "ns", permissions.writes_check),
    "join/{address}": ("PUT", join, "", permissions.agent_write),
    "force-leave/{node}": ("PUT", force_leave, "prune", permissions.operator_write),
    "leave": ("PUT", leave, "", permissions.agent_write),
    "reload": ("PUT", reload, "", permissions.agent_write),
}

ROUTES = tuple(
    Route(
        method,
        f"/v1/agent/{path}",
        handler,
        may,
        query=(read_parameters if method == "GET" else parameters)(names),
        datacenter=False,
    )
    for path, (method, handler, names, may) in _TABLE.items()
)
