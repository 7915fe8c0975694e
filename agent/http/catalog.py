"""`/v1/catalog/`: nodes, services and who runs them, and registration from outside (without an agent)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from rostra.agent.checks import kinds
from rostra.agent.context import Agent
from rostra.agent.definition_fields import DecodeError, read, stored
from rostra.agent.http.declared import Body, parameters, read_parameters
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.fields import Fields
from rostra.agent.http.health import all_of, meta_filter, node_filter, tag_filter
from rostra.agent.http.permissions import anybody, at_servers
from rostra.agent.http.reads import answer, read_options
from rostra.agent.http.routing import JSON_TYPE, Request, Response, Route, dump_json, json_response
from rostra.agent.http.shapes import as_array, as_object, catalog_service_json, node_json, service_json
from rostra.agent.results import Rendering
from rostra.agent.schema import ADDRESS, CHECK, PROXY, SERVICE, Table, Type
from rostra.agent.servers_port import Key, Row
from rostra.server.state.catalog import NAME_RESERVED, Deregister, Nodes, NodeServices, Register, ServiceNames
from rostra.server.state.health import ConnectInstances, ServiceInstances
from rostra.server.state.rows import ServiceRow, read_row
from rostra.wire.durations import format_duration
from rostra.wire.errors import BadRequest, Conflict

#: How many nodes `services?node-meta=` looks into at once.
_NODES_MAX = 5000


def _encode_node(key: Key, row: Row) -> bytes:
    return dump_json(node_json(row))


def _encode_name(key: Key, row: Row) -> bytes:
    return dump_json(key) + b":" + dump_json(row[0])


def _encode_on_node(key: Key, row: Row) -> bytes:
    return dump_json(node_json(row)) if key == ("",) else dump_json(key[1]) + b":" + dump_json(service_json(row))


def _join_node(parts: list[bytes]) -> bytes:
    if not parts:
        return b"null"
    return b'{"Node":' + parts[0] + b',"Services":' + as_object(parts[1:]) + b"}"


def _encode_listed(key: Key, row: Row) -> bytes:
    return dump_json(node_json(row) if key == ("",) else service_json(row))


def _join_node_list(parts: list[bytes]) -> bytes:
    if not parts:
        return b'{"Node":null,"Services":null}'
    return b'{"Node":' + parts[0] + b',"Services":' + (as_array(parts[1:]) if parts[1:] else b"null") + b"}"


_NODES = Rendering("node", "node", _encode_node, as_array)
_NAMES = Rendering("service-name", "service-name", _encode_name, as_object)
_NODE = Rendering("on-node", "on-node", _encode_on_node, _join_node)
_NODE_LIST = Rendering("on-node-list", "on-node-list", _encode_listed, _join_node_list)


async def nodes(request: Request, agent: Agent) -> Response:
    metas = request.query.all("node-meta")
    view = _NODES
    if metas:
        matches = meta_filter(metas)
        view = Rendering("node", ("node", *metas), _encode_node, as_array, lambda key, row: matches(row))
    return await answer(request, agent, Nodes(), view)


async def services(request: Request, agent: Agent) -> Response:
    metas = request.query.all("node-meta")
    response = await answer(request, agent, ServiceNames(), _NAMES, cacheable=True)
    if metas:
        options = read_options(request, agent)
        matches = meta_filter(metas)
        all_nodes = await agent.results.fetch(Nodes(), mode=options.mode, token=request.token)
        found: dict[str, set[str]] = {}
        for name in [n for n, row in all_nodes.rows.items() if matches(row)][:_NODES_MAX]:
            on_node = await agent.results.fetch(NodeServices(str(name)), mode=options.mode, token=request.token)
            for key, row in on_node.rows.items():
                if key != ("",):
                    instance = read_row(ServiceRow, row)
                    found.setdefault(instance.name, set()).update(instance.tags)
        response.body = orjson.dumps({name: sorted(tags) for name, tags in sorted(found.items())})
        response.hot = None
    return response


async def service(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    return await answer(request, agent, ServiceInstances(name), _instances(request), cacheable=True)


async def connect(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    return await answer(request, agent, ConnectInstances(name), _instances(request), cacheable=True)


async def node(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, NodeServices(request.require("node", "Missing node name")), _NODE)


async def node_services(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, NodeServices(request.require("node", "Missing node name")), _NODE_LIST)


async def datacenters(request: Request, agent: Agent) -> Response:
    return json_response([agent.datacenter])


def _instances(request: Request) -> Rendering:
    tags, metas = request.query.all("tag"), request.query.all("node-meta")
    tests = [t for t in (tag_filter(tags), node_filter(metas)) if t is not None]
    return Rendering("catalog", ("catalog", tuple(tags), tuple(metas)), _encode_instance, as_array, all_of(tests))


def _encode_instance(key: Key, row: Row) -> bytes:
    return dump_json(catalog_service_json(row[0], row[1]))


# -- writing -----------------------------------------------------------------------------------------------------------


#: What Consul's catalog knows of a definition: it stands there as an agent would have registered it.
_PROXY = PROXY.without("mode")
_DEFINITION = CHECK.only(
    "http method body tcp grpc alias_node alias_service docker_container_id shell tls_skip_verify grpc_use_tls "
    "output_max_size script_args header ttl interval timeout deregister_critical_service_after"
)
_SERVICE = Body.of(
    SERVICE.only("kind id service tags address meta port enable_tag_override tagged_addresses weights"),
    "CreateIndex ModifyIndex",
    Proxy=Body.of(_PROXY, takes_snake=True),
    Connect=Body("Native", is_strict=False),
)
_CHECK = Body(
    "Node CheckID Name Status Notes Output ServiceID ServiceName ServiceTags Type CreateIndex ModifyIndex",
    Definition=Body.of(_DEFINITION, is_strict=False),
)
_REGISTRATION = Body(
    "Datacenter ID Node Address TaggedAddresses NodeMeta SkipNodeUpdate Token CreateIndex ModifyIndex",
    Service=_SERVICE,
    Check=_CHECK,
    Checks=_CHECK,
)
_DEREGISTRATION = Body("Datacenter Node Address ServiceID CheckID Token")


async def register(request: Request, agent: Agent) -> Response:
    body = _REGISTRATION.read(request)
    _check_dc(body, agent)
    node_name = body.text("Node")
    if not node_name:
        raise HttpError(500, "Must provide node")
    skip = body.flag("SkipNodeUpdate")
    if not body.text("Address") and not skip:
        raise HttpError(500, "Must provide address if SkipNodeUpdate is not set")
    service_fields, check_fields = body.object("Service"), body.object("Check")
    if service_fields and service_fields.text("Address") in ("0.0.0.0", "::", "[::]"):
        raise HttpError(500, "Invalid service address")
    given = [check_fields] if check_fields else []
    given += body.objects("Checks")
    for check in given:
        if check.text("Node") not in ("", node_name):
            raise HttpError(500, f'check node "{check.text("Node")}" does not match node "{node_name}"')
    command = Register(
        node=node_name,
        address=body.text("Address"),
        node_id=body.text("ID"),
        datacenter=agent.datacenter,
        tagged_addresses=body.text_map("TaggedAddresses"),
        node_meta=body.text_map("NodeMeta"),
        skip_node_update=skip,
        service=service_map(service_fields) if service_fields else None,
        checks=tuple(check_map(check) for check in given),
    )
    try:
        await write(agent.servers, command, request.caller)
    except Conflict as e:
        if not e.message.startswith(NAME_RESERVED):
            raise
        renaming = f'Error while renaming Node ID: "{command.node_id}" ({command.address})'
        raise HttpError(500, f"failed inserting node: {renaming}: {e.message}") from None
    return Response(200, b"true", {"Content-Type": JSON_TYPE})


async def deregister(request: Request, agent: Agent) -> Response:
    body = _DEREGISTRATION.read(request)
    _check_dc(body, agent)
    node_name = body.text("Node")
    if not node_name:
        raise HttpError(500, "Must provide node")
    command = Deregister(node_name, body.text("ServiceID") or None, body.text("CheckID") or None)
    await write(agent.servers, command, request.caller)
    return Response(200, b"true", {"Content-Type": JSON_TYPE})


def _check_dc(body: Fields, agent: Agent) -> None:
    if body.text("Datacenter") not in ("", agent.datacenter):
        raise HttpError(500, "No path to datacenter")


def service_map(given: Fields) -> dict[str, Any]:
    """The fields of ServiceRow, by name, that a catalog registration's Service describes."""
    weights, connected, proxy = given.object("Weights"), given.object("Connect"), given.raw("Proxy")
    tagged = given.plain_map("TaggedAddresses")
    passing, warning = (weights.integer("Passing"), weights.integer("Warning")) if weights else (0, 0)
    return {
        "id": given.text("ID") or given.text("Service"),
        "name": given.text("Service"),
        "address": given.text("Address"),
        "port": given.integer("Port"),
        "tags": given.texts("Tags"),
        "meta": given.text_map("Meta"),
        "tagged_addresses": {
            name: _decoded(ADDRESS, {} if one is None else one, f"TaggedAddresses.{name}.")
            for name, one in tagged.items()
        },
        "weight_passing": max(1, passing),
        "weight_warning": warning if passing >= 1 else 1,
        "enable_tag_override": given.flag("EnableTagOverride"),
        "kind": given.text("Kind"),
        "proxy": None if proxy is None else stored(_decoded(_PROXY, proxy, "Service.Proxy."), _PROXY),
        "native": connected.flag("Native") if connected else False,
    }


