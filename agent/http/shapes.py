"""Rows of the state as the JSON objects of the API: the one place that knows Consul's field names and null habits.

Functions take row tuples as they came over the wire. Empty is `null` for a node's maps and an instance's Meta, `{}` in
the flat catalog form, `[]` for tags; Weights, Proxy and Connect are always there. Measured against Consul 1.8.7.
"""

from __future__ import annotations

import base64
import hashlib
from binascii import b2a_base64
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from rostra.agent.schema import api_name
from rostra.agent.servers_port import Key, Row
from rostra.server.state.rows import CheckRow, IntentionRow, KVRow, NodeRow, RootRow, ServiceRow, read_row, session_row
from rostra.wire.durations import format_duration

Json = dict[str, Any]

#: Keys of users' own data below these are never renamed.
_OPAQUE = frozenset({"config", "Config", "meta", "Meta"})


def node_json(row: Row) -> Json:
    n = read_row(NodeRow, row)
    return {
        "ID": n.id,
        "Node": n.name,
        "Address": n.address,
        "Datacenter": n.datacenter,
        "TaggedAddresses": n.tagged_addresses or None,
        "Meta": n.meta or None,
        "CreateIndex": n.create_index,
        "ModifyIndex": n.modify_index,
    }


def service_json(row: Row) -> Json:
    """An instance as in `health/service` and `catalog/node`."""
    s = read_row(ServiceRow, row)
    out: Json = {"Kind": s.kind} if s.kind else {}
    out |= {"ID": s.id, "Service": s.name, "Tags": s.tags, "Address": s.address}
    if s.tagged_addresses:
        out["TaggedAddresses"] = tagged_json(s.tagged_addresses)
    out |= {
        "Meta": s.meta or None,
        "Port": s.port,
        "Weights": {"Passing": s.weight_passing, "Warning": s.weight_warning},
        "EnableTagOverride": s.enable_tag_override,
        "Proxy": proxy_json(s.proxy),
        "Connect": {"Native": True} if s.native else {},
        "CreateIndex": s.create_index,
        "ModifyIndex": s.modify_index,
    }
    return out


def catalog_service_json(node_row: Row, service_row: Row) -> Json:
    """The flat form of `catalog/service`."""
    n, s = read_row(NodeRow, node_row), read_row(ServiceRow, service_row)
    out: Json = {
        "ID": n.id,
        "Node": n.name,
        "Address": n.address,
        "Datacenter": n.datacenter,
        "TaggedAddresses": n.tagged_addresses or None,
        "NodeMeta": n.meta or None,
        "ServiceKind": s.kind,
        "ServiceID": s.id,
        "ServiceName": s.name,
        "ServiceTags": s.tags,
        "ServiceAddress": s.address,
    }
    if s.tagged_addresses:
        out["ServiceTaggedAddresses"] = tagged_json(s.tagged_addresses)
    out |= {
        "ServiceWeights": {"Passing": s.weight_passing, "Warning": s.weight_warning},
        "ServiceMeta": s.meta,
        "ServicePort": s.port,
        "ServiceEnableTagOverride": s.enable_tag_override,
        "ServiceProxy": proxy_json(s.proxy),
        "ServiceConnect": {"Native": True} if s.native else {},
        "CreateIndex": s.create_index,
        "ModifyIndex": s.modify_index,
    }
    return out


def check_json(row: Row) -> Json:
    c = read_row(CheckRow, row)
    return {
        "Node": c.node,
        "CheckID": c.id,
        "Name": c.name,
        "Status": c.status,
        "Notes": c.notes,
        "Output": c.output,
        "ServiceID": c.service_id,
        "ServiceName": c.service_name,
        "ServiceTags": c.service_tags,
        "Type": c.type,
        "Definition": c.definition,
        "CreateIndex": c.create_index,
        "ModifyIndex": c.modify_index,
    }


def instance_json(row: Row) -> Json:
    """A row of `health.service`: node, service and its checks."""
    node, service, checks = row
    return {"Node": node_json(node), "Service": service_json(service), "Checks": [check_json(c) for c in checks]}


def tagged_json(addresses: dict[str, dict[str, Any]]) -> Json:
    return {
        name: {"Address": a.get("address", a.get("Address", "")), "Port": a.get("port", a.get("Port", 0))}
        for name, a in addresses.items()
    }


def proxy_json(proxy: dict[str, Any] | None) -> Json:
    """The stored snake_case proxy map in the API's names. Consul always shows MeshGateway and Expose."""
    out: Json = api_names(proxy) if proxy else {}
    for upstream in out.get("Upstreams") or ():
        for name, default in _UPSTREAM_DEFAULTS.items():
            upstream.setdefault(name, default() if callable(default) else default)
    out.setdefault("MeshGateway", {})
    out["Expose"] = _expose_json(out.get("Expose") or {})
    return out


