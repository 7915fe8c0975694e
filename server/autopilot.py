"""Autopilot: how the leader cares for the servers. Who is healthy, who may vote now, whose place can be cleared.

`judge` and `plan` are pure: what is known of the servers goes in, health and the next steps come out. `Autopilot` keeps
what they need over time (since when is a server stable, since when dead) and does the steps through the roster, one
change of the list after another. Rules and names follow Consul's, with one difference: a dead server keeps its place
while clearing it would gain nothing, since a server that only restarts could then vote again at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rostra.runtime.log import RateLimited, get
from rostra.server.node import ServerNode
from rostra.server.raft.members import LEARNER, Member
from rostra.server.roster import Roster, Waiting, address_of, majority
from rostra.server.state.rows import AutopilotRow, MemberRow
from rostra.wire.errors import NoLeader, RostraError, Timeout

log = get("autopilot")

TICK_S = 0.5
#: A server answers each heartbeat: fewer than this many missed ones say nothing, however short the threshold is set.
HEARTBEATS_MISSED = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """What the leader knows of one server at this moment."""

    member: Member
    status: str  # of the node: alive | failed | left; "" before it has enrolled
    version: str
    is_leader: bool
    is_up: bool
    last_contact_s: float
    last_index: int
    lag: int  # entries behind the leader


@dataclass(frozen=True, slots=True)
class Health:
    """A judgement that has a past. Times are the leader's monotonic clock."""

    seen: Seen
    healthy: bool
    since: float  # healthy, or not, for this long
    dead_since: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    what: str  # promote | remove | admit
    node_id: str
    name: str


def judge(seen: Seen, config: AutopilotRow, heartbeat_s: float) -> bool:
    """Is this server fit to vote?"""
    if seen.is_leader:
        return True
    threshold_s = max(config.last_contact_threshold_ms / 1000, HEARTBEATS_MISSED * heartbeat_s)
    return (
        seen.is_up
        and seen.status == "alive"
        and seen.last_contact_s <= threshold_s
        and seen.lag <= config.max_trailing_logs
    )


def follow(
    before: Mapping[str, Health], seen: Iterable[Seen], config: AutopilotRow, heartbeat_s: float, now: float
) -> dict[str, Health]:
    """The health of each server by id, with what was known of it before."""
    found = {}
    for one in seen:
        old = before.get(one.member.id)
        healthy = judge(one, config, heartbeat_s)
        is_dead = one.status in ("failed", "left") and not one.is_up and not one.is_leader
        found[one.member.id] = Health(
            one,
            healthy,
            old.since if old is not None and old.healthy == healthy else now,
            (old.dead_since if old is not None and old.dead_since is not None else now) if is_dead else None,
        )
    return found


def plan(
    servers: Collection[Health],
    waiting: Collection[Waiting],
    rows: Mapping[str, MemberRow],
    config: AutopilotRow,
    now: float,
) -> list[Step]:
    """What should be done, the most useful first. Each step is looked at again when its turn comes."""
    # To promote early is safer than to remove early: for a while there may be one voter more than needed.
    return [
        *_promotions(servers, config, now),
        *_removals(servers, waiting, config, now),
        *_admissions(servers, waiting, rows, config),
    ]


def _promotions(servers: Collection[Health], config: AutopilotRow, now: float) -> list[Step]:
    stable_s = config.server_stabilization_time_ms / 1000
    return [
        _step("promote", h.seen.member)
        for h in servers
        if h.seen.member.suffrage == LEARNER and h.healthy and now - h.since >= stable_s
    ]


def _removals(
    servers: Collection[Health], waiting: Collection[Waiting], config: AutopilotRow, now: float
) -> list[Step]:
    if not config.cleanup_dead_servers:
        return []
    stable_s = config.server_stabilization_time_ms / 1000
    dead = [h.seen.member for h in servers if h.dead_since is not None and now - h.dead_since >= stable_s]
    dead_voters = [m for m in dead if m.votes]
    steps = [_step("remove", m) for m in dead if not m.votes]
    count, lost = sum(h.seen.member.votes for h in servers), len(dead_voters)
    # Never more than a minority at once: who does not hear the others may be the one who is cut off.
    if not lost or lost > (count - 1) // 2 or count - lost < config.min_quorum:
        return steps
    # Worth it only where fewer are needed afterwards, or where a new server waits for the name of the dead one.
    gains = majority(count - lost) < majority(count)
    names = {w.name for w in waiting} if config.auto_admit_servers else set()
    return steps + [_step("remove", m) for m in dead_voters if gains or m.name in names]


def _admissions(
    servers: Collection[Health], waiting: Collection[Waiting], rows: Mapping[str, MemberRow], config: AutopilotRow
) -> list[Step]:
    names = {h.seen.member.name for h in servers}
    return [
        Step("admit", w.node_id, w.name)
        for w in waiting
        if w.name not in names and (config.auto_admit_servers or returns(w, rows.get(w.name)))
    ]


