"""The founding of a cluster: which server proposes, what each may answer, and when it is committed. Pure.

`bootstrap.py` has the rules in words, the file, the calls and the time.
"""

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rostra.server.membership import (
    EXPECT_MAX,
    FILE_NAME,
    PEERS_MAX,
    REFUSED_MAX,
    Membership,
    ServerInfo,
    Stored,
    dump_membership,
    number,
    parse_membership,
    parse_server,
    text,
    texts,
)
from rostra.server.raft.members import LEARNER, VOTER
from rostra.wire.errors import BadRequest, Denied

HELLO = "bootstrap.hello"
PREPARE = "bootstrap.prepare"
COMMIT = "bootstrap.commit"
REFUSE = "bootstrap.refuse"
KINDS = (HELLO, PREPARE, COMMIT, REFUSE)
#: Answered by servers of a cluster only.
JOIN = "bootstrap.join"
WAITING, MEMBER = "waiting", "member"
#: How long an answer counts as "is here".
FRESH_S = 2.0
#: After this the other members act for a proposer that is gone. They give its proposal up if other servers could found
#: the cluster instead. Else they complete it: it may come back, and a majority can work without it.
PATIENCE_S = 3.0
#: How often a server that waits to be let in asks.
JOIN_EVERY_S = 0.5
#: Servers of a cluster that are asked at once, while it is not known which of them leads.
JOIN_AT_ONCE = 8


@dataclass(slots=True)
class Peer:
    """What another server last said about itself. Kept by key hash, which TLS has proved."""

    info: ServerInfo
    instance: str
    expect: int
    cluster_id: str | None
    prepared: str | None
    refused: frozenset[str]
    has_data: bool
    sees: frozenset[str]
    servers: tuple[str, ...]
    reached_at: float = -math.inf
    address: str = ""  # where we reached it


@dataclass(frozen=True, slots=True)
class Call:
    address: str
    kind: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Remark:
    level: str
    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FoundingPlan:
    """What to do next. When `stored` differs from what is on disk, store it first and ask again."""

    stored: Stored
    calls: tuple[Call, ...] = ()
    remarks: tuple[Remark, ...] = ()


