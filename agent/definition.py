"""Service and check definitions, as Consul's JSON or HCL spells them, turned into rows and check specs.

Called by `agent/local.py` for definitions from HTTP and from configuration files. Pure: it knows no clock, no sockets
and no registered services, so a sidecar without a port keeps port 0 until `local.py` picks one. Maps whose keys belong
to the user (meta, header, tagged addresses, proxy config) are taken as they are. Error texts are Consul's where it has
one. How a field is spelled and read is `definition_fields.py`'s.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rostra.agent.checks import kinds
from rostra.agent.checks.spec import OUTPUT_BYTES_MAX, CheckSpec
from rostra.agent.definition_fields import DefinitionFields
from rostra.server.state.rows import ServiceRow
from rostra.wire.errors import BadRequest, Denied

INTERVAL_MIN_S = 1.0
DEREGISTER_AFTER_MIN_S = 60.0
STATUSES = ("passing", "warning", "critical")
SIDECAR_SUFFIX = "-sidecar-proxy"

_META_PAIRS_MAX = 64
_META_KEY_MAX = 128
_META_VALUE_MAX = 512
_META_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ScriptsDisabled(Denied):
    """This agent runs no scripts, or none that came over HTTP."""


@dataclass(frozen=True, slots=True)
class Scripts:
    """Whose script checks are run."""

    remote: bool = False  # enable_script_checks: registered over HTTP, too
    local: bool = False  # enable_local_script_checks: from configuration files

    def allow(self, spec: CheckSpec, from_file: bool) -> None:
        """Raises ScriptsDisabled."""
        if not kinds.of(spec).runs_programs or self.remote or (from_file and self.local):
            return
        if from_file:
            raise ScriptsDisabled(
                "Scripts are disabled on this agent; to enable, configure 'enable_script_checks' or "
                "'enable_local_script_checks' to true"
            )
        raise ScriptsDisabled(
            "Scripts are disabled on this agent from remote calls; to enable, configure 'enable_script_checks' to true"
        )


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """One service with its checks; `sidecar` is the proxy that `connect { sidecar_service }` asked for."""

    row: ServiceRow
    checks: tuple[CheckSpec, ...]
    token: str = ""
    sidecar: ServiceDefinition | None = None
    default_sidecar_checks: bool = False  # only on a sidecar: none were given, the agent's own apply


def parse_service(raw: Any, *, node: str) -> ServiceDefinition:
    """The service that `raw` defines for `node`. Raises DecodeError or BadRequest."""
    fields = DefinitionFields(raw, "")
    definition = _read_service(fields, node)
    fields.end()
    return definition


def parse_check(raw: Any, *, from_file: bool = False) -> CheckSpec:
    """A check registered on its own, for the node or (with ServiceID) for a service. In a file an id is name enough.

    Raises as above.
    """
    fields = DefinitionFields(raw, "")
    name = fields.text("name")
    check_id = fields.text("id") or fields.text("check_id") or name
    service_id = fields.text("service_id")
    if not name and not (from_file and check_id):
        raise BadRequest("Missing check name")
    spec = _read_check(fields, id=check_id, name=name, service_id=service_id, bad_status="Bad check status")
    fields.end()
    return spec


def expand_sidecar_checks(sidecar: ServiceDefinition, *, listener: str, parent_id: str) -> ServiceDefinition:
    """The sidecar with the two checks that it gets when none were given: its listener, and its service's health."""
    sidecar_id = sidecar.row.id
    checks = (
        CheckSpec(
            id=f"service:{sidecar_id}:1",
            name="Connect Sidecar Listening",
            type="tcp",
            service_id=sidecar_id,
            tcp=listener,
            interval_s=10.0,
        ),
        CheckSpec(
            id=f"service:{sidecar_id}:2",
            name=f"Connect Sidecar Aliasing {parent_id}",
            type="alias",
            service_id=sidecar_id,
            alias_service=parent_id,
        ),
    )
    return replace(sidecar, checks=checks)


def with_ip_addresses(row: ServiceRow) -> ServiceRow:
    """The service with its own address among the tagged ones, where that is an IP address and they lack it."""
    try:
        version = ipaddress.ip_address(row.address).version
    except ValueError:
        return row
    own = {"address": row.address, "port": row.port}
    tagged = {f"lan_ipv{version}": own, f"wan_ipv{version}": own, **row.tagged_addresses}
    return row._replace(tagged_addresses={name: tagged[name] for name in sorted(tagged)})


