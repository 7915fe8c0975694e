"""`/v1/status/`: who leads and who votes. Asked of the servers each time, never cached: it is the probe of monitors."""

from __future__ import annotations

from rostra.agent.context import Agent
from rostra.agent.http.declared import read_parameters
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import read_options
from rostra.agent.http.routing import Request, Response, Route, json_response


async def leader(request: Request, agent: Agent) -> Response:
    read_options(request, agent)
    return json_response(await agent.servers.act("status.leader", {}, caller=request.caller) or "")


async def peers(request: Request, agent: Agent) -> Response:
    read_options(request, agent)
    return json_response(list(await agent.servers.act("status.peers", {}, caller=request.caller) or ()))


ROUTES = (
    Route("GET", "/v1/status/leader", leader, at_servers, query=read_parameters()),
    Route("GET", "/v1/status/peers", peers, at_servers, query=read_parameters()),
)
