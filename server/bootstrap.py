"""Bootstrap once: how empty servers become one cluster, exactly one, whatever crashes or is lost meanwhile; and how an
empty server that sees a cluster asks to be let in.

Servers greet each other until `expect` empty ones see one another. The one with the lowest node id proposes the cluster
(id and members); a proposal is *committed* when every member holds it on its disk, and whoever learns that may say so.
A member never takes back its answer to a proposal: it holds the proposal until that is known to be dead, or has refused
it for ever. So a proposal cannot be both complete and dead, and a server is never in two clusters:

    empty ──prepare──► holds P ──all members hold P──► committed (for ever; read from disk at each start)
      ▲                  │
      └──a member refused P for ever, or is in another cluster──┘

An empty server that sees a cluster founds none: it asks ("bootstrap.join", see `roster.py`) until the servers of that
cluster have it in their list, stores that list, and is committed as well.

`Founder` (founding.py) decides and is pure; `Bootstrap` owns the file, the calls and the time. Called by
`server/run.py` (`run`) and by the RPC endpoint (`handle`). TLS settles before who may speak; this settles the roles.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rostra.runtime import log as _log
from rostra.runtime.files import write_durably
from rostra.runtime.service import Tasks
from rostra.runtime.tls import explain
from rostra.server.founding import (
    COMMIT,
    HELLO,
    JOIN,
    JOIN_EVERY_S,
    Call,
    Founder,
    FoundingPlan,
    Remark,
)
from rostra.server.membership import (
    EXPECT_MAX,
    FILE_NAME,
    PEERS_MAX,
    Membership,
    ServerInfo,
    Stored,
    dump,
    load,
)
from rostra.server.raft.members import LEARNER, REPLICA
from rostra.wire.errors import BadRequest, Conflict, Internal, RostraError

log = _log.get("bootstrap")

#: Candidates that do not answer hold up the founding no longer than this.
FIRST_ROUND_S = 1.0
#: Asks the server at "host:port" and returns (its answer, the key hash that TLS proved). Raises anything on failure.
Ask = Callable[[str, str, dict[str, Any]], Awaitable[tuple[dict[str, Any], str]]]


@dataclass(slots=True)
class _Line:
    """The state of the calls of one kind to one address."""

    due: float = 0.0
    busy: bool = False
    tried: bool = False
    failures: int = 0


class Bootstrap:
    """One server's part in the founding: the file, the greetings, the waiting."""

    def __init__(
        self,
        data_dir: str | Path,
        me: ServerInfo,
        expect: int,
        *,
        has_data: bool = False,
        has_log: bool | None = None,
        suffrage: str = LEARNER,
        version: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`has_data`: something of a log or a snapshot is there; `has_log`: the log is (the same, where not given).
        `suffrage`: REPLICA never founds a cluster and asks to be let into one without a vote.

        Raises BadRequest or Conflict when the file cannot be used, or not with what else is there.
        """
        if not 0 <= expect <= EXPECT_MAX:
            raise BadRequest(f"bootstrap_expect {expect}: must be between 0 and {EXPECT_MAX}")
        self._path = Path(data_dir) / FILE_NAME
        self._now = now
        stored = load(self._path)
        if stored.committed is not None and not stored.committed.has_key(me.key_hash):
            raise Conflict(
                f"{self._path}: cluster {stored.committed.cluster_id} does not know this node's key;"
                " was the data directory copied, or its tls/node.key replaced?"
            )
        if stored.committed is None and has_data:
            raise Conflict(
                f"{self._path}: lost, although this server has data: it does not know its cluster any more and never"
                " founds another; restore this file from a backup, or start with an empty data directory"
            )
        if stored.committed is not None and stored.started and not (has_data if has_log is None else has_log):
            # Its promises (votes, acknowledged entries) were in that log. Starting without it could elect a second
            # leader of a term, or a leader that lacks what was acknowledged.
            raise Conflict(
                f"{self._path}: this server took part in cluster {stored.committed.cluster_id} as {me.name}"
                f" ({me.node_id}), but its log in {self._path.parent / 'raft'} is gone, and without it it must never"
                " vote again. If the log was only moved away, put it back (never an older copy of it). Else replace the"
                f" server: on another one run `rostra operator raft remove-peer -id={me.node_id}`, empty the data"
                f" directory here, start it again, and let it in with `rostra operator raft add-peer {me.name}`"
            )
        founds = 0 if suffrage == REPLICA else expect
        self._founder = Founder(me, founds, stored, has_data=has_data, suffrage=suffrage, version=version)
        self._limited = _log.RateLimited(log, now=now)
        self._lines: dict[tuple[str, str], _Line] = {}
        self._own: set[str] = {me.host_port}
        self._wake = asyncio.Event()
        self.status = "committed" if stored.committed else "not started"

    @property
    def committed(self) -> Membership | None:
        """The cluster that this server belongs to, as it was founded; durable."""
        return self._founder.stored.committed

    def note_started(self) -> None:
        """The log exists from now on: whoever finds this note without it knows that it was lost. Raises OSError."""
        self._keep(replace(self._founder.stored, started=True))

    def hello(self) -> dict[str, Any]:
        """What this server says about itself to others that greet."""
        return self._founder.hello()

    def asking(self) -> dict[str, Any]:
        """As `hello`, of a server that wants to be let in, or to know whether it still is."""
        return self._founder.asking()

    @property
    def existing_cluster(self) -> str | None:
        """The id of a cluster that was found instead of founding one."""
        return self._founder.existing.cluster_id if self._founder.existing else None

    def handle(self, kind: str, args: Mapping[str, Any], peer_key_hash: str) -> dict[str, Any]:
        """Answer a request of another server, which TLS knows by `peer_key_hash`. Raises RostraError."""
        before = self._founder.hello()
        stored, reply = self._founder.answer(kind, args, peer_key_hash, self._now())
        try:
            self._keep(stored)
        except OSError as e:
            raise Internal(f"{self._path}: {e.strerror}") from None
        peer = self._founder.peers.get(peer_key_hash)
        if peer is not None and kind == HELLO and peer.reached_at == -math.inf:
            self._line(peer.info.host_port, HELLO).due = 0.0  # it has just come: greet it now
        if before["prepared"] != reply["prepared"]:
            self._tell_all()
        self._wake.set()
        return reply

    async def run(
        self,
        candidates: Callable[[], Sequence[str]],
        call: Ask,
        *,
        period_s: float = 0.1,
        call_timeout_s: float = 3.0,
        log_interval_s: float = 10.0,
    ) -> Membership:
        """The membership, when there is one. `candidates`: "host:port" of the RPC of servers, this one's may be there.

        With an existing cluster found it asks to be let in (and says so) until it is, or until cancelled.
        """
        self._limited = _log.RateLimited(log, log_interval_s, now=self._now)
        started = self._now()
        async with Tasks("bootstrap") as tasks:
            while (membership := self.committed) is None:
                self._wake.clear()
                addresses = self._addresses(candidates())
                if not addresses and self._founder.expect < 1 and self._founder.stored.prepared is None:
                    self._remark(Remark("warn", "no cluster yet: give -bootstrap-expect=N or -retry-join", {}))
                late = self._now() - started > FIRST_ROUND_S
                plan = self._settle(late or all(self._line(a, HELLO).tried for a in addresses))
                for remark in plan.remarks:
                    self._remark(remark)
                wanted = [*plan.calls, *(Call(a, HELLO, {}) for a in addresses)]
                for c in wanted:
                    line = self._line(c.address, c.kind)
                    if not line.busy and line.due <= self._now():
                        line.busy, line.due = True, 0.0
                        tasks.start(f"{c.kind} {c.address}", self._ask(c, call, line, period_s, call_timeout_s))
                if self.committed is None:
                    await self._sleep(period_s)
            if self._founder.existing is None:
                await self._tell_committed(membership, call, tasks)
        self.status = "committed"
        log.info("cluster", id=membership.cluster_id, members=[m.name for m in membership.members])
        return membership

    def _settle(self, all_tried: bool) -> FoundingPlan:
        """Plan until nothing is left to be written."""
        founder = self._founder
        if founder.look(self._now()):
            self._tell_all()
        while True:
            plan = founder.plan(self._now(), all_tried=all_tried)
            if plan.stored == founder.stored:
                return plan
            self._keep(plan.stored)
            self._tell_all()

    def _keep(self, stored: Stored) -> None:
        if stored == self._founder.stored:
            return
        self._save(stored)
        self._founder.stored = stored
        if stored.committed is None and stored.prepared is not None:
            log.info("cluster proposed", cluster=stored.prepared.cluster_id, by=stored.prepared.members[0].name)

    def _save(self, stored: Stored) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self._path, dump(stored))

    async def _ask(self, c: Call, call: Ask, line: _Line, period_s: float, timeout_s: float) -> None:
        delay_s = period_s
        try:
            async with asyncio.timeout(timeout_s):
                # The newest that we know goes out, not what was true when the call was planned.
                args = (
                    self._founder.hello() if c.kind == HELLO else self._founder.asking() if c.kind == JOIN else c.args
                )
                reply, key_hash = await call(c.address, c.kind, args)
            if self._founder.note(reply, key_hash, self._now(), address=c.address):
                self._own.add(c.address)
            elif c.kind == JOIN:
                delay_s = JOIN_EVERY_S
                self._keep(self._founder.answered(reply, key_hash))
            line.failures = 0
            if reason := reply.get("reason"):
                self._limited.info("a server does not agree", key=c.address, address=c.address, reason=str(reason))
        except Exception as e:  # a network, another program, another version: all of it means "not now"
            line.failures += 1
            delay_s = min(2.0, period_s * 2**line.failures)
            if c.kind == JOIN:
                self._founder.leader = ""  # others may know who leads now
            waiting = isinstance(e, (TimeoutError, ConnectionRefusedError))
            level = self._limited.info if waiting else self._limited.warn
            reason = e.message if isinstance(e, RostraError) else explain(e)
            level("server cannot be reached", key=c.address, address=c.address, reason=reason)
        finally:
            line.busy, line.tried = False, True
            # A hello that became due meanwhile (there is news) stays due.
            line.due = 0.0 if line.due < 0 else self._now() + delay_s
            self._wake.set()

    def _tell_all(self) -> None:
        """Our hello has news: let it go to everyone now."""
        for (address, kind), line in self._lines.items():
            if kind == HELLO and not line.failures and address not in self._own:
                line.due = -1.0

    async def _tell_committed(self, membership: Membership, call: Ask, tasks: Tasks) -> None:
        """Spare the others a round. A server that misses this learns it from the next greeting."""
        founder = self._founder

        async def tell(member: ServerInfo) -> None:
            try:
                c = founder._call(member, COMMIT, {"cluster_id": membership.cluster_id})
                await call(c.address, c.kind, c.args)
            except Exception as e:
                log.debug("commit not delivered", server=member.name, reason=str(e))

        known = {k for k, p in founder.peers.items() if p.cluster_id == membership.cluster_id}
        others = [m for m in membership.members if m.key_hash not in known | {founder.me.key_hash}]
        if others:
            await asyncio.wait([tasks.start(f"commit {m.name}", tell(m)) for m in others], timeout=0.5)

    def _addresses(self, given: Iterable[str]) -> list[str]:
        """Whom to greet: the candidates, who came to us, and whom those know; each server once."""
        peers = list(self._founder.peers.values())
        heard = [p.address or p.info.host_port for p in peers]
        covered = {p.info.host_port for p in peers if p.address}
        hearsay = [a for p in peers for a in p.servers if a not in covered]
        found = dict.fromkeys([*given, *heard, *hearsay][: 2 * PEERS_MAX])
        return [a for a in found if a not in self._own]

    def _line(self, address: str, kind: str) -> _Line:
        line = self._lines.get((address, kind))
        if line is None:
            if len(self._lines) >= 8 * PEERS_MAX:
                self._lines = {k: v for k, v in self._lines.items() if v.busy}
            line = self._lines[address, kind] = _Line()
        return line

    def _remark(self, remark: Remark) -> None:
        self.status = remark.event
        self._limited.write(remark.level, remark.event, str(remark.fields.get("server", "")), dict(remark.fields))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
