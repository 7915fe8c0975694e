"""The cluster about itself: its identity, its members and which key each name is bound to, and the care of this state.

All of it is proposed by servers only. A node's name belongs to the first key that enrolled under it, until the node has
failed, left or been forgotten; a voting server's name until it is removed from the replicated member list.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.granules import FLOOR_OF, FLOORS
from rostra.server.state.rows import ClusterRow, MemberRow
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Tx, View
from rostra.wire.errors import BadRequest, Conflict, NotFound

CLUSTER_CA_KEY = "cluster-ca"
STATUSES = ("alive", "failed", "left")
ROLES = ("server", "client")


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The first command of a cluster, and its only one of this kind. `members`: (node id, name, address, key hash)."""

    kind: ClassVar[str] = "cluster.bootstrap"
    servers_only: ClassVar[bool] = True
    cluster_id: str
    members: tuple[tuple[str, str, str, str], ...]
    datacenter: str
    cluster_ca_cert_pem: str
    cluster_ca_key_pem: str
    at_ms: int = 0

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True when this founded the cluster; False when the same cluster was founded before."""
        tables = tx.tables
        present = tables.cluster.get("")
        if present is not None:
            if present.cluster_id == self.cluster_id:
                return False
            raise Conflict(f"this is cluster {present.cluster_id} already, not {self.cluster_id}")
        if not self.cluster_id or self.cluster_id != tx.cluster_id:
            raise BadRequest("a cluster needs an id, and its first entry has to carry it")
        row = ClusterRow(self.cluster_id, self.datacenter, self.cluster_ca_cert_pem, self.at_ms, tx.index, tx.index)
        tx.put(tables.cluster, "", row)
        tx.touch("table:cluster", "")
        if self.cluster_ca_key_pem:
            tx.put(tables.secrets, CLUSTER_CA_KEY, self.cluster_ca_key_pem)
        for node_id, name, address, key_hash in self.members:
            _put(tx, MemberRow(name, node_id, "server", address, key_hash, voter=True))
        return True


@dataclass(frozen=True, slots=True)
class BindNode:
    """Bind a node's name to its key, or renew what is known of a node that shows the same key again."""

    kind: ClassVar[str] = "cluster.join-node"
    servers_only: ClassVar[bool] = True
    name: str
    key_hash: str
    role: str
    address: str
    node_id: str = ""
    version: str = ""
    serf_port: int = 8301
    rpc_port: int = 8300

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True; raises Conflict when the name belongs to another key."""
        if not self.name or not self.key_hash:
            raise BadRequest("a member needs a name and a key")
        if self.role not in ROLES:
            raise BadRequest(f"role {self.role!r} is none of {', '.join(ROLES)}")
        old = tx.tables.members.get(self.name)
        if old is None or old.key_hash != self.key_hash:
            # A node that has the name under another key speaks for it no longer, see `server/agents.py`.
            tx.effect("name-bound", self.name, self.key_hash, old.key_hash if old is not None else "", tx.at_ms)
        if old is not None and old.key_hash != self.key_hash:
            if old.voter:
                raise Conflict(
                    f"node name {self.name!r} belongs to a voting server with another key ({old.address}): remove that "
                    "server from the cluster first, or restore its node key"
                )
            if old.status == "alive":
                raise Conflict(
                    f"node name {self.name!r} belongs to another node key ({old.address}), and that node is alive: "
                    f"choose another node name, or run `rostra force-leave {self.name}` if that node is gone for good"
                )
            old = None
        row = old or MemberRow(self.name, self.node_id, self.role, self.address, self.key_hash)
        _put(
            tx,
            row._replace(
                node_id=self.node_id or row.node_id,
                role="server" if row.voter else self.role,
                address=self.address,
                status="alive",
                serf_port=self.serf_port,
                rpc_port=self.rpc_port,
                version=self.version or row.version,
            ),
        )
        return True


@dataclass(frozen=True, slots=True)
class SetMemberStatus:
    """A member is alive, has failed or has left. `key_hash`: only if the name still belongs to this key."""

    kind: ClassVar[str] = "cluster.member-status"
    servers_only: ClassVar[bool] = True
    name: str
    status: str
    key_hash: str = ""

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True when the member has that status now; False when the name belongs to another key."""
        if self.status not in STATUSES:
            raise BadRequest(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        old = tx.tables.members.get(self.name)
        if old is None:
            raise NotFound(f"no member is called {self.name!r}")
        if self.key_hash and self.key_hash != old.key_hash:
            return False
        _put(tx, old._replace(status=self.status))
        return True


@dataclass(frozen=True, slots=True)
class SetVoter:
    """A server is, or is no longer, in Raft's member list."""

    kind: ClassVar[str] = "cluster.set-voter"
    servers_only: ClassVar[bool] = True
    name: str
    voter: bool

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        old = tx.tables.members.get(self.name)
        if old is None:
            raise NotFound(f"no member is called {self.name!r}")
        if self.voter and old.role != "server":
            raise Conflict(f"{self.name!r} is a client and cannot vote")
        _put(tx, old._replace(voter=self.voter))
        return True


@dataclass(frozen=True, slots=True)
class ForgetNode:
    """Free a node's name. A voting server has to be removed from the cluster first."""

    kind: ClassVar[str] = "cluster.forget-node"
    servers_only: ClassVar[bool] = True
    name: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        old = tx.tables.members.get(self.name)
        if old is not None:
            if old.voter:
                raise Conflict(f"{self.name!r} is a voting server: remove it from the cluster first")
            tx.delete(tx.tables.members, self.name)
            tx.touch("table:cluster", self.name)
        return True


@dataclass(frozen=True, slots=True)
class NodeReports:
    """What members say of themselves: (name, version, hashes of the trust anchors that they hold)."""

    kind: ClassVar[str] = "cluster.node-reports"
    servers_only: ClassVar[bool] = True
    reports: tuple[tuple[str, str, tuple[str, ...]], ...]

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> None:
        for name, version, anchors in self.reports:
            old = tx.tables.members.get(name)
            if old is not None:
                _put(tx, old._replace(version=version, anchors=anchors))


@dataclass(frozen=True, slots=True)
class StateHash:
    """What the leader's history was at `index`, see `Store.checkpoint`. Each store reports where its own differs."""

    kind: ClassVar[str] = "cluster.state-hash"
    servers_only: ClassVar[bool] = True
    index: int
    hash: int

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        tx.effect("state-hash", self.index, self.hash)
        return True


@dataclass(frozen=True, slots=True)
class ReapTombstones:
    """Forget deletions below an index. Absent things have at least that index from then on, so no index falls."""

    kind: ClassVar[str] = "cluster.reap-tombstones"
    servers_only: ClassVar[bool] = True
    table: str
    below: int

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> int:
        """How many were reaped."""
        if self.table not in FLOORS:
            raise BadRequest(f"table {self.table!r} is none of {', '.join(FLOORS)}")
        if self.below > tx.index:
            raise BadRequest(f"index {self.below} has not been reached")
        tables = tx.tables
        if self.table == "kv":
            # A key gets its tombstone when it goes and loses it when it comes back: they lie in the order of indexes.
            dead = [key for key, _ in takewhile(lambda row: row[1] < self.below, tables.tombstones.rows.items())]
            for key in dead:
                tx.delete(tables.tombstones, key)
        else:
            dead = [
                granule
                for granule, index in tables.granules.rows.items()
                if index < self.below
                and FLOOR_OF.get(granule.partition(":")[0]) == self.table
                and not tables.is_live(granule)
            ]
            for granule in dead:
                tx.delete(tables.granules, granule)
        if self.below > tables.floors.rows[self.table]:
            tx.put(tables.floors, self.table, self.below)
        return len(dead)


@dataclass(frozen=True, slots=True)
class Members:
    """{name: MemberRow} of all nodes that ever enrolled and were not forgotten."""

    kind: ClassVar[str] = "cluster.members"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:cluster")
        return list(view.tables.members.order or ())

    def row(self, view: View, key: str) -> MemberRow | None:
        return view.tables.members.get(key)

    def visible(self, can: Authorizer, key: str, row: MemberRow) -> bool:
        return can.node_read(key)


def _put(tx: Tx, row: MemberRow) -> None:
    old = tx.tables.members.get(row.name)
    if old is None:
        row = row._replace(create_index=tx.index, modify_index=tx.index)
    else:
        row = row._replace(create_index=old.create_index, modify_index=old.modify_index)
        if row == old:
            return
        row = row._replace(modify_index=tx.index)
    tx.put(tx.tables.members, row.name, row)
    tx.touch("table:cluster", row.name)
