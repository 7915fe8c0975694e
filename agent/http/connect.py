"""`/v1/connect/` and `/v1/agent/connect/ca/roots`: the mesh CA's public side, and intentions.

An intention's identity is (source, destination); ids are kept for older clients. Who wins is `acl.intention`.
"""

from __future__ import annotations

import uuid
from typing import Any

from rostra.acl.intention import ANY, decide
from rostra.agent.context import Agent
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.fields import Fields
from rostra.agent.http.reads import answer, read_options
from rostra.agent.http.routing import JsonObject, Request, Response, Route, dump_json, json_response
from rostra.agent.http.shapes import as_array, intention_json, root_json
from rostra.agent.results import View
from rostra.agent.servers_port import Key, Row
from rostra.server.state.ca import CaConfig, Roots
from rostra.server.state.intention import DeleteIntention, Intentions, IntentionsFor, SetIntention
from rostra.server.state.rows import IntentionRow, RootRow
from rostra.wire.errors import BadRequest, NoLeader, Timeout

_PRECEDENCE = IntentionRow._fields.index("precedence")
_CERT, _INTERMEDIATES = RootRow._fields.index("cert_pem"), RootRow._fields.index("intermediates_pem")

# -- certificates ------------------------------------------------------------------------------------------------------


def _encode_root(key: Key, row: Row) -> bytes:
    if key == "":
        trust_domain, active = row
        return b'"ActiveRootID":' + dump_json(active) + b',"TrustDomain":' + dump_json(trust_domain)
    return dump_json(root_json(row))


def _join_roots(parts: list[bytes]) -> bytes:
    if not parts:
        return b'{"ActiveRootID":"","TrustDomain":"","Roots":[]}'
    return b"{" + parts[0] + b',"Roots":' + as_array(parts[1:]) + b"}"


def _encode_pem(key: Key, row: Row) -> bytes:
    return b"" if key == "" else "".join((row[_CERT], *row[_INTERMEDIATES])).encode()


_ROOTS = View("root", "root", _encode_root, _join_roots)
_ROOTS_PEM = View("root-pem", "root-pem", _encode_pem, b"".join)


async def roots(request: Request, agent: Agent) -> Response:
    if request.query.flag("pem"):
        return await answer(request, agent, Roots(), _ROOTS_PEM, content_type="application/pem-certificate-chain")
    return await answer(request, agent, Roots(), _ROOTS)


async def agent_roots(request: Request, agent: Agent) -> Response:
    """The roots as this host knows them: proxies poll it, so it never leaves the host once it is warm."""
    return await answer(request, agent, Roots(), _ROOTS, always_cached=True)


_CONFIG_DEFAULTS: dict[str, Any] = {"LeafCertTTL": "72h", "IntermediateCertTTL": "8760h", "RotationPeriod": "2160h"}


def _encode_config(key: Key, row: Row) -> bytes:
    config, index = row
    return dump_json(_ca_configuration(config, index))


def _ca_configuration(config: dict[str, Any], index: int) -> dict[str, Any]:
    given = dict(config)
    provider = given.pop("Provider", None) or given.pop("provider", None) or "consul"
    given = given.pop("Config", None) or given
    return {
        "Provider": provider,
        "Config": {**_CONFIG_DEFAULTS, **given},
        "State": None,
        "ForceWithoutCrossSigning": False,
        "CreateIndex": index,
        "ModifyIndex": index,
    }


_CONFIG = View("ca-config", "ca-config", _encode_config, lambda p: p[0] if p else dump_json(_ca_configuration({}, 1)))


async def ca_configuration(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, CaConfig(), _CONFIG)


# -- intentions --------------------------------------------------------------------------------------------------------


def _encode_intention(key: Key, row: Row) -> bytes:
    return dump_json(intention_json(row))


_LIST = View("intention", "intention", _encode_intention, as_array)


async def list_intentions(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, Intentions(), _LIST)


