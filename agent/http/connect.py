"""`/v1/connect/` and `/v1/agent/connect/ca/roots`: the mesh CA's public side, and intentions.

An intention's identity is (source, destination); ids are kept for older clients. Who wins is `acl.intention`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rostra.acl.intention import ANY, decide
from rostra.agent.context import Agent
from rostra.agent.http.declared import ENTERPRISE, Body, parameters, read_parameters
from rostra.agent.http.errors import HttpError, write
from rostra.agent.http.permissions import at_servers
from rostra.agent.http.reads import answer, read_options
from rostra.agent.http.routing import Request, Response, Route, dump_json, json_response
from rostra.agent.http.shapes import as_array, intention_json, root_json
from rostra.agent.results import Rendering
from rostra.agent.servers_port import Key, Row
from rostra.server.state.ca import CaConfig, Roots
from rostra.server.state.intention import DUPLICATE, DeleteIntention, Intentions, IntentionsFor, SetIntention, duplicate
from rostra.server.state.rows import IntentionRow, RootRow, read_row
from rostra.wire.errors import BadRequest, Conflict, NoLeader, Timeout

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


_ROOTS = Rendering("root", "root", _encode_root, _join_roots)
_ROOTS_PEM = Rendering("root-pem", "root-pem", _encode_pem, b"".join)


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


_CONFIG = Rendering(
    "ca-config", "ca-config", _encode_config, lambda p: p[0] if p else dump_json(_ca_configuration({}, 1))
)


async def ca_configuration(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, CaConfig(), _CONFIG)


# -- intentions --------------------------------------------------------------------------------------------------------


def _encode_intention(key: Key, row: Row) -> bytes:
    return dump_json(intention_json(row))


def _encode_ranked(key: Key, row: Row) -> bytes:
    # The rank and the two names lead the fragment, for `join` to sort and to group by.
    return b"%d\0%s\0%s\0" % (9 - row[_PRECEDENCE], key[0].encode(), key[1].encode()) + _encode_intention(key, row)


def _ranked(parts: list[bytes]) -> list[list[bytes]]:
    """[rank, source, destination, JSON] of each, the strongest first."""
    return sorted(part.split(b"\0", 3) for part in parts)


_LIST = Rendering(
    "intention-ranked", "intention-ranked", _encode_ranked, lambda p: as_array([f[3] for f in _ranked(p)])
)


async def list_intentions(request: Request, agent: Agent) -> Response:
    return await answer(request, agent, Intentions(), _LIST)


async def create(request: Request, agent: Agent) -> Response:
    try:
        given, named = _parse(request)
    except BadRequest as e:
        raise HttpError(500, f"Failed to decode request body: {_problem(e)}") from None
    if named:
        raise HttpError(500, "ID must be empty when creating a new intention")
    return json_response({"ID": await _set(request, agent, replace(given, id=str(uuid.uuid4())))})


async def read_by_id(request: Request, agent: Agent) -> Response:
    wanted = request.params["intention"]
    if len(wanted) != 36:
        raise BadRequest("Bad request: failed intention lookup: index error: UUID must be 36 characters")
    read_options(request, agent)
    row = await _find(request, agent, lambda row: row.id == wanted.lower())
    if row is None:
        raise HttpError(404, "Intention not found")
    return json_response(intention_json(row))


async def update_by_id(request: Request, agent: Agent) -> Response:
    wanted = _intention_id(request)
    try:
        given, _ = _parse(request)
    except BadRequest as e:
        raise BadRequest(f"Bad request: {e.message}") from None
    if await _find(request, agent, lambda row: row.id == wanted) is None:
        raise HttpError(500, f"Cannot modify non-existent intention: '{wanted}'")
    await _set(request, agent, replace(given, id=wanted))
    await _drop_former(request, agent, given, lambda row: row.id == wanted)
    return json_response({"ID": wanted})


async def delete_by_id(request: Request, agent: Agent) -> Response:
    wanted = _intention_id(request)
    olds = await _those(request, agent, lambda row: row.id == wanted)
    if not olds:
        raise HttpError(500, f"Cannot delete non-existent intention: '{wanted}'")
    return await _delete(request, agent, [(row.source, row.destination) for row in olds])


async def read_exact(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    pair = (source.lower(), destination.lower())
    view = Rendering(
        "intention",
        ("exact", pair),
        _encode_intention,
        lambda parts: parts[0] if parts else b"",
        lambda key, row: key[0].lower() == pair[0] and key[1].lower() == pair[1],
    )
    response = await answer(request, agent, IntentionsFor(destination), view, missing_is_404=True)
    if response.status == 404:
        response.body, response.hot = b"Intention not found", None
    return response


async def put_exact(request: Request, agent: Agent) -> Response:
    pair = _pair(request)
    try:
        given, _ = _parse(request)
    except BadRequest as e:
        raise BadRequest(f"Failed to decode request body: {_problem(e)}") from None
    given = replace(given, source=given.source or pair[0], destination=given.destination or pair[1])
    if (given.source, given.destination) != pair:
        raise BadRequest("SourceName and DestinationName must be those of ?source= and ?destination=")
    await _set(request, agent, given)
    await _drop_former(request, agent, given, lambda row: _folded(row) == _folded(pair))
    return json_response(True)


async def delete_exact(request: Request, agent: Agent) -> Response:
    pair = _pair(request)
    there = await _those(request, agent, lambda row: _folded(row) == _folded(pair))
    return await _delete(request, agent, [(row.source, row.destination) for row in there] or [pair])


async def _drop_former(
    request: Request, agent: Agent, given: SetIntention, is_it: Callable[[IntentionRow], bool]
) -> None:
    """Delete what `given` has replaced and is still there: older servers tell spellings apart and do not move ids.

    The new one is written first: what is refused, or lost in between, must not leave the connection without any rule.
    """
    pair = (given.source, given.destination)
    for old in await _those(request, agent, is_it):
        if (old.source, old.destination) != pair:
            try:
                await write(agent.servers, DeleteIntention(old.source, old.destination), request.caller)
            except NoLeader:
                raise Timeout("the new intention was written, the one it replaces is still there: try again") from None


async def _delete(request: Request, agent: Agent, pairs: list[tuple[str, str]]) -> Response:
    for pair in pairs:
        await write(agent.servers, DeleteIntention(*pair), request.caller)
    return json_response(True)


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
    for name in names:
        _name("name", name)
    if len(names) == 1 and by == "destination":
        return await answer(request, agent, IntentionsFor(_name("name", names[0])), _matched(names, by), cacheable=True)
    return await answer(request, agent, Intentions(), _matched(names, by), cacheable=True)


def _matched(names: list[str], by: str) -> Rendering:
    side = 0 if by == "source" else 1
    folded = {name: _name("name", name).lower() for name in sorted(set(names))}
    wanted = {*folded.values(), ANY}

    def join(parts: list[bytes]) -> bytes:
        groups: list[bytes] = []
        ranked = [(f[1 + side].decode().lower(), f[3]) for f in _ranked(parts)]
        for name, meant in folded.items():
            found = [shown for named, shown in ranked if named in (meant, ANY)]
            groups.append(dump_json(name) + b":" + (as_array(found) if found else b"null"))
        return b"{" + b",".join(groups) + b"}"

    key = ("matched", by, *folded)
    return Rendering("intention-ranked", key, _encode_ranked, join, lambda key, row: key[side].lower() in wanted)


async def check(request: Request, agent: Agent) -> Response:
    source, destination = _pair(request)
    source_type = request.query.get("source-type", "consul") or "consul"
    if source_type != "consul":
        raise HttpError(500, f'unsupported SourceType: "{source_type}"')
    options = read_options(request, agent)
    entry = await agent.results.fetch(IntentionsFor(destination), mode=options.mode, token=request.token)
    rows = [read_row(IntentionRow, row) for row in entry.rows.values()]
    return json_response({"Allowed": decide(source, destination, rows, agent.config.intentions_default_allow).allowed})


def _pair(request: Request) -> tuple[str, str]:
    pair = []
    for name in ("source", "destination"):
        value = request.query.get(name)
        if not value:
            raise HttpError(500, f"required query parameter '{name}' not set")
        pair.append(_name(name, value))
    return pair[0], pair[1]


def _name(label: str, value: str) -> str:
    """The name of a service, from one that may have a namespace in front."""
    if value.count("/") > 1:
        raise HttpError(500, f"{label} \"{value}\" is invalid: input can contain at most one '/'")
    return value.removeprefix("default/")


def _folded(pair: Sequence[Any]) -> tuple[str, str]:
    """What tells intentions apart: their source and destination (which a row begins with), without their case."""
    return pair[0].lower(), pair[1].lower()


def _intention_id(request: Request) -> str:
    wanted = request.params["intention"]
    if len(wanted) != 36:
        raise HttpError(
            500, "Intention lookup failed: failed intention lookup: index error: UUID must be 36 characters"
        )
    return wanted.lower()


_INTENTION = Body(
    "ID Description SourceNS SourceName DestinationNS DestinationName SourceType Action DefaultAddr DefaultPort Meta "
    "Precedence CreatedAt UpdatedAt Hash CreateIndex ModifyIndex"
)
_NAME_CHARS_MAX, _VALUE_CHARS_MAX, _META_MAX = 128, 512, 64


def _parse(request: Request) -> tuple[SetIntention, str]:
    """What the body describes, and the ID in it. Raises BadRequest."""
    body = _INTENTION.read(request)
    if body.text("SourceType") not in ("", "consul"):
        raise _refused("SourceType must be set to 'consul'")
    for name in ("SourceNS", "DestinationNS"):
        if body.text(name) not in ("", "default"):
            raise _refused(f"{name}: {ENTERPRISE}")
    description, meta = body.text("Description"), body.text_map("Meta")
    if len(description.encode()) > _VALUE_CHARS_MAX:
        raise _refused(f"Description exceeds maximum length {_VALUE_CHARS_MAX}")
    if len(meta) > _META_MAX:
        raise _refused(f"Meta exceeds maximum element count {_META_MAX}")
    for name, value in meta.items():
        if len(name.encode()) > _NAME_CHARS_MAX:
            raise _refused(f'Meta key "{name}" exceeds maximum length {_NAME_CHARS_MAX}')
        if len(value.encode()) > _VALUE_CHARS_MAX:
            raise _refused(f'Meta value for key "{name}" exceeds maximum length {_VALUE_CHARS_MAX}')
    for name in ("DefaultAddr", "DefaultPort"):
        if body.raw(name):
            request.ignored.append(f"field {name}")
    source, destination, action = body.text("SourceName"), body.text("DestinationName"), body.text("Action")
    return SetIntention(source, destination, action, description, meta), body.text("ID")


def _problem(error: BadRequest) -> str:
    return error.message.removeprefix("Request decode failed: ")


def _refused(*problems: str) -> HttpError:
    """Refusals of the content are lists of errors, as Consul prints them."""
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    return HttpError(500, f"{count} occurred:\n" + "".join(f"\t* {problem}\n" for problem in problems) + "\n")


async def _set(request: Request, agent: Agent, command: SetIntention) -> str:
    if problems := command.problems():
        raise _refused(*problems)
    if command.id:  # servers of this version refuse that themselves, older ones would overwrite it
        pair = _folded((command.source, command.destination))
        for other in await _those(request, agent, lambda row: _folded(row) == pair and row.id != command.id):
            raise HttpError(500, duplicate(other))
    try:
        return str(await agent.servers.write(command, caller=request.caller))
    except BadRequest as e:
        raise _refused(e.message) from None
    except Conflict as e:
        if e.message.startswith(DUPLICATE):
            raise HttpError(500, e.message) from None
        raise


async def _find(request: Request, agent: Agent, is_it: Callable[[IntentionRow], bool]) -> IntentionRow | None:
    return next(iter(await _those(request, agent, is_it)), None)


async def _those(request: Request, agent: Agent, is_it: Callable[[IntentionRow], bool]) -> list[IntentionRow]:
    entry = await agent.results.fetch(Intentions(), token=request.token)
    return [row for row in (read_row(IntentionRow, row) for row in entry.rows.values()) if is_it(row)]


ROUTES = (
    Route("GET", "/v1/connect/ca/roots", roots, at_servers, query=read_parameters("pem")),
    Route("GET", "/v1/agent/connect/ca/roots", agent_roots, at_servers, query=read_parameters()),
    Route("GET", "/v1/connect/ca/configuration", ca_configuration, at_servers, query=read_parameters()),
    Route("GET", "/v1/connect/intentions", list_intentions, at_servers, query=read_parameters()),
    Route("POST", "/v1/connect/intentions", create, at_servers, query=parameters()),
    Route("GET", "/v1/connect/intentions/match", match, at_servers, query=read_parameters("by name")),
    Route(
        "GET",
        "/v1/connect/intentions/check",
        check,
        query=read_parameters("source destination source-type"),
        may=at_servers,
    ),
    Route(
        "GET", "/v1/connect/intentions/exact", read_exact, query=read_parameters("source destination"), may=at_servers
    ),
    Route("PUT", "/v1/connect/intentions/exact", put_exact, at_servers, query=parameters("source destination")),
    Route(
        "DELETE", "/v1/connect/intentions/exact", delete_exact, query=parameters("source destination"), may=at_servers
    ),
    Route("GET", "/v1/connect/intentions/{intention}", read_by_id, at_servers, query=read_parameters()),
    Route("PUT", "/v1/connect/intentions/{intention}", update_by_id, at_servers, query=parameters()),
    Route("DELETE", "/v1/connect/intentions/{intention}", delete_by_id, at_servers, query=parameters()),
)
