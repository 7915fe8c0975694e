"""The settings: each field of `Config` names its key, its flag, its meaning and whether a reload may change it.

Nothing else has to be edited for a new one, but the docs, which a test compares. Keys that Consul knows and Rostra has
no use for are accepted with one warning (`UNUSED`).
"""

# ruff: noqa: RUF009  (setting() returns a dataclass field)

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple

from rostra.agent.values import (
    ADDRESS,
    ADDRESSES,
    DURATION,
    DURATIONS,
    JOINS,
    LOG_LEVEL,
    PORT,
    SECRET_KEY,
    SWITCH,
    TEXT,
    TEXT_MAP,
    TEXTS,
    WHOLE,
    Kind,
    Secret,
    between,
    one_of,
)


class Definition(NamedTuple):
    """A service or check definition of a file: snake_case keys, checked; `where` is its file:line:column."""

    value: dict[str, Any]
    where: str

    def __repr__(self) -> str:
        return f"Definition({self.value.get('name', '')!r}, {self.where!r})"  # the value may hold a token


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
    raft_multiplier: int = setting(1, between(1, 10), "performance.raft_multiplier", "",
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
    ca_provider: str = setting("consul", one_of("consul"), "connect.ca_provider", "",
        "Only the built-in CA ('consul').")
    default_intention_policy: str = setting("", one_of("allow", "deny"), "default_intention_policy", "",
        "What holds where no intention matches.", reloadable=True)
    acl_enabled: bool = setting(False, SWITCH, "acl.enabled", "", "Access control by tokens (not yet enforced).")
    acl_default_policy: str = setting("allow", one_of("allow", "deny"), "acl.default_policy acl_default_policy", "",
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


def _default_of(f: Field[Any]) -> Any:
    return f.default if f.default is not MISSING else {}


DEFAULTS = {f.name: _default_of(f) for f in fields(Config) if f.metadata}
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
UNUSED_FLAGS = """
    advertise-wan grpc-port grpc-tls-port https-port join-wan log-file log-rotate-bytes log-rotate-duration
    log-rotate-max-files primary-gateway protocol raft-protocol retry-interval-wan retry-join-wan retry-max-wan
    segment serf-lan-allowed-cidrs serf-lan-bind serf-wan-allowed-cidrs serf-wan-bind serf-wan-port ui-content-path
    ui-dir
    """.split()  # noqa: SIM905
UNUSED_SWITCHES = """
    disable-host-node-id disable-keyring-file rejoin syslog ui
    """.split()  # noqa: SIM905
