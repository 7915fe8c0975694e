"""Bootstrap once: islands, lost messages, crashes at each step; never two clusters with a common member."""

import asyncio
import json
import os
import random
import uuid
from dataclasses import replace
from typing import Any

import pytest

from rostra.server import bootstrap as bs
from rostra.server.bootstrap import Bootstrap
from rostra.server.founding import COMMIT, FRESH_S, HELLO, JOIN, KINDS, MEMBER, PREPARE, REFUSE, WAITING, Founder
from rostra.server.membership import (
    FILE_NAME,
    Membership,
    ServerInfo,
    Stored,
    dump,
    dump_membership,
    load,
    parse_membership,
)
from rostra.wire.errors import BadRequest, Conflict, Denied, Internal, TooLarge

#: More of them with SIM_SEEDS=1000.
SEEDS = int(os.environ.get("SIM_SEEDS", "30"))


def server(n: int, **changed) -> ServerInfo:
    info = ServerInfo(f"{n:08d}-0000-4000-8000-000000000000", f"s{n}", f"10.0.0.{n}", 8300, f"{n:064x}")
    return replace(info, **changed)


# -- a simulated world for the pure core -----------------------------------------------------------------------------


class World:
    """Servers as pure `Founder`s with disks, on a network that loses, delays and repeats; one seed, one story."""

    def __init__(self, seed: int, count: int, expect: int, *, loss: float = 0.2) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.loss = loss
        self.expect = expect
        self.infos = [server(n) for n in range(1, count + 1)]
        self.random.shuffle(self.infos)
        self.disks = [Stored() for _ in self.infos]
        self.founders: list[Founder | None] = [None] * count
        self.queue: list[tuple] = []
        self.cut: set[frozenset[int]] = set()
        self.ever_committed: dict[int, str] = {}
        self.clusters: dict[str, Membership] = {}

    def start(self, i: int) -> None:
        self.founders[i] = Founder(
            self.infos[i],
            self.expect,
            self.disks[i],
            instance=str(self.random.random()),
            new_id=lambda: f"c{self.random.getrandbits(64):016x}",
        )

    def crash(self, i: int) -> None:
        self.founders[i] = None

    def store(self, i: int, stored: Stored) -> bool:
        """False: it crashed, before or after the write reached the disk."""
        founder = self.founders[i]
        assert founder is not None
        if stored == founder.stored:
            return True
        dies = self.random.random() < self.dying
        if not dies or self.random.random() < 0.5:
            self.disks[i] = stored
        if dies:
            self.crash(i)
            return False
        founder.stored = stored
        return True

    dying = 0.0

    def index(self, address: str) -> int | None:
        return next((i for i, info in enumerate(self.infos) if info.host_port == address), None)

    def turn(self, i: int) -> None:
        founder = self.founders[i]
        if founder is None:
            return
        while True:
            plan = founder.plan(self.now)
            if plan.stored == founder.stored:
                break
            if not self.store(i, plan.stored):
                return
        self.check()
        for j, info in enumerate(self.infos):
            if j != i:
                self.send(i, j, HELLO, founder.hello(), info.host_port)
        for call in plan.calls:
            if (called := self.index(call.address)) is not None:
                self.send(i, called, call.kind, call.args, call.address)

    def send(self, i, j, kind, args, address, reply_to=None):
        if frozenset((i, j)) in self.cut or self.random.random() < self.loss:
            return
        for _ in range(1 + (self.random.random() < 0.1)):
            self.queue.append((i, j, kind, args, address, reply_to))

    def deliver(self) -> None:
        if not self.queue:
            return
        i, j, kind, args, address, reply_to = self.queue.pop(self.random.randrange(len(self.queue)))
        receiver = self.founders[j]
        if receiver is None:
            return
        key_hash = self.infos[i].key_hash
        if kind == "reply":
            if reply_to == receiver.instance:
                receiver.note(args, key_hash, self.now, address=address)
            return
        try:
            stored, reply = receiver.answer(kind, args, key_hash, self.now)
        except Exception:
            return
        if self.store(j, stored):
            sender = self.founders[i]
            self.send(j, i, "reply", reply, address, sender.instance if sender else None)
        self.check()

    def check(self) -> None:
        for i, disk in enumerate(self.disks):
            if disk.committed is not None:
                before = self.ever_committed.setdefault(i, disk.committed.cluster_id)
                assert before == disk.committed.cluster_id, "a server changed its cluster"
                assert self.clusters.setdefault(before, disk.committed) == disk.committed
                assert len(disk.committed.members) == self.expect
                assert self.infos[i] in disk.committed.members
        members = [m for c in self.clusters.values() for m in c.members]
        assert len(set(members)) == len(members), "two clusters have a common member"

    def step(self) -> None:
        self.now += self.random.random() * 0.02
        if self.random.random() < 0.15:
            self.turn(self.random.randrange(len(self.infos)))
        else:
            self.deliver()
        if len(self.queue) > 400:
            del self.queue[: len(self.queue) // 2]

    def calm(self, steps: int = 6000) -> None:
        """No more trouble: everything runs and every message arrives."""
        self.dying, self.loss, self.cut = 0.0, 0.0, set()
        for i, founder in enumerate(self.founders):
            if founder is None:
                self.start(i)
        for _ in range(steps):
            self.step()
            if all(d.committed for d in self.disks):
                return


@pytest.mark.parametrize("expect", [1, 2, 3, 5])
def test_servers_that_see_each_other_found_one_cluster(expect):
    for seed in range(10):
        world = World(seed, expect, expect, loss=0.0)
        world.calm()
        found = {d.committed for d in world.disks}
        assert len(found) == 1, f"seed {seed}"
        (membership,) = found
        assert membership is not None
        assert [m.node_id for m in membership.members] == sorted(i.node_id for i in world.infos)


@pytest.mark.parametrize("expect", [2, 3])
def test_crashes_at_any_step_and_lost_messages_still_end_in_one_cluster(expect):
    for seed in range(SEEDS):
        world = World(seed, expect, expect, loss=0.3)
        world.dying = 0.4
        for i in range(expect):
            world.start(i)
        for _ in range(600):
            world.step()
            for i in range(expect):
                if world.random.random() < 0.004:
                    world.crash(i)
                elif world.founders[i] is None and world.random.random() < 0.02:
                    world.start(i)
        world.calm()
        assert len({d.committed for d in world.disks}) == 1, f"seed {seed}"
        assert world.disks[0].committed, f"seed {seed}"


@pytest.mark.parametrize(("count", "expect"), [(4, 2), (5, 2), (4, 3), (6, 3), (7, 3)])
def test_islands_never_found_clusters_with_a_common_member(count, expect):
    for seed in range(SEEDS // 2):
        world = World(seed, count, expect, loss=0.1)
        world.dying = 0.2
        for i in range(count):
            world.start(i)
        for _ in range(900):
            if world.random.random() < 0.01:
                sides = [world.random.random() < 0.5 for _ in range(count)]
                pairs = [(i, j) for i in range(count) for j in range(i) if sides[i] != sides[j]]
                world.cut = {frozenset(p) for p in pairs}
            world.step()
            for i in range(count):
                if world.founders[i] is None and world.random.random() < 0.02:
                    world.start(i)
        world.calm(2500)
        assert world.clusters, f"seed {seed}: no cluster at all"


def test_a_proposer_lost_for_ever_is_replaced_when_another_server_takes_its_place():
    """s1 proposed to s2 and died with its disk; s3 never heard of it. s2, s3 and the new s4 found the cluster."""
    world = World(1, 4, 3, loss=0.0)
    world.infos = [server(n) for n in (1, 2, 3, 4)]
    dead = Membership("dead", "dc1", tuple(world.infos[:3]))
    world.disks[1] = Stored(prepared=dead)
    world.cut = {frozenset((0, i)) for i in (1, 2, 3)}
    for i in (1, 2, 3):
        world.start(i)
    for _ in range(9000):
        world.step()
    assert {d.committed and d.committed.cluster_id for d in world.disks[1:]} == set(world.clusters)
    assert "dead" not in world.clusters
    assert "dead" in world.disks[2].refused


def test_a_proposal_that_all_others_hold_is_committed_without_its_proposer():
    world = World(1, 3, 3, loss=0.0)
    world.infos = [server(n) for n in (1, 2, 3)]
    held = Membership("c", "dc1", tuple(world.infos))
    world.disks = [Stored(prepared=held) for _ in range(3)]
    world.start(1)
    world.start(2)
    for _ in range(500):
        world.step()
    assert world.disks[1].committed == world.disks[2].committed == held


# -- single decisions ------------------------------------------------------------------------------------------------

A, B, C, D = (server(n) for n in (1, 2, 3, 4))


def founder(me=A, expect=3, stored=None, **more) -> Founder:
    return Founder(me, expect, stored or Stored(), instance=f"{me.name} {me.key_hash}", new_id=lambda: "new", **more)


def proposal(*members, cluster_id="p", datacenter="dc1"):
    infos = tuple(sorted(replace(m, datacenter=datacenter) for m in members))
    return {"proposal": dump_membership(Membership(cluster_id, datacenter, infos))}


def meet(one: Founder, *others: Founder, now=0.0) -> None:
    """`one` has greeted `others`, and they say that they see everyone."""
    everyone = {f.me.key_hash for f in (one, *others)}
    for other in others:
        said = {**other.hello(), "sees": sorted(everyone - {other.me.key_hash})}
        one.note(said, other.me.key_hash, now, address=other.me.host_port)


def test_only_the_lowest_node_id_proposes():
    low, high = founder(A, 2), founder(B, 2)
    meet(low, founder(B, 2))
    meet(high, founder(A, 2))
    assert low.plan(0).stored.prepared == Membership("new", "dc1", (A, B))
    assert high.plan(0).stored == Stored()


def test_nothing_is_proposed_before_the_members_see_each_other():
    one = founder(A, 3)
    for other in (founder(B, 3), founder(C, 3)):
        one.note(other.hello(), other.me.key_hash, 0.0, address=other.me.host_port)
    plan = one.plan(0)
    assert plan.stored == Stored()
    assert plan.remarks[-1].event == "waiting for servers to reach each other"


def test_a_server_that_only_came_to_us_does_not_count():
    one = founder(A, 2)
    one.note({**founder(B, 2).hello(), "sees": [A.key_hash]}, B.key_hash, 0.0)
    assert one.plan(0).stored == Stored()


def test_a_server_not_heard_of_for_a_while_does_not_count():
    one = founder(A, 2)
    meet(one, founder(B, 2))
    assert one.plan(FRESH_S + 0.1).stored == Stored()


def test_with_an_existing_cluster_in_sight_no_other_is_founded():
    one, theirs = founder(A, 2), Membership("old", "dc1", (C, D))
    meet(one, founder(B, 2), founder(C, 2, Stored(committed=theirs)))
    plan = one.plan(0)
    assert plan.stored == Stored()
    assert "waits to be let into it" in plan.remarks[0].event
    stored, reply = one.answer(PREPARE, proposal(A, B), B.key_hash, 0)
    assert not reply["ok"]
    assert stored.refused == ("p",)


def let_in(one: Founder, *servers, cluster_id="old", by=C, **changed):
    infos = tuple(sorted((*servers, replace(one.me, suffrage="learner"))))
    membership = dump_membership(Membership(cluster_id, "dc1", infos))
    hello = founder(by, 2, Stored(committed=Membership("old", "dc1", (C, D)))).hello()
    return {**hello, "state": MEMBER, "leader": "", "membership": membership, **changed}


def test_an_empty_server_that_sees_a_cluster_asks_its_servers_until_it_knows_who_leads():
    one, theirs = founder(A, 2), Membership("old", "dc1", (C, D))
    meet(one, founder(C, 2, Stored(committed=theirs)), founder(D, 2, Stored(committed=theirs)))
    calls = one.plan(0).calls
    assert [(c.kind, c.address) for c in calls] == [(JOIN, C.host_port), (JOIN, D.host_port)]
    assert one.asking()["suffrage"] == "learner"
    assert one.answered({"state": WAITING, "leader": D.host_port}, C.key_hash) == Stored()
    assert [c.address for c in one.plan(0).calls] == [D.host_port]
    assert one.answered({"state": WAITING, "leader": ""}, D.key_hash) == Stored()
    assert len(one.plan(0).calls) == 2
    one.twin = "10.0.0.9:8300"
    assert one.plan(0).calls == ()


def test_a_server_that_was_let_in_stores_the_list_with_itself_in_it():
    one = founder(A, 3)
    meet(one, founder(C, 2, Stored(committed=Membership("old", "dc1", (C, D)))))
    stored = one.answered(let_in(one, C, D), C.key_hash)
    assert stored.committed is not None
    assert [(m.name, m.suffrage) for m in stored.committed.members] == [
        ("s1", "learner"),
        ("s3", "voter"),
        ("s4", "voter"),
    ]
    assert parse_membership(dump_membership(stored.committed)) == stored.committed


def test_a_server_without_a_log_that_the_others_list_as_a_voter_waits_to_be_replaced():
    one = founder(A, 3)
    meet(one, founder(C, 2, Stored(committed=Membership("old", "dc1", (C, D)))))
    lost = {**let_in(one, C), "membership": dump_membership(Membership("old", "dc1", (A, C)))}
    assert one.answered(lost, C.key_hash) == Stored()
    remark = one.plan(0).remarks[0]
    assert (remark.level, "its log is gone" in remark.event) == ("err", True)
    assert f"remove-peer -id={A.node_id}" in remark.fields["hint"]
    assert one.answered({"state": WAITING, "leader": ""}, C.key_hash) == Stored()  # it was removed
    assert "waits to be let into it" in one.plan(0).remarks[0].event
    assert one.answered(let_in(one, C), C.key_hash).committed is not None


@pytest.mark.parametrize(
    "reply",
    [
        lambda one: let_in(one, C, D, cluster_id="another"),
        lambda one: let_in(one, D),  # not of the one who says it
        lambda one: {**let_in(one, C), "membership": dump_membership(Membership("old", "dc1", (C, D)))},
        lambda one: {**let_in(one, C), "membership": {"cluster_id": "old"}},
        lambda one: {**let_in(one, C), "membership": None},
        lambda one: let_in(replace_me(one, name="s9"), C),
        lambda one: let_in(replace_me(one, node_id=B.node_id), C),
        lambda one: {**let_in(one, C), "leader": 7},
    ],
)
def test_a_server_is_let_in_only_as_what_it_asked_for(reply):
    one = founder(A, 3)
    meet(one, founder(C, 2, Stored(committed=Membership("old", "dc1", (C, D)))))
    with pytest.raises(BadRequest):
        one.answered(reply(one), C.key_hash)


def replace_me(one: Founder, **changed) -> Founder:
    return founder(replace(one.me, **changed))


def test_a_server_that_holds_a_proposal_or_has_a_cluster_is_let_into_no_other():
    for stored in (Stored(prepared=Membership("p", "dc1", (A, B))), Stored(committed=Membership("p", "dc1", (A, B)))):
        one = founder(A, 2, stored)
        meet(one, founder(C, 2, Stored(committed=Membership("old", "dc1", (C, D)))))
        assert one.answered(let_in(one, C, D), C.key_hash) == stored
        assert not [c for c in one.plan(0).calls if c.kind == JOIN]


@pytest.mark.parametrize(
    ("other", "expect", "event"),
    [
        (B, 3, "servers differ in bootstrap_expect"),
        (replace(B, datacenter="dc2"), 2, "a server of another datacenter"),
        (replace(B, name=A.name), 2, "two servers have the same name"),
        (replace(B, address=A.address), 2, "two servers have the same address"),
        (replace(B, node_id=A.node_id), 2, "another server has this server's identity"),
    ],
)
def test_servers_that_contradict_each_other_found_nothing_and_say_why(other, expect, event):
    one = founder(A, 2)
    meet(one, founder(other, expect))
    plan = one.plan(0)
    assert plan.stored == Stored()
    assert plan.remarks[0].event.startswith(event)


def test_of_too_many_servers_the_lowest_ids_found_the_cluster():
    one = founder(A, 2)
    meet(one, founder(C, 2), founder(B, 2))
    prepared = one.plan(0).stored.prepared
    assert prepared is not None
    assert prepared.members == (A, B)


def test_expect_zero_never_founds():
    one = founder(A, 0)
    meet(one, founder(B, 0))
    assert one.plan(0).stored == Stored()


def test_a_greeting_for_another_key_is_denied():
    with pytest.raises(Denied):
        founder().answer(HELLO, founder(B).hello(), C.key_hash, 0)


def test_only_members_may_propose_and_commit():
    one = founder(A, 2)
    with pytest.raises(Denied):
        one.answer(PREPARE, proposal(A, B), C.key_hash, 0)
    with pytest.raises(BadRequest):
        one.answer(PREPARE, proposal(B, C), C.key_hash, 0)
    one.stored = Stored(prepared=Membership("p", "dc1", (A, B)))
    with pytest.raises(Denied):
        one.answer(COMMIT, {"cluster_id": "p"}, C.key_hash, 0)


def test_a_prepared_proposal_is_never_refused_and_a_refused_one_never_prepared():
    one = founder(B, 2)
    stored, reply = one.answer(PREPARE, proposal(A, B), A.key_hash, 0)
    assert reply["ok"]
    assert reply["prepared"] == "p"
    one.stored = stored
    assert not one.answer(REFUSE, {"cluster_id": "p"}, A.key_hash, 0)[1]["ok"]
    one.stored = Stored(refused=("p",))
    assert not one.answer(PREPARE, proposal(A, B), A.key_hash, 0)[1]["ok"]


def test_of_two_proposals_the_lower_servers_waits_and_the_higher_servers_is_refused():
    one = founder(C, 2, Stored(prepared=Membership("p", "dc1", (B, C))))
    stored, reply = one.answer(PREPARE, proposal(A, C, cluster_id="q"), A.key_hash, 0)
    assert (stored, reply["ok"]) == (one.stored, False)
    one = founder(C, 2, Stored(prepared=Membership("p", "dc1", (A, C))))
    stored, reply = one.answer(PREPARE, proposal(B, C, cluster_id="q"), B.key_hash, 0)
    assert stored.refused == ("q",)


def test_a_proposal_with_a_stale_address_of_ours_is_refused():
    stored, reply = founder(B, 2).answer(PREPARE, proposal(A, replace(B, rpc_port=1)), A.key_hash, 0)
    assert not reply["ok"]
    assert stored.refused == ("p",)


def test_a_commit_for_something_that_is_not_held_changes_nothing():
    one = founder(B, 2)
    stored, reply = one.answer(COMMIT, {"cluster_id": "p"}, A.key_hash, 0)
    assert (stored, reply["ok"]) == (Stored(), False)


def test_a_server_in_a_cluster_answers_with_it_and_prepares_nothing_else():
    one = founder(B, 2, Stored(committed=Membership("p", "dc1", (A, B))))
    stored, reply = one.answer(PREPARE, proposal(B, C, cluster_id="q"), C.key_hash, 0)
    assert (stored, reply["ok"], reply["cluster_id"]) == (one.stored, False, "p")
    assert one.answer(COMMIT, {"cluster_id": "p"}, A.key_hash, 0)[1]["ok"]


def test_whatever_a_stranger_sends_is_a_bad_request_or_harmless():
    chance = random.Random(7)
    junk: list[Any] = [None, 1, "", "x" * 300, [], {}, ["a"], {"members": 1}, b"x", True, -1, 1 << 70, "\n"]
    base: dict[str, Any] = {**founder(B).hello(), **proposal(A, B, C), "cluster_id": "p"}
    for _ in range(3000):
        args = {k: chance.choice(junk) if chance.random() < 0.2 else v for k, v in base.items()}
        if isinstance(args.get("proposal"), dict) and chance.random() < 0.5:
            args["proposal"] = {k: chance.choice([v, chance.choice(junk)]) for k, v in args["proposal"].items()}
        for kind in (*KINDS, "bootstrap.other"):
            try:
                founder().answer(kind, args, B.key_hash, 0)
            except (BadRequest, Denied, TooLarge):
                pass


# -- the shell: files, time, concurrency -----------------------------------------------------------------------------


class Net:
    """Real `Bootstrap`s on real files; calls go straight to `handle`."""

    def __init__(self, tmp_path, infos, expect):
        self.path, self.infos, self.expect = tmp_path, infos, expect
        self.servers: dict[str, Bootstrap] = {}
        self.keys: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.drop = lambda kind: False

    def start(self, info, **more) -> Bootstrap:
        b = self.servers[info.host_port] = Bootstrap(self.path / info.name, info, self.expect, **more)
        return b

    def run(self, info, *candidates, **more):
        async def call(address, kind, args):
            await asyncio.sleep(0)
            self.calls.append((address, kind))
            if address not in self.servers or self.drop(kind):
                raise ConnectionRefusedError
            reply = self.servers[address].handle(kind, args, info.key_hash)
            await asyncio.sleep(0.001)
            return reply, self.keys.get(address) or next(i.key_hash for i in self.infos if i.host_port == address)

        return self.servers[info.host_port].run(lambda: list(candidates), call, **more)


async def ask_nobody(address, kind, args):
    raise AssertionError("there is nobody to ask")


async def test_one_server_that_expects_itself_commits_at_once(tmp_path):
    net = Net(tmp_path, [A], 1)
    membership = await asyncio.wait_for(net.start(A).run(lambda: [A.host_port], ask_nobody), 0.5)
    assert membership.members == (A,)
    path = tmp_path / "s1" / FILE_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(uuid.UUID(membership.cluster_id)) == membership.cluster_id
    assert net.start(A).committed == membership


async def test_one_that_expects_itself_finds_an_existing_cluster_first(tmp_path):
    net = Net(tmp_path, [A, B], 1)
    net.start(B)
    await net.run(B)
    b = net.start(A)
    task = asyncio.create_task(net.run(A, B.host_port))
    async with asyncio.timeout(30):
        while b.existing_cluster is None:
            await asyncio.sleep(0.01)
    assert b.committed is None
    assert not task.done()
    task.cancel()


async def test_three_converge_soon_after_the_last_has_started(tmp_path):
    """s1 knows nobody; s2 and s3 know only s1."""
    net = Net(tmp_path, [A, B, C], 3)
    for info in (A, B):
        net.start(info)
    early = [asyncio.create_task(net.run(A)), asyncio.create_task(net.run(B, A.host_port))]
    await asyncio.sleep(0.3)
    assert not any(t.done() for t in early)
    net.start(C)
    loop = asyncio.get_running_loop()
    began = loop.time()
    found = await asyncio.wait_for(asyncio.gather(*early, net.run(C, A.host_port)), 5)
    assert loop.time() - began < 1.0  # 0.06 s on an idle machine
    assert len(set(found)) == 1
    assert found[0].members == (A, B, C)
    files = {(tmp_path / i.name / FILE_NAME).read_bytes() for i in (A, B, C)}
    assert len(files) == 1


async def test_servers_greet_each_other_in_a_bounded_number_of_calls(tmp_path):
    net = Net(tmp_path, [A, B, C], 3)
    for info in (A, B):
        net.start(info)
    tasks = [asyncio.create_task(net.run(i, A.host_port, B.host_port, C.host_port)) for i in (A, B)]
    await asyncio.sleep(1.0)
    assert len(net.calls) < 60
    for t in tasks:
        t.cancel()


async def test_lost_commits_are_learned_from_the_next_greeting(tmp_path):
    net = Net(tmp_path, [A, B, C], 3)
    net.drop = lambda kind: kind == COMMIT
    for info in (A, B, C):
        net.start(info)
    found = await asyncio.wait_for(asyncio.gather(*(net.run(i, A.host_port, B.host_port) for i in (A, B, C))), 5)
    assert len(set(found)) == 1


@pytest.mark.parametrize("seed", range(12))
async def test_servers_that_die_around_each_write_converge_after_restarts(tmp_path, seed):
    chance = random.Random(seed)
    net = Net(tmp_path, [A, B, C], 3)
    net.drop = lambda kind: chance.random() < 0.2

    class Died(OSError):
        pass

    class Mortal(Bootstrap):
        deaths = 4
        dead: asyncio.Event

        def _save(self, stored):
            dies = Mortal.deaths > 0 and chance.random() < 0.7
            Mortal.deaths -= dies
            if not dies or chance.random() < 0.5:
                super()._save(stored)
            if dies:
                net.servers.pop(self._founder.me.host_port, None)
                self.dead.set()
                raise Died(5, "died")

    async def live(info):
        while True:
            b = net.servers[info.host_port] = Mortal(tmp_path / info.name, info, 3)
            b.dead = asyncio.Event()
            running = asyncio.create_task(net.run(info, A.host_port, B.host_port, C.host_port, period_s=0.01))
            dead = asyncio.create_task(b.dead.wait())
            await asyncio.wait([running, dead], return_when=asyncio.FIRST_COMPLETED)
            dead.cancel()
            if not b.dead.is_set():
                return running.result()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    found = await asyncio.wait_for(asyncio.gather(live(A), live(B), live(C)), 20)
    assert len(set(found)) == 1
    assert found[0].members == (A, B, C)


async def test_an_answer_under_another_key_than_it_claims_does_not_count(tmp_path):
    net = Net(tmp_path, [A, B], 2)
    net.start(A)
    net.start(B)
    net.keys[B.host_port] = C.key_hash
    task = asyncio.create_task(net.run(A, B.host_port))
    await asyncio.sleep(0.3)
    assert net.servers[A.host_port].committed is None
    assert B.key_hash not in net.servers[A.host_port]._founder.peers
    task.cancel()


async def test_a_write_that_fails_is_not_answered_as_done(tmp_path, monkeypatch):
    b = Bootstrap(tmp_path, B, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bs, "write_durably", full)
    with pytest.raises(Internal, match="No space"):
        b.handle(PREPARE, proposal(A, B), A.key_hash)
    assert b._founder.stored == Stored()


def test_a_damaged_or_newer_file_is_refused_and_kept(tmp_path):
    path = tmp_path / FILE_NAME
    for content, error in [(b"{", BadRequest), (b'{"format": 1}', BadRequest), (b'{"format": 3}', Conflict)]:
        path.write_bytes(content)
        with pytest.raises(error, match=FILE_NAME):
            Bootstrap(tmp_path, A, 1)
        assert path.read_bytes() == content


def test_what_is_stored_is_read_back(tmp_path):
    m = Membership("p", "dc1", (A, B))
    for stored in (Stored(), Stored(prepared=m, refused=("x", "y")), Stored(committed=m, started=True)):
        (tmp_path / "f").write_bytes(dump(stored))
        assert load(tmp_path / "f") == stored


async def test_data_without_a_founding_and_a_founding_with_another_key_are_refused(tmp_path):
    with pytest.raises(Conflict, match="has data"):
        Bootstrap(tmp_path, A, 1, has_data=True)
    await Bootstrap(tmp_path, A, 1).run(list, ask_nobody)
    with pytest.raises(Conflict, match="key"):
        Bootstrap(tmp_path, replace(A, key_hash=B.key_hash), 1)
    assert Bootstrap(tmp_path, A, 1, has_data=True).committed


async def test_a_server_whose_log_is_gone_refuses_to_start_once_it_had_one(tmp_path):
    b = Bootstrap(tmp_path, A, 1)
    await b.run(list, ask_nobody)
    assert Bootstrap(tmp_path, A, 1).committed  # it never had one: it ended before
    b.note_started()
    assert Bootstrap(tmp_path, A, 1, has_data=True).committed
    for has_data in (False, True):  # a snapshot holds no votes
        with pytest.raises(Conflict, match=f"log in .* is gone.*remove-peer -id={A.node_id}"):
            Bootstrap(tmp_path, A, 1, has_data=has_data, has_log=False)


def test_a_file_of_the_first_format_is_read_and_taken_for_that_of_a_server_that_had_a_log(tmp_path):
    members = [{"id": A.node_id, "name": A.name, "address": A.address, "port": 8300, "key_hash": A.key_hash}]
    data = {"cluster_id": "p", "datacenter": "dc1", "members": members}
    for committed, started in ((data, True), (None, False)):
        held = {"format": 1, "prepared": None, "committed": committed, "refused": ["x"]}
        (tmp_path / FILE_NAME).write_text(json.dumps(held))
        stored = load(tmp_path / FILE_NAME)
        assert (stored.started, stored.refused, bool(stored.committed)) == (started, ("x",), started)
    (tmp_path / FILE_NAME).write_text(json.dumps({**held, "committed": data}))
    assert Bootstrap(tmp_path, A, 1, has_data=True).committed == Membership("p", "dc1", (A,))
    with pytest.raises(Conflict, match="is gone"):
        Bootstrap(tmp_path, A, 1)


def test_a_replica_founds_nothing(tmp_path):
    b = Bootstrap(tmp_path, A, 1, suffrage="replica")
    assert b._founder.plan(0).stored == Stored()
    assert (b.hello()["expect"], b.asking()["suffrage"]) == (0, "replica")


async def test_an_empty_server_asks_the_leader_until_it_is_let_in(tmp_path):
    net = Net(tmp_path, [B, C], 1)
    net.start(B)
    await net.run(B)
    cluster: Any = net.servers[B.host_port]
    answers: list[dict[str, Any]] = []

    def handle(kind, args, key_hash, real=cluster.handle):
        if kind != JOIN:
            return real(kind, args, key_hash)
        assert (args["name"], args["suffrage"]) == (C.name, "learner")
        reply = {**cluster.hello(), "state": WAITING, "leader": B.host_port}
        if len(answers) == 2:
            infos = (B, replace(C, suffrage="learner"))
            listed = dump_membership(Membership(cluster.committed.cluster_id, "dc1", infos))
            reply |= {"state": MEMBER, "membership": listed}
        answers.append(reply)
        return reply

    cluster.handle = handle
    c = net.start(C)
    membership = await asyncio.wait_for(net.run(C, B.host_port), 10)
    assert membership.cluster_id == cluster.committed.cluster_id
    assert [m.suffrage for m in membership.members] == ["voter", "learner"]
    assert len(answers) == 3
    assert load(tmp_path / "s3" / FILE_NAME).committed == membership == c.committed


def test_expect_is_bounded(tmp_path):
    with pytest.raises(BadRequest):
        Bootstrap(tmp_path, A, 99)


def test_the_file_is_synced_before_the_answer(tmp_path, monkeypatch):
    order = []
    real = os.fsync

    def fsync(fd) -> None:
        order.append("fsync")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    b = Bootstrap(tmp_path, B, 2)
    b.handle(PREPARE, proposal(A, B), A.key_hash)
    assert order == ["fsync", "fsync"]  # the file, then its name