def frozen(value: Any) -> Any:
    """`value` with its lists as tuples, which is what comes back from the wire; so local and catalog rows compare."""
    if isinstance(value, Mapping):
        return {str(k): frozen(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value)  # as any JSON reader would take it; the wire has no such integer
    return value


def _read_service(fields: DefinitionFields, node: str) -> ServiceDefinition:
    name = fields.text("name") or fields.text("service")
    service_id = fields.text("id") or name
    kind = fields.text("kind")
    address = fields.text("address")
    port = fields.integer("port")
    tags = fields.texts("tags")
    meta = fields.text_map("meta")
    tagged_addresses = _read_tagged_addresses(fields)
    weight_passing, weight_warning, weights_given = _read_weights(fields)
    enable_tag_override = fields.boolean("enable_tag_override")
    token = fields.text("token")
    fields.refuse_namespace()
    fields.ignore("partition", "locality")
    checks = tuple(_read_service_checks(fields, service_id, name, token))
    proxy = _read_proxy(fields.object("proxy"))
    connect = fields.object("connect")
    native, sidecar_fields = False, None
    if connect is not None:
        native = connect.boolean("native")
        sidecar_fields = connect.object("sidecar_service")
        connect.end()

    if not name:
        raise BadRequest("Missing service name")
    _check_id("service ID", service_id)
    if address in {"0.0.0.0", "::", "[::]"}:
        raise BadRequest("Invalid service address")
    _check_port("Port", port)
    if weights_given:
        _check_weights(weight_passing, weight_warning)
    _check_meta(meta)
    _check_proxy(kind, port, native, proxy)

    row = ServiceRow(
        node=node,
        id=service_id,
        name=name,
        address=address,
        port=port,
        tags=tags,
        meta=meta,
        tagged_addresses=tagged_addresses,
        weight_passing=weight_passing,
        weight_warning=weight_warning,
        enable_tag_override=enable_tag_override,
        kind=kind,
        proxy=proxy,
        native=native,
    )
    sidecar = _read_sidecar(sidecar_fields, row, token) if sidecar_fields is not None else None
    return ServiceDefinition(row, checks, token, sidecar)


def _read_sidecar(fields: DefinitionFields, parent: ServiceRow, token: str) -> ServiceDefinition:
    """Name, tags and meta come from the parent unless given; ID, kind and destination are the agent's to choose."""
    if fields.text("id"):
        raise _errors("A SidecarService cannot specify an ID as this is managed by the agent")
    nested = fields.object("connect")
    if nested is not None:
        if nested.object("sidecar_service") is not None:
            raise _errors("A SidecarService cannot have a nested SidecarService")
        nested.boolean("native")
        nested.end()
    sidecar_id = parent.id + SIDECAR_SUFFIX
    name = fields.text("name") or parent.name + SIDECAR_SUFFIX
    kind = fields.text("kind") or "connect-proxy"
    address = fields.text("address")
    port = fields.integer("port")
    tags = fields.texts("tags") or parent.tags
    meta = fields.text_map("meta") or dict(parent.meta)
    tagged_addresses = _read_tagged_addresses(fields)
    weight_passing, weight_warning, weights_given = _read_weights(fields)
    enable_tag_override = fields.boolean("enable_tag_override")
    token = fields.text("token") or token
    fields.refuse_namespace()
    fields.ignore("partition", "locality")
    own_checks = fields.has("check") or fields.has("checks")
    checks = tuple(_read_service_checks(fields, sidecar_id, name, token))
    proxy = dict(_read_proxy(fields.object("proxy")) or {})
    fields.end()

    proxy.setdefault("destination_service_name", parent.name)
    proxy.setdefault("destination_service_id", parent.id)
    proxy.setdefault("local_service_address", "127.0.0.1")
    if not proxy.get("local_service_port") and parent.port > 0:
        proxy["local_service_port"] = parent.port
    if address in {"0.0.0.0", "::", "[::]"}:
        raise BadRequest("Invalid service address")
    _check_port("Port", port)
    if weights_given:
        _check_weights(weight_passing, weight_warning)
    _check_meta(meta)
    _check_proxy(kind, port or 1, False, proxy)
    row = ServiceRow(
        node=parent.node,
        id=sidecar_id,
        name=name,
        address=address,
        port=port,
        tags=tags,
        meta=meta,
        tagged_addresses=tagged_addresses,
        weight_passing=weight_passing,
        weight_warning=weight_warning,
        enable_tag_override=enable_tag_override,
        kind=kind,
        proxy=proxy,
    )
    return ServiceDefinition(row, checks, token, None, default_sidecar_checks=not own_checks)


def _read_service_checks(
    fields: DefinitionFields, service_id: str, service_name: str, token: str
) -> Iterator[CheckSpec]:
    given: list[DefinitionFields] = []
    single = fields.object("check")
    if single is not None and not single.is_empty():
        given.append(single)
    given.extend(fields.objects("checks"))
    for position, check in enumerate(given, start=1):
        default_id = f"service:{service_id}" if len(given) == 1 else f"service:{service_id}:{position}"
        check_id = check.text("check_id") or check.text("id") or default_id
        name = check.text("name") or f"Service '{service_name}' check"
        check.ignore("service_id")
        spec = _read_check(
            check,
            id=check_id,
            name=name,
            service_id=service_id,
            bad_status="Status for checks must 'passing', 'warning', 'critical'",
        )
        check.end()
        yield replace(spec, token=spec.token or token)


def _read_check(fields: DefinitionFields, *, id: str, name: str, service_id: str, bad_status: str) -> CheckSpec:
    """The spec of one check object."""
    status = fields.text("status")
    notes = fields.text("notes")
    token = fields.text("token")
    args = fields.texts("args") or fields.texts("script_args")
    http, tcp = fields.text("http"), fields.text("tcp")
    method, body = fields.text("method"), fields.text("body")
    header = fields.header("header")
    given: dict[str, Any] = {"args": args, "http": http, "tcp": tcp}
    given |= {name: fields.text(name) for name in ("grpc", "docker_container_id", "alias_node", "alias_service")}
    fields.refuse_namespace()
    fields.ignore("shell", "grpc_use_tls", "proxy_http", "proxy_grpc", "partition", "type", "output")
    interval_s, timeout_s = fields.duration("interval"), fields.duration("timeout")
    ttl_s = fields.duration("ttl")
    tls_skip_verify, tls_server_name = fields.boolean("tls_skip_verify"), fields.text("tls_server_name")
    given |= {"interval": interval_s, "ttl": ttl_s}
    success_before_passing = fields.integer("success_before_passing")
    failures_before_critical = fields.integer("failures_before_critical")
    failures_before_warning = fields.integer("failures_before_warning") or failures_before_critical
    deregister_after_s = fields.duration("deregister_critical_service_after")
    output_bytes_max = fields.integer("output_max_size") or OUTPUT_BYTES_MAX

    if status and status not in STATUSES:
        raise BadRequest(bad_status)
    kind = kinds.asked_for(given)
    if min(success_before_passing, failures_before_critical, failures_before_warning) < 0:
        raise BadRequest("Invalid check: SuccessBeforePassing and FailuresBefore* must not be negative")
    if failures_before_warning > failures_before_critical:
        raise BadRequest("Invalid check: FailuresBeforeWarning can't be higher than FailuresBeforeCritical")
    if timeout_s < 0:
        raise BadRequest("Invalid check: Timeout must not be negative")
    if output_bytes_max < 1:
        raise BadRequest("Invalid check: OutputMaxSize must be positive")
    _check_id("check ID", id)

    return CheckSpec(
        id=id,
        name=name,
        type=kind.name,
        status=status or "critical",
        notes=notes,
        service_id=service_id,
        token=token,
        interval_s=max(interval_s, INTERVAL_MIN_S) if kind.probe else 0.0,
        timeout_s=timeout_s or kind.timeout_s,
        ttl_s=ttl_s,
        http=http,
        method=method,
        header=header,
        body=body,
        tls_skip_verify=tls_skip_verify,
        tls_server_name=tls_server_name,
        tcp=tcp,
        args=args,
        alias_node=given["alias_node"],
        alias_service=given["alias_service"],
        success_before_passing=success_before_passing,
        failures_before_warning=failures_before_warning,
        failures_before_critical=failures_before_critical,
        deregister_after_s=max(deregister_after_s, DEREGISTER_AFTER_MIN_S) if deregister_after_s > 0 else 0.0,
        output_bytes_max=min(output_bytes_max, OUTPUT_BYTES_MAX),
    )


def _read_proxy(fields: DefinitionFields | None) -> dict[str, Any] | None:
    """The proxy part of a row: snake_case keys, empty ones left out, upstreams with their defaults filled in."""
    if fields is None:
        return None
    proxy = {
        "destination_service_name": fields.text("destination_service_name"),
        "destination_service_id": fields.text("destination_service_id"),
        "local_service_address": fields.text("local_service_address"),
        "local_service_port": fields.integer("local_service_port"),
        "mode": fields.text("mode"),
        "config": frozen(fields.free_map("config")),
        "upstreams": tuple(_read_upstream(upstream) for upstream in fields.objects("upstreams")),
        "mesh_gateway": _mode_map(fields.object("mesh_gateway")),
        "expose": _read_expose(fields.object("expose")),
    }
    fields.end()
    _check_port("Proxy.LocalServicePort", proxy["local_service_port"])
    return {key: value for key, value in proxy.items() if value}


def _read_expose(fields: DefinitionFields | None) -> dict[str, Any]:
    """Paths that the proxy serves without mTLS, for checks of others."""
    if fields is None:
        return {}
    checks, paths = fields.boolean("checks"), tuple(_read_path(path) for path in fields.objects("paths"))
    fields.end()
    return {**({"checks": True} if checks else {}), **({"paths": paths} if paths else {})}


def _read_path(fields: DefinitionFields) -> dict[str, Any]:
    path = {
        "listener_port": fields.integer("listener_port"),
        "path": fields.text("path"),
        "local_path_port": fields.integer("local_path_port"),
        "protocol": fields.text("protocol"),
        "parsed_from_check": fields.boolean("parsed_from_check"),
    }
    fields.end()
    return path


def _read_upstream(fields: DefinitionFields) -> dict[str, Any]:
    upstream = {
        "destination_type": fields.text("destination_type") or "service",
        "destination_namespace": fields.text("destination_namespace"),
        "destination_name": fields.text("destination_name"),
        "datacenter": fields.text("datacenter"),
        "local_bind_address": fields.text("local_bind_address"),
        "local_bind_port": fields.integer("local_bind_port"),
        "config": frozen(fields.free_map("config")),
        "mesh_gateway": _mode_map(fields.object("mesh_gateway")),
    }
    fields.end()
    return {key: value for key, value in upstream.items() if value}


def _mode_map(fields: DefinitionFields | None) -> dict[str, str]:
    if fields is None:
        return {}
    mode = fields.text("mode")
    fields.end()
    return {"mode": mode} if mode else {}


def _read_tagged_addresses(fields: DefinitionFields) -> dict[str, dict[str, Any]]:
    addresses: dict[str, dict[str, Any]] = {}
    for name, value in fields.free_map("tagged_addresses").items():
        entry = DefinitionFields({} if value is None else value, f"TaggedAddresses.{name}.")
        addresses[name] = {"address": entry.text("address"), "port": entry.integer("port")}
        entry.end()
    return addresses


def _read_weights(fields: DefinitionFields) -> tuple[int, int, bool]:
    weights = fields.object("weights")
    if weights is None:
        return 1, 1, False
    passing, warning = weights.integer("passing"), weights.integer("warning")
    weights.end()
    return passing, warning, True


def _check_weights(passing: int, warning: int) -> None:
    if passing < 1:
        raise BadRequest("Invalid Weights: Passing must be greater than 0")
    if warning < 0:
        raise BadRequest("Invalid Weights: Warning must be greater or equal than 0")
    if passing > 65535 or warning > 65535:
        raise BadRequest("Invalid Weights: DNS Weight must be between 0 and 65535")


def _check_meta(meta: Mapping[str, str]) -> None:
    problem = meta_problem(meta)
    if problem:
        raise BadRequest(f"Invalid Service Meta: {problem}")


def meta_problem(meta: Mapping[str, str]) -> str:
    """What is wrong with the metadata of a node or service; "" where nothing is."""
    if len(meta) > _META_PAIRS_MAX:
        return f"Node metadata cannot contain more than {_META_PAIRS_MAX} key/value pairs"
    for key, value in meta.items():
        problem = _pair_problem(key, value)
        if problem:
            return f"Couldn't load metadata pair ('{key[:_META_KEY_MAX]}', '{value[:_META_KEY_MAX]}'): {problem}"
    return ""


def _pair_problem(key: str, value: str) -> str:
    if not key:
        return "Key cannot be blank"
    if not _META_KEY.fullmatch(key):
        return "Key contains invalid characters"
    if len(key) > _META_KEY_MAX:
        return f"Key is too long (limit: {_META_KEY_MAX} characters)"
    if key.startswith("consul-"):
        return "Key prefix 'consul-' is reserved for internal use"
    if len(value) > _META_VALUE_MAX:
        return f"Value is too long (limit: {_META_VALUE_MAX} characters)"
    return ""


def _check_proxy(kind: str, port: int, native: bool, proxy: Mapping[str, Any] | None) -> None:
    if kind != "connect-proxy":
        return
    problems: list[str] = []
    proxy = proxy or {}
    if not str(proxy.get("destination_service_name", "")).strip():
        problems.append("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
    elif proxy["destination_service_name"] == "*":
        problems.append("Proxy.DestinationServiceName must not be a wildcard for Connect proxy services")
    if port == 0:
        problems.append("Port must be set for a Connect proxy")
    if native:
        problems.append("A Proxy cannot also be Connect Native, only typical services")
    listeners: set[str] = set()
    destinations: set[tuple[str, str, str]] = set()
    for upstream in proxy.get("upstreams", ()):
        problems.extend(_upstream_problems(upstream, listeners, destinations))
    problems.extend(_expose_problems(proxy.get("expose", {}).get("paths", ())))
    if problems:
        raise _errors(*problems)


def _expose_problems(paths: tuple[dict[str, Any], ...]) -> Iterator[str]:
    if len({path["path"] for path in paths}) < len(paths):
        yield "expose.paths: duplicate paths exposed"
    if len({path["listener_port"] for path in paths}) < len(paths):
        yield "expose.paths: duplicate listener ports exposed"
    for path in paths:
        if not path["path"]:
            yield "expose.paths: empty path exposed"
        if not 0 < path["listener_port"] <= 65535:
            yield f"expose.paths: invalid listener port: {path['listener_port']}"
        if not 0 <= path["local_path_port"] <= 65535:
            yield f"expose.paths: invalid local path port: {path['local_path_port']}"
        if path["protocol"] not in ("", "http", "http2"):
            yield f"protocol '{path['protocol']}' not supported for path: {path['path']}, must be in: [http http2]"


def _upstream_problems(
    upstream: Mapping[str, Any], listeners: set[str], destinations: set[tuple[str, str, str]]
) -> Iterator[str]:
    kind, name = upstream["destination_type"], upstream.get("destination_name", "")
    port = upstream.get("local_bind_port", 0)
    if kind not in {"service", "prepared_query"}:
        yield f'unknown upstream destination type: "{kind}"'
        return
    if not name:
        yield "upstream destination name cannot be empty"
        return
    if name == "*":
        yield "upstream destination name cannot be a wildcard"
        return
    if port == 0:
        yield "upstream local bind port cannot be zero"
        return
    if not 0 < port <= 65535:
        yield f"upstream local bind port {port} is not between 1 and 65535"
        return
    listener = join_host_port(upstream.get("local_bind_address") or "127.0.0.1", port)
    if listener in listeners:
        yield f'upstreams cannot contain duplicates by local bind address and port; "{listener}" is specified twice'
    listeners.add(listener)
    destination = (kind, name, upstream.get("datacenter", ""))
    if destination in destinations:
        yield (
            f'upstreams cannot contain duplicates of [type="{kind}", name="{name}", '
            f'namespace="", datacenter="{destination[2]}"]'
        )
    destinations.add(destination)


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        is_v6 = False
    return f"[{host}]:{port}" if is_v6 else f"{host}:{port}"


def _check_port(name: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise BadRequest(f"Invalid {name}: {port} is not between 0 and 65535")


def _check_id(what: str, value: str) -> None:
    if len(value) > 512 or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise BadRequest(f"Invalid {what}: at most 512 characters, none of them a control character")


def _errors(*problems: str) -> BadRequest:
    """Several problems in the shape that Consul's clients show."""
    head = "1 error occurred:" if len(problems) == 1 else f"{len(problems)} errors occurred:"
    return BadRequest("\n".join([head, *(f"\t* {problem}" for problem in problems)]) + "\n\n")
