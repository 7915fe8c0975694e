"""The client agent's own certificate: got from any server after the first connection, renewed in time, reported.

The cluster secret only lets a node enrol. From then on it shows a certificate of the cluster CA and trusts that CA, so
that the secret can be changed or removed. `Certificate.keep` runs for the life of the agent; on servers the core does
the same for itself, and the agent beside it only takes over what the core has installed (`follow_core`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from rostra.runtime import log as _log
from rostra.runtime.identity import NodeIdentity
from rostra.wire.errors import BadRequest, NoLeader, RostraError, Timeout

log = _log.get("enrolment")

#: How often it is looked whether something is due; also how soon a lost report is repeated.
EVERY_S = 600.0
RETRY_MIN_S, RETRY_MAX_S = 2.0, 300.0
RELOAD_EVERY_S = 60.0


class Servers(Protocol):
    """What this needs of `servers_port.Servers`."""

    @property
    def connected(self) -> bool: ...

    async def act(self, kind: str, args: dict[str, Any], *, token: str = "", timeout_s: float = 10.0) -> Any: ...


class Certificate:
    """Keeps one node's certificate good. `kick` when a session with a server begins."""

    def __init__(self, identity: NodeIdentity, servers: Servers, *, now: Callable[[], float] = time.time) -> None:
        self._identity, self._servers, self._now = identity, servers, now
        self._wake = asyncio.Event()
        self._limited = _log.RateLimited(log, 600.0)

    def kick(self) -> None:
        self._wake.set()

    async def keep(self) -> None:
        """Ends only by cancellation."""
        delay = RETRY_MIN_S
        while True:
            await self._sleep(EVERY_S if not self._servers.connected else 0.0)
            try:
                await self.renew()
            except (NoLeader, Timeout):
                wait, delay = delay, min(delay * 2, RETRY_MAX_S)
            except RostraError as e:
                self._limited.warn("no certificate of the cluster CA yet, trying again", reason=e.message)
                wait, delay = delay, min(delay * 2, RETRY_MAX_S)
            else:
                wait, delay = EVERY_S, RETRY_MIN_S
            await self._sleep(wait)

    async def renew(self) -> None:
        """One look: a certificate where one is due, a report where the servers do not know the anchors. Raises."""
        identity = self._identity
        if self._now() >= identity.renew_at:
            answer = await self._servers.act("node.certificate", {})
            try:
                pem, anchors = str(answer["cert_pem"]), str(answer["anchors_pem"])
            except (TypeError, KeyError):
                raise BadRequest("the server's answer is no certificate") from None
            await asyncio.to_thread(identity.install_certificate, pem, anchors, trust_enrolment=True)
            log.info("has a new certificate of the cluster CA", renew_at=_date(identity.renew_at))
        await self._servers.act("node.report", {"anchors": identity.anchor_hashes})

    async def _sleep(self, seconds: float) -> None:
        """Until then or until kicked."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()


async def follow_core(identity: NodeIdentity) -> None:
    """On a server: take over the certificate that its core installs in the same directory."""
    limited = _log.RateLimited(log, 600.0)
    while True:
        await asyncio.sleep(RELOAD_EVERY_S if identity.is_enrolled else 1.0)
        try:
            await asyncio.to_thread(identity.reload)
        except (RostraError, OSError) as e:
            limited.warn("this node's certificate cannot be read again", reason=str(e))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
