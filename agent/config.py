"""The agent's configuration: flags, JSON and HCL files → one frozen `Config`, or every problem at once.

`load(argv)` reads Consul's flags and configuration keys; each field of `Config` names its key, its flag, its meaning
and whether a reload may change it, and nothing else has to be edited for a new one. Keys that Consul knows and Rostra
has no use for are accepted with one warning (`UNUSED`); keys that nobody knows are errors. Service and check
definitions are checked as the running agent checks them (`agent/file_definitions.py`) and handed on as plain maps
(`Definition`). null is "not set", and "" in lists and maps of strings. Imports the standard library, `wire.durations`,
`wire.bounds`, and `agent/hcl.py` and `agent/file_definitions.py` only where a file asks for them: it runs first of all.
"""

# ruff: noqa: RUF009  (setting() returns a dataclass field)

from __future__ import annotations

import binascii
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rostra.wire.durations import SECOND, parse_duration

if TYPE_CHECKING:
    from rostra.agent import hcl  # imported where a file is read: an agent that is told all by flags needs no parser


class Problem(NamedTuple):
    """One thing that is wrong: `where` is `file:line:column`, `-flag` or empty; `key` is the dotted key or empty."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigErrors(Exception):
    """All problems of a configuration; `str(e)` has one line for each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = tuple(problems)


class Secret:
    """A value that prints as *** wherever it ends up; `reveal()` is the only way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***" if self._value else ""

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, _memo: object) -> Secret:
        return self

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled: send reveal() to whom it is for")


class Definition(NamedTuple):
    """A service or check definition of a file: snake_case keys, checked; `where` is its file:line:column."""

    value: dict[str, Any]
    where: str

    def __repr__(self) -> str:
        return f"Definition({self.value.get('name', '')!r}, {self.where!r})"  # the value may hold a token


# ── kinds of values ──────────────────────────────────────────────────────────────────────────────────────────────────

_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
LOG_LEVELS = ("trace", "debug", "info", "warn", "error")
_LOG_LEVEL_ALIASES = {"err": "error", "warning": "warn"}
_ANY_ADDRESS = ("0.0.0.0", "::")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text) / SECOND
    except ValueError:
        raise ValueError(f'invalid duration "{text}": write it like "30s", "5m" or "1h30m"') from None


class Kind(NamedTuple):
    """How a value is read from a file (`read`) and from a flag (`parse`), and how two of them combine."""

    expects: str
    read: Callable[[Any], Any]
    parse: Callable[[str], Any]
    combine: Callable[[Any, Any], Any] | None = None  # None: the later one replaces the earlier one
    is_switch: bool = False


def _only(*types: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in types:
            raise TypeError
        return value

    return read


def _integer(value: Any) -> int:
    if type(value) is float and value.is_integer():  # 80.0 and 1e2 of a program that knows floats only
        return int(value)
    return cast(int, _only(int)(value))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise TypeError from None


def _switch(text: str) -> bool:
    if text not in _BOOLEANS:
        raise TypeError
    return _BOOLEANS[text]


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str | None) for v in value):
        raise TypeError
    return tuple(v or "" for v in value)


def _text_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str | None) for v in value.values()):
        raise TypeError
    return {k: v or "" for k, v in value.items()}


def _duration(value: Any) -> float:
    seconds = _seconds(cast(str, _only(str)(value)))
    if seconds < 0:
        raise ValueError("a duration cannot be negative")
    return seconds


def _port(value: Any) -> int:
    port = _integer(value)
    if not -1 <= port <= 65535:
        raise ValueError(f"invalid port {port}: 1 to 65535, or -1 to switch it off")
    return port


def _log_level(value: Any) -> str:
    level = str(_only(str)(value)).lower()
    level = _LOG_LEVEL_ALIASES.get(level, level)
    if level not in LOG_LEVELS:
        raise ValueError(f'invalid log level "{value}": one of {", ".join(LOG_LEVELS)}')
    return level


def _is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, UnicodeError, ValueError):
            continue
        return True
    return False


def _address(value: Any) -> str:
    text = str(_only(str)(value)).strip()
    _refuse_template(text)
    text = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if " " in text:
        raise ValueError("cannot contain multiple addresses; use addresses.http and addresses.dns to listen on several")
    if text and not _is_address(text):
        raise ValueError(f"invalid ip address: {text}")
    return text


def _addresses(value: Any) -> tuple[str, ...]:
    """Consul's space-separated list of addresses to listen on; a unix socket is written unix:///path."""
    text = str(_only(str)(value))
    _refuse_template(text)
    found = tuple(a[1:-1] if a.startswith("[") and a.endswith("]") else a for a in text.split())
    for address in found:
        if not (address.startswith("unix://") or _is_address(address)):
            raise ValueError(f"invalid ip address: {address}")
    return found


def _refuse_template(text: str) -> None:
    if "{{" in text:
        raise ValueError(
            "go-sockaddr templates are not supported: give the address itself, "
            "or bind to 0.0.0.0 and one of this host's addresses is advertised"
        )


def _joins(value: Any) -> tuple[str, ...]:
    addresses = tuple(filter(None, _texts(value)))
    for address in addresses:
        if "=" in address:
            raise ValueError(f'cloud auto-join is not supported: "{address}"; give addresses or host names')
        _refuse_template(address)
    return addresses


def _secret_key(value: Any) -> Secret:
    """The cluster secret, or the new and the old one with a comma between; nothing of it may appear in the message."""
    text = str(_only(str)(value))
    secrets = text.split(",") if text else []
    if len(secrets) > 2:
        raise ValueError("more than two keys: during a change it is the new one, a comma, and the old one")
    for secret in secrets:
        try:
            raw = binascii.a2b_base64(secret.strip().encode("ascii"), strict_mode=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) not in (16, 24, 32):
            raise ValueError(
                'not a key: it must be 32 random bytes (or 16 or 24) in base64, such as "rostra keygen" prints'
            )
    return Secret(text)


def _meta_pair(text: str) -> dict[str, str]:
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise ValueError(f'"{text}" must have the form key:value')
    return {key: value}


def _one_of(*choices: str) -> Kind:
    def read(value: Any) -> str:
        if _only(str)(value) not in choices:
            raise ValueError(f'"{value}" must be one of {", ".join(choices)}')
        return str(value)

    return Kind("a string", read, read)


def _between(low: int, high: int) -> Kind:
    def read(value: Any) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(f"cannot be {number}; it must be between {low} and {high}")
        return number

    return Kind("a whole number", read, lambda text: read(_whole(text)))


def _durations(value: Any) -> dict[str, float]:
    return {key: _seconds(text) if text else 0.0 for key, text in _text_map(value).items()}


def _append(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*old, *new)


