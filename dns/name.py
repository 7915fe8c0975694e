"""What a query's name asks for: labels → Lookup. Pure, and total: every name has an answer.

Labels are lower case here (DNS compares names without regard to case; the packet keeps its spelling elsewhere).
The kind of a name is its rightmost keyword, as in Consul: `v1.web.service.dc1.consul` is tag `v1` of service `web`.
Names that have no records but others below them (`service.consul`) are `empty`, not unknown: resolvers that minimise
the names they ask for would otherwise conclude that nothing lies below (RFC 8020).
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

TYPE_SRV = 33

Labels = tuple[str, ...]


class Kind(Enum):
    SERVICE = "service"
    NODE = "node"
    ADDRESS = "addr"
    CONNECT = "connect"
    APEX = "apex"
    SERVERS = "ns"
    EMPTY = "empty"  # exists, has no records of its own
    UNKNOWN = "unknown"  # inside the domain, and there is no such name
    REVERSE = "reverse"
    OUTSIDE = "outside"  # not ours


class Lookup(NamedTuple):
    """`name` is the service's or node's name, or the packed address's hex; `zone` the domain it was asked under."""

    kind: Kind
    name: str = ""
    tag: str = ""
    datacenter: str = ""
    zone: Labels = ()


OUTSIDE = Lookup(Kind.OUTSIDE)

_KEYWORDS = frozenset({"service", "node", "addr", "connect", "virtual", "ingress", "query"})
_HEX = frozenset("0123456789abcdef")


def parse_zone(domain: str) -> Labels:
    """Labels of a configured domain: `consul.` and `Consul` alike give `("consul",)`. Raises ValueError."""
    labels = tuple(domain.strip(".").lower().split("."))
    if not all(0 < len(label) <= 63 and label.isascii() for label in labels) or sum(map(len, labels)) > 200:
        raise ValueError(f"{domain!r} is not a domain name")
    return labels


def parse_name(labels: Labels, qtype: int, zones: tuple[Labels, ...], datacenter: str) -> Lookup:
    """The meaning of `labels` (lower case) asked with `qtype`, served under any of `zones`."""
    for zone in zones:
        if labels[-len(zone) :] == zone:
            return _parse_inside(labels[: -len(zone)], qtype, zone, datacenter)
    if labels[-1:] == ("arpa",):
        return _parse_reverse(labels)
    return OUTSIDE


def _parse_inside(labels: Labels, qtype: int, zone: Labels, datacenter: str) -> Lookup:
    if not labels:
        return Lookup(Kind.APEX, zone=zone)
    if labels == ("ns",):
        return Lookup(Kind.SERVERS, zone=zone)
    unknown = Lookup(Kind.UNKNOWN, zone=zone)
    for at in range(len(labels) - 1, -1, -1):
        label = labels[at]
        if label in _KEYWORDS:
            keyword, parts, suffix = label, labels[:at], labels[at + 1 :]
            break
        # RFC 2782 names may leave out "service", but only where SRV is asked.
        if qtype == TYPE_SRV and label.startswith("_"):
            keyword, parts, suffix = "service", labels[: at + 1], labels[at + 1 :]
            break
    else:
        is_datacenter = _datacenter_of(labels, datacenter) == datacenter or labels == ("dc",)
        if labels[0] == "_tcp" and _datacenter_of(labels[1:], datacenter) == datacenter:
            return Lookup(Kind.EMPTY, zone=zone)  # `_web._tcp.consul` lies below
        return Lookup(Kind.EMPTY, zone=zone) if is_datacenter else unknown

    where = _datacenter_of(suffix, datacenter)
    if where is None:
        return unknown
    if keyword == "addr":
        return _parse_address(parts, where, zone)
    if where != datacenter:
        return unknown
    if keyword == "service":
        return _parse_service(parts, where, zone)
    if keyword == "connect":  # tags say nothing here, as in Consul
        return Lookup(Kind.CONNECT, parts[-1], "", where, zone) if parts else Lookup(Kind.EMPTY, zone=zone)
    if keyword == "node":
        if not parts:
            return Lookup(Kind.EMPTY, zone=zone)
        return Lookup(Kind.NODE, ".".join(parts), "", where, zone)
    return unknown


def _datacenter_of(suffix: Labels, default: str) -> str | None:
    """`()`, `(dc,)` and `(dc, "dc")` name a datacenter; anything else names nothing."""
    if not suffix:
        return default
    if len(suffix) == 1 or (len(suffix) == 2 and suffix[1] == "dc"):
        return suffix[0]
    return None


def _parse_service(parts: Labels, datacenter: str, zone: Labels) -> Lookup:
    if not parts or parts == ("_tcp",):
        return Lookup(Kind.EMPTY, zone=zone)
    if len(parts) == 2 and parts[0].startswith("_") and parts[1].startswith("_"):
        tag = parts[1][1:]
        return Lookup(Kind.SERVICE, parts[0][1:], "" if tag == "tcp" else tag, datacenter, zone)
    # A tag may contain dots; a service's name may not.
    return Lookup(Kind.SERVICE, parts[-1], ".".join(parts[:-1]), datacenter, zone)


def _parse_address(parts: Labels, datacenter: str, zone: Labels) -> Lookup:
    if not parts:
        return Lookup(Kind.EMPTY, zone=zone)
    if len(parts) == 1 and len(parts[0]) in (8, 32) and _HEX.issuperset(parts[0]):
        return Lookup(Kind.ADDRESS, parts[0], "", datacenter, zone)
    return Lookup(Kind.UNKNOWN, zone=zone)


def _parse_reverse(labels: Labels) -> Lookup:
    """`1.0.0.10.in-addr.arpa` → the packed address as hex; incomplete ones are not ours."""
    if len(labels) == 6 and labels[4] == "in-addr":
        octets = labels[3::-1]
        if all(o.isascii() and o.isdigit() and len(o) <= 3 and int(o) <= 255 for o in octets):
            return Lookup(Kind.REVERSE, bytes(map(int, octets)).hex())
    if len(labels) == 34 and labels[32] == "ip6":
        nibbles = "".join(labels[31::-1])
        if len(nibbles) == 32 and _HEX.issuperset(nibbles):
            return Lookup(Kind.REVERSE, nibbles)
    return OUTSIDE
