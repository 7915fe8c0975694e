"""The plan against random histories of Raft itself: what it calls safe, committed or never acknowledged is true.

The model knows what the survivors do not: which entries were committed, and who helped. Elections, replication,
commits and snapshots follow Raft's rules in any order; then some servers survive and a plan is made of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from rostra.server.raft.members import Member
from rostra.server.raft.recovery import Found, SnapshotFound, effective, plan_recovery

Entry = tuple[bytes, int, int]

SEEDS = 2000


@dataclass
class Server:
    name: str
    term: int = 0
    voted_in: int = 0
    leads: int = 0  # the term in which it is leader
    log: list[Entry] = field(default_factory=lambda: [(b"\x01", 1, 0)])  # all of it, also what a snapshot covers
    commit: int = 1
    first: int = 1  # what its journal begins with
    snapshot: int = 0
    match: dict[str, int] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        return self.log[-1][2], self.log[-1][1]


class History:
    def __init__(self, size: int, chance: random.Random) -> None:
        self.chance = chance
        self.unrest = chance.choice([0.05, 0.3, 0.6])  # how often somebody campaigns although there is a leader
        self.snapshots = chance.choice([0.0, 0.1, 0.8])
        self.reach = chance.choice([1, 2, size])  # how many servers a leader reaches at a time
        self.servers = [Server(f"s{i + 1}") for i in range(size)]
        self.members = tuple(Member(s.name, "10.0.0.1", i, s.name, s.name) for i, s in enumerate(self.servers))
        self.committed: dict[int, Entry] = {1: self.servers[0].log[0]}
        self.helpers: list[tuple[Entry, set[str]]] = []  # (the last entry of a commit, who had it on disk)

    @property
    def majority(self) -> int:
        return len(self.servers) // 2 + 1

    def some(self) -> list[Server]:
        """Who is reachable right now."""
        return self.chance.sample(self.servers, self.chance.randint(1, len(self.servers)))

    def step(self) -> None:
        leaders = [s for s in self.servers if s.leads and s.leads == s.term]
        if not leaders or self.chance.random() < self.unrest:
            self.elect(self.chance.choice(self.servers))
            return
        leader = self.chance.choice(leaders)
        if self.chance.random() < 0.4:
            self.append(leader)
        for other in self.some()[: self.reach]:
            if other is not leader:
                self.replicate(leader, other)
        self.advance(leader)
        if self.chance.random() < self.snapshots:
            self.take_snapshot(self.chance.choice(self.servers))

    def elect(self, candidate: Server) -> None:
        candidate.term += 1
        candidate.voted_in, votes = candidate.term, 1
        for other in self.some():
            if other is candidate or other.term > candidate.term:
                continue
            other.term = candidate.term
            if other.voted_in < candidate.term and other.order <= candidate.order:
                other.voted_in = candidate.term
                votes += 1
        if votes >= self.majority:
            candidate.leads = candidate.term
            candidate.match = {candidate.name: 0}
            self.append(candidate)

    def append(self, leader: Server) -> None:
        index = leader.log[-1][1] + 1
        leader.log.append((b"\x00%d.%d" % (index, leader.term), index, leader.term))

    def replicate(self, leader: Server, other: Server) -> None:
        if other.term > leader.term:
            return
        other.term = leader.term
        upto = self.chance.choice([len(leader.log), self.chance.randint(1, len(leader.log))])
        if leader.snapshot > other.commit and self.chance.random() < 0.5:
            upto = leader.snapshot
            other.snapshot = upto
            if len(other.log) < upto or other.log[upto - 1] != leader.log[upto - 1]:
                other.log, other.first = leader.log[:upto], upto
            other.commit = max(other.commit, upto)
        else:
            for position in range(upto):
                if position >= len(other.log) or other.log[position] != leader.log[position]:
                    assert position >= other.commit, "a committed entry would be truncated: the model is wrong"
                    other.log[position:] = leader.log[position:upto]
                    break
        leader.match[other.name] = max(leader.match.get(other.name, 0), upto)
        other.commit = max(other.commit, min(leader.commit, upto))

    def advance(self, leader: Server) -> None:
        leader.match[leader.name] = len(leader.log)
        agreed = sorted(leader.match.values(), reverse=True)
        reached = agreed[self.majority - 1] if len(agreed) >= self.majority else 0
        if reached > leader.commit and leader.log[reached - 1][2] == leader.term:
            leader.commit = reached
            for entry in leader.log[:reached]:
                assert self.committed.setdefault(entry[1], entry) == entry, "two entries committed: the model is wrong"
            self.helpers.append((leader.log[reached - 1], {n for n, m in leader.match.items() if m >= reached}))

    def take_snapshot(self, server: Server) -> None:
        server.snapshot = server.commit
        server.first = max(server.first, self.chance.choice([server.commit, self.chance.randint(1, server.commit)]))

    def found(self, server: Server) -> Found:
        """As its directory would be read; the index of the last commit may be behind the truth."""
        commit = self.chance.randint(max(1, server.commit - 2), server.commit)
        snapshot = None
        if server.snapshot:
            entry = server.log[server.snapshot - 1]
            snapshot = SnapshotFound(entry[1], entry[2], 100, self.members, 0)
        kept = server.log[server.first - 1 :] if snapshot else server.log
        fields = effective(tuple(kept), commit, snapshot, None, self.members)
        return Found(f"/{server.name}", server.name, "c", server.term, **fields)


def has(server: Server, entry: Entry) -> bool:
    return entry[1] <= len(server.log) and server.log[entry[1] - 1] == entry


def check(history: History, survivors: Sequence[Server]) -> str:
    """Asserts that the plan is true; what it was about."""
    by_path = {f"/{s.name}": s for s in survivors}
    (plan,) = plan_recovery([history.found(s) for s in survivors])
    assert plan.contradictions == ()
    if plan.startable:
        # Whoever they elect has all that was ever acknowledged.
        assert len(survivors) >= history.majority
        return "startable"
    assert len(survivors) < history.majority
    assert plan.best is not None
    best = by_path[plan.best.keep.path]
    here = {s.name for s in survivors}
    for entry, helpers in history.helpers:
        assert has(best, entry) or not helpers & here, "an entry that a survivor helped to acknowledge is lost"
        assert has(best, entry) or plan.unseen, "an acknowledged entry is lost, and the plan says that none can be"
    lost = 0
    for choice in plan.choices:
        keep = by_path[choice.keep.path]
        for loss in choice.losses:
            other, entries = by_path[loss.of.path], []
            for index in range(loss.first, loss.last + 1):
                entries.append(other.log[index - 1])
            assert loss.committed + loss.possible + loss.overtaken + loss.never == len(entries)
            for entry in entries[: loss.committed]:
                assert history.committed.get(entry[1]) == entry, "called committed and is not"
            for entry in entries[len(entries) - loss.never :] if loss.never else ():
                assert history.committed.get(entry[1]) != entry, "called never acknowledged and was"
            lost += len(entries)
        named = {loss.of.path: loss.first for loss in choice.losses}
        for path, other in by_path.items():
            for entry in other.log[: named.get(path, len(other.log) + 1) - 1]:
                if history.committed.get(entry[1]) == entry:
                    assert has(keep, entry), "an acknowledged entry is given up without a word"
        for follower in choice.followers:
            theirs = by_path[follower.path]
            assert all(has(keep, entry) for entry in theirs.log[: theirs.commit])
    return "losses" if lost else "no losses"


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_the_plan_is_true_of_every_history(size):
    seen: dict[str, int] = {}
    for seed in range(SEEDS):
        chance = random.Random(f"{size} {seed}")
        history = History(size, chance)
        for _ in range(chance.randint(3, 60)):
            history.step()
        survivors = chance.sample(history.servers, chance.randint(1, min(size, history.majority)))
        outcome = check(history, survivors)
        seen[outcome] = seen.get(outcome, 0) + 1
    assert seen["startable"] > 10
    assert seen["no losses"] > 10
    assert size == 3 or seen["losses"] > 10