def _update(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {**old, **new}


TEXT = Kind("a string", _only(str), str)
WHOLE = Kind("a whole number", _integer, _whole)
SWITCH = Kind("true or false", _only(bool), _switch, is_switch=True)
DURATION = Kind('a duration in quotes, such as "30s"', _duration, _duration)
PORT = Kind("a port number", _port, lambda text: _port(_whole(text)))
LOG_LEVEL = Kind("a string", _log_level, _log_level)
ADDRESS = Kind("a string", _address, _address)
ADDRESSES = Kind("a string of addresses with spaces between them", _addresses, _addresses)
SECRET = Kind("a string", lambda value: Secret(_only(str)(value)), Secret)
SECRET_KEY = Kind("a string", _secret_key, _secret_key)
TEXTS = Kind("a list of strings", _texts, lambda text: (text,), _append)
JOINS = Kind("a list of strings", _joins, lambda text: _joins([text]), _append)
TEXT_MAP = Kind("a map of strings", _text_map, _meta_pair, _update)
DURATIONS = Kind("a map of durations in quotes", _durations, str, _update)
MAP = Kind("a map", lambda value: dict(_only(dict)(value)), str, _update)


# ── forms of definitions ─────────────────────────────────────────────────────────────────────────────────────────────


class Many(NamedTuple):
    """A list of objects of one shape; one object alone is a list of one."""

    shape: Mapping[str, Any]


class MapOf(NamedTuple):
    """A map from any name to objects of one shape."""

    shape: Mapping[str, Any]


def _keep_list(value: Any) -> list[str]:
    return list(_texts(value))


def _headers(value: Any) -> dict[str, list[str]]:
    return {key: [v] if isinstance(v, str) else _keep_list(v or []) for key, v in _only(dict)(value).items()}


def _duration_text(value: Any) -> str:
    _duration(value)
    return str(value)


_LIST = Kind("a list of strings", _keep_list, str)
_WAIT = Kind('a duration in quotes, such as "10s"', _duration_text, str)
_HEADERS = Kind("a map of lists of strings", _headers, str)
_STATUS = _one_of("passing", "warning", "critical")

# Keys as Consul 1.8 to 1.22 has them. Values of opaque maps (config, meta) are handed on untouched.
CHECK_SHAPE: dict[str, Any] = {
    **dict.fromkeys(
        ("id", "check_id", "name", "notes", "service_id", "token", "http", "method", "body", "tcp", "udp", "h2ping",
         "os_service", "grpc", "docker_container_id", "shell", "alias_node", "alias_service", "tls_server_name",
         "namespace", "partition"), TEXT),
    **dict.fromkeys(("interval", "timeout", "ttl", "deregister_critical_service_after"), _WAIT),
    **dict.fromkeys(("grpc_use_tls", "h2ping_use_tls", "tls_skip_verify", "tcp_use_tls", "disable_redirects"), SWITCH),
    **dict.fromkeys(
        ("output_max_size", "success_before_passing", "failures_before_warning", "failures_before_critical"), WHOLE),
    "status": _STATUS,
    "args": _LIST,
    "script_args": _LIST,
    "header": _HEADERS,
}  # fmt: skip
_GATEWAY_SHAPE: dict[str, Any] = {"mode": TEXT}
_UPSTREAM_SHAPE: dict[str, Any] = {
    **dict.fromkeys(
        ("destination_type", "destination_namespace", "destination_partition", "destination_peer", "destination_name",
         "datacenter", "local_bind_address", "local_bind_socket_path", "local_bind_socket_mode"), TEXT),
    "local_bind_port": WHOLE,
    "config": MAP,
    "mesh_gateway": _GATEWAY_SHAPE,
}  # fmt: skip
_PROXY_SHAPE: dict[str, Any] = {
    **dict.fromkeys(
        ("destination_service_name", "destination_service_id", "local_service_address", "local_service_socket_path",
         "mode"), TEXT),
    "local_service_port": WHOLE,
    "config": MAP,
    "upstreams": Many(_UPSTREAM_SHAPE),
    "mesh_gateway": _GATEWAY_SHAPE,
    "expose": {
        "checks": SWITCH,
        "paths": Many({"path": TEXT, "protocol": TEXT, "local_path_port": WHOLE, "listener_port": WHOLE}),
    },
    "transparent_proxy": MAP,
    "access_logs": MAP,
}  # fmt: skip
SERVICE_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("id", "name", "kind", "address", "socket_path", "token", "namespace", "partition"), TEXT),
    "tags": _LIST,
    "port": WHOLE,
    "ports": Many({"name": TEXT, "port": WHOLE, "default": SWITCH}),
    "tagged_addresses": MapOf({"address": TEXT, "port": WHOLE}),
    "meta": TEXT_MAP,
    "weights": {"passing": WHOLE, "warning": WHOLE},
    "enable_tag_override": SWITCH,
    "locality": {"region": TEXT, "zone": TEXT},
    "check": CHECK_SHAPE,
    "checks": Many(CHECK_SHAPE),
    "proxy": _PROXY_SHAPE,
}
_NESTED: dict[str, Any] = {"native": SWITCH, "sidecar_service": MAP}  # refused, but in Consul's words
SERVICE_SHAPE["connect"] = {"native": SWITCH, "sidecar_service": {**SERVICE_SHAPE, "connect": _NESTED}}


# ── the settings ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Setting(NamedTuple):
    kind: Kind
    keys: tuple[str, ...]
    flag: str
    help: str
    reloadable: bool


