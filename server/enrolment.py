"""Which node a name belongs to: every agent's hello passes here before anything else is answered.

A name is bound in the log to the first key that shows it. The log decides; `enrolment_problem` tells beforehand why it
would refuse, so that a node which comes again and again writes nothing. Called by the endpoint and by `roster.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rostra.server.endpoint import Peer, about_node
from rostra.server.leader import SERF_CHECK
from rostra.server.node import ServerNode
from rostra.server.settings import CoreSettings
from rostra.server.state.cluster import BindNode
from rostra.server.state.tables import Tables
from rostra.wire.errors import BadRequest, Conflict

#: A refused node comes again and again; it is answered from memory for this long.
REFUSED_S = 1.0
REFUSED_MAX = 1024


class Enrolment:
    """Binds names to keys. `server_id`: key hash → id in the list of servers, or None."""

    def __init__(
        self,
        node: ServerNode,
        settings: CoreSettings,
        *,
        server_id: Callable[[str], str | None],
        on_enrolled: Callable[[], None],
    ) -> None:
        self._node, self._settings = node, settings
        self._server_id, self._on_enrolled = server_id, on_enrolled
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
        if refused is not None and time.monotonic() < refused[0]:
            raise Conflict(refused[1])
        role = "client" if self._server_id(peer.key_hash) is None else "server"
        known = self._node.store.tables.members.get(peer.name)
        if known is not None and known.key_hash == peer.key_hash and known.status == "alive":
            seen = (known.node_id, known.role, known.address, known.serf_port, known.version)
            if seen == (peer.node_id, role, about.address, about.serf_port, about.version):
                return
        await self._node.barrier("default")
        try:
            if problem := enrolment_problem(self._node.store.tables, peer.name, peer.node_id, peer.key_hash):
                raise Conflict(problem)
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
            self._refused[peer.name, peer.key_hash] = (time.monotonic() + REFUSED_S, e.message)
            raise
        self._on_enrolled()


def enrolment_problem(tables: Tables, name: str, node_id: str, key_hash: str) -> str:
    """Why a node may not have its name and node id at present, or "". The log decides; this spares it the refusals."""
    members = tables.members.rows
    known = members.get(name)
    if known is not None and known.key_hash != key_hash and (known.voter or known.status == "alive"):
        gone = (
            f"if that server is gone for good, run `rostra operator raft remove-peer -id={known.node_id}` first;"
            " else restore its node key"
            if known.voter
            else f"choose another node name, or run `rostra force-leave {name}` if that node is gone for good"
        )
        return (
            f"{_of(name)} belongs to another node key ({known.address}),"
            f" and that node is {'a server' if known.voter else 'alive'}: {gone}"
        )
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


def _of(name: str) -> str:
    return f"node name {name!r}"
