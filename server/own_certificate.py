"""This server's own certificate: of the cluster CA, renewed in time, and the anchors that it trusts are reported.

`server/run.py` keeps it at work for as long as the server lives. The leader signs, by the same act as for agents
(`server/acts.py`); until this server is in the log, there is nothing to ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial

from rostra.runtime import log as logging
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.wall import Wall
from rostra.server.acts import Acts
from rostra.server.node import ServerNode
from rostra.wire.errors import NoLeader, RostraError, Timeout

log = logging.get("server")

#: How often this server looks whether its certificate is due and its report still true.
EVERY_S = 60.0
RETRY_S = 1.0


class OwnCertificate:
    """`name`: what the node of `identity` is called."""

    def __init__(self, identity: NodeIdentity, node: ServerNode, acts: Acts, name: str) -> None:
        self._identity, self._node, self._acts, self._name = identity, node, acts, name

    async def keep(self) -> None:
        """Ends only by cancellation."""
        limited = logging.RateLimited(log, 600.0)
        wall, never = Wall(), asyncio.Event()
        while True:
            try:
                is_done = await self._certify()
            except (NoLeader, Timeout):
                is_done = False
            except Exception as e:
                reason = e.message if isinstance(e, RostraError) else repr(e)
                limited.warn("this server has no new certificate of the cluster CA yet", reason=reason)
                is_done = False
            if not is_done or wall.now() >= self._identity.renew_at:
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await wall.until(self._identity.renew_at, never)

    async def _certify(self) -> bool:
        """True when certificate and report are as they should be."""
        identity, tables = self._identity, self._node.store.tables
        cluster, member = tables.cluster.get(""), tables.members.get(self._name)
        if cluster is None or member is None or member.key_hash != identity.key_hash:
            return False
        if time.time() >= identity.renew_at or cluster.ca_cert_pem not in identity.anchors_pem:
            answer = await self._acts.certificate_for(member, identity.public_key)
            pems = answer["cert_pem"], answer["anchors_pem"]
            install = partial(identity.install_certificate, *pems, trust_enrolment=True)
            installing = asyncio.ensure_future(asyncio.to_thread(install))
            try:
                await asyncio.shield(installing)
            finally:
                await installing  # nothing stops a thread: a server that has stopped writes no more files
            log.info("has a new certificate of the cluster CA", renew_at=_date(identity.renew_at))
        await self._acts.report(member, identity.anchor_hashes)
        return True


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