def _expose_json(given: Json) -> Json:
    """Shows only fields that are set, and always where a path came from."""
    out: Json = {"Checks": True} if given.get("Checks") else {}
    if given.get("Paths"):
        out["Paths"] = [
            {name: path[name] for name in _PATH_FIELDS if path.get(name)}
            | {"ParsedFromCheck": bool(path.get("ParsedFromCheck"))}
            for path in given["Paths"]
        ]
    return out


_PATH_FIELDS = ("ListenerPort", "Path", "LocalPathPort", "Protocol")


_UPSTREAM_DEFAULTS: dict[str, Any] = {
    "DestinationType": "",
    "DestinationName": "",
    "Datacenter": "",
    "LocalBindPort": 0,
    "Config": None,
    "MeshGateway": dict,
}


def api_names(value: Any) -> Any:
    """Maps with their keys in CamelCase; users' own maps are left alone."""
    if isinstance(value, dict):
        return {_api_name(k): (v if k in _OPAQUE else api_names(v)) for k, v in value.items()}
    return [api_names(v) for v in value] if isinstance(value, (list, tuple)) else value


@lru_cache(4096)
def _api_name(key: str) -> str:
    return api_name(key) if key and (key[0].islower() or "_" in key) else key


def kv_fragment(key: Key, row: Row) -> bytes:
    kv = read_row(KVRow, row)
    value = b'"' + b2a_base64(kv.value, newline=False) + b'"' if kv.value else b"null"
    session = b',"Session":%s' % orjson.dumps(kv.session) if kv.session else b""
    return b'{"LockIndex":%d,"Key":%s,"Flags":%d,"Value":%s%s,"CreateIndex":%d,"ModifyIndex":%d}' % (
        kv.lock_index,
        orjson.dumps(kv.key),
        kv.flags,
        value,
        session,
        kv.create_index,
        kv.modify_index,
    )


def session_json(row: Row) -> Json:
    s = session_row(*row)
    shown = {
        "ID": s.id,
        "Name": s.name,
        "Node": s.node,
        "LockDelay": s.lock_delay_ms * 1_000_000 if s.lock_delay_ns < 0 else s.lock_delay_ns,
        "Behavior": s.behavior,
        "TTL": s.ttl or ttl_text(s.ttl_ms),
        "NodeChecks": s.node_checks,
        "ServiceChecks": [{"ID": c, "Namespace": ""} for c in s.service_checks] or None,
    }
    if s.checks:
        shown["Checks"] = s.checks
    return shown | {"CreateIndex": s.create_index, "ModifyIndex": s.modify_index}


def ttl_text(ms: int) -> str:
    """A TTL as it is shown where the row does not say how it was given."""
    if not ms:
        return ""
    return f"{ms // 1000}s" if ms % 1000 == 0 else format_duration(ms * 1_000_000)


def intention_json(row: Row) -> Json:
    i = read_row(IntentionRow, row)
    digest = hashlib.sha256(repr((i.source, i.destination, i.action, i.description, sorted(i.meta.items()))).encode())
    return {
        "ID": i.id,
        "Description": i.description,
        "SourceNS": "default",
        "SourceName": i.source,
        "DestinationNS": "default",
        "DestinationName": i.destination,
        "SourceType": "consul",
        "Action": i.action,
        "DefaultAddr": "",
        "DefaultPort": 0,
        "Meta": i.meta,
        "Precedence": i.precedence,
        "CreatedAt": rfc3339(i.created_at_ms),
        "UpdatedAt": rfc3339(i.updated_at_ms),
        "Hash": base64.b64encode(digest.digest()).decode(),
        "CreateIndex": i.create_index,
        "ModifyIndex": i.modify_index,
    }


def root_json(row: Row) -> Json:
    r = read_row(RootRow, row)
    return {
        "ID": r.id,
        "Name": r.name,
        "SerialNumber": r.serial,
        "SigningKeyID": r.signing_key_id,
        "ExternalTrustDomain": r.trust_domain.removesuffix(".consul"),
        "NotBefore": rfc3339(r.not_before_ms),
        "NotAfter": rfc3339(r.not_after_ms),
        "RootCert": r.cert_pem,
        "IntermediateCerts": r.intermediates_pem or None,
        "Active": r.active,
        "PrivateKeyType": r.key_type,
        "PrivateKeyBits": r.key_bits,
        "CreateIndex": r.create_index,
        "ModifyIndex": r.modify_index,
    }


def rfc3339(ms: int) -> str:
    at = datetime.fromtimestamp(ms / 1000, UTC)
    fraction = f".{ms % 1000:03d}".rstrip("0") if ms % 1000 else ""
    return at.strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"


def as_array(parts: list[bytes]) -> bytes:
    """`[a,b,c]`. The brackets are added to the outer fragments, so that a megabyte is copied once, not twice."""
    if not parts:
        return b"[]"
    if len(parts) == 1:
        return b"[" + parts[0] + b"]"
    parts[0] = b"[" + parts[0]
    parts[-1] += b"]"
    return b",".join(parts)


def as_object(parts: list[bytes]) -> bytes:
    """`{…}` of fragments that are `"name":value` each."""
    return b"{" + b",".join(parts) + b"}"
