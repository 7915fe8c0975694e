"""Which node a name belongs to: every agent's hello passes here before anything else is answered.

A name is bound in the log to the first key that shows it. The log decides; `enrolment_problem` tells beforehand why it
would refuse, so that a node which comes again and again writes nothing. A name goes to another key only when the node
that has it is gone: it counts as failed, no server has a connection of it, and it does not answer. Every holder of
`encrypt` may enrol, so new names have a rate (`Pace`), and unused ones a bound. Called by the endpoint and by
`roster.py`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from rostra.runtime.log import get
from rostra.server.leader import SERF_CHECK, SILENT_S, UNUSED_S, is_unused
from rostra.server.node import ServerNode
from rostra.server.requests import Peer, about_node
from rostra.server.settings import CoreSettings
from rostra.server.state.cluster import BindNode
from rostra.server.state.rows import MemberRow
from rostra.server.state.tables import Tables
from rostra.wire.errors import BadRequest, Conflict, RostraError

log = get("enrolment")

#: A refused node comes again and again; it is answered from memory for this long.
REFUSED_S = 1.0
REFUSED_MAX = 1024
#: New names from one address that one server takes at once, and then each second. A data centre may come from a single
#: address (NAT) and be rolled out in one go.
BURST, EACH_SECOND = 256, 1.0
SOURCES_MAX = 4096
#: Names whose nodes have enrolled and never come back, in the whole cluster. Counted once in a while only.
UNUSED_MAX, COUNT_EVERY_S = 1024, 1.0
#: Former holders of names that are remembered, to be told why.
TAKEN_MAX = 1024
#: The other servers get this long to say whether a node is connected to them.
ASK_S = 1.0


class Pace:
    """How many new names each source address may enrol: BURST at once, then so many each second. Pure."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}  # source -> (names left, when that was)

    def takes(self, address: str, now: float) -> bool:
        source = _source(address)
        left, at = self._left.pop(source, (float(BURST), now))
        left = min(float(BURST), left + (now - at) * EACH_SECOND)
        if len(self._left) >= SOURCES_MAX:  # the one that has been quiet for longest
            del self._left[next(iter(self._left))]
        self._left[source] = (left - 1 if left >= 1 else left, now)
        return left >= 1