def setting(
    default: Any, kind: Kind, keys: str = "", flag: str = "", help: str = "", *, reloadable: bool = False
) -> Any:
    """A field of Config: `keys` are dotted configuration keys (several are separated by spaces)."""
    metadata = {"setting": Setting(kind, tuple(keys.split()), flag, help, reloadable)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Config:
    """What the agent was told, with defaults filled in and addresses settled. Times are in seconds."""

    # fmt: off
    # Who and where
    dev: bool = setting(False, SWITCH, "", "dev",
        "Development mode: one server in memory on 127.0.0.1, open to this host.")
    server: bool = setting(False, SWITCH, "server", "server", "Run a server on this node.")
    bootstrap: bool = setting(False, SWITCH, "bootstrap", "bootstrap", "Form a cluster of one server.")
    bootstrap_expect: int = setting(0, WHOLE, "bootstrap_expect", "bootstrap-expect",
        "Number of servers that form the cluster at its first start.")
    non_voting_server: bool = setting(False, SWITCH, "non_voting_server read_replica", "non-voting-server",
        "Run a server that has everything and never votes.")
    node_name: str = setting("", TEXT, "node_name", "node",
        "Name of this node, unique in the cluster. Default: the host name.")
    node_id: str = setting("", TEXT, "node_id", "node-id",
        "UUID of this node. Default: a random one kept in the data directory.")
    node_meta: dict[str, str] = setting({}, TEXT_MAP, "node_meta", "node-meta",
        "key:value to attach to this node. Repeatable.", reloadable=True)
    datacenter: str = setting("dc1", TEXT, "datacenter", "datacenter", "Datacenter of this node.")
    domain: str = setting("consul", TEXT, "domain", "domain", "DNS domain.")
    alt_domain: str = setting("", TEXT, "alt_domain", "alt-domain", "A second DNS domain.")
    data_dir: str = setting("", TEXT, "data_dir", "data-dir", "Directory for the state of this node.")
    pid_file: str = setting("", TEXT, "pid_file", "pid-file", "File to write the process id to.")

    # Addresses and ports
    bind_addr: str = setting("0.0.0.0", ADDRESS, "bind_addr", "bind", "Address for cluster communication.")
    advertise_addr: str = setting("", ADDRESS, "advertise_addr", "advertise",
        "Address that other nodes are told. Default: -bind, or this host's private address.")
    client_addrs: tuple[str, ...] = setting(("127.0.0.1",), ADDRESSES, "client_addr", "client",
        "Addresses for HTTP and DNS, with spaces between them.")
    http_addrs: tuple[str, ...] = setting((), ADDRESSES, "addresses.http", "",
        "Addresses for HTTP instead of client_addr; unix:///path for a socket.")
    dns_addrs: tuple[str, ...] = setting((), ADDRESSES, "addresses.dns", "",
        "Addresses for DNS instead of client_addr.")
    http_port: int = setting(8500, PORT, "ports.http", "http-port",
        "HTTP port; -1 switches HTTP off, 0 takes any free one.")
    dns_port: int = setting(8600, PORT, "ports.dns", "dns-port", "DNS port; -1 switches DNS off, 0 takes any free one.")
    server_port: int = setting(8300, PORT, "ports.server", "server-port", "Port of the servers' RPC and Raft.")
    join_port: int = setting(8301, PORT, "ports.serf_lan", "serf-lan-port",
        "Port on which agents answer probes and joins.")
    sidecar_min_port: int = setting(21000, PORT, "ports.sidecar_min_port", "", "First of the ports given to sidecars.")
    sidecar_max_port: int = setting(21255, PORT, "ports.sidecar_max_port", "", "Last of the ports given to sidecars.")

    # Joining
    retry_join: tuple[str, ...] = setting((), JOINS, "retry_join", "retry-join",
        "Address of a server (host or host:port) to join, tried until it works. Repeatable.", reloadable=True)
    start_join: tuple[str, ...] = setting((), JOINS, "start_join", "join",
        "Like -retry-join, but the agent fails if none can be joined at the start. Repeatable.")
    retry_interval_s: float = setting(30.0, DURATION, "retry_interval", "retry-interval",
        "Time between attempts to join.", reloadable=True)
    retry_max: int = setting(0, WHOLE, "retry_max", "retry-max", "Attempts to join before giving up; 0 never gives up.")
    encrypt: Secret = setting(Secret(), SECRET_KEY, "encrypt", "encrypt",
        "The cluster secret, as printed by 'rostra keygen'.")
    raft_multiplier: int = setting(1, _between(1, 10), "performance.raft_multiplier", "",
        "Scales the election timeouts.")

    # Logs
    log_level: str = setting("info", LOG_LEVEL, "log_level", "log-level",
        "trace, debug, info, warn or error.", reloadable=True)
    log_json: bool = setting(False, SWITCH, "log_json", "log-json", "Write the log as JSON lines.")

    # HTTP
    http_response_headers: dict[str, str] = setting({}, TEXT_MAP,
        "http_config.response_headers http_api_response_headers", "",
        "Headers to add to every HTTP response.", reloadable=True)
    http_block_endpoints: tuple[str, ...] = setting((), TEXTS, "http_config.block_endpoints", "",
        "HTTP path prefixes to answer with 403.", reloadable=True)
    allow_write_http_from: tuple[str, ...] = setting((), TEXTS,
        "http_config.allow_write_http_from", "allow-write-http-from",
        "Networks (CIDR) from which writes are accepted. Repeatable.")
    http_max_conns_per_client: int = setting(200, WHOLE, "limits.http_max_conns_per_client", "",
        "Connections that one client address may have open to HTTP.", reloadable=True)
    kv_max_value_bytes: int = setting(512 * 1024, WHOLE, "limits.kv_max_value_size", "", "Largest KV value, in bytes.")
    default_query_time_s: float = setting(300.0, DURATION, "default_query_time", "default-query-time",
        "How long a blocking query without 'wait' waits.")
    max_query_time_s: float = setting(600.0, DURATION, "max_query_time", "max-query-time",
        "How long a blocking query may wait.")

    # DNS
    recursors: tuple[str, ...] = setting((), TEXTS, "recursors", "recursor",
        "Upstream DNS server for other names. Repeatable.", reloadable=True)
    dns_node_ttl_s: float = setting(0.0, DURATION, "dns_config.node_ttl", "", "TTL of node answers.", reloadable=True)
    dns_service_ttl_s: dict[str, float] = setting({}, DURATIONS, "dns_config.service_ttl", "",
        "TTL of service answers, by name or prefix*.", reloadable=True)
    dns_only_passing: bool = setting(False, SWITCH, "dns_config.only_passing", "",
        "Leave instances with warnings out of DNS.", reloadable=True)
    dns_enable_truncate: bool = setting(False, SWITCH, "dns_config.enable_truncate", "",
        "Set TC on cut UDP answers.", reloadable=True)
    dns_udp_answer_limit: int = setting(3, WHOLE, "dns_config.udp_answer_limit", "",
        "Most answers to a UDP client without EDNS.", reloadable=True)
    dns_a_record_limit: int = setting(0, WHOLE, "dns_config.a_record_limit", "",
        "Most address records in an answer; 0 is no limit.", reloadable=True)
    dns_soa_refresh_s: int = setting(3600, WHOLE, "dns_config.soa.refresh", "", "SOA refresh.", reloadable=True)
    dns_soa_retry_s: int = setting(600, WHOLE, "dns_config.soa.retry", "", "SOA retry.", reloadable=True)
    dns_soa_expire_s: int = setting(86400, WHOLE, "dns_config.soa.expire", "", "SOA expire.", reloadable=True)
    dns_soa_min_ttl_s: int = setting(0, WHOLE, "dns_config.soa.min_ttl", "",
        "SOA minimum: how long 'no such name' is kept.", reloadable=True)

    # Checks and local state
    enable_script_checks: bool = setting(False, SWITCH, "enable_script_checks", "enable-script-checks",
        "Allow script checks, from the API too.")
    enable_local_script_checks: bool = setting(False, SWITCH,
        "enable_local_script_checks", "enable-local-script-checks",
        "Allow script checks from configuration files only.")
    check_update_interval_s: float = setting(300.0, DURATION, "check_update_interval", "",
        "How often a check's output alone is written to the catalog.")
    check_output_bytes_max: int = setting(4096, WHOLE, "check_output_max_size", "check_output_max_size",
        "Longest check output that is kept, in bytes.")
    discard_check_output: bool = setting(False, SWITCH, "discard_check_output", "",
        "Keep no check output at all.", reloadable=True)
    session_ttl_min_s: float = setting(10.0, DURATION, "session_ttl_min", "", "Shortest session TTL.")

    # Mesh
    ca_provider: str = setting("consul", _one_of("consul"), "connect.ca_provider", "",
        "Only the built-in CA ('consul').")
    default_intention_policy: str = setting("", _one_of("allow", "deny"), "default_intention_policy", "",
        "What holds where no intention matches.", reloadable=True)
    acl_enabled: bool = setting(False, SWITCH, "acl.enabled", "", "Access control by tokens (not yet enforced).")
    acl_default_policy: str = setting("allow", _one_of("allow", "deny"), "acl.default_policy acl_default_policy", "",
        "What tokens may do that no rule names; decides unmatched intentions when acl.enabled.")
    # fmt: on

    # Collected, not set
    services: tuple[Definition, ...] = ()
    checks: tuple[Definition, ...] = ()
    config_files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    argv: tuple[str, ...] = field(default=(), repr=False)  # for a reload: load(config.argv); holds -encrypt

    @property
    def intentions_default_allow(self) -> bool:
        """Whether a connection that no intention speaks of is allowed."""
        if self.default_intention_policy:
            return self.default_intention_policy == "allow"
        return not (self.acl_enabled and self.acl_default_policy == "deny")


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(Config) if f.metadata}

