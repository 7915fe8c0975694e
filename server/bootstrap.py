"""Bootstrap once: how empty servers become one cluster, exactly one, whatever crashes or is lost meanwhile; and how an
empty server that sees a cluster asks to be let in.

Servers greet each other until `expect` empty ones see one another. The one with the lowest node id proposes the cluster
(id and members); a proposal is *committed* when every member holds it on its disk, and whoever learns that may say so.
A member never takes back its answer to a proposal: it holds the proposal until that is known to be dead, or has refused
it for ever. So a proposal cannot be both complete and dead, and a server is never in two clusters:

    empty ──prepare──► holds P ──all members hold P──► committed (for ever; read from disk at each start)
      ▲                  │
      └──a member refused P for ever, or is in another cluster──┘

An empty server that sees a cluster founds none: it asks ("bootstrap.join", see `roster.py`) until the servers of that
cluster have it in their list, stores that list, and is committed as well.

`Founder` decides and is pure; `Bootstrap` owns the file, the calls and the time. Called by `server/run.py` (`run`) and
by the RPC endpoint (`handle`). TLS settles before who may speak; this settles the roles.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rostra.runtime import log as _log
from rostra.runtime.files import write_durably
from rostra.runtime.service import Tasks
from rostra.runtime.tls import explain
from rostra.server.raft.members import LEARNER, MEMBERS_MAX, REPLICA, VOTER, Member, Members
from rostra.wire.errors import BadRequest, Conflict, Denied, Internal, RostraError, TooLarge

log = _log.get("bootstrap")

HELLO = "bootstrap.hello"
PREPARE = "bootstrap.prepare"
COMMIT = "bootstrap.commit"
REFUSE = "bootstrap.refuse"
KINDS = (HELLO, PREPARE, COMMIT, REFUSE)
#: Answered by servers of a cluster only.
JOIN = "bootstrap.join"
WAITING, MEMBER = "waiting", "member"

FILE_NAME = "bootstrap.json"
#: 2: members have a suffrage, and `started`.
FORMAT = 2
EXPECT_MAX = 15
PEERS_MAX = 64
REFUSED_MAX = 64

#: How long an answer counts as "is here".
FRESH_S = 2.0
#: After this the other members act for a proposer that is gone. They give its proposal up if other servers could found
#: the cluster instead. Else they complete it: it may come back, and a majority can work without it.
PATIENCE_S = 3.0
#: Candidates that do not answer hold up the founding no longer than this.
FIRST_ROUND_S = 1.0
#: How often a server that waits to be let in asks.
JOIN_EVERY_S = 0.5
#: Servers of a cluster that are asked at once, while it is not known which of them leads.
JOIN_AT_ONCE = 8


@dataclass(frozen=True, slots=True, order=True)
class ServerInfo:
    node_id: str
    name: str
    address: str
    rpc_port: int
    key_hash: str
    datacenter: str = "dc1"
    suffrage: str = VOTER  # in a list of members

    @property
    def host_port(self) -> str:
        return f"{self.address}:{self.rpc_port}"


@dataclass(frozen=True, slots=True)
class Membership:
    """A cluster as it was founded, or as it was when it let this server in: members by ascending node id.

    The first one of a founding proposed it. Later changes are in the log.
    """

    cluster_id: str
    datacenter: str
    members: tuple[ServerInfo, ...]

    def has_key(self, key_hash: str) -> bool:
        return any(m.key_hash == key_hash for m in self.members)

    def as_members(self) -> Members:
        """The same as the log has it."""
        return tuple(Member(m.node_id, m.address, m.rpc_port, m.key_hash, m.name, m.suffrage) for m in self.members)


@dataclass(frozen=True, slots=True)
class Stored:
    """The lasting notes of a server. Every answer is on the disk before it is given."""

    prepared: Membership | None = None
    committed: Membership | None = None
    refused: tuple[str, ...] = ()
    #: Its log exists: it may have voted. Without that log it must never vote again, see `Bootstrap`.
    started: bool = False


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
            stored, reason = self._answer_commit(_text(args, "cluster_id"), key_hash)
        elif kind == REFUSE:
            stored, reason = self._answer_refuse(_text(args, "cluster_id"))
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
        self.leader, self.counted_on = _text(reply, "leader") if reply.get("leader") else "", ""
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


# -- the shell -------------------------------------------------------------------------------------------------------

#: Asks the server at "host:port" and returns (its answer, the key hash that TLS proved). Raises anything on failure.
Ask = Callable[[str, str, dict[str, Any]], Awaitable[tuple[dict[str, Any], str]]]


@dataclass(slots=True)
class _Line:
    """The state of the calls of one kind to one address."""

    due: float = 0.0
    busy: bool = False
    tried: bool = False
    failures: int = 0


class Bootstrap:
    """One server's part in the founding: the file, the greetings, the waiting."""

    def __init__(
        self,
        data_dir: str | Path,
        me: ServerInfo,
        expect: int,
        *,
        has_data: bool = False,
        has_log: bool | None = None,
        suffrage: str = LEARNER,
        version: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`has_data`: something of a log or a snapshot is there; `has_log`: the log is (the same, where not given).
        `suffrage`: REPLICA never founds a cluster and asks to be let into one without a vote.

        Raises BadRequest or Conflict when the file cannot be used, or not with what else is there.
        """
        if not 0 <= expect <= EXPECT_MAX:
            raise BadRequest(f"bootstrap_expect {expect}: must be between 0 and {EXPECT_MAX}")
        self._path = Path(data_dir) / FILE_NAME
        self._now = now
        stored = load(self._path)
        if stored.committed is not None and not stored.committed.has_key(me.key_hash):
            raise Conflict(
                f"{self._path}: cluster {stored.committed.cluster_id} does not know this node's key;"
                " was the data directory copied, or its tls/node.key replaced?"
            )
        if stored.committed is None and has_data:
            raise Conflict(
                f"{self._path}: lost, although this server has data: it does not know its cluster any more and never"
                " founds another; restore this file from a backup, or start with an empty data directory"
            )
        if stored.committed is not None and stored.started and not (has_data if has_log is None else has_log):
            # Its promises (votes, acknowledged entries) were in that log. Starting without it could elect a second
            # leader of a term, or a leader that lacks what was acknowledged.
            raise Conflict(
                f"{self._path}: this server took part in cluster {stored.committed.cluster_id} as {me.name}"
                f" ({me.node_id}), but its log in {self._path.parent / 'raft'} is gone, and without it it must never"
                " vote again. If the log was only moved away, put it back (never an older copy of it). Else replace the"
                f" server: on another one run `rostra operator raft remove-peer -id={me.node_id}`, empty the data"
                f" directory here, start it again, and let it in with `rostra operator raft add-peer {me.name}`"
            )
        founds = 0 if suffrage == REPLICA else expect
        self._founder = Founder(me, founds, stored, has_data=has_data, suffrage=suffrage, version=version)
        self._limited = _log.RateLimited(log, now=now)
        self._lines: dict[tuple[str, str], _Line] = {}
        self._own: set[str] = {me.host_port}
        self._wake = asyncio.Event()
        self.status = "committed" if stored.committed else "not started"

    @property
    def committed(self) -> Membership | None:
        """The cluster that this server belongs to, as it was founded; durable."""
        return self._founder.stored.committed

    def note_started(self) -> None:
        """The log exists from now on: whoever finds this note without it knows that it was lost. Raises OSError."""
        self._keep(replace(self._founder.stored, started=True))

    def hello(self) -> dict[str, Any]:
        """What this server says about itself to others that greet."""
        return self._founder.hello()

    def asking(self) -> dict[str, Any]:
        """As `hello`, of a server that wants to be let in, or to know whether it still is."""
        return self._founder.asking()

    @property
    def existing_cluster(self) -> str | None:
        """The id of a cluster that was found instead of founding one."""
        return self._founder.existing.cluster_id if self._founder.existing else None

    def handle(self, kind: str, args: Mapping[str, Any], peer_key_hash: str) -> dict[str, Any]:
        """Answer a request of another server, which TLS knows by `peer_key_hash`. Raises RostraError."""
        before = self._founder.hello()
        stored, reply = self._founder.answer(kind, args, peer_key_hash, self._now())
        try:
            self._keep(stored)
        except OSError as e:
            raise Internal(f"{self._path}: {e.strerror}") from None
        peer = self._founder.peers.get(peer_key_hash)
        if peer is not None and kind == HELLO and peer.reached_at == -math.inf:
            self._line(peer.info.host_port, HELLO).due = 0.0  # it has just come: greet it now
        if before["prepared"] != reply["prepared"]:
            self._tell_all()
        self._wake.set()
        return reply

    async def run(
        self,
        candidates: Callable[[], Sequence[str]],
        call: Ask,
        *,
        period_s: float = 0.1,
        call_timeout_s: float = 3.0,
        log_interval_s: float = 10.0,
    ) -> Membership:
        """The membership, when there is one. `candidates`: "host:port" of the RPC of servers, this one's may be there.

        With an existing cluster found it asks to be let in (and says so) until it is, or until cancelled.
        """
        self._limited = _log.RateLimited(log, log_interval_s, now=self._now)
        started = self._now()
        async with Tasks("bootstrap") as tasks:
            while (membership := self.committed) is None:
                self._wake.clear()
                addresses = self._addresses(candidates())
                if not addresses and self._founder.expect < 1 and self._founder.stored.prepared is None:
                    self._remark(Remark("warn", "no cluster yet: give -bootstrap-expect=N or -retry-join", {}))
                late = self._now() - started > FIRST_ROUND_S
                plan = self._settle(late or all(self._line(a, HELLO).tried for a in addresses))
                for remark in plan.remarks:
                    self._remark(remark)
                wanted = [*plan.calls, *(Call(a, HELLO, {}) for a in addresses)]
                for c in wanted:
                    line = self._line(c.address, c.kind)
                    if not line.busy and line.due <= self._now():
                        line.busy, line.due = True, 0.0
                        tasks.start(f"{c.kind} {c.address}", self._ask(c, call, line, period_s, call_timeout_s))
                if self.committed is None:
                    await self._sleep(period_s)
            if self._founder.existing is None:
                await self._tell_committed(membership, call, tasks)
        self.status = "committed"
        log.info("cluster", id=membership.cluster_id, members=[m.name for m in membership.members])
        return membership

    def _settle(self, all_tried: bool) -> FoundingPlan:
        """Plan until nothing is left to be written."""
        founder = self._founder
        if founder.look(self._now()):
            self._tell_all()
        while True:
            plan = founder.plan(self._now(), all_tried=all_tried)
            if plan.stored == founder.stored:
                return plan
            self._keep(plan.stored)
            self._tell_all()

    def _keep(self, stored: Stored) -> None:
        if stored == self._founder.stored:
            return
        self._save(stored)
        self._founder.stored = stored
        if stored.committed is None and stored.prepared is not None:
            log.info("cluster proposed", cluster=stored.prepared.cluster_id, by=stored.prepared.members[0].name)

    def _save(self, stored: Stored) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self._path, dump(stored))

    async def _ask(self, c: Call, call: Ask, line: _Line, period_s: float, timeout_s: float) -> None:
        delay_s = period_s
        try:
            async with asyncio.timeout(timeout_s):
                # The newest that we know goes out, not what was true when the call was planned.
                args = (
                    self._founder.hello() if c.kind == HELLO else self._founder.asking() if c.kind == JOIN else c.args
                )
                reply, key_hash = await call(c.address, c.kind, args)
            if self._founder.note(reply, key_hash, self._now(), address=c.address):
                self._own.add(c.address)
            elif c.kind == JOIN:
                delay_s = JOIN_EVERY_S
                self._keep(self._founder.answered(reply, key_hash))
            line.failures = 0
            if reason := reply.get("reason"):
                self._limited.info("a server does not agree", key=c.address, address=c.address, reason=str(reason))
        except Exception as e:  # a network, another program, another version: all of it means "not now"
            line.failures += 1
            delay_s = min(2.0, period_s * 2**line.failures)
            if c.kind == JOIN:
                self._founder.leader = ""  # others may know who leads now
            waiting = isinstance(e, (TimeoutError, ConnectionRefusedError))
            level = self._limited.info if waiting else self._limited.warn
            reason = e.message if isinstance(e, RostraError) else explain(e)
            level("server cannot be reached", key=c.address, address=c.address, reason=reason)
        finally:
            line.busy, line.tried = False, True
            # A hello that became due meanwhile (there is news) stays due.
            line.due = 0.0 if line.due < 0 else self._now() + delay_s
            self._wake.set()

    def _tell_all(self) -> None:
        """Our hello has news: let it go to everyone now."""
        for (address, kind), line in self._lines.items():
            if kind == HELLO and not line.failures and address not in self._own:
                line.due = -1.0

    async def _tell_committed(self, membership: Membership, call: Ask, tasks: Tasks) -> None:
        """Spare the others a round. A server that misses this learns it from the next greeting."""
        founder = self._founder

        async def tell(member: ServerInfo) -> None:
            try:
                c = founder._call(member, COMMIT, {"cluster_id": membership.cluster_id})
                await call(c.address, c.kind, c.args)
            except Exception as e:
                log.debug("commit not delivered", server=member.name, reason=str(e))

        known = {k for k, p in founder.peers.items() if p.cluster_id == membership.cluster_id}
        others = [m for m in membership.members if m.key_hash not in known | {founder.me.key_hash}]
        if others:
            await asyncio.wait([tasks.start(f"commit {m.name}", tell(m)) for m in others], timeout=0.5)

    def _addresses(self, given: Iterable[str]) -> list[str]:
        """Whom to greet: the candidates, who came to us, and whom those know; each server once."""
        peers = list(self._founder.peers.values())
        heard = [p.address or p.info.host_port for p in peers]
        covered = {p.info.host_port for p in peers if p.address}
        hearsay = [a for p in peers for a in p.servers if a not in covered]
        found = dict.fromkeys([*given, *heard, *hearsay][: 2 * PEERS_MAX])
        return [a for a in found if a not in self._own]

    def _line(self, address: str, kind: str) -> _Line:
        line = self._lines.get((address, kind))
        if line is None:
            if len(self._lines) >= 8 * PEERS_MAX:
                self._lines = {k: v for k, v in self._lines.items() if v.busy}
            line = self._lines[address, kind] = _Line()
        return line

    def _remark(self, remark: Remark) -> None:
        self.status = remark.event
        self._limited.write(remark.level, remark.event, str(remark.fields.get("server", "")), dict(remark.fields))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass


# -- the file and the wire -------------------------------------------------------------------------------------------


def load(path: Path) -> Stored:
    """What this server remembers. Raises BadRequest for a damaged file, Conflict for one of a newer version."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] > FORMAT:
            raise Conflict(f"{path}: format {data['format']} of a newer Rostra; this one knows up to {FORMAT}")
        return Stored(
            prepared=parse_membership(data["prepared"]) if data["prepared"] else None,
            committed=parse_membership(data["committed"]) if data["committed"] else None,
            refused=tuple(str(r) for r in data["refused"]),
            # Format 1 does not say; a server that has a cluster and nothing else has most likely lost the rest.
            started=bool(data["started"]) if data["format"] > 1 else data["committed"] is not None,
        )
    except FileNotFoundError:
        return Stored()
    except OSError as e:
        raise BadRequest(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, BadRequest) as e:
        raise BadRequest(f"{path}: damaged ({e}); restore it from a backup") from None


def dump(stored: Stored) -> bytes:
    data = {
        "format": FORMAT,
        "prepared": dump_membership(stored.prepared) if stored.prepared else None,
        "committed": dump_membership(stored.committed) if stored.committed else None,
        "refused": list(stored.refused),
        "started": stored.started,
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def dump_membership(membership: Membership) -> dict[str, Any]:
    return {
        "cluster_id": membership.cluster_id,
        "datacenter": membership.datacenter,
        "members": [
            {
                "id": m.node_id,
                "name": m.name,
                "address": m.address,
                "port": m.rpc_port,
                "key_hash": m.key_hash,
                "suffrage": m.suffrage,
            }
            for m in membership.members
        ],
    }


def parse_membership(data: Any) -> Membership:
    """Raises BadRequest for anything but a sound one: then no other part checks it again."""
    if not isinstance(data, Mapping):
        raise BadRequest("not a cluster")
    datacenter = _text(data, "datacenter")
    listed = data.get("members")
    if not isinstance(listed, (list, tuple)) or not 1 <= len(listed) <= MEMBERS_MAX:
        raise BadRequest(f"a cluster has 1 to {MEMBERS_MAX} members")
    members = []
    for item in listed:
        if not isinstance(item, Mapping):
            raise BadRequest("not a member")
        suffrage = item.get("suffrage", VOTER)
        if suffrage not in (VOTER, LEARNER, REPLICA):
            raise BadRequest("suffrage is none that this version knows")
        members.append(
            ServerInfo(
                _text(item, "id"),
                _text(item, "name"),
                _text(item, "address"),
                _number(item, "port", 65535),
                _text(item, "key_hash"),
                datacenter,
                suffrage,
            )
        )
    # Addresses may be the same for a while: a server moved to that of one that is gone. A founding refuses it.
    for values in ([getattr(m, f) for m in members] for f in ("node_id", "name", "key_hash")):
        if len(set(values)) != len(values):
            raise BadRequest("two members are the same")
    if [m.node_id for m in members] != sorted(m.node_id for m in members):
        raise BadRequest("members are not in order")
    return Membership(_text(data, "cluster_id"), datacenter, tuple(members))


def parse_server(said: Any) -> ServerInfo:
    """Who a greeting says that it is from. Raises BadRequest."""
    if not isinstance(said, Mapping):
        raise BadRequest("not a greeting")
    return ServerInfo(
        _text(said, "node_id"),
        _text(said, "name"),
        _text(said, "address"),
        _number(said, "rpc_port", 65535),
        _text(said, "key_hash"),
        _text(said, "datacenter"),
    )


def _parse_hello(said: Mapping[str, Any]) -> Peer:
    return Peer(
        info=parse_server(said),
        instance=_text(said, "instance"),
        expect=_number(said, "expect", EXPECT_MAX),
        cluster_id=_text(said, "cluster_id") if said.get("cluster_id") else None,
        prepared=_text(said, "prepared") if said.get("prepared") else None,
        refused=frozenset(_texts(said, "refused", REFUSED_MAX)),
        has_data=bool(said.get("has_data")),
        sees=frozenset(_texts(said, "sees", PEERS_MAX)),
        servers=tuple(_texts(said, "servers", 16)),
    )


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
        raise BadRequest(f"{name} is missing or not a text")
    return value


def _texts(data: Mapping[str, Any], name: str, most: int) -> list[str]:
    values = data.get(name, ())
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and len(v) <= 255 for v in values):
        raise BadRequest(f"{name} is not a list of texts")
    if len(values) > most:
        raise TooLarge(f"{name} has {len(values)} items, at most {most} allowed")
    return list(values)


def _number(data: Mapping[str, Any], name: str, most: int) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadRequest(f"{name} is not a number from 0 to {most}")
    return value
