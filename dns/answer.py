"""What a Lookup is answered with: rcode and records, from values alone. Pure; `resolver.py` orders and encodes them.

An instance counts while neither its node nor itself has a critical check; `only_passing` also leaves out warnings.
A service without any such instance does not exist for DNS (NXDOMAIN, as in Consul); a name that exists without records
of the asked type is NODATA: no answer, and the SOA in Authority that says for how long to remember it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from rostra.dns.message import (
    NAME_BYTES_MAX,
    NOERROR,
    NXDOMAIN,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_CNAME,
    TYPE_NS,
    TYPE_PTR,
    TYPE_SOA,
    TYPE_SRV,
    TYPE_TXT,
    Record,
    encode_host,
    encode_labels,
    encode_name,
    encode_record,
    encode_srv_record,
    encode_txt,
    owner_is_question,
    pointer,
)
from rostra.dns.name import Kind, Labels, Lookup, parse_zone
from rostra.dns.source import Instance, Node

NAME_SERVERS_MAX = 3
#: Records of one set; the rest of a service that is larger than this is reached in other rotations.
RECORDS_MAX = 4096

TruncationFlag = Literal["size", "always", "never"]


@dataclass(frozen=True, slots=True)
class DnsConfig:
    """Names and limits. `truncation_flag`: set TC where bytes ran out ("size"), also where `udp_answer_limit` cut
    ("always": Consul's enable_truncate = true), or not at all ("never": enable_truncate = false)."""

    domain: str = "consul"
    alt_domain: str = ""
    datacenter: str = "dc1"
    only_passing: bool = False
    node_ttl_s: int = 0
    service_ttl_s: Mapping[str, int] = field(default_factory=dict)  # by name, or by prefix with a '*' at its end
    soa_refresh_s: int = 3600
    soa_retry_s: int = 600
    soa_expire_s: int = 86400
    soa_min_ttl_s: int = 0
    a_record_limit: int = 0  # 0: none
    udp_answer_limit: int = 3  # where the client did not say that it takes more than 512 bytes; 0: none
    edns_bytes_max: int = 4096
    truncation_flag: TruncationFlag = "size"
    recursors: tuple[str, ...] = ()

    @property
    def zones(self) -> tuple[Labels, ...]:
        """Longest first, so that a domain inside another is found. Raises ValueError."""
        zones = {parse_zone(d) for d in (self.domain, self.alt_domain) if d.strip(".")}
        return tuple(sorted(zones, key=len, reverse=True))

    @property
    def zone(self) -> Labels:
        """The one that answers are in where the question is in none. Raises ValueError."""
        return parse_zone(self.domain if self.domain.strip(".") else self.alt_domain)

    def ttl_of(self, service: str) -> int:
        """The exact name's, else the longest matching prefix's."""
        exact = self.service_ttl_s.get(service)
        if exact is not None:
            return exact
        best, ttl_s = -1, 0
        for pattern, value in self.service_ttl_s.items():
            prefix = pattern[:-1].lower()
            if pattern.endswith("*") and len(prefix) > best and service.startswith(prefix):
                best, ttl_s = len(prefix), value
        return ttl_s


class AnswerPlan(NamedTuple):
    """`records` in any order: the resolver shuffles and cuts them. `one_only`: a CNAME admits no second record, and its
    `target` says where it leads. `lead` stands before them, `extras` in Additional, if there is room. `each_matters`:
    the number of answers is not limited, for none stands for the others.

    `is_lasting`: the answer is about something that exists, so it may be kept until that changes; what does not exist
    is never remembered, or random names would fill the cache.
    """

    rcode: int = NOERROR
    records: Sequence[Record] = ()
    authority: tuple[bytes, ...] = ()
    additional: tuple[bytes, ...] = ()
    one_only: bool = False
    is_lasting: bool = False
    lead: tuple[bytes, ...] = ()
    extras: tuple[bytes, ...] = ()
    each_matters: bool = False


@lru_cache(maxsize=16)
def _encode_zone(zone: Labels) -> bytes:
    return encode_name(zone)


def encode_soa(config: DnsConfig, zone: Labels, name_size: int, serial: int) -> bytes:
    """The zone's SOA; `name_size` is the size of the question's name, which ends in the zone."""
    owner = pointer(12 + name_size - len(_encode_zone(zone)))
    times = (config.soa_refresh_s, config.soa_retry_s, config.soa_expire_s, config.soa_min_ttl_s)
    rdata = b"\x02ns" + owner + b"\x0ahostmaster" + owner + struct.pack(">5I", serial & 0xFFFFFFFF, *times)
    return encode_record(owner, TYPE_SOA, config.soa_min_ttl_s, rdata)


def plan_nothing(rcode: int, soa: bytes, *, is_lasting: bool = False) -> AnswerPlan:
    """NXDOMAIN, or NODATA with `rcode` NOERROR."""
    return AnswerPlan(rcode, authority=(soa,), is_lasting=is_lasting)


def select_instances(instances: Sequence[Instance], tag: str, *, only_passing: bool) -> list[Instance]:
    """The healthy ones that carry `tag` (lower case, or "" for any)."""
    if only_passing:
        return [i for i in instances if i.status == "passing" and (not tag or tag in i.tags)]
    return [i for i in instances if i.status != "critical" and (not tag or tag in i.tags)]


def plan_service(
    lookup: Lookup, qtype: int, instances: Sequence[Instance], config: DnsConfig, soa: bytes
) -> AnswerPlan:
    chosen = select_instances(instances, lookup.tag, only_passing=config.only_passing)
    if not chosen:
        below = "." + lookup.tag
        healthy = select_instances(instances, "", only_passing=config.only_passing) if lookup.tag else []
        has_below = any(tag.endswith(below) for i in healthy for tag in i.tags if "." in tag)
        return plan_nothing(NOERROR if has_below else NXDOMAIN, soa)
    ttl_s = config.ttl_of(lookup.name)
    if qtype == TYPE_SRV:
        # Two instances at one address and port are one for a client: Consul names them once too.
        found = {r.wire: r for i in chosen if (r := _srv_record(i, lookup.zone, ttl_s, config)) is not None}
        records, one_only = list(found.values()), False
    else:
        records, one_only = _address_records(chosen, qtype, ttl_s)
    if not records:
        return plan_nothing(NOERROR, soa, is_lasting=True)
    return AnswerPlan(records=records[:RECORDS_MAX], one_only=one_only, is_lasting=True)


def encode_ahead(instances: Sequence[Instance], zone: Labels, config: DnsConfig, name: str) -> None:
    """Make the SRV records of some instances of the service `name`; `plan_service` finds them made."""
    ttl_s = config.ttl_of(name)
    for instance in instances:
        _srv_record(instance, zone, ttl_s, config)


def _address_records(found: Sequence[Instance] | Sequence[Node], qtype: int, ttl_s: int) -> tuple[list[Record], bool]:
    """A and AAAA as asked; where all addresses are host names, a CNAME whatever is asked: DNS admits only one."""
    addresses: dict[bytes, Record] = {}
    hosts: dict[str, Record] = {}
    any_address = False
    for thing in found:
        ip = thing.ip
        if ip:
            any_address = True
            rtype = TYPE_A if len(ip) == 4 else TYPE_AAAA
            if qtype in (rtype, TYPE_ANY) and ip not in addresses:
                weight = thing.weight if isinstance(thing, Instance) else 1
                addresses[ip] = Record(owner_is_question(rtype, ttl_s, ip), weight)
        elif thing.host not in hosts and (target := _host_or_none(thing.host)):
            hosts[thing.host] = Record(owner_is_question(TYPE_CNAME, ttl_s, target), target=target)
    if any_address:
        return list(addresses.values()), False
    return list(hosts.values()), True


def _srv_record(instance: Instance, zone: Labels, ttl_s: int, config: DnsConfig) -> Record | None:
    made = instance.encoded.get((TYPE_SRV, zone))
    if isinstance(made, Record):
        return made
    target = _srv_target(instance, zone)
    if target is None:
        return None
    wire = encode_srv_record(ttl_s, 1, instance.weight, instance.port, target)
    glue = b""
    if instance.ip:
        glue_ttl_s = ttl_s if instance.has_own_address else config.node_ttl_s
        glue = encode_record(b"", TYPE_A if len(instance.ip) == 4 else TYPE_AAAA, glue_ttl_s, instance.ip)
    record = Record(wire, instance.weight, target, len(wire) - len(target), glue)
    instance.encoded[(TYPE_SRV, zone)] = record
    return record


def _srv_target(instance: Instance, zone: Labels) -> bytes | None:
    """`<node>.node.<dc>.<domain>`, or `<hex>.addr.<dc>.<domain>` for an address of its own, or the host name."""
    if not instance.ip:
        return _host_or_none(instance.host)
    try:
        if instance.has_own_address:
            return encode_labels((instance.ip.hex(),)) + _encode_suffix("addr", instance.datacenter, zone)
        return _encode_node(instance.node, instance.datacenter, zone)
    except ValueError:
        return None


def _encode_node(node: str, datacenter: str, zone: Labels) -> bytes:
    name = encode_labels(node.split(".")) + _encode_suffix("node", datacenter, zone)
    if len(name) > NAME_BYTES_MAX:
        raise ValueError(f"the node's name {node!r} is too long for DNS")
    return name


@lru_cache(maxsize=64)
def _encode_suffix(keyword: str, datacenter: str, zone: Labels) -> bytes:
    return encode_name((keyword, datacenter, *zone))


def _host_or_none(host: str) -> bytes | None:
    try:
        return encode_host(host)
    except ValueError:
        return None


def plan_node(node: Node | None, qtype: int, config: DnsConfig, soa: bytes, *, has_below: bool = False) -> AnswerPlan:
    """A node's address whatever its health, and its metadata as TXT; `rfc1035-` keys give the bare value."""
    if node is None:
        return plan_nothing(NOERROR if has_below else NXDOMAIN, soa)
    records, one_only = _address_records([node], qtype, config.node_ttl_s)
    if qtype == TYPE_TXT and node.meta:
        records, one_only = [], False  # what is asked for is there, whatever a CNAME admits
    if qtype in (TYPE_TXT, TYPE_ANY) and not (records and one_only):
        for key, value in sorted(node.meta.items()):
            text = value if key.lower().startswith("rfc1035-") else f"{key}={value}"
            records.append(Record(owner_is_question(TYPE_TXT, config.node_ttl_s, encode_txt(text))))
    if not records:
        return plan_nothing(NOERROR, soa, is_lasting=True)
    return AnswerPlan(records=records, one_only=one_only, is_lasting=True, each_matters=True)


def plan_address(lookup: Lookup, qtype: int, config: DnsConfig, soa: bytes) -> AnswerPlan:
    """`0a000001.addr.dc1.consul`: the name is the answer."""
    ip = bytes.fromhex(lookup.name)
    rtype = TYPE_A if len(ip) == 4 else TYPE_AAAA
    if qtype not in (rtype, TYPE_ANY):
        return plan_nothing(NOERROR, soa)
    return AnswerPlan(records=[Record(owner_is_question(rtype, config.node_ttl_s, ip))])


def plan_servers(qtype: int, servers: Sequence[Instance], config: DnsConfig, soa: bytes) -> AnswerPlan:
    """`ns.consul`, which the SOA names: the addresses of servers."""
    healthy = select_instances(servers, "", only_passing=config.only_passing)
    records, one_only = _address_records(healthy[:NAME_SERVERS_MAX], qtype, config.node_ttl_s)
    return plan_nothing(NOERROR, soa) if one_only or not records else AnswerPlan(records=records)


def plan_apex(lookup: Lookup, qtype: int, servers: Sequence[Instance], config: DnsConfig, soa: bytes) -> AnswerPlan:
    """SOA and NS of the domain; the name servers are the cluster's servers."""
    ns: dict[bytes, Record] = {}
    if qtype in (TYPE_NS, TYPE_SOA, TYPE_ANY):
        for server in select_instances(servers, "", only_passing=config.only_passing):
            if len(ns) == NAME_SERVERS_MAX:
                break
            target = _srv_target(server, lookup.zone)
            if target is not None and server.ip:
                wire = encode_record(soa[:2], TYPE_NS, config.node_ttl_s, target)  # of the zone, as the SOA
                rtype = TYPE_A if len(server.ip) == 4 else TYPE_AAAA
                glue = encode_record(b"", rtype, config.node_ttl_s, server.ip)
                ns[target] = Record(wire, 1, target, len(wire) - len(target), glue)
    if qtype == TYPE_SOA:
        addresses = tuple(r.target + r.glue for r in ns.values())
        return AnswerPlan(records=[Record(soa)], authority=tuple(r.wire for r in ns.values()), additional=addresses)
    if qtype == TYPE_ANY:
        return AnswerPlan(records=[Record(soa), *ns.values()])
    if qtype == TYPE_NS and ns:
        return AnswerPlan(records=list(ns.values()))
    return plan_nothing(NOERROR, soa)


def plan_reverse(node: Node | None, service: str, config: DnsConfig) -> AnswerPlan | None:
    """The node that has the address, else the service; None where DNS cannot carry the name."""
    try:
        if node is not None:
            target = _encode_node(node.name, node.datacenter, config.zone)
        else:
            target = encode_labels((service,)) + _encode_suffix("service", config.datacenter, config.zone)
    except ValueError:
        return None
    return AnswerPlan(records=[Record(owner_is_question(TYPE_PTR, config.node_ttl_s, target))])


def plan_empty(kind: Kind, soa: bytes) -> AnswerPlan:
    return plan_nothing(NOERROR if kind is Kind.EMPTY else NXDOMAIN, soa)