# Keys of Consul's that have no effect here, accepted with one warning. `x.*` is x with all below it.
UNUSED: tuple[str, ...] = tuple(  # one word each, as prose: a list would be 170 lines
    """
    acl.disabled_ttl acl.down_policy acl.enable_key_list_policy acl.enable_token_persistence
    acl.enable_token_replication acl.msp_disable_bootstrap acl.policy_ttl acl.role_ttl acl.token_ttl acl.tokens.*
    acl_agent_master_token acl_agent_token acl_datacenter acl_disabled_ttl acl_down_policy acl_enable_key_list_policy
    acl_enforce_version_8 acl_master_token acl_replication_token acl_token acl_ttl addresses.grpc addresses.grpc_tls
    addresses.https advertise_addr_ipv4 advertise_addr_ipv6 advertise_addr_wan advertise_addr_wan_ipv4
    advertise_addr_wan_ipv6 advertise_reconnect_timeout ae_interval audit.* auto_config.* auto_encrypt.*
    auto_reload_config autopilot.cleanup_dead_servers autopilot.disable_upgrade_migration
    autopilot.last_contact_threshold autopilot.max_trailing_logs autopilot.min_quorum autopilot.redundancy_zone_tag
    autopilot.server_stabilization_time autopilot.upgrade_version_tag ca_file ca_path cache.* cert_file
    check_deregister_interval_min check_reap_interval cloud.* config_entries.* connect.ca_config.*
    connect.enable_mesh_gateway_wan_federation connect.enable_serverless_plugin connect.enabled
    connect.test_ca_leaf_root_change_spread consul.* disable_anonymous_signature disable_coordinates
    disable_host_node_id disable_http_unprintable_char_filter disable_keyring_file disable_remote_exec
    disable_update_check discovery_max_stale dns_config.allow_stale dns_config.cache_max_age
    dns_config.disable_compression dns_config.enable_additional_node_meta_txt dns_config.max_stale
    dns_config.prefer_namespace dns_config.recursor_strategy dns_config.recursor_timeout dns_config.use_cache
    enable_acl_replication enable_agent_tls_for_checks enable_central_service_config enable_debug enable_syslog
    encrypt_verify_incoming encrypt_verify_outgoing experiments gossip_lan.* gossip_wan.* http_config.max_header_bytes
    http_config.use_cache key_file leave_drain_time leave_on_terminate license_path limits.http_max_header_bytes
    limits.https_handshake_timeout limits.request_limits.* limits.rpc_client_timeout limits.rpc_handshake_timeout
    limits.rpc_max_burst limits.rpc_max_conns_per_client limits.rpc_rate limits.txn_max_req_len locality.* log_file
    log_rotate_bytes log_rotate_duration log_rotate_max_files log_sublevels.* partition peering.*
    performance.grpc_keepalive_interval performance.grpc_keepalive_timeout performance.leave_drain_time
    performance.rpc_hold_timeout ports.expose_max_port ports.expose_min_port ports.grpc ports.grpc_tls ports.https
    ports.proxy_max_port ports.proxy_min_port ports.serf_wan primary_datacenter primary_gateways
    primary_gateways_interval protocol raft_boltdb.* raft_logstore.* raft_protocol raft_snapshot_interval
    raft_snapshot_threshold raft_trailing_logs reconnect_timeout reconnect_timeout_wan rejoin_after_leave reporting.*
    retry_interval_wan retry_join_wan retry_max_wan revision rpc.* rpc_hold_timeout segment segment_limit
    segment_name_limit segments serf_lan serf_lan_allowed_cidrs serf_wan serf_wan_allowed_cidrs server_name
    server_rejoin_age_max skip_leave_on_interrupt snapshot_agent.* start_join_wan sync_coordinate_interval_min
    sync_coordinate_rate_target syslog_facility tagged_addresses.* telemetry.* tls.* tls_cipher_suites tls_min_version
    tls_prefer_server_cipher_suites translate_wan_addrs ui ui_config.content_path ui_config.dashboard_url_templates.*
    ui_config.dir ui_config.enabled ui_config.metrics_provider ui_config.metrics_provider_files
    ui_config.metrics_provider_options_json ui_config.metrics_proxy.* ui_content_path ui_dir unix_sockets.*
    use_streaming_backend verify_incoming verify_incoming_https verify_incoming_rpc verify_outgoing
    verify_server_hostname version version_prerelease watches xds.*
    """.split()  # noqa: SIM905
)
_UNUSED_FLAGS = """
    advertise-wan grpc-port grpc-tls-port https-port join-wan log-file log-rotate-bytes log-rotate-duration
    log-rotate-max-files primary-gateway protocol raft-protocol retry-interval-wan retry-join-wan retry-max-wan
    segment serf-lan-allowed-cidrs serf-lan-bind serf-wan-allowed-cidrs serf-wan-bind serf-wan-port ui-content-path
    ui-dir
    """.split()  # noqa: SIM905
