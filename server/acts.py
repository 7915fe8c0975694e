"""The short list of things that agents ask of a server and that are not log entries.

Each takes (peer, arguments, caller) and answers a msgpack value or raises RostraError; KeyError, TypeError and
ValueError mean that the arguments were malformed. Acts that only the leader can do (session renewal, reports of
followers, force-leave) are passed on to it. Certificates of nodes are for the key that TLS has proved and for the name
that is bound to it, never for what is asked.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from rostra.acl.authorizer import Authorizer
from rostra.acl.identity import ServiceIdentity
from rostra.server.autopilot import Autopilot
from rostra.server.endpoint import Act
from rostra.server.leader import LeaderDuties
from rostra.server.node import ServerNode
from rostra.server.raft.members import Member
from rostra.server.requests import Peer, about_node
from rostra.server.roster import Roster, address_of
from rostra.server.state.cluster import CLUSTER_CA_KEY, NodeReports
from rostra.server.state.rows import MemberRow
from rostra.server.state.tables import Tables
from rostra.server.writes import HOLD_S, on_behalf_of
from rostra.wire.caller import Caller
from rostra.wire.errors import BadRequest, Denied, NoLeader, RostraError, Timeout
from rostra.wire.rpc import Lost

LEAF_TTL_S = 72 * 3600
CSR_BYTES_MAX = 16 << 10
#: Signing costs about 1 ms; more than this many waiting means that somebody asks in a loop.
SIGNING_MAX = 256
#: A node that asks again for a certificate within this time gets the same one.
CERTIFICATE_AGAIN_S = 60.0
CERTIFICATES_KEPT = 4096
ANCHORS_MAX = 8
NAMES_HEARD_MAX = 65_536


def _anybody(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    """As in Consul: where the leader is needs no token."""
    return True


def _by_its_key(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    """The node asks for itself, and TLS has proved its key: `run` looks at who it is, and no token counts."""
    return True


def _operator_read(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    return can.operator_read()


def _operator_write(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    return can.operator_write()


def _of_the_session(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    session = tables.sessions.get(_text(args, "id", 255))
    return session is None or can.session_write(session.node)


def _of_the_service(can: Authorizer, tables: Tables, args: dict[str, Any]) -> bool:
    return can.service_write(_text(args, "service", 255))


class Acts:
    """`table` maps the kind of an act to its function and to who may ask for it."""

    def __init__(
        self,
        node: ServerNode,
        leader: LeaderDuties,
        peer: Callable[[str], Any],
        roster: Roster,
        autopilot: Autopilot,
        *,
        learn_candidates: Callable[[list[str]], bool],
        servers: Callable[[], list[dict[str, Any]]],
        holds: Callable[[str, str], bool],
        metrics: Callable[[], dict[str, Any]],
    ) -> None:
        self._node, self._leader, self._peer = node, leader, peer
        self._roster, self._autopilot = roster, autopilot
        self._learn, self._servers, self._holds, self._metrics = learn_candidates, servers, holds, metrics
        self._signing = 0
        #: what the certificate is for -> (when, the answer)
        self._certificates: OrderedDict[tuple[str, ...], tuple[float, dict[str, Any]]] = OrderedDict()
        #: What each may be asked by: the only place where that is said.
        self.table: dict[str, Act] = {
            "ping": Act(self.ping, _anybody),
            "heard": Act(self.heard, _by_its_key),
            "session.held": Act(self.session_held, _by_its_key),
            "session.renew": Act(self.renew_session, _of_the_session),
            "member.force-leave": Act(self.force_leave, _operator_write),
            "connect.sign": Act(self.sign_leaf, _of_the_service),
            "node.certificate": Act(self.node_certificate, _by_its_key),
            "node.report": Act(self.node_report, _by_its_key),
            "status.leader": Act(self.status_leader, _anybody),
            "status.peers": Act(self.status_peers, _anybody),
            "server.metrics": Act(self.server_metrics, _by_its_key),
            "servers": Act(self.list_servers, _by_its_key),
            "join.found": Act(self.join_found, _by_its_key),
            "raft.configuration": Act(self.raft_configuration, _operator_read),
            "raft.waiting": Act(self.raft_waiting, _operator_read),
            "raft.add-peer": Act(self.raft_add_peer, _operator_write),
            "raft.remove-peer": Act(self.raft_remove_peer, _operator_write),
            "raft.transfer-leader": Act(self.raft_transfer_leader, _operator_write),
            "raft.moved": Act(self.raft_moved, _by_its_key),
            "autopilot.health": Act(self.autopilot_health, _operator_read),
        }

    async def ping(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        return ()

    async def heard(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """A follower hears these agents. {names: [str], keys?: [hash of the key of each]}"""
        if peer.role != "server":
            raise Denied("only servers report whom they hear")
        names = args["names"]
        if len(names) > NAMES_HEARD_MAX:
            raise BadRequest(f"more than {NAMES_HEARD_MAX} names")
        keys = args.get("keys")
        if keys is None:  # it is of an older version
            keys = ("",) * len(names)
        if len(keys) != len(names):
            raise BadRequest("a key for each name")
        self._leader.heard(zip(names, keys, strict=True))
        return ()

    async def session_held(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{name, key_hash} -> whether that node's agent has a connection here."""
        if peer.role != "server":
            raise Denied("only servers ask who is connected")
        return self._holds(_text(args, "name", 128), _text(args, "key_hash", 128))

    async def renew_session(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{id} -> the session's row, or None where there is none."""
        session_id = _text(args, "id", 255)

        async def renew() -> Any:
            row = self._leader.renew(session_id)
            return None if row is None else tuple(row)

        return await self._at_leader("session.renew", {"id": session_id}, caller, renew, answer_s=2.0)

    async def force_leave(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{name, prune: bool}: an operator says that this node is gone for good."""
        name, prune = _text(args, "name", 128), args["prune"] is True

        async def leave() -> Any:
            await self._leader.force_leave(name, prune=prune)
            return ()

        return await self._at_leader("member.force-leave", {"name": name, "prune": prune}, caller, leave, answer_s=6.0)

    async def _at_leader(
        self,
        kind: str,
        args: dict[str, Any],
        caller: Caller | None,
        here: Callable[[], Awaitable[Any]],
        *,
        answer_s: float,
    ) -> Any:
        """What the leader answers, be it this server or another; it may be asked again, so `here` bears repetition.

        Raises what it raises, NoLeader where none was found, and Timeout where one was asked and did not answer.
        """
        deadline = time.monotonic() + HOLD_S
        while True:
            is_silent = False  # one was asked: perhaps it is done
            try:
                if self._node.is_leader:
                    await self._node.leader_index("default")
                    return await here()
                leader_id = self._node.leader_id
                other = self._peer(leader_id) if leader_id else None
                if other is not None:
                    async with asyncio.timeout(answer_s):
                        return await other.call("act", kind, args, *on_behalf_of(caller, other))
            except (Lost, TimeoutError):
                is_silent = True
            except NoLeader:
                pass
            if time.monotonic() >= deadline:
                raise (
                    Timeout(f"{kind}: the leader did not answer; it may or may not have been done")
                    if is_silent
                    else NoLeader(self._why_no_leader())
                )
            await asyncio.sleep(0.05)

    def _why_no_leader(self) -> str:
        raft = self._node.raft
        if raft is None:
            return "No cluster leader: this server is in no cluster yet; ask the agent of one that is"
        if not raft.suffrage:
            return "No cluster leader: this server was removed from the cluster; ask the agent of one that is in it"
        return "No cluster leader"

    async def sign_leaf(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{csr_pem, service} -> {cert_pem, serial, valid_after_ms, valid_before_ms, root_id, uri, service}"""
        from rostra.server.ca.issue import sign_leaf

        service, csr_pem = _text(args, "service", 255), _text(args, "csr_pem", CSR_BYTES_MAX)
        await self._node.barrier("default")
        store = self._node.store
        root = next((r for r in store.tables.roots.rows.values() if r.active), None)
        key_pem = store.secret(f"root:{root.id}") if root is not None else None
        if root is None or key_pem is None:
            raise NoLeader("the mesh CA is not ready yet: the leader makes its first root after its election")
        leaf = await self._sign(
            sign_leaf,
            root,
            key_pem,
            csr_pem,
            uri=ServiceIdentity(root.trust_domain, self._node.datacenter, service).uri,
            now_ms=int(time.time() * 1000),
            ttl_s=LEAF_TTL_S,
            serial=secrets.randbits(120) | 1,
        )
        return {
            "cert_pem": leaf.cert_pem,
            "serial": leaf.serial_hex,
            "valid_after_ms": leaf.valid_after_ms,
            "valid_before_ms": leaf.valid_before_ms,
            "root_id": root.id,
            "uri": leaf.uri,
            "service": service,
        }

    async def node_certificate(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """-> {cert_pem, anchors_pem}: the cluster CA's certificate for the peer's own key, name and role."""
        await self._node.barrier("default")
        return await self.certificate_for(self._bound(peer), peer.public_key)

    async def certificate_for(self, member: MemberRow, public_key: bytes) -> dict[str, Any]:
        """A certificate for a member and its key, which the caller has proof of. NoLeader: there is no CA yet."""
        from rostra.server.ca.issue import sign_node

        store = self._node.store
        cluster, key_pem = store.tables.cluster.get(""), store.secret(CLUSTER_CA_KEY)
        if cluster is None or not cluster.ca_cert_pem or not key_pem:
            raise NoLeader("the cluster CA is not ready yet: the first leader makes it")
        wanted = (member.key_hash, member.name, member.node_id, member.role, cluster.ca_cert_pem)
        made = self._certificates.get(wanted)
        # By the wall clock, as the certificate's own times are: one from before the clock was set is not given again.
        if made is not None and 0 <= time.time() - made[0] < CERTIFICATE_AGAIN_S:
            return made[1]
        certificate = await self._sign(
            sign_node,
            cluster.ca_cert_pem,
            key_pem,
            public_key,
            node_id=member.node_id,
            name=member.name,
            role=member.role,
            now_ms=int(time.time() * 1000),
            serial=secrets.randbits(120) | 1,
        )
        answer = {"cert_pem": certificate, "anchors_pem": cluster.ca_cert_pem}
        self._certificates[wanted] = (time.time(), answer)
        while len(self._certificates) > CERTIFICATES_KEPT:
            self._certificates.popitem(last=False)
        return answer

    async def node_report(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{anchors: [hex SHA-256]}: the trust anchors that the peer holds. Logged when that is news."""
        anchors = args["anchors"]
        if type(anchors) is not tuple or len(anchors) > ANCHORS_MAX:
            raise BadRequest(f"anchors are a list of at most {ANCHORS_MAX}")
        for anchor in anchors:
            if type(anchor) is not str or len(anchor) != 64 or not set(anchor) <= set("0123456789abcdef"):
                raise BadRequest("an anchor is named by its SHA-256 in hexadecimal")
        await self._node.barrier("default")
        return await self.report(self._bound(peer), anchors)

    async def report(self, member: MemberRow, anchors: tuple[str, ...]) -> bool:
        """True when it was news."""
        if member.anchors == anchors:
            return False
        await self._node.own_write(NodeReports(reports=((member.name, member.version, anchors),)), hold_s=5)
        return True

    def _bound(self, peer: Peer) -> MemberRow:
        """What the log says of the node whose key the peer has proved. Raises Denied."""
        if peer.local or not peer.public_key:
            raise Denied("only for nodes that show a certificate: the agent of a server shares that of its server")
        member = self._node.store.tables.members.get(peer.name)
        if member is None or member.key_hash != peer.key_hash or member.node_id != peer.node_id:
            raise Denied(f"node {peer.name} is not bound to the key and node id that it shows; it has to enrol again")
        return member

    async def _sign(self, sign: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        """A signature, made beside the loop."""
        if self._signing >= SIGNING_MAX:
            raise RostraError("too many certificate requests at once; try again")
        self._signing += 1
        try:
            return await asyncio.to_thread(sign, *args, **fields)
        finally:
            self._signing -= 1

    async def status_leader(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """The leader's "address:port", "" where none is known."""
        leader_id = self._node.leader_id
        for server in self._servers():
            if server["id"] == leader_id:
                return f"{server['host']}:{server['port']}"
        return ""

    async def status_peers(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        return [f"{s['host']}:{s['port']}" for s in self._servers()]

    async def list_servers(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """Every server of the member list: {id, name, host, port, key_hash, serf_port}."""
        return self._servers()

    async def server_metrics(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        return self._metrics()

    # -- the servers themselves ---------------------------------------------------------------------------------

    async def raft_configuration(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{stale?: bool} -> {members, index, settled, change}: see `Roster.configuration`. `stale`: as known here."""
        if args.get("stale") is True:
            return self._roster.configuration()

        async def answer() -> Any:
            return self._roster.configuration()

        return await self._at_leader("raft.configuration", {}, caller, answer, answer_s=2.0)

    async def raft_waiting(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """-> [{id, name, address, suffrage, key_hash, version, waiting_s, problem}]: who asks to be let in."""

        async def answer() -> Any:
            return self._roster.describe_waiting()

        return await self._at_leader("raft.waiting", {}, caller, answer, answer_s=2.0)

    async def raft_add_peer(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{name | id} -> {id, name, address, suffrage}: let a waiting server in."""
        if not (peer.local or peer.role == "server"):
            # A server gets every secret of the cluster. A node that may only enrol must not make a server of itself.
            raise Denied(
                f"a server is let in from the host of a server, and this was asked by the agent of {peer.name}, a"
                " client: run it on a server's host, or with -http-addr of the agent there"
            )
        wanted = _server_named(args)

        async def admit() -> Any:
            return _described(await self._roster.admit(name=wanted.get("name", ""), node_id=wanted.get("id", "")))

        return await self._at_leader("raft.add-peer", wanted, caller, admit, answer_s=12.0)

    async def raft_remove_peer(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{id | address | name} -> {id, name, address, suffrage}: take a server out of the list, for good."""
        wanted = _server_named(args)

        async def remove() -> Any:
            return _described(
                await self._roster.remove(
                    node_id=wanted.get("id", ""), name=wanted.get("name", ""), address=wanted.get("address", "")
                )
            )

        return await self._at_leader("raft.remove-peer", wanted, caller, remove, answer_s=14.0)

    async def raft_transfer_leader(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{id? | name?} -> {id, name, address, suffrage} of the server that leads now."""
        wanted = _server_named(args)

        async def transfer() -> Any:
            return _described(await self._roster.transfer(node_id=wanted.get("id", ""), name=wanted.get("name", "")))

        return await self._at_leader("raft.transfer-leader", wanted, caller, transfer, answer_s=4.0)

    async def raft_moved(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{host, port}: the server at the other end has this address now. On the leader only."""
        if peer.role != "server":
            raise Denied("only servers say that they have moved")
        host, port = _text(args, "host", 253), args["port"]
        about_node({"address": host}, "", "")
        if type(port) is not int or not 0 < port < 65536:
            raise BadRequest("that is not a port")
        await self._roster.moved(peer.node_id, host, port)
        return ()

    async def autopilot_health(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """-> {healthy, failure_tolerance, leader, term, servers: […]}, see `Autopilot.health`."""

        async def answer() -> Any:
            return self._autopilot.health()

        return await self._at_leader("autopilot.health", {}, caller, answer, answer_s=2.0)

    async def join_found(self, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        """{addresses: ["host:port" of servers' RPC]}: what this host's agent found by asking its join addresses.
        -> whether this server looks for others still, so that it is worth to ask them again."""
        if not peer.local:
            raise Denied("only the agent of this host tells where to join")
        return self._learn([a for a in args["addresses"] if isinstance(a, str) and len(a) <= 300][:64])


def _server_named(args: dict[str, Any]) -> dict[str, str]:
    """The parts of {id, name, address} that say which server is meant; "" is as if it were not there."""
    if not set(args) <= {"id", "name", "address"}:
        raise BadRequest("a server is named by id, name or address")
    return {key: _text(args, key, 300) for key, value in args.items() if value != ""}


def _described(member: Member) -> dict[str, Any]:
    return {"id": member.id, "name": member.name, "address": address_of(member), "suffrage": member.suffrage}


def _text(args: dict[str, Any], name: str, chars_max: int) -> str:
    value = args[name]
    if type(value) is not str or not value:
        raise BadRequest(f"{name} must be a text")
    if len(value) > chars_max:
        raise BadRequest(f"{name} has {len(value)} characters, at most {chars_max} are allowed")
    return value
