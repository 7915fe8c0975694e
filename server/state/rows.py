"""The rows of the state's tables, as immutable named tuples: the public types of every RPC answer.

On the wire and in snapshots a row is a msgpack array in this field order, which agents read with `read_row`. So a field
is never renamed, moved or removed; a new one goes to the end with a default. Maps in a row are never changed in place.
`create_index` and `modify_index` are indexes of the state (X-Consul-Index), not of Raft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

R = TypeVar("R", bound=tuple[Any, ...])


def read_row(kind: type[R], fields: Sequence[Any]) -> R:
    """A row that a server of any version sent: fields that this one does not know are left out, others have defaults.

    Raises TypeError where a field is missing that every version has.
    """
    try:
        return kind(*fields)
    except TypeError:
        return kind(*fields[: len(kind._fields)])  # type: ignore[attr-defined]


class NodeRow(NamedTuple):
    name: str
    id: str  # UUID or ""
    address: str
    datacenter: str
    tagged_addresses: dict[str, str] = {}
    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0


class ServiceRow(NamedTuple):
    node: str
    id: str
    name: str
    address: str = ""  # "" means the node's
    port: int = 0
    tags: tuple[str, ...] = ()
    meta: dict[str, str] = {}
    tagged_addresses: dict[str, dict[str, Any]] = {}  # name -> {"address": str, "port": int}
    weight_passing: int = 1
    weight_warning: int = 1
    enable_tag_override: bool = False
    kind: str = ""  # "", "connect-proxy", "mesh-gateway", ...
    proxy: dict[str, Any] | None = None  # snake_case keys as in Consul's HCL, see agent/definition.py
    native: bool = False  # Connect.Native
    create_index: int = 0
    modify_index: int = 0


class CheckRow(NamedTuple):
    node: str
    id: str
    name: str = ""
    status: str = "critical"  # passing | warning | critical
    notes: str = ""
    output: str = ""
    service_id: str = ""
    service_name: str = ""
    service_tags: tuple[str, ...] = ()
    type: str = ""  # http | tcp | ttl | script | alias | ""
    definition: dict[str, Any] = {}
    create_index: int = 0
    modify_index: int = 0


class KVRow(NamedTuple):
    key: str
    value: bytes
    flags: int = 0
    lock_index: int = 0
    session: str = ""
    create_index: int = 0
    modify_index: int = 0


class SessionRow(NamedTuple):
    id: str
    node: str
    name: str = ""
    lock_delay_ms: int = 15000
    behavior: str = "release"  # release | delete
    ttl_ms: int = 0  # 0: no TTL
    node_checks: tuple[str, ...] = ("serfHealth",)
    service_checks: tuple[str, ...] = ()
    create_index: int = 0
    modify_index: int = 0

    # A tail that only those rows have of which it says more: older versions read all the others.

    @property
    def checks(self) -> tuple[str, ...]:
        """More checks to rely on, under the name that they had before Consul 1.7."""
        return self[10] if len(self) > 10 else ()  # type: ignore[misc, no-any-return]

    @property
    def ttl(self) -> str:
        """As it was given, where `ttl_ms` would be shown otherwise."""
        return self[11] if len(self) > 10 else ""  # type: ignore[misc, no-any-return]

    @property
    def lock_delay_ns(self) -> int:
        """As it was given, where `lock_delay_ms` is rounded or bounded."""
        return self[12] if len(self) > 10 else -1  # type: ignore[misc, no-any-return]


def session_row(*fields: Any) -> SessionRow:
    """The row that came as an array, with its tail where it has one; what this version does not know is left out."""
    return tuple.__new__(SessionRow, fields[:13]) if len(fields) > 12 else SessionRow(*fields[:10])


class IntentionRow(NamedTuple):
    source: str  # service name or "*"
    destination: str
    action: str  # allow | deny
    id: str = ""
    description: str = ""
    meta: dict[str, str] = {}
    precedence: int = 9
    created_at_ms: int = 0  # for display only
    updated_at_ms: int = 0
    create_index: int = 0
    modify_index: int = 0


class RootRow(NamedTuple):
    """A root certificate of the mesh CA. The private key lies in a table of its own that no query reads."""

    id: str  # hex SHA-1 fingerprint with colons, as Consul shows it
    name: str
    serial: int
    signing_key_id: str
    trust_domain: str  # "<cluster uuid>.consul"
    not_before_ms: int
    not_after_ms: int
    cert_pem: str
    intermediates_pem: tuple[str, ...] = ()
    active: bool = True
    key_type: str = "ec"
    key_bits: int = 256
    create_index: int = 0
    modify_index: int = 0


class MemberRow(NamedTuple):
    """A node that enrolled: its name is bound to the first key that it showed."""

    name: str
    node_id: str
    role: str  # server | client
    address: str  # advertised IP
    key_hash: str  # hex SHA-256 of the node key's SubjectPublicKeyInfo
    status: str = "alive"  # alive | failed | left
    serf_port: int = 8301
    rpc_port: int = 8300
    version: str = ""
    anchors: tuple[str, ...] = ()  # hashes of trust anchors that the node reported
    create_index: int = 0
    modify_index: int = 0
    voter: bool = False  # in the replicated member list of Raft


class ClusterRow(NamedTuple):
    """What was decided once, at bootstrap. The cluster CA's private key lies among the secrets."""

    cluster_id: str
    datacenter: str
    ca_cert_pem: str = ""
    created_at_ms: int = 0
    create_index: int = 0
    modify_index: int = 0


class CaRow(NamedTuple):
    """The mesh CA as a whole."""

    trust_domain: str = ""
    active_root_id: str = ""
    config: dict[str, Any] = {}
    config_index: int = 0  # index of the state at which `config` changed
    create_index: int = 0
    modify_index: int = 0


class AutopilotRow(NamedTuple):
    """How the leader cares for the servers; names and defaults as Consul's, the last one is ours."""

    cleanup_dead_servers: bool = True
    last_contact_threshold_ms: int = 200
    max_trailing_logs: int = 250
    min_quorum: int = 0
    server_stabilization_time_ms: int = 10_000
    auto_admit_servers: bool = False  # whoever holds `encrypt` may become a server, and has every secret then
    create_index: int = 0
    modify_index: int = 0
