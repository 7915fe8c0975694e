"""Service and check definitions, as Consul's JSON or HCL spells them, turned into rows and check specs.

Called by `agent/local.py` for definitions from HTTP and from configuration files. Pure: it knows no clock, no sockets
and no registered services, so a sidecar without a port keeps port 0 until `local.py` picks one. Maps whose keys belong
to the user (meta, header, tagged addresses, proxy config) are taken as they are. Error texts are Consul's where it has
one. Which fields there are is `schema.py`'s, and how they are read `definition_fields.py`'s.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rostra.agent.checks import kinds
from rostra.agent.checks.spec import OUTPUT_BYTES_MAX, CheckSpec
from rostra.agent.definition_fields import read, stored
from rostra.agent.schema import CHECK, PROXY, SERVICE
from rostra.server.state.rows import ServiceRow
from rostra.wire.durations import SECOND
from rostra.wire.errors import BadRequest, Denied

INTERVAL_MIN_S = 1.0
DEREGISTER_AFTER_MIN_S = 60.0
STATUSES = ("passing", "warning", "critical")
SIDECAR_SUFFIX = "-sidecar-proxy"

_SAME = tuple(f.name for f in fields(CheckSpec) if f.name in CHECK.in_bodies)  # in a definition and in a spec
_DURATIONS = ("interval", "timeout", "ttl", "deregister_critical_service_after")
_COUNTS = ("success_before_passing", "failures_before_critical", "failures_before_warning")
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
    return _service(read(SERVICE, raw), node)


def parse_check(raw: Any, *, from_file: bool = False) -> CheckSpec:
    """A check registered on its own, for the node or (with ServiceID) for a service. In a file an id is name enough.

    Raises as above.
    """
    given = read(CHECK, raw)
    given["id"] = given["id"] or given["check_id"] or given["name"]
    if not given["name"] and not (from_file and given["id"]):
        raise BadRequest("Missing check name")
    return _check(given, bad_status="Bad check status")


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


def _service(given: dict[str, Any], node: str, *, parent: ServiceRow | None = None) -> ServiceDefinition:
    """`parent`: the service whose sidecar this is."""
    if parent is not None:
        _complete_sidecar(given, parent)
    name = given["name"] or given["service"]
    service_id, kind, port, meta = given["id"] or name, given["kind"], given["port"], given["meta"]
    weights, connect = given["weights"] or {"passing": 1, "warning": 1}, given["connect"] or {}
    proxy = stored(given["proxy"], PROXY) if given["proxy"] is not None else None
    for upstream in (proxy or {}).get("upstreams", ()):
        upstream.setdefault("destination_type", "service")
    checks = tuple(_service_checks(given, service_id, name))
    if not name:
        raise BadRequest("Missing service name")
    if parent is None:
        _check_id("service ID", service_id)
    if given["address"] in {"0.0.0.0", "::", "[::]"}:
        raise BadRequest("Invalid service address")
    _check_port("Port", port)
    _check_port("Proxy.LocalServicePort", (proxy or {}).get("local_service_port", 0))
    _check_weights(weights["passing"], weights["warning"])
    _check_meta(meta)
    _check_proxy(kind, port, proxy, is_native=bool(connect.get("native")), gets_port=parent is not None)

    row = ServiceRow(
        node=node,
        id=service_id,
        name=name,
        address=given["address"],
        port=port,
        tags=given["tags"],
        meta=meta,
        tagged_addresses=given["tagged_addresses"],
        weight_passing=weights["passing"],
        weight_warning=weights["warning"],
        enable_tag_override=given["enable_tag_override"],
        kind=kind,
        proxy=proxy,
        native=bool(connect.get("native")),
    )
    sidecar = connect.get("sidecar_service")
    if sidecar is not None:
        sidecar["token"] = sidecar["token"] or given["token"]
        sidecar = _service(sidecar, node, parent=row)
    default_checks = parent is not None and given["check"] is None and given["checks"] is None
    return ServiceDefinition(row, checks, given["token"], sidecar, default_checks)


def _complete_sidecar(given: dict[str, Any], parent: ServiceRow) -> None:
    """Name, tags and meta come from the parent unless given; ID, kind and destination are the agent's to choose."""
    if given["id"]:
        raise _errors("A SidecarService cannot specify an ID as this is managed by the agent")
    if given["connect"] and given["connect"]["sidecar_service"] is not None:
        raise _errors("A SidecarService cannot have a nested SidecarService")
    proxy = given["proxy"] or {}
    given |= {
        "id": parent.id + SIDECAR_SUFFIX,
        "name": given["name"] or parent.name + SIDECAR_SUFFIX,
        "kind": given["kind"] or "connect-proxy",
        "tags": given["tags"] or parent.tags,
        "meta": given["meta"] or dict(parent.meta),
        "connect": None,
        "proxy": proxy
        | {
            "destination_service_name": proxy.get("destination_service_name") or parent.name,
            "destination_service_id": proxy.get("destination_service_id") or parent.id,
            "local_service_address": proxy.get("local_service_address") or "127.0.0.1",
            "local_service_port": proxy.get("local_service_port") or max(0, parent.port),
        },
    }


