"""Packet in, packet out, no sockets: finds the plan for a question and keeps what was encoded for it.

Three layers, each forgotten the moment its service changes. `hot`: whole replies by the packet's bytes without the
id, all that the busiest queries touch. Rotations: 16 encoded orders per (name, type, room), whatever the spelling, the
flags or the EDNS options; drawn anew every second, so that no order outlives its fairness. Watched: the live views.
A name that nobody registered is refused from memory and remembered nowhere: a flood of them costs nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple, cast

from rostra.dns.alias import Ask, Known, Step, Trail, follow, place, spell_out
from rostra.dns.answer import (
    AnswerPlan,
    DnsConfig,
    encode_ahead,
    encode_soa,
    plan_address,
    plan_apex,
    plan_empty,
    plan_node,
    plan_reverse,
    plan_servers,
    plan_service,
)
from rostra.dns.message import (
    BADVERS,
    CLASS_ANY,
    CLASS_IN,
    FLAG_AA,
    FLAG_RA,
    FLAG_RD,
    FLAG_TC,
    NOTHING,
    NXDOMAIN,
    OPT_BYTES,
    REFUSED,
    SERVFAIL,
    TCP_BYTES_MAX,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_AXFR,
    TYPE_CNAME,
    TYPE_IXFR,
    TYPE_NS,
    TYPE_PTR,
    TYPE_SOA,
    UDP_PLAIN_BYTES_MAX,
    Query,
    Record,
    Sections,
    assemble,
    encode_reply,
    labels_of,
    parse_query,
)
from rostra.dns.name import Kind, Lookup, parse_name
from rostra.dns.source import Instance, LiveRows, ServiceView, Source

ROTATIONS = 16
#: Sizes that replies are encoded for; a client's own size is rounded down to one of them.
SIZE_CLASSES = (4096, 2048, 1452, 1400, 1232, 1024, 512)
SERVERS_SERVICE = "consul"
#: Host names in one SRV answer whose addresses are looked up.
HOSTS_MAX = 8
#: What a watch is of: a service's name, that of a destination in the mesh, or the addresses of all services.
_WatchKey = str | tuple[str]
_ADDRESSES = ("",)
#: Answers from knowledge older than this are counted as stale.
STALE_AFTER_S = 5.0

Draw = Callable[[], bytes]
Count = Callable[[str, int], None]


class Wait(NamedTuple):
    """The answer depends on a view that is still arriving: resolve again when `view.ready()`."""

    view: LiveRows


class Forward(NamedTuple):
    """Not our name: ask a recursor."""

    query: Query


class Look(NamedTuple):
    """The answer depends on what recursors say to these: resolve again when it is known."""

    asks: tuple[Ask, ...]


class _Watched:
    """A live view and what was encoded from it."""

    __slots__ = ("keys", "remove", "used", "view")

    def __init__(self, view: LiveRows) -> None:
        self.view = view
        self.keys: set[_Key] = set()
        self.used = 0
        self.remove: Callable[[], None] = lambda: None


class _Planned(NamedTuple):
    plan: AnswerPlan
    watched: _Watched | None = None


class _Key(NamedTuple):
    name: bytes
    qtype: int
    room: int


#: Bytes for all records; the number of answers; and what it would be but for `udp_answer_limit`.
_Limits = tuple[int, int, int]


class _Rotation:
    """The encoded orders of one plan. Each has `take` records at most, of the `most` that there were to take."""

    __slots__ = (
        "_made",
        "_next",
        "_rest",
        "_weighted",
        "hot_keys",
        "most",
        "offset",
        "plan",
        "size",
        "take",
        "wanted",
        "watched",
    )

    def __init__(self, plan: AnswerPlan, key: _Key, limits: _Limits, watched: _Watched | None) -> None:
        self.plan = plan
        _, take, most = limits
        self.take = 1 if plan.one_only else len(plan.records) if plan.each_matters else take
        self.most = min(len(plan.records), 1 if plan.one_only else most)
        self.offset = 12 + len(key.name) + 4
        self.size = 0
        self.wanted = ROTATIONS if len(plan.records) > 1 and not plan.each_matters else 1
        self.hot_keys: list[bytes] = []
        self.watched = watched
        self._made: list[tuple[Sections, bool]] = []
        self._next = 0
        self._rest: Sequence[Record] = ()
        self._weighted = len({r.weight for r in plan.records}) > 1

    def draw(self, room: int, chance: Callable[[], float]) -> tuple[Sections, bool]:
        """One encoded order, and whether `take` cut the number of records. Encodes at most one more."""
        made = self._made
        if len(made) < self.wanted:
            made.append(self._encode(room, chance))
            return made[-1]
        self._next = (self._next + 1) % len(made)
        return made[self._next]

    @property
    def all(self) -> list[tuple[Sections, bool]]:
        return self._made

    @property
    def is_complete(self) -> bool:
        return len(self._made) == self.wanted

    def renew(self) -> int:
        """Encode again, in other orders, from the next query on. Gives the number of bytes let go."""
        self.hot_keys.clear()
        if self.wanted == 1:
            return 0
        freed, self.size = self.size, 0
        self._made.clear()
        return freed

    def _encode(self, room: int, chance: Callable[[], float]) -> tuple[Sections, bool]:
        plan = self.plan
        order = self._order(chance)
        chosen = order[: self.take]
        sections = assemble(chosen, plan.authority, plan.additional, self.offset, room, plan.lead, plan.extras)
        used, rest = max(sections.counts[0] - len(plan.lead), 0), len(self._rest)
        # Where a reply holds a part of the instances, the next one goes on where it ended: all get their turn.
        self._rest = () if self._weighted or used == len(order) else order[used : rest if used < rest else None]
        self.size += len(sections.tail)
        return sections, len(chosen) < self.most

    def _order(self, chance: Callable[[], float]) -> Sequence[Record]:
        records = self.plan.records
        if self.wanted == 1:
            return records
        if self._weighted:
            # Weighted sampling without replacement (Efraimidis, Spirakis): the earlier, the likelier by weight.
            return sorted(records, key=lambda r: -math.log(1 - chance()) / (r.weight or 1e-9))
        fresh = sorted(records, key=lambda _: chance())
        if not self._rest:
            return fresh
        first = {id(r) for r in self._rest}
        return [*self._rest, *(r for r in fresh if id(r) not in first)]


class Resolver:
    """`resolve` answers; `tick` wants to be called once a second; `close` lets go of the views."""

    def __init__(
        self,
        config: DnsConfig,
        source: Source,
        *,
        count: Count | None = None,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] | None = None,
        kept_max: int = 4096,
        kept_bytes_max: int = 16 << 20,
        hot_bytes_max: int = 32 << 20,
        watched_max: int = 4096,
        idle_ticks: int = 600,
    ) -> None:
        self.hot: dict[bytes, Draw] = {}
        self.hot_hits = 0
        self.dropped = 0  # datagrams for which the shell had no room
        self._config = config
        self._zones = config.zones
        if not self._zones:
            raise ValueError("the DNS domain is empty")
        self._source = source
        source.prepare = self._prepare
        self._count = count or (lambda _name, _n: None)
        self._counts: dict[str, int] = {}
        self._clock = clock
        self._chance = chance or random.Random().random  # noqa: S311 - spreads load, guards nothing
        self._kept: dict[_Key, _Rotation] = {}
        self._kept_bytes = 0
        self._hot_bytes = 0
        self._watched: dict[_WatchKey, _Watched] = {}
        self._nodes: _Watched | None = None
        self._now = 0
        self._kept_max, self._kept_bytes_max, self._hot_bytes_max = kept_max, kept_bytes_max, hot_bytes_max
        self._watched_max, self._idle_ticks = watched_max, idle_ticks
        self._ra = FLAG_RA if config.recursors else 0

    # -- what the shell calls -----------------------------------------------------------------------------------

    def resolve(
        self, packet: bytes, *, tcp: bool = False, known: Known | None = None, may_ask: bool = True
    ) -> bytes | Wait | Look | Forward | None:
        """The reply; or what it waits for; or None where no reply is due.

        `known` is what recursors said to the `Look` before; without `may_ask` the reply does without more of it.
        """
        query = parse_query(packet)
        if not isinstance(query, Query):
            self._add("malformed")
            return query
        if known is None:
            self._add("queries")
        if query.edns_version:
            return self._refuse(packet, query, BADVERS)
        if query.qclass not in (CLASS_IN, CLASS_ANY) or query.qtype in (TYPE_AXFR, TYPE_IXFR):
            return self._refuse(packet, query, REFUSED)
        limits = self._limits(query, tcp)
        room = limits[0]
        key = _Key(query.name, query.qtype, room)
        rotation = self._kept.get(key)
        if rotation is None:
            planned = self._plan(query.name, query.labels, query.qtype)
            if planned is None and self._config.recursors and query.flags & FLAG_RD:
                return Forward(query)
            if planned is None or isinstance(planned, int):
                return self._refuse(packet, query, REFUSED if planned is None else planned)
            if isinstance(planned, Wait):
                return planned
            if not planned.plan.records and not planned.plan.is_lasting:
                return packet[:2] + self._nothing(query, planned.plan, tcp)
            led = self._lead_on(query, planned, known, may_ask and bool(self._config.recursors))
            if not isinstance(led, _Planned):
                return led
            rotation = self._keep(key, limits, led)
        elif rotation.watched is not None:
            rotation.watched.used = self._now
        size = rotation.size
        sections, is_cut = rotation.draw(room, self._chance)
        if rotation.plan.is_lasting:
            self._kept_bytes += rotation.size - size
        reply = self._encode(query, rotation.plan.rcode, sections, is_cut, tcp)
        if query.is_plain and not tcp and rotation.is_complete and rotation.plan.is_lasting:
            self._keep_hot(packet[2:], query, rotation)
        return packet[:2] + reply

    def fail(self, packet: bytes) -> bytes | None:
        """SERVFAIL for a query whose wait was in vain."""
        query = parse_query(packet)
        return self._refuse(packet, query, SERVFAIL) if isinstance(query, Query) else query

    def tick(self) -> None:
        """Renew the orders, report the counts, let go of what nobody asks for any more."""
        self._now += 1
        self.hot.clear()
        self._hot_bytes = 0
        for key, rotation in list(self._kept.items()):
            if rotation.plan.authority:
                self._forget(key)  # its SOA carries the time
            else:
                self._kept_bytes -= rotation.renew()
        if self._now % 60 == 0:
            for watched_key, watched in list(self._watched.items()):
                if self._now - watched.used > self._idle_ticks:
                    self._unwatch(watched_key, watched)
        if self.hot_hits:
            self._add("queries", self.hot_hits)
            self._add("hot_queries", self.hot_hits)
            self.hot_hits = 0
        if self.dropped:
            self._add("dropped_queries", self.dropped)
            self.dropped = 0
        if self._source.age_s > STALE_AFTER_S and "queries" in self._counts:
            self._add("stale_queries", self._counts["queries"])
        for name, n in self._counts.items():
            self._count(f"dns.{name}", n)
        self._counts.clear()

    def close(self) -> None:
        for key, watched in list(self._watched.items()):
            self._unwatch(key, watched)
        if self._nodes is not None:
            self._nodes.remove()
            self._nodes = None
        self.hot.clear()
        self._kept.clear()

    # -- from a question to a rotation --------------------------------------------------------------------------

    def _limits(self, query: Query, tcp: bool) -> _Limits:
        config = self._config
        size, take, most = TCP_BYTES_MAX, 1 << 30, 1 << 30
        if not tcp:
            size = UDP_PLAIN_BYTES_MAX
            if query.edns_bytes is not None and query.edns_bytes > size:
                wanted = min(query.edns_bytes, config.edns_bytes_max)
                size = next((c for c in SIZE_CLASSES if c <= wanted), UDP_PLAIN_BYTES_MAX)
            if size <= UDP_PLAIN_BYTES_MAX:
                take = config.udp_answer_limit or take
        if config.a_record_limit and query.qtype in (TYPE_A, TYPE_AAAA, TYPE_ANY):
            most = config.a_record_limit
        opt = OPT_BYTES + len(query.subnet) if query.edns_bytes is not None else 0
        return size - 12 - len(query.question) - opt, take if take < most else most, most

    def _keep(self, key: _Key, limits: _Limits, planned: _Planned) -> _Rotation:
        plan, watched = planned
        rotation = _Rotation(plan, key, limits, watched)
        if plan.is_lasting and watched is not None:
            while self._kept and (len(self._kept) >= self._kept_max or self._kept_bytes > self._kept_bytes_max):
                self._forget(next(iter(self._kept)))
            self._kept[key] = rotation
            watched.keys.add(key)
        return rotation

    def _plan(self, name: bytes, labels: Sequence[str], qtype: int) -> _Planned | Wait | int | None:
        """What a question is answered with; a wait; the rcode of a refusal; None where it is not ours."""
        config, source = self._config, self._source
        lookup = parse_name(tuple(labels), qtype, self._zones, config.datacenter)
        kind = lookup.kind
        if kind is Kind.OUTSIDE:
            return None
        if kind is Kind.REVERSE:
            return self._plan_reverse(lookup, qtype)
        soa = encode_soa(config, lookup.zone, len(name), int(self._clock()))
        if kind is Kind.ADDRESS:
            return _Planned(plan_address(lookup, qtype, config, soa))
        if kind is Kind.EMPTY or kind is Kind.UNKNOWN:
            return _Planned(plan_empty(kind, soa))
        if kind is Kind.NODE:
            nodes = self._watch_nodes()
            if not isinstance(nodes, _Watched):
                return nodes
            node = source.nodes.get(lookup.name)
            has_below = node is None and source.nodes.has_below(lookup.name)
            return _Planned(plan_node(node, qtype, config, soa, has_below=has_below), nodes)
        of_servers = kind is Kind.APEX or kind is Kind.SERVERS
        key: _WatchKey = SERVERS_SERVICE if of_servers else lookup.name
        if kind is Kind.CONNECT:
            key = (lookup.name,)
        watched = self._watch(key)
        if isinstance(watched, Wait):
            return watched
        instances = self._instances(key, watched)
        if kind is Kind.SERVERS and qtype not in (TYPE_SOA, TYPE_NS):
            return _Planned(plan_servers(qtype, instances, config, soa))
        if of_servers:
            return _Planned(plan_apex(lookup, qtype, instances, config, soa))
        if watched is None and not source.is_ready:
            return SERVFAIL
        return _Planned(plan_service(lookup, qtype, instances, config, soa), watched)

    def _plan_reverse(self, lookup: Lookup, qtype: int) -> _Planned | Wait | None:
        nodes = self._watch_nodes() if qtype in (TYPE_PTR, TYPE_ANY) else None
        if not isinstance(nodes, _Watched):
            return nodes if isinstance(nodes, Wait) else None
        ip, service = bytes.fromhex(lookup.name), ""
        node = self._source.nodes.by_address(ip)
        if node is None:
            addresses = self._watch(_ADDRESSES)
            if isinstance(addresses, Wait):
                return addresses
            service = self._source.addresses.service_at(ip) if addresses is not None else ""
        plan = plan_reverse(node, service, self._config) if node is not None or service else None
        return None if plan is None else _Planned(plan)

    # -- aliases ------------------------------------------------------------------------------------------------

    def _lead_on(self, query: Query, planned: _Planned, known: Known | None, may_ask: bool) -> _Planned | Wait | Look:
        """The plan with what stands behind its host names, as far as it is ours or recursors tell.

        Where that is nothing, the plan stays as it was, and is kept. A plan that depends on others is not kept.
        """
        plan = planned.plan
        if plan.one_only:
            hosts = list(plan.records) if query.qtype != TYPE_CNAME else []
        else:
            hosts = [r for r in plan.records if r.target and not r.glue]
        if not hosts or not (known is not None or may_ask or any(self._is_ours(r.target) for r in hosts)):
            return planned
        if plan.one_only:
            trail = self._follow(query.name, self._pick(hosts), query.qtype, known, may_ask)
            if not isinstance(trail, Trail):
                return Look((trail,)) if isinstance(trail, Ask) else trail
            lead, records = place(trail, 12 + len(query.question))
            return _Planned(AnswerPlan(records=records, lead=tuple(lead)))
        asks: list[Ask] = []
        extras: list[bytes] = []
        for target in list({r.target: None for r in hosts})[:HOSTS_MAX]:
            found = self._follow(b"", Step(0, target), TYPE_A, known, may_ask)
            if isinstance(found, Wait):
                return found
            if isinstance(found, Ask):
                asks.append(found)
            else:
                extras += spell_out(found, target)
        return Look(tuple(asks)) if asks else _Planned(plan._replace(extras=tuple(extras), is_lasting=False))

    def _follow(
        self, question: bytes, first: Step, qtype: int, known: Known | None, may_ask: bool
    ) -> Trail | Ask | Wait:
        return cast("Trail | Ask | Wait", follow(question, first, qtype, self._own, known, may_ask=may_ask))

    def _own(self, name: bytes, qtype: int) -> Trail | Wait | None:
        """What our zones say about a name."""
        planned = self._plan(name, labels_of(name), qtype) if self._is_ours(name) else None
        if not isinstance(planned, _Planned):
            return Trail([], ()) if isinstance(planned, int) else planned
        records = planned.plan.records
        if planned.plan.one_only and records and qtype != TYPE_CNAME:
            return Trail([self._pick(records)], ())
        return Trail([], records)

    def _is_ours(self, name: bytes) -> bool:
        labels = labels_of(name.lower())
        return any(labels[-len(zone) :] == zone for zone in self._zones)

    def _pick(self, hosts: Sequence[Record]) -> Step:
        """One of several CNAMEs."""
        record = hosts[int(self._chance() * len(hosts))]
        return Step(int.from_bytes(record.wire[6:10], "big"), record.target)

    # -- live views ---------------------------------------------------------------------------------------------

    def _view(self, key: _WatchKey) -> LiveRows | None:
        if isinstance(key, str):
            return self._source.service(key)
        return self._source.connect(key[0]) if key[0] else self._source.addresses

    def _watch(self, key: _WatchKey) -> _Watched | Wait | None:
        """None where the service is not registered, or nothing is known yet."""
        watched = self._watched.get(key)
        if watched is None:
            view = self._view(key)
            if view is None:
                return None
            if len(self._watched) >= self._watched_max:
                oldest = min(self._watched, key=lambda n: self._watched[n].used)
                self._unwatch(oldest, self._watched[oldest])
            watched = self._watched[key] = _Watched(view)
            watched.remove = view.on_change(lambda: self._changed(watched))
        watched.used = self._now
        return watched if watched.view.is_ready else Wait(watched.view)

    def _watch_nodes(self) -> _Watched | Wait | int:
        if self._nodes is None:
            if not self._source.is_ready:
                return SERVFAIL
            watched = self._nodes = _Watched(self._source.nodes)
            watched.remove = watched.view.on_change(lambda: self._changed(watched))
        return self._nodes if self._nodes.view.is_ready else Wait(self._nodes.view)

    def _instances(self, key: _WatchKey, watched: _Watched | None) -> Sequence[Instance]:
        if watched is None:
            return ()
        instances = cast(ServiceView, watched.view).instances()
        if not instances and self._view(key) is None:
            self._unwatch(key, watched)  # deregistered: the names' watch alone will tell when it is back
        return instances

    def _changed(self, watched: _Watched) -> None:
        for key in list(watched.keys):
            self._forget(key)

    def _unwatch(self, key: _WatchKey, watched: _Watched) -> None:
        watched.remove()
        self._changed(watched)
        del self._watched[key]

    def _forget(self, key: _Key) -> None:
        rotation = self._kept.pop(key)
        self._kept_bytes -= rotation.size
        if rotation.watched is not None:
            rotation.watched.keys.discard(key)
        for hot_key in rotation.hot_keys:
            self.hot.pop(hot_key, None)

    # -- encoding -----------------------------------------------------------------------------------------------

    def _prepare(self, name: str, instances: Sequence[Instance]) -> None:
        """Called for a large service slice by slice, so that its first SRV answer needs not encode all in one step."""
        encode_ahead(instances, self._config.zone, self._config, name)

    def _encode(self, query: Query, rcode: int, sections: Sections, is_cut: bool, tcp: bool) -> bytes:
        flags = FLAG_AA | self._ra
        wants_tc = self._config.truncation_flag
        if not tcp and ((sections.truncated and wants_tc != "never") or (is_cut and wants_tc == "always")):
            flags |= FLAG_TC
            self._add("truncated")
        return encode_reply(query, rcode, flags, sections)

    def _keep_hot(self, hot_key: bytes, query: Query, rotation: _Rotation) -> None:
        replies = [self._encode(query, rotation.plan.rcode, s, is_cut, False) for s, is_cut in rotation.all]
        self._hot_bytes += sum(map(len, replies)) + len(hot_key) + 200
        if self._hot_bytes > self._hot_bytes_max:
            self.hot.clear()
            self._hot_bytes = 0
            return
        self.hot[hot_key] = cycle(replies).__next__
        rotation.hot_keys.append(hot_key)

    def _nothing(self, query: Query, plan: AnswerPlan, tcp: bool) -> bytes:
        """The short way for names that do not exist or have no records: floods ask for them."""
        if plan.rcode == NXDOMAIN:
            self._add("nxdomain")
        sections = Sections((0, len(plan.authority), 0), b"".join(plan.authority), False)
        return self._encode(query, plan.rcode, sections, False, tcp)

    def _refuse(self, packet: bytes, query: Query, rcode: int) -> bytes:
        self._add({SERVFAIL: "servfail", REFUSED: "refused"}.get(rcode, "badvers"))
        return packet[:2] + encode_reply(query, rcode, self._ra, NOTHING)

    def _add(self, name: str, n: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + n
