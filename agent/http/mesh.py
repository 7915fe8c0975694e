"""`/v1/agent/connect/`: what a service of the mesh, or its proxy, asks the agent of its own host.

A leaf and a proxy's snapshot come with a private key: their routes ask for the right to be that service.
"""

from __future__ import annotations

from rostra.acl.identity import BadIdentity, ServiceIdentity, parse
from rostra.acl.intention import Intention, decide
from rostra.agent.context import Agent
from rostra.agent.http.declared import Body, parameters, read_parameters
from rostra.agent.http.permissions import at_servers, holds_key_of_proxy, holds_key_of_service
from rostra.agent.http.reads import how_long
from rostra.agent.http.routing import Request, Response, Route, json_response
from rostra.agent.http.shapes import rfc3339
from rostra.server.state.ca import Roots
from rostra.server.state.intention import IntentionsFor
from rostra.server.state.rows import IntentionRow, read_row
from rostra.wire.errors import BadRequest


async def leaf(request: Request, agent: Agent) -> Response:
    name = request.require("service", "Missing service name")
    index = _index(request)
    held = await agent.leaves.wait(name, index, how_long(request, agent) if index else 10.0, token=request.token)
    shown = {
        "SerialNumber": held.serial,
        "CertPEM": held.cert_pem,
        "PrivateKeyPEM": held.key_pem,
        "Service": name,
        "ServiceURI": held.uri,
        "ValidAfter": rfc3339(held.valid_after_ms),
        "ValidBefore": rfc3339(held.valid_before_ms),
        "CreateIndex": held.index,
        "ModifyIndex": held.index,
    }
    return json_response(shown, headers={"X-Consul-Index": str(held.index)})


_AUTHORIZE = Body("Target ClientCertURI ClientCertSerial")


async def authorize(request: Request, agent: Agent) -> Response:
    """Whether the holder of a certificate may connect to `Target`: for services that do their own TLS."""
    try:
        fields = _AUTHORIZE.read(request)
        target, uri = fields.text("Target"), fields.text("ClientCertURI")
    except BadRequest as error:
        raise BadRequest(f"Bad request: {error.message}") from None
    if not target:
        raise BadRequest("Bad request: Target service must be specified")
    try:
        client = parse(uri)
    except BadIdentity:
        raise BadRequest("Bad request: ClientCertURI not a valid Connect identifier") from None
    if not isinstance(client, ServiceIdentity):
        raise BadRequest("Bad request: ClientCertURI not a valid Service identifier")
    trust = (await agent.results.fetch(Roots(), token=request.token)).rows.get("", ("", ""))
    if trust[0] and client.trust_domain != trust[0]:
        reason = f"Identity from an external trust domain: {client.trust_domain}"
        return json_response({"Authorized": False, "Reason": reason})
    rows = (await agent.results.fetch(IntentionsFor(target), token=request.token)).rows
    intentions: list[Intention] = [read_row(IntentionRow, row) for row in rows.values()]
    decision = decide(client.service, target, intentions, agent.config.intentions_default_allow)
    if isinstance(decision.winner, IntentionRow):
        i = decision.winner
        reason = (
            f"Matched intention: {i.action.upper()} default/{i.source} => default/{i.destination} "
            f"(ID: {i.id}, Precedence: {i.precedence})"
        )
    else:
        reason = f"No intention matches, access is {'allowed' if decision.allowed else 'denied'} by default"
    return json_response({"Authorized": decision.allowed, "Reason": reason})


async def proxy(request: Request, agent: Agent) -> Response:
    """A proxy's snapshot; with `?hash=` it waits for another one."""
    known = request.query.get("hash")
    proxy_id = request.require("id", "Missing proxy ID")
    body, digest = await agent.proxies.wait_encoded(proxy_id, known, how_long(request, agent) if known else 10.0)
    return Response(200, body, {"Content-Type": "application/json", "X-Consul-ContentHash": digest})


def _index(request: Request) -> int:
    index = request.query.get("index")
    if index and not (index.isascii() and index.isdigit() and len(index) <= 20):
        raise BadRequest("Invalid index")
    return int(index or 0)


ROUTES = (
    Route("GET", "/v1/agent/connect/ca/leaf/{service}", leaf, holds_key_of_service, query=read_parameters("ns")),
    Route("POST", "/v1/agent/connect/authorize", authorize, at_servers, query=parameters(), datacenter=False),
    Route(
        "GET",
        "/v1/agent/connect/proxy/{id}",
        proxy,
        holds_key_of_proxy,
        query=read_parameters("hash"),
        datacenter=False,
    ),
)