class Enrolment:
    """Binds names to keys. `server_id`: key hash → id in the list of servers, or None; `holds(name, key)`: whether a
    node is connected here; `others()`: (name, client) of the servers that can be asked; `probe`: does a node answer?"""

    def __init__(
        self,
        node: ServerNode,
        settings: CoreSettings,
        *,
        server_id: Callable[[str], str | None],
        holds: Callable[[str, str], bool],
        others: Callable[[], Iterable[tuple[str, Any]]],
        probe: Callable[[MemberRow], Awaitable[bool]],
        on_enrolled: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._settings, self._now = node, settings, now
        self._server_id, self._on_enrolled = server_id, on_enrolled
        self._holds, self._others, self._probe = holds, others, probe
        self._pace = Pace()
        self._unused, self._counted_at = 0, float("-inf")
        # (name, former key) -> (key, when in ms): to whom it went
        self._taken: dict[tuple[str, str], tuple[str, int]] = {}
        # (name, key) -> (until, why): not the exception, whose frames would keep the connection, and the one before it
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}

    async def enrol(self, peer: Peer) -> None:
        """Bind a node's name to its key the first time it is seen; refuse another key. Raises Conflict, NoLeader."""
        s = self._settings
        about = about_node(peer.about, s.datacenter, peer.address)
        if about.datacenter != s.datacenter:
            raise BadRequest(
                f"node {peer.name} is in datacenter {about.datacenter!r}, this server in {s.datacenter!r}:"
                " -datacenter has to be the same"
            )
        if peer.local:
            if peer.name != s.node_name:
                raise Conflict(f"the server of this host is called {s.node_name}, not {peer.name}")
            return
        refused = self._refused.get((peer.name, peer.key_hash))
        if refused is not None and self._now() < refused[0]:
            raise Conflict(refused[1])
        role = "client" if self._server_id(peer.key_hash) is None else "server"
        known = self._node.store.tables.members.get(peer.name)
        if known is not None and known.key_hash == peer.key_hash and known.status == "alive":
            seen = (known.node_id, known.role, known.address, known.serf_port, known.version)
            if seen == (peer.node_id, role, about.address, about.serf_port, about.version):
                return
        await self._node.barrier("default")
        try:
            known = self._node.store.tables.members.get(peer.name)
            if problem := enrolment_problem(self._node.store.tables, peer.name, peer.node_id, peer.key_hash):
                raise Conflict(self._why_taken(peer, known) or problem)
            if known is None or known.key_hash != peer.key_hash:
                await self._check_new(peer, known)
            await self._node.own_write(
                BindNode(
                    name=peer.name,
                    key_hash=peer.key_hash,
                    role=role,
                    address=about.address,
                    node_id=peer.node_id,
                    serf_port=about.serf_port,
                    version=about.version,
                ),
                hold_s=5.0,
            )
        except Conflict as e:
            if len(self._refused) >= REFUSED_MAX:
                self._refused.clear()
            self._refused[peer.name, peer.key_hash] = (self._now() + REFUSED_S, e.message)
            raise
        if known is not None and known.key_hash != peer.key_hash:
            log.warn(
                "a node name goes to another key",
                node=peer.name,
                key_before=known.key_hash,
                key_now=peer.key_hash,
                was=known.status,
                address=about.address,
                peer=peer.address,
            )
        self._on_enrolled()

    # -- a name for a key that does not have it yet ----------------------------------------------------------------

    async def _check_new(self, peer: Peer, known: MemberRow | None) -> None:
        """Raises Conflict: it is not free, or too many are enrolled."""
        now = self._now()
        if now - self._counted_at > COUNT_EVERY_S:
            self._unused = sum(map(is_unused, self._node.store.tables.members.rows.values()))
            self._counted_at = now
        if self._unused >= UNUSED_MAX:
            raise Conflict(
                f"{self._unused} node names are enrolled and unused, and {UNUSED_MAX} are allowed: each is forgotten"
                f" {UNUSED_S:.0f} s after its node has failed, or at once with `rostra force-leave -prune NAME`; this"
                " node tries again by itself"
            )
        if not self._pace.takes(peer.address, now):
            raise Conflict(
                f"{BURST} new node names have come from {peer.address} in a short time, and server {self._node.name}"
                f" takes no more from there than {EACH_SECOND:.0f} each second: this node tries again by itself"
            )
        if known is not None and (where := await self._holder(known)):
            raise Conflict(
                f"{_of(known.name)} belongs to another node key ({known.address}), and that node {where}: choose"
                " another node name, or stop that node's agent first"
            )
        self._unused += 1

    async def _holder(self, member: MemberRow) -> str:
        """Where the node is that has this name, or "". It may count as failed and live: its agent may have stood still,
        or the server that hears it cannot tell the leader."""
        if self._holds(member.name, member.key_hash):
            return f"has a connection to server {self._node.name}"

        async def ask(name: str, client: Any) -> str:
            try:
                async with asyncio.timeout(ASK_S):
                    args = {"name": member.name, "key_hash": member.key_hash}
                    held = await client.call("act", "session.held", args)
            except (TimeoutError, RostraError):  # it is lost with its sessions, or of a version that cannot say
                return ""
            return f"has a connection to server {name}" if held is True else ""

        async def probe() -> str:
            return f"answers at {member.address}" if await self._probe(member) else ""

        answers = await asyncio.gather(probe(), *(ask(name, client) for name, client in self._others()))
        return next(filter(None, answers), "")

    # -- the one that has lost its name ----------------------------------------------------------------------------

    def bound(self, name: str, key_hash: str, key_before: str, at_ms: int) -> None:
        """The log has bound a name to a key; `key_before`: "" where nobody had it."""
        self._taken.pop((name, key_hash), None)
        if key_before:
            if len(self._taken) >= TAKEN_MAX:
                del self._taken[next(iter(self._taken))]
            self._taken[name, key_before] = (key_hash, at_ms)

    def _why_taken(self, peer: Peer, known: MemberRow | None) -> str:
        key_hash, at_ms = self._taken.get((peer.name, peer.key_hash), ("", 0))
        if known is None or known.key_hash != key_hash:
            return ""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_ms / 1000))
        return (
            f"{_of(peer.name)} went to another node key ({key_hash[:16]}… at {known.address}) at {at}, while this node"
            f" ({peer.key_hash[:16]}…) was not alive: if that one is not yours, somebody else knows `encrypt`; stop it,"
            f" run `rostra force-leave {peer.name}`, and this node is let in again"
        )


def enrolment_problem(tables: Tables, name: str, node_id: str, key_hash: str) -> str:
    """Why a node may not have its name and node id at present, or "". The log decides; this spares it the refusals."""
    members = tables.members.rows
    known = members.get(name)
    if known is not None and known.key_hash != key_hash and (known.voter or known.status == "alive"):
        gone = (
            f"if that server is gone for good, run `rostra operator raft remove-peer -id={known.node_id}` first;"
            " else restore its node key"
            if known.voter
            else "if this one replaces it, repeat it then (a client does so by itself); else choose another node name"
        )
        state = "is a server" if known.voter else f"counts as alive until it has been silent for {SILENT_S:.0f} s"
        return f"{_of(name)} belongs to another node key ({known.address}), and that node {state}: {gone}"
    folded = name.lower()
    for other in members.values():
        if other.name == name or not (other.voter or other.status == "alive"):
            continue
        if other.name.lower() == folded:
            return f"{_of(name)} differs only by case from that of node {other.name} ({other.address})"
        if other.key_hash == key_hash:
            return (
                f"{_of(name)} shows the key of node {other.name} ({other.address}), which is alive: if this data"
                " directory is a copy, remove node-id and tls/ in it; if the node was renamed, wait until its old name"
                " has failed"
            )
        if other.node_id == node_id:
            return (
                f"{_of(name)} has the node id {node_id} of node {other.name} ({other.address}), which is"
                " alive: remove the file node-id in one's data directory, or give it another -node-id"
            )
    listed = tables.nodes.get(tables.node_name(name))
    if listed is not None and listed.id and listed.id != node_id:
        # The leader could not register it under this id, see `catalog.Register`.
        check = tables.checks.get((listed.name, SERF_CHECK))
        if check is not None and check.status == "passing":
            return (
                f"{_of(name)} is listed in the catalog with node id {listed.id} ({listed.address}) and passing:"
                " wait until that one has failed, or deregister it"
            )
    return ""


def _source(address: str) -> str:
    """Whose address that is: of IPv6, a host has a whole /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 6 and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return address


def _of(name: str) -> str:
    return f"node name {name!r}"