def returns(waiting: Waiting, row: MemberRow | None) -> bool:
    """Was it a server that autopilot removed while it was dead? One that an operator removed has left."""
    return (
        row is not None
        and row.role == "server"
        and not row.voter
        and row.status == "failed"  # one that was removed alive has left, whatever it has said of itself since
        and (row.key_hash, row.node_id) == (waiting.key_hash, waiting.node_id)
    )


def failure_tolerance(servers: Iterable[Health]) -> int:
    """How many more voters may fail before nothing can be decided any more."""
    votes = [h.healthy for h in servers if h.seen.member.votes]
    return max(0, sum(votes) - majority(len(votes)))


def _step(what: str, member: Member) -> Step:
    return Step(what, member.id, member.name)


class Autopilot:
    """The loop of the leader, and what operators are shown of it."""

    def __init__(
        self,
        node: ServerNode,
        roster: Roster,
        *,
        heartbeat_s: float,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._node, self._roster, self._heartbeat_s = node, roster, heartbeat_s
        self._now, self._wall = now, wall
        self._health: dict[str, Health] = {}
        self.rounds = 0  # of looking at the servers, in this leadership
        self._refused = RateLimited(log, 60.0)

    @property
    def config(self) -> AutopilotRow:
        return self._node.store.tables.autopilot.get("") or AutopilotRow()

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except (NoLeader, Timeout):
                pass  # leadership was lost, or a change is not committed yet
            except RostraError as e:
                log.err("a duty of autopilot was refused", error=e.message)
            except Exception as e:
                # A defect in a duty breaks no promise of the log: say so, and go on.
                self._refused.err("a duty of autopilot failed", key=repr(e), exc_info=e)
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        raft = self._node.raft
        if raft is None or not raft.is_leader:
            self._health, self.rounds = {}, 0  # the next leadership judges anew
            return
        await self._node.leader_index("default")  # NoLeader: it does not lead any more
        await self._roster.keep_rows()
        servers = self._look()
        self.rounds += 1
        waiting, rows = self._roster.waiting(), self._node.store.tables.members.rows
        if not raft.members_settled:
            return
        for step in plan(servers, waiting, rows, self.config, self._now()):
            try:
                await self._do(step)
            except (NoLeader, Timeout):
                raise
            except RostraError as e:
                self._refused.warn(f"cannot {step.what} a server", key=step.node_id, server=step.name, reason=e.message)
            else:
                return  # the next step is planned with what is known then

    async def _do(self, step: Step) -> None:
        if step.what == "promote":
            await self._roster.promote(step.node_id)
            log.info("a server has caught up and votes from now on", server=step.name, id=step.node_id)
        elif step.what == "remove":
            await self._roster.remove_dead(step.node_id)
            log.warn(
                "autopilot removed a dead server from the cluster; it is let in again if it comes back",
                server=step.name,
                id=step.node_id,
            )
        else:
            await self._roster.admit(node_id=step.node_id)

    def _look(self) -> Sequence[Health]:
        self._health = follow(self._health, self._seen(), self.config, self._heartbeat_s, self._now())
        return list(self._health.values())

    def _seen(self) -> list[Seen]:
        raft, rows = self._node.raft, self._node.store.tables.members
        if raft is None or not raft.is_leader:
            raise NoLeader
        peers = {p.id: p for p in raft.peers()}
        last = max((p.match_index + p.lag_entries for p in peers.values()), default=raft.commit_index)
        found = []
        for member in raft.members:
            row, peer = rows.get(member.name), peers.get(member.id)
            known = row is not None and row.key_hash == member.key_hash
            found.append(
                Seen(
                    member,
                    status=row.status if row is not None and known else "",
                    version=row.version if row is not None and known else "",
                    is_leader=member.id == self._node.node_id,
                    is_up=peer is not None and peer.is_up,
                    last_contact_s=peer.last_contact_s if peer is not None else 0.0,
                    last_index=peer.match_index if peer is not None else last,
                    lag=peer.lag_entries if peer is not None else 0,
                )
            )
        return found

    def health(self) -> dict[str, Any]:
        """On the leader: {healthy, failure_tolerance, leader, term, servers: […]}; times in ms. Raises NoLeader."""
        servers = self._look()
        raft = self._node.raft
        assert raft is not None
        to_wall = self._wall() - self._now()
        return {
            "healthy": all(h.healthy for h in servers),
            "failure_tolerance": failure_tolerance(servers),
            "leader": self._node.node_id,
            "term": raft.term,
            "servers": [
                {
                    "id": h.seen.member.id,
                    "name": h.seen.member.name,
                    "address": address_of(h.seen.member),
                    "serf_status": h.seen.status or "none",
                    "version": h.seen.version,
                    "leader": h.seen.is_leader,
                    "voter": h.seen.member.votes,
                    "suffrage": h.seen.member.suffrage,
                    "last_contact_ms": 0 if h.seen.is_leader else round(h.seen.last_contact_s * 1000),
                    "last_term": raft.term if h.seen.is_up or h.seen.is_leader else 0,
                    "last_index": h.seen.last_index,
                    "lag": h.seen.lag,
                    "healthy": h.healthy,
                    "stable_since_ms": round((h.since + to_wall) * 1000),
                }
                for h in servers
            ],
        }