class Founder:
    """The decisions of one server. Changes nothing but its notes about others: the owner sets `stored`."""

    def __init__(
        self,
        me: ServerInfo,
        expect: int,
        stored: Stored,
        *,
        has_data: bool = False,
        suffrage: str = LEARNER,
        version: str = "",
        instance: str = "",
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.me = me
        self.expect = expect
        self.stored = stored
        self.peers: dict[str, Peer] = {}
        self.existing: Peer | None = None  # a server of a cluster that we are not in; once seen, we never found one
        self.leader = ""  # address of that cluster's leader, as its servers tell who wait
        self.counted_on = ""  # a server of that cluster whose list has us as a voter, with a log that we do not have
        self._suffrage, self._version = suffrage, version
        self.twin = ""  # address of another process with our node id
        self._has_data = has_data
        self.instance = instance or str(uuid.uuid4())
        self._new_id = new_id
        self._holding_since: tuple[str, float] = ("", 0.0)
        self._sees: frozenset[str] = frozenset()

    # -- what others are told -----------------------------------------------------------------------------------

    def hello(self, stored: Stored | None = None) -> dict[str, Any]:
        """What this server says about itself, in every request and every answer."""
        stored = stored or self.stored
        me = self.me
        return {
            "node_id": me.node_id,
            "name": me.name,
            "address": me.address,
            "rpc_port": me.rpc_port,
            "key_hash": me.key_hash,
            "datacenter": me.datacenter,
            "expect": self.expect,
            "cluster_id": stored.committed.cluster_id if stored.committed else None,
            "has_data": self._has_data or stored.committed is not None,
            "instance": self.instance,
            "prepared": stored.prepared.cluster_id if stored.prepared else None,
            "refused": list(stored.refused),
            "sees": sorted(self._sees),
            "servers": [p.info.host_port for p in self.peers.values() if p.reached_at > -math.inf][:16],
        }

    # -- what others say ----------------------------------------------------------------------------------------

    def note(self, said: Mapping[str, Any], key_hash: str, now: float, *, address: str = "") -> bool:
        """Remember what a server said. `address`: where we reached it; "" when it came to us. True: it was ourselves.

        Raises BadRequest, or Denied when it speaks for another key than the one that it proved.
        """
        peer = _parse_hello(said)
        if peer.info.key_hash != key_hash:
            raise Denied(f"server {peer.info.name} speaks for a key that is not its own")
        if peer.instance == self.instance:
            return True
        if peer.info.node_id == self.me.node_id or key_hash == self.me.key_hash:
            self.twin = address or peer.info.host_port
            return False
        before = self.peers.pop(key_hash, None)
        if address:
            peer.reached_at, peer.address = now, address
        elif before is not None:
            peer.reached_at, peer.address = before.reached_at, before.address
        self.peers[key_hash] = peer
        if len(self.peers) > PEERS_MAX:
            del self.peers[next(iter(self.peers))]
        if peer.cluster_id and not self._is_mine(peer.cluster_id) and peer.info.datacenter == self.me.datacenter:
            self.existing = peer
        return False

    def _is_mine(self, cluster_id: str) -> bool:
        return any(m is not None and m.cluster_id == cluster_id for m in (self.stored.prepared, self.stored.committed))

    def look(self, now: float) -> bool:
        """Work out whom we see now. True when it changed, so that the others should be told."""
        sees = frozenset(k for k, p in self.peers.items() if self._is_fresh(p, now))
        changed = sees != self._sees
        self._sees = sees
        return changed

    def _is_fresh(self, peer: Peer, now: float) -> bool:
        return now - peer.reached_at <= FRESH_S

    def answer(self, kind: str, args: Mapping[str, Any], key_hash: str, now: float) -> tuple[Stored, dict[str, Any]]:
        """The answer to a request, and what must be on disk before it is sent."""
        if kind == HELLO:
            self.note(args, key_hash, now)
            return self.stored, self.hello()
        if kind == PREPARE:
            stored, reason = self._answer_prepare(parse_membership(args.get("proposal")), key_hash)
        elif kind == COMMIT:
            stored, reason = self._answer_commit(text(args, "cluster_id"), key_hash)
        elif kind == REFUSE:
            stored, reason = self._answer_refuse(text(args, "cluster_id"))
        else:
            raise BadRequest(f"unknown request {kind[:64]!r}")
        return stored, {**self.hello(stored), "ok": not reason, "reason": reason}

    def _answer_prepare(self, proposal: Membership, key_hash: str) -> tuple[Stored, str]:
        stored, cluster_id = self.stored, proposal.cluster_id
        if not proposal.has_key(key_hash):
            raise Denied("only a member of the proposed cluster may propose it")
        if not proposal.has_key(self.me.key_hash):
            raise BadRequest(f"{self.me.name} is not a member of the proposed cluster")
        if stored.committed is not None:
            same = stored.committed.cluster_id == cluster_id
            return stored, "" if same else f"{self.me.name} is in cluster {stored.committed.cluster_id}"
        if cluster_id in stored.refused:
            return stored, "refused before"
        held = stored.prepared
        if held is not None and held.cluster_id == cluster_id:
            return stored, ""
        if reason := self._objection(proposal):
            return self._refuse(cluster_id), reason
        if held is not None:
            # Two proposals compete: the one of the lower node id goes first, so that not both can be stuck.
            if held.members[0].node_id < proposal.members[0].node_id:
                return self._refuse(cluster_id), f"{self.me.name} holds the proposal of {held.members[0].name}"
            return stored, f"{self.me.name} still holds the proposal of {held.members[0].name}"
        return replace(stored, prepared=proposal), ""

    def _objection(self, proposal: Membership) -> str:
        """Why this server will never be in that cluster, or ""."""
        if self._has_data:
            return f"{self.me.name} has data already"
        if self.existing is not None:
            return f"{self.me.name} sees cluster {self.existing.cluster_id} at {self.existing.info.name}"
        if proposal.datacenter != self.me.datacenter:
            return f"{self.me.name} is in datacenter {self.me.datacenter}, not {proposal.datacenter}"
        if len(proposal.members) != self.expect:
            return f"{self.me.name} has bootstrap_expect {self.expect}, not {len(proposal.members)}"
        if self.me not in proposal.members:
            return f"{self.me.name} has another name or address now"
        if len({m.host_port for m in proposal.members}) != len(proposal.members):
            return "two members have the same address"
        if any(m.suffrage != VOTER for m in proposal.members):
            return "not all members vote"
        return ""

    def _answer_commit(self, cluster_id: str, key_hash: str) -> tuple[Stored, str]:
        stored = self.stored
        if stored.committed is not None:
            return stored, "" if stored.committed.cluster_id == cluster_id else "in another cluster"
        held = stored.prepared
        if held is None or held.cluster_id != cluster_id:
            return stored, f"{self.me.name} does not hold this proposal"
        if not held.has_key(key_hash):
            raise Denied("only a member of the cluster may commit it")
        return replace(stored, prepared=None, committed=held), ""

    def _answer_refuse(self, cluster_id: str) -> tuple[Stored, str]:
        if self._is_mine(cluster_id):
            return self.stored, f"{self.me.name} holds this proposal"
        if self.stored.committed is not None:
            return self.stored, ""  # being in a cluster is a refusal of all others: nothing needs to be remembered
        stored = self._refuse(cluster_id)
        return stored, "" if cluster_id in stored.refused else "too many refused proposals"

    def _refuse(self, cluster_id: str) -> Stored:
        refused = self.stored.refused
        if cluster_id in refused or len(refused) >= REFUSED_MAX:
            return self.stored
        return replace(self.stored, refused=(*refused, cluster_id))

    # -- being let into a cluster -------------------------------------------------------------------------------

    def asking(self) -> dict[str, Any]:
        """What goes with JOIN: who we are, and as what we want to be let in."""
        return {**self.hello(), "suffrage": self._suffrage, "version": self._version}

    def answered(self, reply: Mapping[str, Any], key_hash: str) -> Stored:
        """What to store after the server with that key has answered JOIN. Raises BadRequest for what cannot be true."""
        self.leader, self.counted_on = text(reply, "leader") if reply.get("leader") else "", ""
        existing, stored = self.existing, self.stored
        if reply.get("state") != MEMBER or existing is None or stored.prepared or stored.committed:
            return stored
        membership = parse_membership(reply.get("membership"))
        mine = next((m for m in membership.members if m.key_hash == self.me.key_hash), None)
        if (
            membership.cluster_id != existing.cluster_id
            or membership.datacenter != self.me.datacenter
            or not membership.has_key(key_hash)
            or mine is None
            or (mine.node_id, mine.name) != (self.me.node_id, self.me.name)
        ):
            raise BadRequest("it was let into another cluster, or under another name, than it asked for")
        # A server that is let in becomes a voter when its log is level. Without one, the log that its vote stands for
        # is lost.
        if mine.suffrage == VOTER:
            self.counted_on = existing.info.name
            return stored
        return replace(stored, committed=membership)

    def _plan_joining(self, existing: Peer, now: float) -> tuple[Call, ...]:
        if self.twin:
            return ()
        found = [
            p.address for p in self.peers.values() if p.cluster_id == existing.cluster_id and self._is_fresh(p, now)
        ]
        asked = [self.leader] if self.leader else found[:JOIN_AT_ONCE]
        return tuple(Call(address, JOIN, {}) for address in asked)

    # -- what to do ---------------------------------------------------------------------------------------------

    def plan(self, now: float, *, all_tried: bool = True) -> FoundingPlan:
        """The next step. `all_tried`: every candidate answered or failed once, or had its time."""
        self.look(now)
        if self.stored.committed is not None:
            return FoundingPlan(self.stored)
        if self.stored.prepared is not None:
            return self._plan_holding(self.stored.prepared, now)
        return self._plan_empty(now, all_tried)

    def _plan_holding(self, held: Membership, now: float) -> FoundingPlan:
        if self._holding_since[0] != held.cluster_id:
            self._holding_since = (held.cluster_id, now)
        waited_s = now - self._holding_since[1]
        lacking: list[ServerInfo] = []
        for member in held.members[1:]:  # the first one held it before anyone else knew of it
            peer = self.peers.get(member.key_hash)
            if member.key_hash != self.me.key_hash and not (
                peer and held.cluster_id in (peer.prepared, peer.cluster_id)
            ):
                lacking.append(member)
        if not lacking:
            return FoundingPlan(replace(self.stored, prepared=None, committed=held))
        for member in held.members:
            peer = self.peers.get(member.key_hash)
            if peer and (held.cluster_id in peer.refused or (peer.cluster_id or held.cluster_id) != held.cluster_id):
                return FoundingPlan(replace(self._refuse(held.cluster_id), prepared=None))
        if held.members[0].key_hash != self.me.key_hash and waited_s < PATIENCE_S:
            return FoundingPlan(self.stored)
        if waited_s >= PATIENCE_S and self._could_found_another(held, now):
            calls = [self._call(m, REFUSE, {"cluster_id": held.cluster_id}) for m in lacking]
        else:
            calls = [self._call(m, PREPARE, {"proposal": dump_membership(held)}) for m in lacking]
        remarks = []
        if waited_s >= PATIENCE_S:
            names = ", ".join(f"{m.name} ({m.host_port})" for m in lacking)
            remarks.append(
                Remark(
                    "warn",
                    "waiting for servers that were about to found the cluster with this one",
                    {
                        "servers": names,
                        "cluster": held.cluster_id,
                        "hint": f"if one of them is gone for ever, stop all of them and remove {FILE_NAME} on each",
                    },
                )
            )
        return FoundingPlan(self.stored, tuple(calls), tuple(remarks))

    def _could_found_another(self, held: Membership, now: float) -> bool:
        here = {self.me, *(p.info for p in self._willing(now))}
        return len(here) >= self.expect and not here.issuperset(held.members)

    def _call(self, member: ServerInfo, kind: str, args: dict[str, Any]) -> Call:
        peer = self.peers.get(member.key_hash)
        return Call(peer.address if peer and peer.address else member.host_port, kind, args)

    def _willing(self, now: float) -> list[Peer]:
        """Servers that are here, empty, and want what we want."""
        return [
            p
            for p in self.peers.values()
            if self._is_fresh(p, now)
            and p.info.datacenter == self.me.datacenter
            and p.expect == self.expect
            and not p.has_data
            and not p.cluster_id
        ]

    def _plan_empty(self, now: float, all_tried: bool) -> FoundingPlan:
        remarks, may_found = self._obstacles(now)
        if self.existing is not None:
            return FoundingPlan(self.stored, self._plan_joining(self.existing, now), tuple(remarks))
        wait = FoundingPlan(self.stored, (), tuple(remarks))
        if not may_found or self.expect < 1 or not all_tried:
            return wait
        willing = sorted(self._willing(now), key=lambda p: p.info)
        if len(willing) + 1 < self.expect:
            here = [p.info.name for p in willing]
            remark = Remark("info", "waiting for servers", {"expect": self.expect, "here": [self.me.name, *here]})
            return replace(wait, remarks=(*wait.remarks, remark))
        chosen = sorted([self.me, *(p.info for p in willing)])[: self.expect]
        if chosen[0] != self.me:
            return wait  # its proposal will come
        keys = {m.key_hash for m in chosen}
        for peer in willing:
            if peer.info.key_hash not in keys:
                continue
            if peer.prepared is not None:
                return wait  # another proposal must end first
            if missing := keys - peer.sees - {peer.info.key_hash}:
                names = [m.name for m in chosen if m.key_hash in missing]
                remark = Remark("info", "waiting for servers to reach each other", {peer.info.name: names})
                return replace(wait, remarks=(*wait.remarks, remark))
        proposal = Membership(self._new_id(), self.me.datacenter, tuple(chosen))
        if len(chosen) == 1:
            return FoundingPlan(replace(self.stored, committed=proposal), (), tuple(remarks))
        return FoundingPlan(replace(self.stored, prepared=proposal), (), tuple(remarks))

    def _obstacles(self, now: float) -> tuple[list[Remark], bool]:
        """What an operator should know, and whether this server may propose in spite of it."""
        remarks: list[Remark] = []
        may_found = True

        def obstacle(event: str, *, level: str = "warn", stops: bool = True, **fields: Any) -> None:
            nonlocal may_found
            remarks.append(Remark(level, event, fields))
            may_found &= not stops

        me = self.me
        if self.twin:
            hint = "its data directory is a copy: remove node-id and tls/ there"
            obstacle("another server has this server's identity", level="err", address=self.twin, hint=hint)
        if self.counted_on:
            obstacle(
                "this server votes in a cluster, but its log is gone: it takes no part until it has been replaced",
                level="err",
                server=self.counted_on,
                hint=f"put back the server directory if it was only moved or not mounted (never an older copy); or run"
                f" `rostra operator raft remove-peer -id={me.node_id}` on another server, then `rostra operator raft"
                f" add-peer {me.name}`",
            )
        elif (found := self.existing) is not None:
            obstacle(
                "a cluster exists: this server waits to be let into it",
                cluster=found.cluster_id,
                server=found.info.name,
                address=found.address or found.info.host_port,
                hint=f"on one of its servers run `rostra operator raft add-peer {me.name}`",
            )
        fresh = [p for p in self.peers.values() if self._is_fresh(p, now)]
        for peer in fresh:
            info, where = peer.info, peer.address
            if info.datacenter != me.datacenter:
                event = "a server of another datacenter is not counted"
                obstacle(
                    event, stops=False, server=info.name, address=where, theirs=info.datacenter, ours=me.datacenter
                )
            elif self.expect and peer.expect not in (0, self.expect) and not peer.has_data:
                event = "servers differ in bootstrap_expect, no cluster is founded"
                obstacle(event, server=info.name, address=where, theirs=peer.expect, ours=self.expect)
            elif peer.has_data and not peer.cluster_id:
                event = "a server has data but no cluster, it is not counted"
                obstacle(event, stops=False, server=info.name, address=where)
        everyone = [me, *(p.info for p in fresh)]
        for what, values in (
            ("node id", [i.node_id for i in everyone]),
            ("name", [i.name for i in everyone]),
            ("address", [i.host_port for i in everyone]),
        ):
            if doubled := sorted({v for v in values if values.count(v) > 1}):
                obstacle(f"two servers have the same {what}, no cluster is founded", values=doubled)
        return remarks, may_found


def _parse_hello(said: Mapping[str, Any]) -> Peer:
    return Peer(
        info=parse_server(said),
        instance=text(said, "instance"),
        expect=number(said, "expect", EXPECT_MAX),
        cluster_id=text(said, "cluster_id") if said.get("cluster_id") else None,
        prepared=text(said, "prepared") if said.get("prepared") else None,
        refused=frozenset(texts(said, "refused", REFUSED_MAX)),
        has_data=bool(said.get("has_data")),
        sees=frozenset(texts(said, "sees", PEERS_MAX)),
        servers=tuple(texts(said, "servers", 16)),
    )