_UNUSED_SWITCHES = """
    disable-host-node-id disable-keyring-file rejoin syslog ui
    """.split()  # noqa: SIM905


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(argv: Sequence[str]) -> Config:
    """The configuration that these arguments (without program and noun) and the files they name make up.

    Raises ConfigErrors with all problems. Later files win over earlier ones, flags over files, -hcl over flags; lists
    are joined, those of the flags first.
    """
    loading = _Loading()
    flags = loading.read_flags(argv)
    for name, text in flags.plain:
        loading.take_flag(name, text, lists=True)
    for path, wanted in loading.config_paths(flags.sources, flags.format):
        loading.read_file(path, wanted)
    for name, text in flags.plain:
        loading.take_flag(name, text, lists=False)
    for i, text in enumerate(flags.fragments):
        loading.read_text(f"-hcl[{i}]" if len(flags.fragments) > 1 else "-hcl", text, "hcl")
    return loading.finish(argv)


def validate(paths: Sequence[str], format: str = "") -> Config:
    """What `load` makes of these files and directories alone (`rostra validate`)."""
    return load([*([f"-config-format={format}"] if format else []), *(f"-config-file={path}" for path in paths)])


def read_definitions(path: str) -> list[Definition]:
    """The service definitions of one file, for `rostra services register`. Raises ConfigErrors."""
    loading = _Loading()
    loading.read_file(path, "")
    if loading.problems:
        raise ConfigErrors(loading.problems)
    return loading.services


def usage() -> str:
    """The help text of all flags."""
    lines = []
    extra = [
        ("config-file", "<path>", "JSON or HCL file to read. Repeatable."),
        ("config-dir", "<path>", "Directory whose *.json and *.hcl are read in the order of their names. Repeatable."),
        ("config-format", "<hcl|json>", "Format of all configuration files, whatever their names end in."),
        ("hcl", "<text>", "Configuration as HCL text. Repeatable."),
    ]
    known = [(s.flag, "" if s.kind.is_switch else "=<value>", s.help) for s in SETTINGS.values() if s.flag]
    for flag, value, help in sorted(known + [(f, f"={v}", h) for f, v, h in extra]):
        lines.append(f"  -{flag}{value}\n     {help}\n")
    return "\n".join(lines)


class _Flags(NamedTuple):
    plain: list[tuple[str, str]]
    sources: list[tuple[str, str]]  # ("config-file" | "config-dir", path)
    fragments: list[str]
    format: str