async def create(request: Request, agent: Agent) -> Response:
    given = _parse(request)
    pair = (given.source, given.destination)
    existing = await _find(request, agent, lambda row: (row.source, row.destination) == pair)
    if existing is not None:
        raise HttpError(
            500,
            f"duplicate intention found: {existing.action.upper()} default/{existing.source} => "
            f"default/{existing.destination} (ID: {existing.id}, Precedence: {existing.precedence})",
        )
    command = SetIntention(
        given.source, given.destination, given.action, given.description, given.meta, id=str(uuid.uuid4())
    )
    return json_response({"ID": await _set(request, agent, command)})


async def read_by_id(request: Request, agent: Agent) -> Response:
    wanted = request.params["intention"]
    if len(wanted) != 36:
        raise BadRequest("Bad request: failed intention lookup: index error: UUID must be 36 characters")
    read_options(request, agent)
    row = await _find(request, agent, lambda row: row.id == wanted)
    if row is None:
        raise HttpError(404, "Intention not found")
    return json_response(intention_json(row))


async def update_by_id(request: Request, agent: Agent) -> Response:
    wanted = _intention_id(request)
    entry = await agent.results.fetch(Intentions(), token=request.token)
    olds = [row for row in (IntentionRow(*row) for row in entry.rows.values()) if row.id == wanted]
    if not olds:
        raise HttpError(500, f"Cannot modify non-existent intention: '{wanted}'")
    given = _parse(request, olds[0].source, olds[0].destination)
    command = SetIntention(given.source, given.destination, given.action, given.description, given.meta, id=wanted)
    await _set(request, agent, command)
    # The pair is the identity, so another pair is another intention, which takes the id over. It is written first: what
    # is refused, or lost in between, must not leave the connection without any rule. Repeating the request mends that.
    for old in olds:
        if (old.source, old.destination) != (given.source, given.destination):
            try:
                await write(agent.servers, DeleteIntention(old.source, old.destination), request.token)
            except NoLeader:
                raise Timeout("the new intention was written, the one it replaces is still there: try again") from None
    return json_response({"ID": wanted})


async def delete_by_id(request: Request, agent: Agent) -> Response:
    wanted = _intention_id(request)
    old = await _find(request, agent, lambda row: row.id == wanted)
    if old is None:
        raise HttpError(500, f"Cannot delete non-existent intention: '{wanted}'")
    return json_response(bool(await write(agent.servers, DeleteIntention(old.source, old.destination), request.token)))