def _service_checks(given: dict[str, Any], service_id: str, service_name: str) -> Iterator[CheckSpec]:
    single, several = given["check"], given["checks"] or []
    says_anything = single and (any(single.values()) or any(single[name] is not None for name in _DURATIONS))
    checks = [single, *several] if says_anything else several
    for position, check in enumerate(checks, start=1):
        default_id = f"service:{service_id}" if len(checks) == 1 else f"service:{service_id}:{position}"
        check |= {
            "id": check["check_id"] or check["id"] or default_id,
            "name": check["name"] or f"Service '{service_name}' check",
            "service_id": service_id,
            "token": check["token"] or given["token"],
        }
        yield _check(check, bad_status="Status for checks must 'passing', 'warning', 'critical'")


def _check(given: dict[str, Any], *, bad_status: str) -> CheckSpec:
    given["args"] = given["args"] or given["script_args"]
    given["failures_before_warning"] = given["failures_before_warning"] or given["failures_before_critical"]
    interval_s, timeout_s, ttl_s, deregister_after_s = ((given[name] or 0) / SECOND for name in _DURATIONS)
    output_bytes_max = given["output_max_size"] or OUTPUT_BYTES_MAX
    if given["status"] and given["status"] not in STATUSES:
        raise BadRequest(bad_status)
    kind = kinds.asked_for(given)
    if min(given[count] for count in _COUNTS) < 0:
        raise BadRequest("Invalid check: SuccessBeforePassing and FailuresBefore* must not be negative")
    if given["failures_before_warning"] > given["failures_before_critical"]:
        raise BadRequest("Invalid check: FailuresBeforeWarning can't be higher than FailuresBeforeCritical")
    if timeout_s < 0:
        raise BadRequest("Invalid check: Timeout must not be negative")
    if output_bytes_max < 1:
        raise BadRequest("Invalid check: OutputMaxSize must be positive")
    _check_id("check ID", given["id"])
    settled = {
        "type": kind.name,
        "status": given["status"] or "critical",
        "interval_s": max(interval_s, INTERVAL_MIN_S) if kind.probe else 0.0,
        "timeout_s": timeout_s or kind.timeout_s,
        "ttl_s": ttl_s,
        "deregister_after_s": max(deregister_after_s, DEREGISTER_AFTER_MIN_S) if deregister_after_s > 0 else 0.0,
        "output_bytes_max": min(output_bytes_max, OUTPUT_BYTES_MAX),
    }
    return CheckSpec(**{name: given[name] for name in _SAME} | settled)


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


def _check_proxy(kind: str, port: int, proxy: Mapping[str, Any] | None, *, is_native: bool, gets_port: bool) -> None:
    if kind != "connect-proxy":
        return
    problems: list[str] = []
    proxy = proxy or {}
    if not str(proxy.get("destination_service_name", "")).strip():
        problems.append("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
    elif proxy["destination_service_name"] == "*":
        problems.append("Proxy.DestinationServiceName must not be a wildcard for Connect proxy services")
    if port == 0 and not gets_port:
        problems.append("Port must be set for a Connect proxy")
    if is_native:
        problems.append("A Proxy cannot also be Connect Native, only typical services")
    listeners: set[str] = set()
    destinations: set[tuple[str, str, str]] = set()
    for upstream in proxy.get("upstreams", ()):
        problems.extend(_upstream_problems(upstream, listeners, destinations))
    problems.extend(_expose_problems(proxy.get("expose", {}).get("paths", ())))
    if problems:
        raise _errors(*problems)


def _expose_problems(paths: tuple[dict[str, Any], ...]) -> Iterator[str]:
    if len({path.get("path", "") for path in paths}) < len(paths):
        yield "expose.paths: duplicate paths exposed"
    if len({path.get("listener_port", 0) for path in paths}) < len(paths):
        yield "expose.paths: duplicate listener ports exposed"
    for path in paths:
        listener, local, protocol = path.get("listener_port", 0), path.get("local_path_port", 0), path.get("protocol")
        if "path" not in path:
            yield "expose.paths: empty path exposed"
        if not 0 < listener <= 65535:
            yield f"expose.paths: invalid listener port: {listener}"
        if not 0 <= local <= 65535:
            yield f"expose.paths: invalid local path port: {local}"
        if protocol not in (None, "http", "http2"):
            yield f"protocol '{protocol}' not supported for path: {path.get('path', '')}, must be in: [http http2]"


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