class _Loading:
    """The state of one load: what was set, where, and what is wrong."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, tuple[str, str]] = {}  # field → (where, key)
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.unused: dict[str, None] = {}
        self.services: list[Definition] = []
        self.checks: list[Definition] = []
        self.files: list[str] = []
        self.is_incomplete = False  # something could not be read at all: what is missing is then no problem

    def problem(self, where: str, key: str, message: str) -> None:
        self.problems.append(Problem(where, key, message))

    def named(self, key: str) -> bool:
        return any(p.key == key for p in self.problems)

    # -- flags

    def read_flags(self, argv: Sequence[str]) -> _Flags:
        flags = _Flags([], [], [], "")
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if not word.startswith("-") or word in ("-", "--"):
                extra = rest if word == "--" else [word, *rest]
                if extra:
                    self.problem("", "", f"unexpected extra arguments: {' '.join(extra)}")
                break
            name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
            known = _FLAGS.get(name)
            if known is None:
                self.is_incomplete = True
                self.problem("", "", f"flag provided but not defined: -{name}{_did_you_mean(name, _FLAGS, '-')}")
                if not equals and rest and not rest[0].startswith("-"):
                    rest.pop(0)  # most likely its value: one mistake is one line
                continue
            if not equals and not known.is_switch:
                if not rest:
                    self.is_incomplete = True
                    self.problem("", "", f"flag needs an argument: -{name}")
                    break
                text = rest.pop(0)
            flags = self._sort_flag(flags, name, text if equals or not known.is_switch else "true")
        return flags

    def _sort_flag(self, flags: _Flags, name: str, text: str) -> _Flags:
        if name in ("config-file", "config-dir"):
            flags.sources.append((name, text))
        elif name == "hcl":
            flags.fragments.append(text)
        elif name == "config-format":
            if text not in ("hcl", "json"):
                self.problem("-config-format", "", f'must be "hcl" or "json", not "{text}"')
            else:
                return flags._replace(format=text)
        else:
            flags.plain.append((name, text))
        return flags

    def take_flag(self, name: str, text: str, *, lists: bool) -> None:
        """Lists are taken before the files, single values after them."""
        kind = _FLAGS[name]
        if lists != (kind.combine is not None):
            return
        field_name = _FIELD_OF_FLAG.get(name)
        if field_name is None:
            self.unused[f"-{name}"] = None
        value = self.convert(kind.parse, kind, text, f"-{name}", "")
        if value is not _BAD and field_name is not None:
            self.put(field_name, value, f"-{name}", "")

    # -- files

    def config_paths(self, sources: list[tuple[str, str]], format: str) -> Iterator[tuple[str, str]]:
        for flag, path in sources:
            if not os.path.isdir(path):
                if flag == "config-dir":
                    self.is_incomplete = True
                    self.problem("", "", f"cannot read the configuration directory {path}: it is not a directory")
                else:
                    yield path, format
                continue
            try:
                names = sorted(os.listdir(path))
            except OSError as e:
                self.problem("", "", f"cannot read the configuration directory {path}: {e.strerror}")
                continue
            for name in names:
                if name.endswith((".json", ".hcl")) and os.path.isfile(os.path.join(path, name)):
                    yield os.path.join(path, name), format

    def read_file(self, path: str, format: str) -> None:
        if not format:
            format = os.path.splitext(path)[1].lstrip(".")
            if format not in ("hcl", "json"):
                self.is_incomplete = True
                self.problem(
                    path, "", "the name of a configuration file ends in .json or .hcl (or give -config-format)"
                )
                return
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except OSError as e:
            self.is_incomplete = True
            self.problem("", "", f"cannot read the configuration file {path}: {e.strerror}")
            return
        except UnicodeDecodeError as e:
            self.is_incomplete = True
            self.problem(path, "", f"not UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}")
            return
        self.files.append(path)
        if text:  # an empty file sets nothing, in JSON too
            self.read_text(path, text, format)

    def read_text(self, name: str, text: str, format: str) -> None:
        from rostra.agent import hcl

        try:
            document = hcl.parse_json(text, name) if format == "json" else hcl.parse_hcl(text, name)
        except hcl.SyntaxProblem as e:
            self.is_incomplete = True
            self.problem(f"{e.file}:{e.line}:{e.column}", "", e.message)
            return
        for container, key in document.repeated:
            self.warnings.append(f"{document.where(container, key)}: {key}: given more than once; the last one counts")
        self.take_settings(document, document.value, _tree(), "")

    def take_settings(self, document: hcl.Document, value: dict[str, Any], tree: dict[str, Any], prefix: str) -> None:
        for raw, item in value.items():
            where = document.where(value, raw)
            name = _find(raw, tree)
            key = prefix + (name or raw)
            if name is None:
                if "*" in tree:
                    self.unused[key] = None
                else:
                    self.problem(where, key, f"unknown configuration key{_did_you_mean(raw, tree)}")
                continue
            node = tree[name]
            if item is None:
                continue
            if node == _UNUSED_LEAF:
                self.unused[key] = None
            elif isinstance(node, _Definitions):
                self.take_definitions(document, value, raw, item, node)
            elif isinstance(node, dict):
                self.take_block(document, item, node, where, key)
            else:
                self.take_value(node, item, where, key)

    def take_block(self, document: hcl.Document, item: Any, tree: dict[str, Any], where: str, key: str) -> None:
        if set(tree) == {"*"}:
            self.unused[key] = None
            return
        blocks = [b for b in item if b is not None] if isinstance(item, list) else [item]
        if not all(isinstance(block, dict) for block in blocks):
            self.problem(where, key, f"must be a block, not {_describe(item)}")
            return
        for block in blocks:
            self.take_settings(document, block, tree, f"{key}.")

    def take_value(self, field_name: str, item: Any, where: str, key: str) -> None:
        kind = SETTINGS[field_name].kind
        if kind.combine is _update and _is_blocks(item):
            item = {k: v for block in item for k, v in block.items()}
        value = self.convert(kind.read, kind, item, where, key)
        if value is not _BAD:
            self.put(field_name, value, where, key)

    def put(self, field_name: str, value: Any, where: str, key: str) -> None:
        combine = SETTINGS[field_name].kind.combine
        if combine and field_name in self.values:
            value = combine(self.values[field_name], value)
        self.values[field_name] = value
        self.origins[field_name] = (where, key)

    def convert(self, read: Callable[[Any], Any], kind: Kind, raw: Any, where: str, key: str) -> Any:
        try:
            return read(raw)
        except TypeError:
            shown = f'"{raw}"' if where.startswith("-") and not key and isinstance(raw, str) else _describe(raw)
            self.problem(where, key, f"must be {kind.expects}, not {shown}")
        except ValueError as e:
            self.problem(where, key, str(e))
        return _BAD

    # -- definitions

    def take_definitions(
        self, document: hcl.Document, container: dict[str, Any], raw: str, item: Any, node: _Definitions
    ) -> None:
        many = isinstance(item, list)
        for i, one in enumerate(item if many else [item]):
            if one is None:
                continue
            where = document.where(item, i) if many else document.where(container, raw)
            key = f"{node.key}[{i}]" if many else node.key
            if not isinstance(one, dict):
                self.problem(where, key, f"must be a block, not {_describe(one)}")
                continue
            before = len(self.problems)
            value = self.shaped(document, one, node.shape, key)
            if not str(value.get("name", "")).strip() and len(self.problems) == before:
                what = "check" if node.shape is CHECK_SHAPE else "service"
                named = what == "check" and (value.get("id") or value.get("check_id"))
                if not named:
                    self.problem(where, key, f"a {what} definition needs a name")
            if len(self.problems) == before:
                (self.checks if node.shape is CHECK_SHAPE else self.services).append(Definition(value, where))

    def shaped(
        self, document: hcl.Document, value: dict[str, Any], shape: Mapping[str, Any], key: str
    ) -> dict[str, Any]:
        """The object with canonical keys and checked values."""
        found: dict[str, Any] = {}
        for raw, item in value.items():
            where = document.where(value, raw)
            name = _find(raw, shape)
            if name is None:
                self.problem(where, f"{key}.{raw}", f"unknown configuration key{_did_you_mean(raw, shape)}")
                continue
            if item is None:
                continue
            result = self.shaped_value(document, value, raw, item, shape[name], f"{key}.{name}", where)
            if result is not _BAD:
                found[name] = result
        return found

    def shaped_value(
        self, document: hcl.Document, container: Any, raw: Any, item: Any, form: Any, key: str, where: str
    ) -> Any:
        if isinstance(form, Kind):
            if form.combine is _update and _is_blocks(item):
                item = {k: v for block in item for k, v in block.items()}
            return self.convert(form.read, form, item, where, key)
        if isinstance(form, Many):
            items = item if isinstance(item, list) else [item]
            return [
                self.shaped_value(
                    document, item, i, one, form.shape, f"{key}[{i}]",
                    document.where(item, i) if isinstance(item, list) else where,
                )
                for i, one in enumerate(items)
                if one is not None
            ]  # fmt: skip
        blocks = item if isinstance(item, list) else [item]
        if not all(isinstance(block, dict) for block in blocks):
            self.problem(where, key, f"must be a block, not {_describe(item)}")
            return _BAD
        if isinstance(form, MapOf):
            return {
                name: self.shaped_value(document, block, name, one or {}, form.shape, f"{key}.{name}", where)
                for block in blocks
                for name, one in block.items()
            }
        if len(blocks) > 1:
            self.problem(where, key, f"given {len(blocks)} times; only one is possible")
            return _BAD
        return self.shaped(document, blocks[0] if blocks else {}, form, key)

    # -- the whole

    def finish(self, argv: Sequence[str]) -> Config:
        values = self.values
        if values.get("dev"):
            values.setdefault("server", True)
            if values["server"]:
                values.setdefault("bootstrap", True)
            values.setdefault("bind_addr", "127.0.0.1")
        for name, default in _DEFAULTS.items():
            values.setdefault(name, default)
        _settle_names(self)
        _settle_servers(self)
        _settle_addresses(self)
        _settle_rest(self)
        if self.services or self.checks:
            _settle_definitions(self)
        if self.problems:
            raise ConfigErrors(self.problems)
        if self.unused:
            self.warnings.append(
                f"accepted because Consul knows them, without effect here: {', '.join(sorted(self.unused))}"
            )
        return Config(
            **values,
            services=tuple(self.services),
            checks=tuple(self.checks),
            config_files=tuple(self.files),
            warnings=tuple(self.warnings),
            argv=tuple(argv),
        )

    def complain(self, field_name: str, message: str) -> None:
        """A problem with a setting's value, told where it was set."""
        where, key = self.origins.get(field_name, ("", SETTINGS[field_name].keys[0]))
        self.problem(where, key, message)