async def read_exact(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    view = View(
        "intention",
        ("exact", source),
        _encode_intention,
        lambda parts: parts[0] if parts else b"",
        lambda key, row: key == (source, destination),
    )
    response = await answer(request, agent, IntentionsFor(destination), view, missing_is_404=True)
    if response.status == 404:
        response.body, response.hot = b"Intention not found", None
    return response


async def put_exact(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    given = _parse(request, source, destination)
    if (given.source, given.destination) != (source, destination):
        raise BadRequest("SourceName and DestinationName must be those of ?source= and ?destination=")
    await _set(request, agent, given)
    return json_response(True)


async def delete_exact(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    return json_response(bool(await write(agent.servers, DeleteIntention(source, destination), request.token)))


async def match(request: Request, agent: Agent) -> Response:
    """Per name, the intentions that can decide about it, the strongest first."""
    query = request.query
    by = query.get("by")
    if not query.has("by"):
        raise HttpError(500, "required query parameter 'by' not set")
    if by not in ("source", "destination"):
        raise HttpError(500, "'by' parameter must be one of 'source' or 'destination'")
    names = query.all("name")
    if not names:
        raise HttpError(500, "required query parameter 'name' not set")
    if len(names) == 1 and by == "destination":
        return await answer(request, agent, IntentionsFor(names[0]), _matched(names, by), cacheable=True)
    return await answer(request, agent, Intentions(), _matched(names, by), cacheable=True)


def _matched(names: list[str], by: str) -> View:
    side = 0 if by == "source" else 1
    wanted = {*names, ANY}

    def encode(key: Key, row: Row) -> bytes:
        # The rank and the two names lead the fragment, for `join` to sort and to group by.
        return b"%d\0%s\0%s\0" % (9 - row[_PRECEDENCE], key[0].encode(), key[1].encode()) + _encode_intention(key, row)

    def join(parts: list[bytes]) -> bytes:
        groups: list[bytes] = []
        fields = sorted(tuple(part.split(b"\0", 3)) for part in parts)
        for name in dict.fromkeys(names):
            found = [f[3] for f in fields if f[1 + side] in (name.encode(), b"*")]
            groups.append(dump_json(name) + b":" + (as_array(found) if found else b"null"))
        return b"{" + b",".join(groups) + b"}"

    return View("matched", ("matched", by, *names), encode, join, lambda key, row: key[side] in wanted)


async def check(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    source_type = request.query.get("source-type", "consul") or "consul"
    if source_type != "consul":
        raise HttpError(500, f'unsupported SourceType: "{source_type}"')
    options = read_options(request, agent)
    entry = await agent.results.fetch(IntentionsFor(destination), mode=options.mode, token=request.token)
    rows = [IntentionRow(*row) for row in entry.rows.values()]
    return json_response({"Allowed": decide(source, destination, rows, _default_allow(agent)).allowed})


def _default_allow(agent: Agent) -> bool:
    return bool(getattr(agent.config, "intentions_default_allow", True))


def _pair(request: Request) -> tuple[str, str]:
    pair = []
    check_names = ("source", "destination")
    for name in check_names:
        value = request.query.get(name)
        if not value:
            raise HttpError(500, f"required query parameter '{name}' not set")
        if value.count("/") == 1 and value.startswith("default/"):
            value = value.removeprefix("default/")
        pair.append(value)
    return pair[0], pair[1]


def _intention_id(request: Request) -> str:
    wanted = request.params["intention"]
    if len(wanted) != 36:
        raise HttpError(
            500, "Intention lookup failed: failed intention lookup: index error: UUID must be 36 characters"
        )
    return wanted


def _parse(request: Request, source: str = "", destination: str = "") -> SetIntention:
    try:
        body = Fields(request.json_object() if request.body.strip() else JsonObject())
        if body.raw("Permissions"):
            raise BadRequest("Request decode failed: Permissions are not supported yet, use Action")
        return SetIntention(
            body.text("SourceName") or source,
            body.text("DestinationName") or destination,
            body.text("Action").lower(),
            body.text("Description"),
            body.text_map("Meta"),
        )
    except BadRequest as e:
        problem = e.message.removeprefix("Request decode failed: ")
        raise HttpError(400, f"Failed to decode request body: {problem}") from None


async def _set(request: Request, agent: Agent, command: SetIntention) -> str:
    """As `write`; refusals are lists of errors, as Consul prints them."""
    try:
        return str(await agent.servers.write(command, token=request.token))
    except BadRequest as e:
        raise HttpError(500, f"1 error occurred:\n\t* {e.message}\n\n") from None


async def _find(request: Request, agent: Agent, is_it: Any) -> IntentionRow | None:
    entry = await agent.results.fetch(Intentions(), token=request.token)
    return next((r for r in (IntentionRow(*row) for row in entry.rows.values()) if is_it(r)), None)


ROUTES = (
    Route("GET", "/v1/connect/ca/roots", roots),
    Route("GET", "/v1/agent/connect/ca/roots", agent_roots),
    Route("GET", "/v1/connect/ca/configuration", ca_configuration),
    Route("GET", "/v1/connect/intentions", list_intentions),
    Route("POST", "/v1/connect/intentions", create),
    Route("GET", "/v1/connect/intentions/match", match),
    Route("GET", "/v1/connect/intentions/check", check),
    Route("GET", "/v1/connect/intentions/exact", read_exact),
    Route("PUT", "/v1/connect/intentions/exact", put_exact),
    Route("DELETE", "/v1/connect/intentions/exact", delete_exact),
    Route("GET", "/v1/connect/intentions/{intention}", read_by_id),
    Route("PUT", "/v1/connect/intentions/{intention}", update_by_id),
    Route("DELETE", "/v1/connect/intentions/{intention}", delete_by_id),
)
