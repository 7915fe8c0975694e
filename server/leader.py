"""What the leader does besides leading: the first root, serfHealth, the death of nodes, the expiry of sessions.

Each duty is a small pure plan over the state and what was heard, and a loop that proposes what the plan says. A
follower runs the same loop and only reports to the leader which agents it hears.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from rostra import CONSUL_API_VERSION
from rostra.runtime.log import RateLimited, get
from rostra.server.node import ServerNode
from rostra.server.raft.members import REPLICA
from rostra.server.state.catalog import Deregister, Register
from rostra.server.state.cluster import ForgetNode, ReapTombstones, SetMemberStatus, StateHash
from rostra.server.state.rows import MemberRow, SessionRow
from rostra.server.state.session import ExpireSession, RenewSessions
from rostra.wire.errors import Conflict, NoLeader, NotFound, RostraError, Timeout

log = get("leader")

TICK_S = 0.25
REPORT_EVERY_S = 0.5
#: A node that no server hears for this long is probed.
SILENT_S = 3.0
#: After an election every agent gets this long to be heard again: its server may be the one that died.
GRACE_S = 15.0
#: With more suspects than this share of the fleet, the network is suspected first and all are probed once more.
SUSPECTS_MAX_SHARE = 0.05
PROBES_AT_ONCE = 16
#: A write for a node that the state machine refused is tried again after this long.
REFUSED_S = 10.0
#: A session is never expired before its TTL; Consul's servers wait twice as long, and clients divide by two.
TTL_FACTOR = 2.0
SERF_CHECK = "serfHealth"
#: A name that was enrolled, and whose node never said what it trusts, is forgotten when it has been gone for this long.
UNUSED_S = 60.0
FORGOTTEN_AT_ONCE = 16
#: For so long a key that was deleted is remembered, as in Consul (`tombstone_ttl`): a prefix has its index from that.
TOMBSTONE_S = 15 * 60.0
#: How often the index is noted to which that has come, and how many deletions are forgotten at once.
NOTED_EVERY_S, REAPED_AT_ONCE = 60.0, 256


def plan_silent(
    members: Iterable[MemberRow], heard: Mapping[str, float], leading_since: float, now: float
) -> list[MemberRow]:
    """Members that count as alive but that nobody has heard for SILENT_S (and, after an election, for GRACE_S).
    `heard`: when, by the hash of the key."""
    silent = []
    for member in members:
        if member.status != "alive":
            continue
        last = heard.get(member.key_hash)
        if last is None:
            if now - leading_since > GRACE_S:
                silent.append(member)
        elif now - last > SILENT_S:
            silent.append(member)
    return silent


def is_unused(member: MemberRow) -> bool:
    """Whether a node of that name has enrolled and no more: the first thing that an agent does then is to ask for a
    certificate and to report the anchors that it trusts."""
    return member.role == "client" and not member.voter and not member.anchors


def plan_expired(sessions: Iterable[SessionRow], seen: Mapping[str, float], now: float) -> list[SessionRow]:
    """Sessions whose time is up, by the clock of this server alone."""
    return [s for s in sessions if s.ttl_ms and now - seen.get(s.id, now) > s.ttl_ms / 1000 * TTL_FACTOR]


class Past:
    """Which index the state had how long ago, as far as this server has led."""

    def __init__(self) -> None:
        self._notes: deque[tuple[float, int]] = deque()  # (monotonic time, index), oldest first
        self._index = 0

    def note(self, now: float, index: int) -> None:
        if not self._notes or now - self._notes[-1][0] >= NOTED_EVERY_S:
            self._notes.append((now, index))

    def before(self, then: float) -> int:
        """The highest index that is known to have been reached before `then`; 0 where none is."""
        while self._notes and self._notes[0][0] < then:
            self._index = self._notes.popleft()[1]
        return self._index


class LeaderDuties:
    """The duties of one server."""

    def __init__(
        self,
        node: ServerNode,
        *,
        sessions: Callable[[], Iterable[tuple[str, str]]],
        peer: Callable[[str], Any],
        probe: Callable[[MemberRow], Awaitable[bool]],
        ensure_roots: Callable[[], Awaitable[None]],
        remove_server: Callable[[str], Awaitable[Any]],
        is_leaving: Callable[[str], bool],
        spawn: Callable[..., asyncio.Task[Any]],
    ) -> None:
        self._node, self._sessions, self._peer, self._probe = node, sessions, peer, probe
        self._ensure_roots, self._spawn = ensure_roots, spawn
        self._remove_server, self._is_leaving = remove_server, is_leaving
        self._heard: dict[str, float] = {}  # by the hash of the key: a name may go to another node
        self._leading_since = 0.0
        self._leading = False
        self._prepared = False
        self._past = Past()
        self._logged_checkpoint: StateHash | None = None
        self._last_report = 0.0
        self._renewed: dict[str, None] = {}
        self._kick = asyncio.Event()
        self._changing = asyncio.Lock()  # of what is known of a member: a duty's write must not follow its leaving
        self._unused_since: dict[str, float] = {}  # by the hash of the key
        self._refused, self._forgotten = RateLimited(log, 60.0), RateLimited(log, 60.0)
        self._refused_until: dict[str, float] = {}  # of members

    def kick(self) -> None:
        """Something happened that a duty may care about."""
        self._kick.set()

    def heard(self, nodes: Iterable[tuple[str, str]]) -> None:
        """A server (this one or a follower) hears the agents of these nodes now: (name, hash of the key). No key: an
        agent of a server's own host, or a server of an older version reports it. An agent with a key to which the
        name does not belong is not that node."""
        now = self._node.clock()
        members = self._node.store.tables.members.rows
        for name, key_hash in nodes:
            member = members.get(name)
            if member is not None and key_hash in ("", member.key_hash):
                self._heard[member.key_hash] = now

    def renew(self, session_id: str) -> SessionRow | None:
        """Under the lease: the session's clock starts again now; the other servers learn of it with the next tick."""
        if not self._node.is_leader:
            raise NoLeader
        row = self._node.store.tables.sessions.get(session_id)
        if row is None:
            return None
        self._node.session_seen[session_id] = self._node.clock()
        self._renewed[session_id] = None
        return row

    async def force_leave(self, name: str, *, prune: bool) -> None:
        """Mark a node that is gone as left and take it out of the catalog; with `prune`, free its name.

        A server is taken out of the list of servers as well. Raises NotFound, and Conflict for what is not gone.
        Repeating it is harmless. A node that comes back is alive again.
        """
        node = self._node
        tables = node.store.tables
        member = tables.members.get(name)
        if member is None:
            raise NotFound(f"no member is called {name!r}")
        if member.status == "alive":
            is_heard = node.clock() - self._heard.get(member.key_hash, float("-inf")) < SILENT_S
            if member.role == "server":  # the leader may be too new to have noted it
                peer = self._peer(member.node_id)
                is_heard |= member.node_id == node.node_id or (peer is not None and peer.open)
            if is_heard or await self._probe(member):
                how = "stop its agent first"
                if member.voter:
                    how += f", or take the server out with `rostra operator raft remove-peer -id={member.node_id}`"
                raise Conflict(f"node {name!r} ({member.address}) is alive: {how}")
        if member.voter:
            await self._remove_server(member.node_id)
        self._heard.pop(member.key_hash, None)
        async with self._changing:
            await node.own_write(SetMemberStatus(name=name, status="left", key_hash=member.key_hash), hold_s=2)
            listed = tables.nodes.get(tables.node_name(name))
            if listed is not None and listed.id in ("", member.node_id):
                await node.own_write(Deregister(node=listed.name), hold_s=2)
            if prune:
                await node.own_write(ForgetNode(name=name), hold_s=2)
        log.info("node was made to leave", node=name, pruned=prune)

    async def run(self) -> None:
        while True:
            try:
                await self._tick()
            except (NoLeader, Timeout):
                pass  # lost it meanwhile
            except RostraError as e:
                log.err("a duty of the leader was refused", error=e.message)
            except Exception as e:
                # A defect in a duty breaks no promise of the log: say so, and lead on.
                self._refused.err("a duty of the leader failed", key=repr(e), exc_info=e)
                await asyncio.sleep(1.0)
            try:
                async with asyncio.timeout(TICK_S):
                    await self._kick.wait()
            except TimeoutError:
                pass
            self._kick.clear()

    async def _tick(self) -> None:
        node = self._node
        now = self._node.clock()
        if not node.is_leader:
            self._leading = self._prepared = False
            await self._report(now)
            return
        if not self._leading:
            self._leading, self._leading_since = True, now
            self._heard.clear()
            self._refused_until.clear()
            self._past = Past()
        await node.leader_index("default")  # NoLeader: it has only just been elected, or does not lead any more
        if not self._prepared:
            await self._ensure_roots()
            self._prepared = True
        self.heard(self._sessions())
        await self._keep_health(now)
        await self._expire(now)
        checkpoint = node.store.checkpoint()
        if checkpoint is not None and checkpoint != self._logged_checkpoint:
            self._logged_checkpoint = checkpoint
            await node.own_write(checkpoint, hold_s=2)
        if self._renewed:
            ids, self._renewed = tuple(self._renewed), {}
            await node.own_write(RenewSessions(ids=ids), hold_s=2)
        self._past.note(now, node.store.index)
        if below := node.store.reapable(self._past.before(now - TOMBSTONE_S) + 1, REAPED_AT_ONCE):
            await node.own_write(ReapTombstones(table="kv", below=below), hold_s=2)

    async def _report(self, now: float) -> None:
        if now - self._last_report < REPORT_EVERY_S:
            return
        self._last_report = now
        leader_id = self._node.leader_id
        peer = self._peer(leader_id) if leader_id else None
        if peer is not None and peer.open:
            nodes = tuple(self._sessions())
            # In two lists: a leader of an older version reads the names only.
            report = {"names": tuple(name for name, _ in nodes), "keys": tuple(key for _, key in nodes)}
            try:
                async with asyncio.timeout(1.0):
                    await peer.call("act", "heard", report)
            except (TimeoutError, RostraError):
                pass

    # -- health of nodes --------------------------------------------------------------------------------------

    async def _keep_health(self, now: float) -> None:
        members = list(self._node.store.tables.members.rows.values())
        me = self._node.name
        for member in members:
            if member.role == "server":
                peer = self._peer(member.node_id)
                if member.name == me or (peer is not None and peer.open):
                    self._heard[member.key_hash] = now
            if now < self._refused_until.get(member.name, 0.0) or self._is_leaving(member.name):
                continue
            with self._refusals_of(member):
                is_heard = now - self._heard.get(member.key_hash, float("-inf")) < 1.0
                was_server = member.role == "server" and not member.voter  # heard or not, it has left
                if member.status != "alive" and is_heard and not was_server:
                    await self._change(member, self._mark, "alive")
                elif member.status == "alive" and not self._is_registered(member):
                    await self._change(member, self._register, True)
                elif member.status == "failed" and self._passes(member):
                    # leadership was lost between the two writes of `_mark`
                    await self._change(member, self._register, False)
        silent = plan_silent(members, self._heard, self._leading_since, now)
        if silent:
            await self._judge(silent, len(members))
        await self._forget_unused(members, now)
        if len(self._heard) > 2 * len(members) + 64:
            keys = {m.key_hash for m in members}
            self._heard = {key: at for key, at in self._heard.items() if key in keys}

    @contextlib.contextmanager
    def _refusals_of(self, member: MemberRow) -> Iterator[None]:
        """A refusal for one node (its name is taken in the catalog, say) stops no other duty."""
        try:
            yield
        except (NoLeader, Timeout):
            raise
        except RostraError as e:
            self._refused_until[member.name] = self._node.clock() + REFUSED_S  # each attempt is an entry of the log
            self._refused.err("the catalog refuses what is known of a node", key=member.name, error=e.message)

    def _is_registered(self, member: MemberRow) -> bool:
        tables = self._node.store.tables
        name = tables.node_name(member.name)
        row = tables.nodes.get(name)
        return (
            row is not None
            and row.address == member.address
            and self._passes(member)
            and (member.role != "server" or self._is_listed(name, member))
        )

    def _is_listed(self, name: str, member: MemberRow) -> bool:
        """Whether the service `consul` of a server says what it should; an older version said less."""
        service = self._node.store.tables.services.get((name, "consul"))
        return service is not None and dict(service.meta) == self._meta(member)

    def _meta(self, member: MemberRow) -> dict[str, str]:
        """What Consul's clients look for, as Consul writes it."""
        raft = self._node.raft
        never_votes = raft is not None and any(m.id == member.node_id and m.suffrage == REPLICA for m in raft.members)
        return {
            "non_voter": str(never_votes).lower(),
            "raft_version": "3",
            "serf_protocol_current": "2",
            "serf_protocol_max": "5",
            "serf_protocol_min": "1",
            "version": CONSUL_API_VERSION,
        }

    def _passes(self, member: MemberRow) -> bool:
        tables = self._node.store.tables
        check = tables.checks.get((tables.node_name(member.name), SERF_CHECK))
        return check is not None and check.status == "passing"

    async def _judge(self, silent: list[MemberRow], fleet: int) -> None:
        """Probe the silent; declare failed those that do not answer (twice, where suspiciously many are silent)."""
        began = self._node.clock()
        rounds = 2 if len(silent) > max(1, fleet * SUSPECTS_MAX_SHARE) else 1
        suspects = silent
        for _ in range(rounds):
            gate = asyncio.Semaphore(PROBES_AT_ONCE)

            async def ask(member: MemberRow, gate: asyncio.Semaphore = gate) -> bool:
                async with gate:
                    return await self._probe(member)

            answers = await asyncio.gather(*(ask(m) for m in suspects))
            now = self._node.clock()
            for member, answered in zip(suspects, answers, strict=True):
                if answered:
                    self._heard[member.key_hash] = now
            suspects = [m for m, answered in zip(suspects, answers, strict=True) if not answered]
        for member in suspects:
            self.heard(self._sessions())
            if self._heard.get(member.key_hash, 0.0) > began:
                continue  # the rounds took their time, and it is back
            log.warn("node failed: no server hears it and it does not answer a probe", node=member.name)
            with self._refusals_of(member):
                await self._change(member, self._mark, "failed")

    async def _change(self, member: MemberRow, write: Callable[[MemberRow, Any], Awaitable[None]], how: Any) -> None:
        """Carry out a decision about `member` as it was; nothing if it has been made to leave meanwhile."""
        async with self._changing:
            if not self._is_leaving(member.name) and self._node.store.tables.members.get(member.name) == member:
                await write(member, how)

    async def _mark(self, member: MemberRow, status: str) -> None:
        await self._node.own_write(SetMemberStatus(name=member.name, status=status, key_hash=member.key_hash), hold_s=2)
        if not self._is_leaving(member.name):
            await self._register(member, status == "alive")

    async def _register(self, member: MemberRow, alive: bool) -> None:
        check = {
            "id": SERF_CHECK,
            "name": "Serf Health Status",
            "status": "passing" if alive else "critical",
            "output": "Agent alive and reachable" if alive else "Agent not live or unreachable",
        }
        tables, service = self._node.store.tables, None
        if member.role == "server":
            service = {
                "id": "consul",
                "name": "consul",
                "port": member.rpc_port,
                "meta": self._meta(member),
            }
        await self._node.own_write(
            Register(
                node=member.name,
                address=member.address,
                node_id=member.node_id,
                datacenter=self._node.datacenter,
                tagged_addresses={k: member.address for k in ("lan", "lan_ipv4", "wan", "wan_ipv4")},
                node_meta={"consul-network-segment": ""},
                skip_node_update=not alive and tables.nodes.get(tables.node_name(member.name)) is not None,
                service=service,
                checks=(check,),
            ),
            hold_s=2,
        )

    async def _forget_unused(self, members: list[MemberRow], now: float) -> None:
        """Names that were enrolled and never used go: nobody has to find them out and force them to leave."""
        unused = {m.key_hash: m for m in members if m.status == "failed" and is_unused(m)}
        self._unused_since = {key: self._unused_since.get(key, now) for key in unused}
        due = [unused[key] for key, since in self._unused_since.items() if now - since > UNUSED_S]
        for member in due[:FORGOTTEN_AT_ONCE]:
            with self._refusals_of(member):
                await self._change(member, self._forget, None)
        if due:
            self._forgotten.info(
                "names that were enrolled and never used are forgotten", nodes=len(due), for_s=int(UNUSED_S)
            )

    async def _forget(self, member: MemberRow, _how: None) -> None:
        tables = self._node.store.tables
        listed = tables.nodes.get(tables.node_name(member.name))
        if listed is not None and listed.id in ("", member.node_id):
            await self._node.own_write(Deregister(node=listed.name), hold_s=2)
        await self._node.own_write(ForgetNode(name=member.name), hold_s=2)

    # -- sessions ---------------------------------------------------------------------------------------------

    async def _expire(self, now: float) -> None:
        seen = self._node.session_seen
        rows = list(self._node.store.tables.sessions.rows.values())
        for row in rows:
            seen.setdefault(row.id, now)
        for row in plan_expired(rows, seen, now):
            if not plan_expired((row,), seen, self._node.clock()):
                continue  # renewed while another was ended
            log.info("session expired", session=row.id, node=row.node)
            index = self._node.store.session_seen(row.id)
            if index is not None:
                await self._node.own_write(ExpireSession(id=row.id, seen_index=index), hold_s=2)