# ── rules between settings ───────────────────────────────────────────────────────────────────────────────────────────

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def _settle_names(loading: _Loading) -> None:
    v = loading.values
    from rostra.wire.bounds import DATACENTER_CHARS_MAX, NODE_NAME_RULE, is_node_name

    v["node_name"] = str(v["node_name"]).strip() or socket.gethostname()
    if not is_node_name(v["node_name"]):
        loading.complain("node_name", f'"{v["node_name"]}" is no name for a node: {NODE_NAME_RULE}')
    elif not re.fullmatch(r"[A-Za-z0-9-]+", v["node_name"]):
        loading.warnings.append(
            f'node name "{v["node_name"]}" will not be found by DNS: it has other characters than a-z, 0-9 and -'
        )
    v["node_id"] = str(v["node_id"]).lower()
    if v["node_id"] and not _UUID.fullmatch(v["node_id"]):
        loading.complain("node_id", f'"{v["node_id"]}" is not a UUID')
    v["datacenter"] = str(v["datacenter"]).lower()
    if not re.fullmatch(rf"[a-z0-9_-]{{1,{DATACENTER_CHARS_MAX}}}", v["datacenter"]):
        loading.complain(
            "datacenter",
            f'datacenter cannot be "{v["datacenter"]}": use only a-z, 0-9, - and _, {DATACENTER_CHARS_MAX} at most',
        )
    for name in ("domain", "alt_domain"):
        v[name] = str(v[name]).strip().strip(".").lower()
        if re.search(r"[\s/]|\.\.", v[name]) or (name == "domain" and not v[name]):
            loading.complain(name, f'"{v[name]}" is not a DNS domain')
    if v["node_meta"]:
        from rostra.agent.definition import meta_problem

        problem = meta_problem(v["node_meta"])
        if problem:
            loading.complain("node_meta", problem)


def _settle_servers(loading: _Loading) -> None:
    v = loading.values
    n = v["bootstrap_expect"]
    if v["dev"] and n > 1:
        loading.complain("bootstrap_expect", "'bootstrap_expect > 0' not allowed in dev mode")
    elif n > 0:
        if n > 1 and v["bootstrap"]:
            loading.complain("bootstrap_expect", "'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive")
        if not v["server"]:
            loading.complain("bootstrap_expect", "'bootstrap_expect > 0' requires 'server = true'")
        if n == 1:
            v["bootstrap"] = True
            if v["dev"]:
                loading.warnings.append("bootstrap_expect = 1: the same as bootstrap = true, which -dev implies")
        elif n % 2 == 0:
            survived = f"{n // 2 - 1}, as one of {n - 1}" if n > 2 else "none"
            loading.warnings.append(f"bootstrap_expect = {n}: a cluster of {n} servers survives the loss of {survived}")
    elif v["bootstrap_expect"] < 0:
        loading.complain("bootstrap_expect", f"cannot be {n}")
    elif v["bootstrap"] and not v["server"]:
        loading.complain("bootstrap", "'bootstrap = true' requires 'server = true'")
    if v["non_voting_server"]:
        if not v["server"]:
            loading.complain("non_voting_server", "'non_voting_server = true' requires 'server = true'")
        elif v["dev"] or v["bootstrap"]:
            loading.complain("non_voting_server", "a server that never votes cannot form a cluster by itself")
        elif v["bootstrap_expect"] > 0:
            loading.warnings.append("bootstrap_expect does not count here: a server that never votes founds no cluster")
    if v["dev"] and v["data_dir"]:
        loading.warnings.append("data_dir is not used with -dev: the state is in memory and ends with the agent")
    elif not v["dev"] and not v["data_dir"] and not loading.is_incomplete and not loading.named("data_dir"):
        loading.problem("", "", "data_dir cannot be empty: give -data-dir=PATH, or -dev to try things out")
    if v["data_dir"]:
        v["data_dir"] = os.path.abspath(v["data_dir"])
        if os.path.exists(v["data_dir"]) and not os.path.isdir(v["data_dir"]):
            loading.complain("data_dir", f"{v['data_dir']} is not a directory")


def _settle_addresses(loading: _Loading) -> None:
    v = loading.values
    v["bind_addr"] = v["bind_addr"] or "0.0.0.0"
    if v["advertise_addr"] in _ANY_ADDRESS:
        loading.complain("advertise_addr", "advertise address cannot be 0.0.0.0, :: or [::]")
    elif not v["advertise_addr"] and v["bind_addr"] not in _ANY_ADDRESS:
        v["advertise_addr"] = v["bind_addr"]
    elif not v["advertise_addr"] and not loading.problems:
        try:
            v["advertise_addr"] = pick_address(host_addresses(), ipv6=v["bind_addr"] == "::")
        except ValueError as e:
            loading.complain("bind_addr", str(e))
    v["client_addrs"] = v["client_addrs"] or ("127.0.0.1",)
    v["http_addrs"] = v["http_addrs"] or v["client_addrs"]
    v["dns_addrs"] = v["dns_addrs"] or tuple(a for a in v["client_addrs"] if not a.startswith("unix://"))
    if any(a.startswith("unix://") for a in v["dns_addrs"]):
        loading.complain("dns_addrs", "DNS is not served on unix sockets")
    for kind in ("sidecar",):
        if v[f"{kind}_min_port"] > v[f"{kind}_max_port"]:
            loading.complain(f"{kind}_min_port", f"{v[f'{kind}_min_port']} is above ports.{kind}_max_port")
    for field_name, is_wanted in (("join_port", True), ("server_port", v["server"])):
        if is_wanted and v[field_name] < 1 and not (v["dev"] and field_name == "server_port" and not v[field_name]):
            loading.complain(field_name, f"invalid port {v[field_name]}: other nodes have to know it; 1 to 65535")
    _refuse_shared_ports(loading)
    exposed = [a for a in dict.fromkeys((v["bind_addr"], *v["http_addrs"])) if not _is_local(a)]
    if v["dev"] and exposed:
        loading.warnings.append(
            f"-dev is open to everyone who can reach {', '.join(exposed)}: no access control, state in memory"
        )


def _refuse_shared_ports(loading: _Loading) -> None:
    v = loading.values
    taken: list[tuple[str, str, int]] = []
    listeners = [("DNS", "dns_port", v["dns_addrs"]), ("HTTP", "http_port", v["http_addrs"])]
    listeners += [("join", "join_port", (v["bind_addr"],))]
    listeners += [("server RPC", "server_port", (v["bind_addr"],))] if v["server"] else []
    for label, field_name, addresses in listeners:
        port = v[field_name]
        for address in addresses:
            for other, other_address, other_port in taken:
                same = address == other_address or {address, other_address} & set(_ANY_ADDRESS)
                if port > 0 and port == other_port and same and other != label:
                    loading.complain(field_name, f"{label} address {address}:{port} already configured for {other}")
            taken.append((label, address, port))


