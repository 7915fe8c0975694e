"""The client agent's own certificate: got from any server after the first connection, renewed in time, reported.

The cluster secret only lets a node enrol. From then on it shows a certificate of the cluster CA and trusts that CA, so
that the secret can be changed or removed. `Certificate.keep` runs for the life of the agent; on servers the core does
the same for itself, and the agent beside it only takes over what the core has installed (`follow_core`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any, Protocol

from rostra.runtime import log as _log
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.wall import Wall
from rostra.wire.caller import ANONYMOUS, Caller
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

    async def act(
        self, kind: str, args: dict[str, Any], *, caller: Caller = ANONYMOUS, timeout_s: float = 10.0
    ) -> Any: ...


class Certificate:
    """Keeps one node's certificate good. `kick` when a session with a server begins."""

    def __init__(self, identity: NodeIdentity, servers: Servers, *, wall: Wall | None = None) -> None:
        self._identity, self._servers, self._wall = identity, servers, wall or Wall()
        self._wake = asyncio.Event()
        self._limited = _log.RateLimited(log, 600.0)

    def kick(self) -> None:
        self._wake.set()

    async def keep(self) -> None:
        """Ends only by cancellation."""
        delay = RETRY_MIN_S
        while True:
            if not self._servers.connected:
                await self._until_due()
            try:
                await self.renew()
                if self._wall.now() >= self._identity.renew_at:
                    raise BadRequest(
                        "it is past its renewal already: the clocks of this host and of the servers differ"
                    )
            except RostraError as e:
                if not isinstance(e, (NoLeader, Timeout)):
                    self._limited.warn("no certificate of the cluster CA yet, trying again", reason=e.message)
                await self._fall_back()
                await self._sleep(delay)
                delay = min(delay * 2, RETRY_MAX_S)
            else:
                delay = RETRY_MIN_S
                await self._until_due()

    async def renew(self) -> None:
        """One look: a certificate where one is due, a report where the servers do not know the anchors. Raises."""
        identity = self._identity
        if self._wall.now() >= identity.renew_at:
            answer = await self._servers.act("node.certificate", {})
            try:
                pem, anchors = str(answer["cert_pem"]), str(answer["anchors_pem"])
            except (TypeError, KeyError):
                raise BadRequest("the server's answer is no certificate") from None
            await asyncio.to_thread(identity.install_certificate, pem, anchors, trust_enrolment=True)
            log.info("has a new certificate of the cluster CA", renew_at=_date(identity.renew_at))
        await self._servers.act("node.report", {"anchors": identity.anchor_hashes})

    async def _fall_back(self) -> None:
        """A certificate that has expired (the clock may have jumped) opens no door: enrol again, with the secret."""
        if self._identity.is_enrolled and self._wall.now() >= self._identity.renew_at and not self._servers.connected:
            try:
                await asyncio.to_thread(self._identity.reload)
            except RostraError as e:
                self._limited.warn("this node cannot prove who it is", reason=e.message)

    async def _until_due(self) -> None:
        """Until the certificate is due or the servers have to be told again; or until kicked."""
        try:
            async with asyncio.timeout(EVERY_S):
                await self._wall.until(self._identity.renew_at or math.inf, self._wake)
        except TimeoutError:
            pass
        self._wake.clear()

    async def _sleep(self, seconds: float) -> None:
        """Until then or until kicked."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()


async def follow_core(identity: NodeIdentity, wall: Wall) -> None:
    """On a server: take over the certificate that its core installs in the same directory."""
    limited = _log.RateLimited(log, 600.0)
    never = asyncio.Event()
    while True:
        if wall.now() >= identity.renew_at:  # none yet, or the core is about to renew it
            await asyncio.sleep(1.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELOAD_EVERY_S):
                await wall.until(identity.renew_at, never)
        try:
            await asyncio.to_thread(identity.reload)
        except (RostraError, OSError) as e:
            limited.warn("this node's certificate cannot be read again", reason=str(e))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