def _decoded(table: Table, value: Any, path: str) -> dict[str, Any]:
    try:
        return read(table, value, path, json=True)
    except DecodeError as error:
        raise BadRequest(f"Request decode failed: {error.message}") from None


def check_map(given: Fields) -> dict[str, Any]:
    """The fields of CheckRow, by name, that a catalog registration's Check describes."""
    described = given.object("Definition")
    definition = _definition(described) if described is not None else {}
    asked = {_DEFINED[name.lower()].name: value for name, value in definition.items()}
    return {
        "id": given.text("CheckID") or given.text("Name"),
        "name": given.text("Name"),
        "status": given.text("Status") or "critical",
        "notes": given.text("Notes"),
        "output": given.text("Output"),
        "service_id": given.text("ServiceID"),
        "type": given.text("Type") or kinds.shown_as({**asked, "args": asked.get("script_args")}),
        "definition": definition,
    }


def _definition(given: Fields) -> dict[str, Any]:
    """What is set of it, in the names and forms in which it is shown."""
    shown: dict[str, Any] = {}
    for name in given.names():
        field = _DEFINED.get(name)
        if field is not None and given.has(name):
            value = _READERS[field.form](given, field.api)
            if value:
                shown[field.api] = format_duration(value) if field.api in _SHOWN_AS_TEXT else value
    return shown