def _settle_rest(loading: _Loading) -> None:
    v = loading.values
    for name in ("http_max_conns_per_client", "kv_max_value_bytes", "retry_max"):
        if v[name] < 0:
            loading.complain(name, f"cannot be {v[name]}")
    if v["check_output_bytes_max"] < 1:
        loading.complain("check_output_bytes_max", f"cannot be {v['check_output_bytes_max']}; it must be at least 1")
    if v["retry_interval_s"] == 0:
        loading.complain("retry_interval_s", "cannot be 0")
    if v["allow_write_http_from"]:
        import ipaddress

        for network in v["allow_write_http_from"]:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                loading.complain("allow_write_http_from", f'"{network}" is not a network such as 10.0.0.0/8')
    for name in ("dns_udp_answer_limit", "dns_a_record_limit"):
        if v[name] < 0:
            loading.complain(name, f"cannot be {v[name]}; 0 or more")
    for name in ("dns_soa_refresh_s", "dns_soa_retry_s", "dns_soa_expire_s", "dns_soa_min_ttl_s"):
        if not 0 <= v[name] < 2**32:
            loading.complain(name, f"cannot be {v[name]}; 0 to 4294967295 seconds")
    for recursor in v["recursors"]:
        host, colon, port = recursor.rpartition(":")
        plain = recursor.strip("[]")
        if plain in _ANY_ADDRESS or host.strip("[]") in _ANY_ADDRESS:
            loading.complain("recursors", f'"{recursor}" is no address of a server: it cannot be 0.0.0.0, :: or [::]')
            continue
        if not _is_address(plain) and not (colon and port.isdigit() and _is_address(host.strip("[]"))):
            loading.complain("recursors", f'"{recursor}" is not an address or address:port')
    if v["acl_enabled"]:
        loading.warnings.append("acl.enabled: tokens are not enforced by this version; every request is allowed")


def _settle_definitions(loading: _Loading) -> None:
    from rostra.agent.definition import Scripts
    from rostra.agent.file_definitions import problems

    v = loading.values
    scripts = Scripts(v["enable_script_checks"], v["enable_script_checks"] or v["enable_local_script_checks"])
    data_dir = "" if v["dev"] else v["data_dir"]
    found = problems(loading.services, loading.checks, node=v["node_name"], scripts=scripts, data_dir=data_dir)
    for where, what, message in found:
        loading.problem(where, what, message)


def _is_local(address: str) -> bool:
    return address.startswith(("127.", "unix://")) or address == "::1"


def pick_address(addresses: Sequence[str], *, ipv6: bool) -> str:
    """The one private address of a host that binds to all; ValueError says what to do where it is not one."""
    family = [a for a in addresses if (":" in a) == ipv6 and not _is_local(a)]
    private = family if ipv6 else [a for a in family if _is_private(a)]
    if len(private) == 1:
        return private[0]
    if len(family) == 1 and not private:
        return family[0]
    if not family:
        raise ValueError("no address to advertise was found on this host: give one with -advertise or -bind")
    raise ValueError(
        f"which of {', '.join(private or family)} shall other nodes use? Give one with -advertise or -bind"
    )


def _is_private(address: str) -> bool:
    a, b = (int(part) for part in address.split(".")[:2])
    return a == 10 or (a == 172 and 16 <= b <= 31) or (a == 192 and b == 168) or (a == 100 and 64 <= b <= 127)


def host_addresses() -> list[str]:
    """The addresses of this host's interfaces, without link-local ones."""
    import array
    import fcntl
    import struct

    entry = 40  # bytes of a struct ifreq on 64-bit Linux; the IPv4 address is at 20
    table = array.array("B", bytes(entry * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(table), table.buffer_info()[0])
        used = struct.unpack("iL", fcntl.ioctl(probe, 0x8912, request))[0]  # SIOCGIFCONF
    found = [socket.inet_ntoa(table[at + 20 : at + 24].tobytes()) for at in range(0, used, entry)]
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as lines:
            for line in lines:
                digits, _index, _prefix, scope, *_rest = line.split()
                if scope == "00":
                    found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    except OSError:
        pass
    return list(dict.fromkeys(a for a in found if not a.startswith("169.254.")))


# ── tables made from the settings ────────────────────────────────────────────────────────────────────────────────────


class _Definitions(NamedTuple):
    key: str
    shape: Mapping[str, Any]


_BAD: Any = object()
_UNUSED_LEAF = "*unused*"
_FIELD_OF_FLAG = {s.flag: name for name, s in SETTINGS.items() if s.flag} | {"read-replica": "non_voting_server"}
_FLAGS: dict[str, Kind] = {
    **{flag: SETTINGS[name].kind for flag, name in _FIELD_OF_FLAG.items()},
    **dict.fromkeys(("config-file", "config-dir", "config-format", "hcl"), TEXT),
    **dict.fromkeys(_UNUSED_FLAGS, TEXT),
    **dict.fromkeys(_UNUSED_SWITCHES, SWITCH),
}


def _default_of(f: Field[Any]) -> Any:
    return f.default if f.default is not MISSING else {}


_DEFAULTS = {f.name: _default_of(f) for f in fields(Config) if f.metadata}
_cached_tree: dict[str, Any] = {}


def _tree() -> dict[str, Any]:
    """All known keys: nested dicts down to a field's name, `_UNUSED_LEAF` or `_Definitions`."""
    if not _cached_tree:
        for path in UNUSED:
            _plant(path, _UNUSED_LEAF)
        for name, s in SETTINGS.items():
            for path in s.keys:
                _plant(path, name)
        for key, shape in (("service", SERVICE_SHAPE), ("check", CHECK_SHAPE)):
            _plant(key, _Definitions(key, shape))
            _plant(f"{key}s", _Definitions(f"{key}s", shape))
    return _cached_tree


def _plant(path: str, leaf: Any) -> None:
    *blocks, last = path.split(".")
    here = _cached_tree
    for block in blocks:
        here = here.setdefault(block, {})
    here[last] = leaf


def _find(raw: str, known: Mapping[str, Any]) -> str | None:
    """The known key that is meant: case does not count, and CamelCase is snake_case."""
    if raw in known:
        return raw
    folded = raw.replace("_", "").lower()
    return next((name for name in known if name.replace("_", "") == folded), None)


def _did_you_mean(word: str, known: Mapping[str, Any], prefix: str = "") -> str:
    import difflib

    close = difflib.get_close_matches(word.lower(), [k for k in known if k != "*"], n=1, cutoff=0.7)
    return f'; did you mean "{prefix}{close[0]}"?' if close else ""


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _describe(value: Any) -> str:
    """What a value is, in words; not the value itself where it may be a secret or long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "a block"
