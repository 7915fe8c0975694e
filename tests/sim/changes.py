"""The operator: other servers in the list, one change at a time, while everything else goes wrong.

A job is a generator that is continued every now and then: it looks at what the leader says and does the next step, or
the same one again, because any step's outcome may be unknown. Jobs are drawn at random; one that has begun is finished
after everything is healed. Voters are only taken away where a majority of the rest can be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rostra.server.raft.members import LEARNER, REPLICA, VOTER, Members
from rostra.wire.errors import RostraError
from tests.sim.server import Machine, Server

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

#: A learner is promoted when it lacks no more entries than this.
LAG_MAX = 20

Job = Iterator[None]


class Operator:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.world, self.chance = cluster, cluster.world, cluster.chance
        self._job: Job | None = None
        self._name = ""
        self.is_stopping = False

    def begin(self) -> None:
        self.world.after(0.05 + 0.1 * self.chance.random(), self._tick)

    @property
    def is_idle(self) -> bool:
        return self._job is None

    @property
    def may_disturb(self) -> bool:
        """Whether others may change the list."""
        return self.cluster.profile.operator and self._job is None

    def remove_now(self, leader: Server, server_id: str) -> None:
        """Once, whatever comes of it. Not where a machine was given up for good meanwhile: with both, no majority is
        left that anything could bring back."""
        if self._job is None and not leader.loop.is_dead and leader.raft is not None:
            wanted = tuple(m for m in leader.raft.members if m.id != server_id)
            leader.loop.run_now(self._propose, leader, wanted)

    def _leader(self) -> Server | None:
        """Whom the operator's commands reach: one that stands still answers nothing."""
        leader = self.cluster.leader()
        return None if leader is None or leader.loop.is_paused else leader

    def _leads_now(self, leader: Server) -> bool:
        """Whether a majority has answered it just now. (Its lease may be void: leadership may be on offer.)"""
        raft = leader.raft
        assert raft is not None
        return raft._clock() < raft._replication.quorum_round() + raft._lease_ns

    def describe(self) -> str:
        return self._name if self._job is not None else "idle"

    def _tick(self) -> None:
        if self._job is None:
            if self.is_stopping:
                return
            if self.chance.random() < 0.2:
                self._begin_job()
        if self._job is not None:
            try:
                next(self._job)
            except StopIteration:
                self.world.note("op", f"{self._name} is done")
                self.cluster.counts[f"operator {self._name}"] += 1
                self._job = None
        self.begin()

    def _begin_job(self) -> None:
        leader = self._leader()
        if leader is None:
            return
        members = leader.members
        voting = [m for m in members if m.votes]
        jobs: list[tuple[str, Callable[[], Job], int]] = []
        if len(members) < 6:
            jobs += [("grow", self._grow, 4 if len(voting) < 4 else 1), ("replica", self._replica, 1)]
        if len(voting) > 3:
            jobs.append(("shrink", self._shrink, 4))
        if len(members) > len(voting):
            jobs.append(("drop", self._drop, 3))
        if len(voting) >= 3:
            jobs += [("replace", self._replace, 4), ("move", self._move, 2)]
        if not jobs:
            return
        self._name, job, _ = self.chance.choices(jobs, [weight for _, _, weight in jobs])[0]
        self.world.note("op", f"begins to {self._name}")
        self._job = job()

    # -- jobs

    def _grow(self) -> Job:
        machine = self.cluster.new_machine()
        yield from self._admit(machine, LEARNER)
        yield from self._promote(machine)

    def _replica(self) -> Job:
        yield from self._admit(self.cluster.new_machine(), REPLICA)

    def _drop(self) -> Job:
        """A server that does not vote goes."""
        machine = self._pick(lambda m: not m.votes)
        if machine is not None:
            yield from self._remove(machine)

    def _shrink(self) -> Job:
        machine = self._pick(lambda m: m.votes)
        if machine is not None:
            yield from self._remove(machine)

    def _replace(self) -> Job:
        """A machine burns down; another one is put in its place."""
        machine = self._pick(lambda m: m.votes)
        if machine is None:
            return
        machine.cut_power()
        machine.is_gone = True
        yield from self._remove(machine)
        machine.replace()
        yield from self._admit(machine, LEARNER)
        yield from self._promote(machine)

    def _move(self) -> Job:
        """A server comes back under another address."""
        machine = self._pick(lambda m: True)
        if machine is None:
            return
        machine.move()
        yield
        machine.start()

        def is_known(members: Members) -> bool:  # unless it was removed meanwhile
            return all(m.host == machine.name for m in members if m.id == machine.id)

        yield from self._change(lambda members: members, is_known)

    # -- steps

    def _admit(self, machine: Machine, suffrage: str) -> Job:
        member = machine.member(suffrage)

        def admitted(members: Members) -> Members:
            return members if any(m.id == member.id for m in members) else (*members, member)

        yield from self._change(admitted)
        leader = self._leader()
        while leader is None or not any(m.id == member.id for m in leader.members):
            yield
            leader = self._leader()
        assert leader is not None
        machine.members = leader.members
        machine.is_gone = False
        machine.start()

    def _promote(self, machine: Machine) -> Job:
        while True:
            leader = self._leader()
            if leader is not None and leader.raft is not None:
                if leader.raft.members_settled and not any(m.id == machine.id for m in leader.raft.members):
                    return  # it was removed meanwhile
                status = next((p for p in leader.raft.peers() if p.id == machine.id), None)
                if leader.id == machine.id or (
                    status is not None and status.is_up and status.match_index > 0 and status.lag_entries <= LAG_MAX
                ):
                    break
            yield

        def promoted(members: Members) -> Members:
            return tuple(replace(m, suffrage=VOTER) if m.id == machine.id else m for m in members)

        yield from self._change(promoted)

    def _remove(self, machine: Machine) -> Job:
        gone = machine.id

        def removed(members: Members) -> Members:
            return tuple(m for m in members if m.id != gone)

        yield from self._change(removed)
        for _ in range(self.chance.randint(0, 8)):  # it may go on for a while, and disturb whom it can
            yield
        machine.is_gone = True
        machine.cut_power()

    def _change(self, edit: Callable[[Members], Members], is_done: Callable[[Members], bool] = lambda _: True) -> Job:
        """Until a leader says that the list is settled and as `edit` makes it, and `is_done` agrees."""
        while True:
            leader = self._leader()
            if leader is not None and leader.raft is not None and leader.raft.members_settled:
                members = leader.raft.members
                wanted = edit(members)
                if wanted == members and is_done(members) and self._leads_now(leader):
                    self.cluster.counts["member changes"] += 1
                    return
                if wanted != members and self._is_safe(leader, wanted):
                    leader.loop.run_now(self._propose, leader, wanted)
            yield

    def _is_safe(self, leader: Server, wanted: Members) -> bool:
        assert leader.raft is not None
        up = {peer.id for peer in leader.raft.peers() if peer.is_up} | {leader.id}
        voting = [m.id for m in wanted if m.votes]
        return 2 * sum(voter in up for voter in voting) > len(voting)

    def _propose(self, leader: Server, wanted: Members) -> None:
        async def propose() -> Any:
            raft = leader.raft
            assert raft is not None
            try:
                if not any(m.id == leader.id and m.votes for m in wanted):
                    await raft.transfer()
                else:
                    await raft.change_members(wanted)
            except RostraError as e:
                self.world.note("op", f"{leader.host}: {e}")

        if leader.loop.is_dead:
            return
        self.world.note("op", "asks for " + " ".join(f"{m.host}:{m.suffrage}" for m in wanted))
        leader.spawn(propose())

    def _pick(self, fits: Callable[[Any], bool]) -> Machine | None:
        """The machine of some member that fits."""
        leader = self._leader()
        ids = {m.id for m in leader.members if fits(m)} if leader is not None else set()
        machines = [m for m in self.cluster.machines if m.id in ids and not m.is_gone]
        return self.chance.choice(machines) if machines else None
