"""The short list of things that agents ask of a server and that are not log entries.

Each takes (peer, arguments) and answers a msgpack value or raises RostraError. Session renewal and what followers hear
belong to the leader and are passed on to it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rostra.acl.identity import ServiceIdentity
from rostra.server.endpoint import Peer
from rostra.server.leader import Leader
from rostra.server.node import HOLD_S, ServerNode
from rostra.wire.errors import BadRequest, Denied, NoLeader, RostraError

LEAF_TTL_S = 72 * 3600
CSR_BYTES_MAX = 16 << 10
#: Signing costs about 1 ms; more than this many waiting means that somebody asks in a loop.
SIGNING_MAX = 256


class Acts:
    """`table` maps the kind of an act to its function."""

    def __init__(
        self,
        node: ServerNode,
        leader: Leader,
        peer: Callable[[str], Any],
        *,
        learn_candidates: Callable[[list[str]], None],
        servers: Callable[[], list[dict[str, Any]]],
        metrics: Callable[[], dict[str, Any]],
    ) -> None:
        self._node, self._leader, self._peer = node, leader, peer
        self._learn, self._servers, self._metrics = learn_candidates, servers, metrics
        self._signing = 0
        self.table: dict[str, Callable[[Peer, dict[str, Any]], Awaitable[Any]]] = {
            "ping": self.ping,
            "heard": self.heard,
            "session.renew": self.renew_session,
            "connect.sign": self.sign_leaf,
            "status.leader": self.status_leader,
            "status.peers": self.status_peers,
            "server.metrics": self.server_metrics,
            "servers": self.list_servers,
            "join.found": self.join_found,
        }

    async def ping(self, peer: Peer, args: dict[str, Any]) -> Any:
        return ()

    async def heard(self, peer: Peer, args: dict[str, Any]) -> Any:
        """A follower hears these agents. {names: [str]}"""
        if peer.role != "server":
            raise Denied("only servers report whom they hear")
        self._leader.heard(str(n) for n in args["names"])
        return ()

    async def renew_session(self, peer: Peer, args: dict[str, Any]) -> Any:
        """{id} -> the session's row, or None where there is none."""
        session_id = str(args["id"])
        deadline = time.monotonic() + HOLD_S
        while True:
            try:
                if self._node.is_leader:
                    await self._node.leader_index("default")
                    row = self._leader.renew(session_id)
                    return None if row is None else tuple(row)
                leader_id = self._node.leader_id
                other = self._peer(leader_id) if leader_id else None
                if other is not None:
                    return await asyncio.wait_for(other.call("act", "session.renew", {"id": session_id}), 2.0)
            except (NoLeader, TimeoutError):
                pass
            if time.monotonic() >= deadline:
                raise NoLeader
            await asyncio.sleep(0.05)

    async def sign_leaf(self, peer: Peer, args: dict[str, Any]) -> Any:
        """{csr_pem, service} -> {cert_pem, serial, valid_after_ms, valid_before_ms, root_id, uri, service}"""
        from rostra.server.ca.issue import sign_leaf

        service, csr_pem = str(args["service"]), str(args["csr_pem"])
        if len(csr_pem) > CSR_BYTES_MAX:
            raise BadRequest("the certificate request is too large")
        await self._node.barrier("default")
        store = self._node.store
        root = next((r for r in store.tables.roots.rows.values() if r.active), None)
        key_pem = store.secret(f"root:{root.id}") if root is not None else None
        if root is None or key_pem is None:
            raise NoLeader("the mesh CA is not ready yet: the leader makes its first root after its election")
        if self._signing >= SIGNING_MAX:
            raise RostraError("too many certificate requests at once; try again")
        self._signing += 1
        try:
            leaf = await asyncio.to_thread(
                sign_leaf,
                root,
                key_pem,
                csr_pem,
                uri=ServiceIdentity(root.trust_domain, self._node.datacenter, service).uri,
                now_ms=int(time.time() * 1000),
                ttl_s=LEAF_TTL_S,
                serial=secrets.randbits(120) | 1,
            )
        finally:
            self._signing -= 1
        return {
            "cert_pem": leaf.cert_pem,
            "serial": leaf.serial_hex,
            "valid_after_ms": leaf.valid_after_ms,
            "valid_before_ms": leaf.valid_before_ms,
            "root_id": root.id,
            "uri": leaf.uri,
            "service": service,
        }

    async def status_leader(self, peer: Peer, args: dict[str, Any]) -> Any:
        """The leader's "address:port", "" where none is known."""
        leader_id = self._node.leader_id
        for server in self._servers():
            if server["id"] == leader_id:
                return f"{server['host']}:{server['port']}"
        return ""

    async def status_peers(self, peer: Peer, args: dict[str, Any]) -> Any:
        return [f"{s['host']}:{s['port']}" for s in self._servers()]

    async def list_servers(self, peer: Peer, args: dict[str, Any]) -> Any:
        """Every server of the member list: {id, name, host, port, key_hash, serf_port}."""
        return self._servers()

    async def server_metrics(self, peer: Peer, args: dict[str, Any]) -> Any:
        return self._metrics()

    async def join_found(self, peer: Peer, args: dict[str, Any]) -> Any:
        """{addresses: ["host:port" of servers' RPC]}: what this host's agent found by asking its join addresses."""
        if not peer.local:
            raise Denied("only the agent of this host tells where to join")
        self._learn([str(a) for a in args["addresses"]][:64])
        return ()
