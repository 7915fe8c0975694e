"""`/v1/health/`: instances with their checks, and checks by node, service, state. All filters work on shared rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from rostra.agent.context import Agent
from rostra.agent.http.declared import read_parameters
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import ReadOptions, answer, read_options
from rostra.agent.http.routing import Request, Response, Route, dump_json
from rostra.agent.http.shapes import as_array, check_json, instance_json
from rostra.agent.results import Rendering
from rostra.agent.servers_port import Key, Row
from rostra.server.state.catalog import Nodes
from rostra.server.state.health import Checks, ConnectInstances, NodeChecks, ServiceInstances
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow

_NODE = CheckRow._fields.index("node")
_STATUS, _SERVICE_ID = CheckRow._fields.index("status"), CheckRow._fields.index("service_id")
_SERVICE_TAGS, _NODE_META = ServiceRow._fields.index("tags"), NodeRow._fields.index("meta")

_CHECKS = Rendering("check", "check", lambda key, row: dump_json(check_json(row)), as_array)


async def service(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    return await answer(request, agent, ServiceInstances(name), _instances(request), cacheable=True)


async def connect(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    return await answer(request, agent, ConnectInstances(name), _instances(request), cacheable=True)


async def node(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, NodeChecks(request.require("node", "Missing node name")), _CHECKS)


async def checks(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    metas = request.query.all("node-meta")
    view = Rendering("service-checks", ("service-checks", *metas), _service_checks, as_array, node_filter(metas))
    return await answer(request, agent, ServiceInstances(name), view)


async def state(request: Request, agent: Agent) -> Response:
    wanted = request.require("state", "Missing check state")
    metas = request.query.all("node-meta")
    if metas:
        return await _state_on_nodes(request, agent, wanted, metas)
    view = _CHECKS
    if wanted != "any":
        view = Rendering("check", ("check", wanted), _CHECKS.encode, as_array, lambda key, row: row[_STATUS] == wanted)
    return await answer(request, agent, Checks(), view)


async def _state_on_nodes(request: Request, agent: Agent, wanted: str, metas: list[str]) -> Response:
    """Checks in a state, on nodes that have every `name:value`: their rows do not say that, so both are watched."""
    options = read_options(request, agent)
    if options.index:
        asked = asyncio.ensure_future(_checks_of(request, agent, wanted, metas, options))
        other = asyncio.ensure_future(_nodes_changed(agent, options.index, request.token))
        try:
            await asyncio.wait((asked, other), return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return await asked
        finally:
            asked.cancel()
            other.cancel()
    return await _checks_of(request, agent, wanted, metas, replace(options, index=0))


async def _checks_of(request: Request, agent: Agent, wanted: str, metas: list[str], options: ReadOptions) -> Response:
    nodes = await agent.results.fetch(Nodes(), mode=options.mode, token=request.token)
    matches = meta_filter(metas)
    names = frozenset(name for name, row in nodes.rows.items() if matches(row))

    def is_meant(key: Key, row: Row) -> bool:
        return row[_NODE] in names and wanted in ("any", row[_STATUS])

    view = Rendering("check", ("check", wanted, names), _CHECKS.encode, as_array, is_meant)
    response = await answer(request, agent, Checks(), view, options=options)
    response.headers["X-Consul-Index"] = str(max(int(response.headers["X-Consul-Index"]), nodes.index))
    response.hot = None  # which depends on the checks alone
    return response


async def _nodes_changed(agent: Agent, index: int, token: str) -> None:
    live = agent.results.live(Nodes(), token=token)
    while not await live.ready(60.0) or live.index <= index:
        await live.wait_change(live.version, 60.0)


def _service_checks(key: Key, row: Row) -> bytes:
    return b",".join(dump_json(check_json(c)) for c in row[2] if c[_SERVICE_ID])


def _instances(request: Request) -> Rendering:
    passing = request.query.flag("passing")
    tags, metas = request.query.all("tag"), request.query.all("node-meta")
    tests: list[Callable[[Key, Row], bool]] = []
    if passing:
        tests.append(_is_passing)
    for test in (tag_filter(tags), node_filter(metas)):
        if test is not None:
            tests.append(test)
    return Rendering(
        "instance", ("instance", passing, tuple(tags), tuple(metas)), _encode_instance, as_array, all_of(tests)
    )


def _encode_instance(key: Key, row: Row) -> bytes:
    return dump_json(instance_json(row))


def _is_passing(key: Key, row: Row) -> bool:
    return all(check[_STATUS] == "passing" for check in row[2])


# -- filters on (node, service, checks) rows, for catalog/ too ---------------------------------------------------------


def tag_filter(tags: list[str]) -> Callable[[Key, Row], bool] | None:
    """Instances that have every tag, whatever its case."""
    if not tags:
        return None
    wanted = {t.lower() for t in tags}
    return lambda key, row: wanted <= {t.lower() for t in row[1][_SERVICE_TAGS]}


def node_filter(metas: list[str]) -> Callable[[Key, Row], bool] | None:
    """Instances on nodes that have every `name:value` in their Meta."""
    if not metas:
        return None
    matches = meta_filter(metas)
    return lambda key, row: matches(row[0])


def meta_filter(metas: list[str]) -> Callable[[Row], bool]:
    """As `node_filter`, on node rows."""
    wanted = [(name, value) for name, _, value in (m.partition(":") for m in metas)]
    return lambda node_row: all(node_row[_NODE_META].get(name) == value for name, value in wanted)


def all_of(tests: list[Callable[[Key, Row], bool]]) -> Callable[[Key, Row], bool] | None:
    if len(tests) <= 1:
        return tests[0] if tests else None
    return lambda key, row: all(test(key, row) for test in tests)


ROUTES = (
    Route(
        "GET",
        "/v1/health/service/{service}",
        service,
        query=read_parameters("passing tag node-meta ns"),
        may=at_servers,
    ),
    Route(
        "GET",
        "/v1/health/connect/{service}",
        connect,
        query=read_parameters("passing tag node-meta ns"),
        may=at_servers,
    ),
    Route("GET", "/v1/health/node/{node}", node, at_servers, query=read_parameters("ns")),
    Route("GET", "/v1/health/checks/{service}", checks, at_servers, query=read_parameters("node-meta ns")),
    Route("GET", "/v1/health/state/{state}", state, at_servers, query=read_parameters("node-meta ns")),
)
