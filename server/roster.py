"""The servers of this cluster, and every way in which their list changes: let in, promoted, moved, removed.

Only the leader changes it, one change at a time. A server that wants to be let in asks again and again
("bootstrap.join"); until an operator lets it in it is told nothing but who leads. Its identity is the key that TLS has
proved. The list itself is Raft's (`raft/members.py`); `keep_rows` lets the members in the state follow it, and with
them the names that they own. Called by the endpoint, by acts and by `autopilot.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rostra.runtime.log import RateLimited, get
from rostra.server.enrolment import enrolment_problem
from rostra.server.founding import MEMBER, WAITING
from rostra.server.introduction import introduce, introduced
from rostra.server.membership import Membership, ServerInfo, dump_membership, parse_server
from rostra.server.node import ServerNode
from rostra.server.raft.log import RaftLog
from rostra.server.raft.members import LEARNER, REPLICA, VOTER, Member, Members, voters
from rostra.server.requests import Peer, about_node
from rostra.server.state.catalog import Deregister
from rostra.server.state.cluster import CLUSTER_CA_KEY, BindNode, SetMemberStatus, SetVoter
from rostra.wire.errors import BadRequest, Conflict, NoLeader, NotFound, Timeout

log = get("servers")

WAITING_MAX = 64
#: Servers that autopilot removed are remembered, for operators who look for them.
REMOVED_MAX = 16
#: A leader is missed for this long before others are asked, or strangers heard: an election is over sooner.
ALONE_S = 2.0
#: A waiting server asks every half second; one that was silent for this long waits no more.
WAITING_S = 10.0
#: A change is one round through the log, and that of a majority of the new list.
CHANGE_S = 5.0


@dataclass(slots=True)
class Waiting:
    """A server that asked to be let in. Kept by the hash of the key that TLS has proved."""

    node_id: str
    name: str
    key_hash: str
    host: str
    port: int
    suffrage: str
    version: str
    since: float
    seen: float

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def majority(count: int) -> int:
    return count // 2 + 1


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(member: Member) -> str:
    return join_address(member.host, member.port)


def find(members: Collection[Member], *, node_id: str = "", name: str = "", address: str = "") -> Member:
    """The server that is meant. Raises BadRequest, NotFound and, for an address that two have, Conflict."""
    if not (node_id or name or address):
        raise BadRequest("say which server is meant: by its id, its name or its address")
    found = [
        m
        for m in members
        if (not node_id or m.id == node_id)
        and (not name or m.name == name)
        and (not address or address_of(m) == address)
    ]
    if not found:
        meant = " and ".join(filter(None, (node_id and f"id {node_id}", name and f"name {name!r}", address)))
        raise NotFound(f"no server with {meant} in this cluster; its servers are {names_of(members)}")
    if len(found) > 1:
        raise Conflict(f"more than one server has the address {address}: give the id of the one that is meant")
    return found[0]


def names_of(members: Collection[Member]) -> str:
    return ", ".join(f"{m.name} ({address_of(m)})" for m in members)


def removal_problem(members: Collection[Member], reachable: Collection[str], leaving: Member) -> str:
    """Why the cluster could not decide anything without `leaving`, or ""."""
    if not leaving.votes:
        return ""
    rest = [m for m in members if m.votes and m.id != leaving.id]
    if not rest:
        return f"{leaving.name} is the last voting server: nobody could decide anything afterwards"
    here = [m for m in rest if m.id in reachable]
    if len(here) >= majority(len(rest)):
        return ""
    lost = ", ".join(m.name for m in rest if m.id not in reachable)
    return (
        f"without {leaving.name} {majority(len(rest))} of {len(rest)} voting servers are needed, and only {len(here)}"
        f" can be reached: bring back {lost} first, or remove it instead"
    )


class Roster:
    """`hello` says what this server says of itself; `hint(id, host, port)` is told where a server was heard from,
    and `where(member)` says it; `introduce(members)` has these heard as well."""

    def __init__(
        self,
        node: ServerNode,
        *,
        serf_port: int,
        version: str,
        hello: Callable[[], dict[str, Any]],
        hint: Callable[[str, str, int], None],
        where: Callable[[Member], tuple[str, int]],
        introduce: Callable[[Members], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._serf_port, self._version = node, serf_port, version
        self._hello, self._hint, self._where, self._introduce, self._now = hello, hint, where, introduce, now
        self._waiting: dict[str, Waiting] = {}
        self._removed: dict[str, tuple[str, str, float]] = {}  # by autopilot: id -> (name, address, when)
        self._change = ""  # the one that is on its way
        self._removing = asyncio.Lock()  # one at a time from its first step: its steps must not be another's
        self._refused, self._announced = RateLimited(log, 60.0), RateLimited(log, 1.0)
        self._versions: dict[str, str] = {node.node_id: version}
        #: Names of servers that an operator removes at this moment: that they are heard means nothing.
        self.leaving: set[str] = set()

    # -- who wants to be let in -------------------------------------------------------------------------------

    def answer_join(self, args: dict[str, Any], peer: Peer) -> dict[str, Any]:
        """The answer to "bootstrap.join". Raises BadRequest, Denied."""
        said = parse_server(args)
        if (said.node_id, said.name) != (peer.node_id, peer.name) or said.key_hash != peer.key_hash:
            raise BadRequest(f"{peer.name} asks for another name, id or key than its certificate has")
        if said.datacenter != self._node.datacenter:
            raise BadRequest(
                f"{said.name} is in datacenter {said.datacenter!r}, this cluster in {self._node.datacenter!r}"
            )
        about_node(args, said.datacenter, "")  # its address and version are texts that others can live with
        if not said.rpc_port:
            raise BadRequest(f"{said.name} says no port")
        answer: dict[str, Any] = {**self._hello(), "state": "", "leader": "", "reason": ""}
        raft = self._node.raft
        if raft is None:
            return {**answer, "reason": f"{self._node.name} is in no cluster itself yet"}
        member = next((m for m in raft.members if m.key_hash == peer.key_hash), None)
        if member is not None:
            self._hint(member.id, said.address, said.rpc_port)
            answer |= self.introduction() or {"membership": dump_membership(self._membership(raft))}
            if raft.members_settled:
                return {**answer, "state": MEMBER}
            # A server that the list names is told all the same: unless it hears the others, the list may never be
            # settled.
            return {**answer, "reason": "it is being let in"}
        if raft.leader_id is None and raft.last_heard_age_s() > ALONE_S and self.hear(said, args, peer.key_hash):
            return {**answer, "reason": f"{self._node.name} did not know of this server, and hears it from now on"}
        if not raft.is_leader:
            leader = next((m for m in raft.members if m.id == raft.leader_id), None)
            return {**answer, "state": WAITING, "leader": address_of(leader) if leader is not None else ""}
        return {**answer, "state": WAITING, "leader": said_by(answer), "reason": self._note(said, args)}

    def introduction(self) -> dict[str, Any]:
        """What this server adds to what it asks and answers about its cluster: the other may not know it yet."""
        raft, ca_key_pem = self._node.raft, self._node.store.secret(CLUSTER_CA_KEY)
        if raft is None or not ca_key_pem:
            return {}
        return introduce(self._membership(raft), self._hello()["key_hash"], ca_key_pem)

    def hear(self, said: ServerInfo, shown: Mapping[str, Any], key_hash: str) -> bool:
        """Whether the server that TLS knows by `key_hash` has proved to be one: then its list is heard. For who lacks a
        leader only. Raises BadRequest."""
        ca_key_pem = self._node.store.secret(CLUSTER_CA_KEY)
        if not ca_key_pem:
            return False
        me, cluster_id = self._hello()["key_hash"], self._node.cluster_id
        membership = introduced(shown, key_hash, me=me, cluster_id=cluster_id, ca_key_pem=ca_key_pem)
        if membership is None:
            return False
        self._introduce(membership.as_members())
        self._hint(said.node_id, said.address, said.rpc_port)  # it may have moved since that list was made
        return True

    def _note(self, said: ServerInfo, args: dict[str, Any]) -> str:
        """Put it on the list. Why it will not be let in as it is, or ""."""
        suffrage = args.get("suffrage")
        if suffrage not in (LEARNER, REPLICA):
            raise BadRequest(f"a server is let in as {LEARNER} or {REPLICA}")
        now = self._now()
        self._forget_silent(now)
        old = self._waiting.get(said.key_hash)
        if old is None:
            # A server that was emptied comes again with another key: it is not there any more under the one before.
            new = (said.name, said.address, said.rpc_port)
            for key_hash in [k for k, w in self._waiting.items() if (w.name, w.host, w.port) == new]:
                del self._waiting[key_hash]
            if len(self._waiting) >= WAITING_MAX:
                return f"{WAITING_MAX} servers wait already to be let in"
            self._announced.info(
                "a server waits to be let into the cluster",
                server=said.name,
                id=said.node_id,
                address=said.host_port,
                hint=f"`rostra operator raft add-peer {said.name}` lets it in",
            )
        self._waiting[said.key_hash] = Waiting(
            said.node_id,
            said.name,
            said.key_hash,
            said.address,
            said.rpc_port,
            str(suffrage),
            args.get("version") or "",
            old.since if old is not None else now,
            now,
        )
        return self._admission_problem(said.name, said.node_id, said.key_hash)

    def _forget_silent(self, now: float) -> None:
        for key_hash in [k for k, w in self._waiting.items() if now - w.seen > WAITING_S]:
            del self._waiting[key_hash]

    def _admission_problem(self, name: str, node_id: str, key_hash: str) -> str:
        raft = self._leading()
        for member in raft.members:
            if member.name == name:
                return (
                    f"{name} is the name of a server of this cluster with another key ({member.id} at"
                    f" {address_of(member)}): if the new one replaces it, run `rostra operator raft remove-peer"
                    f" -id={member.id}` first"
                )
            if member.id == node_id:
                return (
                    f"{name} has the node id of server {member.name} ({address_of(member)}): remove the file node-id in"
                    " its data directory and start it again"
                )
        return enrolment_problem(self._node.store.tables, name, node_id, key_hash)

    def waiting(self) -> list[Waiting]:
        """Who waits, by name. Only the leader knows."""
        self._forget_silent(self._now())
        return sorted(self._waiting.values(), key=lambda w: (w.name, w.node_id))

    def describe_waiting(self) -> list[dict[str, Any]]:
        now = self._now()
        return [
            {
                "id": w.node_id,
                "name": w.name,
                "address": w.address,
                "suffrage": w.suffrage,
                "key_hash": w.key_hash,
                "version": w.version,
                "waiting_s": round(now - w.since, 1),
                "heard_s": round(now - w.seen, 1),
                "problem": self._admission_problem(w.name, w.node_id, w.key_hash),
            }
            for w in self.waiting()
        ]

    # -- changes of the list ------------------------------------------------------------------------------------

    async def admit(self, *, name: str = "", node_id: str = "") -> Member:
        """Let a waiting server in, as learner or as replica. Raises NotFound, Conflict, NoLeader, Timeout."""
        raft = self._leading()
        if not (name or node_id):
            raise BadRequest("say which server is to be let in: by its name or its id")
        found = [w for w in self.waiting() if (not name or w.name == name) and (not node_id or w.node_id == node_id)]
        if not found:
            present = next((m for m in raft.members if name in ("", m.name) and node_id in ("", m.id)), None)
            if present is not None:
                raise Conflict(f"{present.name} is a server of this cluster already ({present.suffrage})")
            others = ", ".join(w.name for w in self.waiting()) or "none"
            raise NotFound(
                f"no server {name or node_id!r} waits to be let in (waiting: {others}): start it with the address of a"
                " server in retry_join, and look at its log"
            )
        if len(found) > 1:
            ids = ", ".join(f"{w.node_id} at {w.address}" for w in found)
            raise Conflict(f"{len(found)} servers called {name!r} wait to be let in ({ids}): give the id of one")
        new = found[0]
        if problem := self._admission_problem(new.name, new.node_id, new.key_hash):
            raise Conflict(problem)
        self._check_free()
        member = Member(new.node_id, new.host, new.port, new.key_hash, new.name, new.suffrage)
        # Its name is its own before it is in the list, else another could take it meanwhile.
        await self._bind(member)
        await self._change_to((*raft.members, member), f"adding {member.name}")
        self._waiting.pop(new.key_hash, None)
        log.info("let a server in", server=member.name, id=member.id, address=address_of(member), as_=member.suffrage)
        return member

    async def promote(self, node_id: str) -> None:
        raft = self._leading()
        member = find(raft.members, node_id=node_id)
        if member.suffrage != LEARNER:
            raise Conflict(f"{member.name} is no learner but a {member.suffrage}")
        await self._change_to(_with(raft.members, replace(member, suffrage=VOTER)), f"promoting {member.name}")

    async def moved(self, node_id: str, host: str, port: int) -> None:
        """That server has another address now; it says so itself."""
        raft = self._leading()
        member = find(raft.members, node_id=node_id)
        if (member.host, member.port) != (host, port):
            await self._change_to(_with(raft.members, replace(member, host=host, port=port)), f"moving {member.name}")
            log.info("a server has moved", server=member.name, before=address_of(member), now=join_address(host, port))

    async def remove(self, *, node_id: str = "", name: str = "", address: str = "") -> Member:
        """An operator takes a server out. The leader hands leadership over and raises NoLeader: the next one does it.

        Raises BadRequest, NotFound, Conflict (what stands against it), Timeout.
        """
        async with self._removing:
            return await self._remove(node_id, name, address)

    async def _remove(self, node_id: str, name: str, address: str) -> Member:
        raft = self._leading()
        member = find(raft.members, node_id=node_id, name=name, address=address)
        self._check_removal(raft, member)
        if member.id == self._node.node_id:
            log.info("hands leadership over, because it is to be removed")
            await raft.transfer()
            raise NoLeader("leadership goes to another server first")
        self._check_free()
        row = self._node.store.tables.members.get(member.name)
        row = row if row is not None and row.key_hash == member.key_hash else None
        # The row says "left" before the list changes, in case this leader fails in between. A server that autopilot
        # removed may come back by itself; one that an operator removed may not.
        self.leaving.add(member.name)
        try:
            if row is not None:
                await self._set_status(row.name, "left", row.key_hash)
            try:
                await self._take_out(raft, member)
            except (BadRequest, Conflict):
                if row is not None:
                    await self._set_status(row.name, row.status, row.key_hash)
                raise
            await self.keep_rows()
        finally:
            self.leaving.discard(member.name)
        tables = self._node.store.tables
        listed = tables.nodes.get(tables.node_name(member.name))
        if listed is not None and listed.id in ("", member.id):
            await self._node.own_write(Deregister(node=listed.name), hold_s=2)
        log.warn("removed a server from the cluster", server=member.name, id=member.id, address=address_of(member))
        return member

    async def remove_dead(self, node_id: str) -> None:
        """For autopilot: it may come back."""
        raft = self._leading()
        member = find(raft.members, node_id=node_id)
        self._check_removal(raft, member)
        await self._take_out(raft, member)
        self._removed[member.id] = (member.name, address_of(member), self._now())
        while len(self._removed) > REMOVED_MAX:
            del self._removed[next(iter(self._removed))]

    async def transfer(self, *, node_id: str = "", name: str = "") -> Member:
        """Hand leadership to a server, or to the one that is most up to date. It, when it was done."""
        raft = self._leading()
        to = ""
        if node_id or name:
            member = find(raft.members, node_id=node_id, name=name)
            if not member.votes:
                raise Conflict(f"{member.name} cannot lead: it is a {member.suffrage} and does not vote")
            if member.id == self._node.node_id:
                return member
            to = member.id
        elif len(voters(raft.members)) == 1:
            raise Conflict(f"{self._node.name} is the only voting server: nobody else could lead")
        return find(raft.members, node_id=await raft.transfer(to))

    async def _take_out(self, raft: RaftLog, member: Member) -> None:
        await self._change_to(tuple(m for m in raft.members if m.id != member.id), f"removing {member.name}")

    def _check_removal(self, raft: RaftLog, member: Member) -> None:
        reachable = {self._node.node_id, *(p.id for p in raft.peers() if p.is_up)}
        if problem := removal_problem(raft.members, reachable, member):
            raise Conflict(problem)

    def _check_free(self) -> None:
        """One change at a time. Raises Conflict with the one that is on its way."""
        if self._change:
            raise Conflict(f"another change of the servers is on its way ({self._change}): try again when it is done")
        if not self._leading().members_settled:
            raise Conflict(
                "another change of the servers is on its way, begun before this server led: try again when it is done"
            )

    async def _change_to(self, new: Members, what: str) -> None:
        self._check_free()
        raft = self._leading()
        self._change = what
        change = raft.change_members(new)
        change.add_done_callback(lambda done: self._changed(what, done))
        try:
            async with asyncio.timeout(CHANGE_S):
                await asyncio.shield(change)
        except TimeoutError:
            raise Timeout(
                f"{what}: not committed within {CHANGE_S:.0f} s, it may still be done; see `rostra operator raft"
                " list-peers`"
            ) from None

    def _changed(self, what: str, done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            done.exception()  # perhaps nobody waits for it any more
        if self._change == what:
            self._change = ""

    def _leading(self) -> RaftLog:
        raft = self._node.raft
        if raft is None or not raft.is_leader:
            raise NoLeader
        return raft

    # -- the rows of the state follow -----------------------------------------------------------------------------

    def note_version(self, server_id: str, version: Any) -> None:
        """What that server says it runs."""
        if isinstance(version, str) and len(version) <= 64 and version.isprintable():
            self._versions[server_id] = version

    async def keep_rows(self) -> None:
        """On the leader: names belong to the servers of the committed list, and to no former one. Raises NoLeader."""
        raft, rows = self._leading(), self._node.store.tables.members
        if not raft.members_settled or not self._node.store.cluster_id:
            return
        keys = {m.name: m.key_hash for m in raft.members}
        for row in [r for r in rows.rows.values() if r.voter and keys.get(r.name) != r.key_hash]:
            await self._node.own_write(SetVoter(name=row.name, voter=False), hold_s=2)
        for member in raft.members:
            try:
                await self._keep_row(member)
            except (BadRequest, Conflict) as e:  # nothing else of the leader's duties has to wait for this
                self._refused.err("the state does not take a server", key=member.name, reason=e.message)

    async def _keep_row(self, member: Member) -> None:
        rows = self._node.store.tables.members
        known = rows.get(member.name)
        if self._goes(member):
            return
        if known is None or (known.key_hash, known.role, known.address, known.rpc_port, known.version) != (
            member.key_hash,
            "server",
            member.host,
            member.port,
            self._versions.get(member.id) or known.version or self._version,
        ):
            await self._bind(member)
        if (known is None or not known.voter) and not self._goes(member):
            await self._node.own_write(SetVoter(name=member.name, voter=True), hold_s=2)

    def _goes(self, member: Member) -> bool:
        """Whether it is being removed, or was since the list was looked at: what is written of it now stays."""
        return member.name in self.leaving or all(m.id != member.id for m in self._leading().members)

    async def _bind(self, member: Member) -> None:
        known = self._node.store.tables.members.get(member.name)
        # The row of the founding knows no version, and no port of the agent: like ours, until its agent says otherwise.
        known = known if known is not None and known.key_hash == member.key_hash and known.version else None
        await self._node.own_write(
            BindNode(
                name=member.name,
                key_hash=member.key_hash,
                role="server",
                address=member.host,
                node_id=member.id,
                serf_port=known.serf_port if known is not None else self._serf_port,
                rpc_port=member.port,
                version=self._versions.get(member.id) or (known.version if known is not None else "") or self._version,
            ),
            hold_s=2,
        )

    async def _set_status(self, name: str, status: str, key_hash: str) -> None:
        await self._node.own_write(SetMemberStatus(name=name, status=status, key_hash=key_hash), hold_s=2)

    # -- what operators see ---------------------------------------------------------------------------------------

    def _membership(self, raft: RaftLog) -> Membership:
        """The list, each server where it was last heard from: who asks may have been told by none that it has moved."""
        infos = [
            ServerInfo(m.id, m.name, *self._where(m), m.key_hash, self._node.datacenter, m.suffrage)
            for m in raft.members
        ]
        return Membership(self._node.cluster_id, self._node.datacenter, tuple(sorted(infos)))

    def configuration(self) -> dict[str, Any]:
        """{members: […], index, settled, change}: the list as this server has it; `change`: what is on its way."""
        raft = self._node.raft
        if raft is None:
            raise NoLeader("No cluster leader: this server has not joined a cluster yet")
        rows = self._node.store.tables.members
        up = {p.id: p.is_up for p in raft.peers()} if raft.is_leader else {}
        members = []
        for m in raft.members:
            row = rows.get(m.name)
            members.append(
                {
                    "id": m.id,
                    "name": m.name,
                    "address": address_of(m),
                    "leader": m.id == raft.leader_id,
                    "voter": m.votes,
                    "suffrage": m.suffrage,
                    "key_hash": m.key_hash,
                    "version": row.version if row is not None and row.key_hash == m.key_hash else "",
                    "up": m.id == self._node.node_id or up.get(m.id),
                }
            )
        return {
            "members": members,
            "index": raft.members_index,
            "settled": raft.members_settled,
            "change": self._change,
            "removed": [
                {"id": i, "name": name, "address": address, "ago_s": round(self._now() - at)}
                for i, (name, address, at) in self._removed.items()
            ],
        }


def said_by(hello: dict[str, Any]) -> str:
    """The address of the server that says this of itself."""
    return join_address(hello["address"], hello["rpc_port"])


def _with(members: Members, changed: Member) -> Members:
    return tuple(changed if m.id == changed.id else m for m in members)