_DEFINED = {field.api.lower(): field for field in _DEFINITION.in_bodies.values()}
_READERS: dict[Any, Callable[[Fields, str], Any]] = {
    Type.TEXT: Fields.text,
    Type.WHOLE: Fields.integer,
    Type.SWITCH: Fields.flag,
    Type.DURATION: Fields.duration_ns,
    Type.TEXTS: lambda given, name: list(given.texts(name)),
    Type.HEADER: Fields.plain_map,
}
_SHOWN_AS_TEXT = frozenset(("Interval", "Timeout", "DeregisterCriticalServiceAfter"))


ROUTES = (
    Route("GET", "/v1/catalog/nodes", nodes, at_servers, query=read_parameters("node-meta")),
    Route("GET", "/v1/catalog/services", services, at_servers, query=read_parameters("node-meta ns")),
    Route("GET", "/v1/catalog/service/{service}", service, at_servers, query=read_parameters("tag node-meta ns")),
    Route("GET", "/v1/catalog/connect/{service}", connect, at_servers, query=read_parameters("tag node-meta ns")),
    Route("GET", "/v1/catalog/node/{node}", node, at_servers, query=read_parameters("ns")),
    Route("GET", "/v1/catalog/node-services/{node}", node_services, at_servers, query=read_parameters("ns")),
    Route("GET", "/v1/catalog/datacenters", datacenters, anybody, query=read_parameters(), datacenter=False),
    Route("PUT", "/v1/catalog/register", register, at_servers, query=parameters("ns")),
    Route("PUT", "/v1/catalog/deregister", deregister, at_servers, query=parameters("ns")),
)
