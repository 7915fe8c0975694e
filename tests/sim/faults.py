"""What goes wrong: each fault begins, and most end after a while. Ended or not, `heal` undoes all of them.

A fault counts when it really did something: a crash of a machine that runs, a cut of a connection that exists. The
leader is hit more often than chance would have it.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rostra.server.raft.journal import Place, inspect_journal
from rostra.server.raft.witness import FILE_NAME as WITNESS
from rostra.wire.errors import RostraError
from tests.sim.disk import OpenDisk
from tests.sim.server import Machine, Server

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

Undo = Callable[[], None]


@dataclass
class Kept:
    """A data directory as it was."""

    files: dict[str, bytes]
    lineage: tuple[str, ...]
    reached: Place
    place: Place  # where the journal in it ends

    @staticmethod
    def of(machine: Machine) -> Kept:
        place = inspect_journal(OpenDisk(machine.disk, None)).place  # type: ignore[arg-type]
        return Kept(machine.disk.copy(), machine.lineage, machine.reached, place)

    def put(self, machine: Machine) -> None:
        machine.disk.put(self.files)
        machine.lineage, machine.reached = self.lineage, self.reached


class Faults:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.chance, self.network = cluster.chance, cluster.network
        self.counts = cluster.counts
        self.count = 0
        self._undo: dict[int, Undo] = {}
        self._next = 0
        self._lossy: set[str] = set()  # ids of servers of whose directory there is a copy
        self._is_over = False
        self._kinds: tuple[tuple[Callable[[], bool], int], ...] = (
            (self.crash_one, 18),
            (self.stop, 6),
            (self.crash_several, 4),
            (self.crash_all, 4),
            (self.crash_mid_sync, 12),
            (self.crash_mid_turn, 12),
            (self.pause, 8),
            (self.depose, 8),
            (self.shift_majority, 8),
            (self.isolate, 8),
            (self.one_way, 8),
            (self.flap, 5),
            (self.disconnect, 8),
            (self.slow_disk, 5),
            (self.stall_disk, 5),
            (self.slow_link, 4),
            (self.break_disk, 4),
            (self.fill_disk, 2),
            (self.transfer, 9),
            (self.remove_alone, 4),
            (self.snapshot, 4),
            (self.move_apart, 5),
            (self.lose_data, 8),
        )

    def begin(self) -> None:
        self.world.after(self.chance.expovariate(self.cluster.profile.fault_rate) + 0.05, self._strike)

    def _strike(self) -> None:
        if self._is_over:
            return
        kinds, weights = zip(*self._kinds)
        kind = self.chance.choices(kinds, weights)[0]
        if kind():
            self.count += 1
            self.counts[f"fault {kind.__name__}"] += 1
        self.begin()

    def _undo_after(self, seconds: float, undo: Undo) -> None:
        self._next += 1
        number = self._next
        self._undo[number] = undo
        self.world.after(seconds, self._end, number)

    def _end(self, number: int) -> None:
        undo = self._undo.pop(number, None)
        if undo is not None:
            undo()

    def heal(self) -> None:
        """No more faults, and those that are there end."""
        self._is_over = True
        undo, self._undo = self._undo, {}
        for each in undo.values():
            each()
        for machine in self.cluster.machines:
            if machine.number in self.cluster.doomed:  # its disk has failed, it only does not know yet
                machine.kill()
            machine.disk.fails = None
            machine.disk.when_syncing = None
            if machine.server is not None:
                machine.server.loop.fuse = -1
            else:
                machine.start()
        self.cluster.doomed.clear()

    # -- whom

    def _victim(self) -> Machine | None:
        """A running machine, the leader's more often than not."""
        leader = self.cluster.leader()
        if leader is not None and self.chance.random() < 0.55:
            return leader.machine
        running = [m for m in self.cluster.machines if m.server is not None]
        return self.chance.choice(running) if running else None

    def _others(self, machine: Machine) -> list[Machine]:
        return [m for m in self.cluster.machines if m is not machine and not m.is_gone]

    def _crash(self, machine: Machine, seconds: float | None = None) -> None:
        self.cluster.crash(machine)
        self._start_later(machine, seconds)

    def _start_later(self, machine: Machine, seconds: float | None = None) -> None:
        self._undo_after(seconds or 0.05 + 0.8 * self.chance.random() ** 2, machine.start)

    # -- crashes

    def crash_one(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        self._crash(machine)
        return True

    def stop(self) -> bool:
        """SIGTERM, and another start."""
        machine = self._victim()
        if machine is None or machine.server is None:
            return False
        server = machine.server
        self.world.note(machine.name, "is told to stop")
        server.loop.run_now(lambda: server.spawn(server.stop()))

        def start() -> None:
            if machine.server is server:
                machine.kill()  # it takes too long
            machine.start()

        self._undo_after(0.3 + 1.2 * self.chance.random(), start)
        return True

    def crash_several(self) -> bool:
        running = [m for m in self.cluster.machines if m.server is not None]
        if len(running) < 2:
            return False
        for machine in self.chance.sample(running, self.chance.randint(2, len(running))):
            self._crash(machine)
        return True

    def crash_all(self) -> bool:
        """One power supply; they come back one after another."""
        for machine in self.cluster.machines:
            if machine.server is not None:
                self.cluster.crash(machine, power=True)
                self._start_later(machine, 0.05 + 0.3 * self.chance.random())
        return True

    def crash_mid_sync(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        server = machine.server

        def crash() -> None:
            if machine.server is server and server is not None:
                self.world.note(machine.name, "in the middle of a sync:")
                self._crash(machine)

        machine.disk.when_syncing = crash
        return True

    def crash_mid_turn(self) -> bool:
        machine = self._victim()
        if machine is None or machine.server is None:
            return False
        server = machine.server
        server.loop.fuse = self.chance.randint(1, 60)

        def burnt() -> None:
            self.world.note(machine.name, "in the middle of a turn:")
            self._crash(machine)

        server.loop.burnt = burnt
        return True

    # -- time

    def pause(self) -> bool:
        machine = self._victim()
        if machine is None or machine.server is None:
            return False
        seconds = (
            5.0
            if self.chance.random() < 0.03
            else self.chance.choice((0.1, 0.25, 0.5, 1.2)) * (0.8 + 0.4 * self.chance.random())
        )
        self._pause(machine.server, seconds)
        return True

    def _pause(self, server: Server, seconds: float) -> None:
        """In the middle of what it does next."""
        loop = server.loop

        def burnt() -> None:
            self.world.note(server.host, f"stands still for {seconds:.2f} s")
            loop.pause(seconds)

        loop.fuse, loop.burnt = self.chance.randint(0, 12), burnt

    def depose(self) -> bool:
        """The leader stands still or is cut off for long enough to lose its place, and is asked all the time."""
        leader = self.cluster.leader()
        others = self._others(leader.machine) if leader is not None else []
        if leader is None or not others:
            return False
        seconds = 0.35 + 0.7 * self.chance.random()
        way = self.chance.random()
        name = leader.host
        if way < 0.4:
            self._pause(leader, seconds)
        else:
            if way < 0.6:  # one of the others loses sight of it
                others = [self.chance.choice(others)]
            pairs = [(name, other.name) for other in others]
            if way < 0.8:
                pairs += [(b, a) for a, b in pairs]
            self.world.note("net", "swallows " + " ".join(f"{a}>{b}" for a, b in pairs))
            self._block(pairs, seconds)
        for client in self.cluster.clients:
            client.leave(leader)
        self._question(leader, self.world.now + seconds + 0.2)
        return True

    def _question(self, server: Server, until: float) -> None:
        """Somebody goes on asking `server`, whatever has become of it."""
        if self.world.now < until and not server.loop.is_dead and not self._is_over:
            client = self.chance.choice(self.cluster.clients)
            mode = "default" if self.chance.random() < 0.85 else "consistent"
            client.read(mode, self.chance.choice(self.cluster.keys), server)
            self.world.after(0.003 + 0.02 * self.chance.random(), self._question, server, until)

    def shift_majority(self) -> bool:
        """The leader's disk stalls and some do not hear it. Then it loses its power, and comes back with them."""
        leader = self.cluster.leader()
        if leader is None:
            return False
        voting = {m.id for m in leader.members if m.votes}
        others = [m for m in self._others(leader.machine) if m.id in voting]
        if len(others) < 2:
            return False
        self.chance.shuffle(others)
        machine, half = leader.machine, len(others) // 2
        lack, have = others[:half], others[half:]
        stall_s = 0.05 + 0.3 * self.chance.random()
        machine.disk.next_sync_s = 2 * stall_s
        self.world.note("net", f"swallows {leader.host}>" + " ".join(m.name for m in lack))
        self._block([(leader.host, m.name) for m in lack], stall_s)
        self.world.after(stall_s, self._shift, machine, leader, lack, have)
        return True

    def _shift(self, machine: Machine, leader: Server, lack: list[Machine], have: list[Machine]) -> None:
        if machine.server is not leader or self._is_over:
            return
        self.cluster.crash(machine, power=True)
        self._start_later(machine, 0.03 + 0.1 * self.chance.random())
        pairs = [(a.name, b.name) for a in have for b in [machine, *lack]]
        self.world.note("net", "cut off " + " ".join(m.name for m in have))
        self._block(pairs + [(b, a) for a, b in pairs], 0.9 + 0.6 * self.chance.random())

    # -- network

    def _block(self, pairs: list[tuple[str, str]], seconds: float) -> None:
        for source, target in pairs:
            self.network.block(source, target)

        def undo() -> None:
            self.world.note("net", "healed " + " ".join(f"{a}>{b}" for a, b in pairs))
            for source, target in pairs:
                self.network.unblock(source, target)

        self._undo_after(seconds, undo)

    def isolate(self) -> bool:
        machine = self._victim()
        if machine is None or len(self.cluster.machines) < 2:
            return False
        group = [machine]
        others = self._others(machine)
        if len(others) > 2 and self.chance.random() < 0.4:
            group.append(others.pop(self.chance.randrange(len(others))))
        pairs = [(a.name, b.name) for a in group for b in others]
        self.world.note("net", "cut off " + " ".join(m.name for m in group))
        self._block(pairs + [(b, a) for a, b in pairs], 0.3 + 1.2 * self.chance.random())
        return True

    def one_way(self) -> bool:
        machine = self._victim()
        others = self._others(machine) if machine is not None else []
        if machine is None or not others:
            return False
        if self.chance.random() < 0.5:
            others = [self.chance.choice(others)]
        pairs = [(machine.name, other.name) for other in others]
        if self.chance.random() < 0.5:
            pairs = [(b, a) for a, b in pairs]
        self.world.note("net", "swallows " + " ".join(f"{a}>{b}" for a, b in pairs))
        self._block(pairs, 0.3 + 1.5 * self.chance.random())
        return True

    def flap(self) -> bool:
        machine = self._victim()
        others = self._others(machine) if machine is not None else []
        if machine is None or not others:
            return False
        other = self.chance.choice(others)
        self.world.note("net", f"flaps {machine.name}<>{other.name}")
        at = 0.0
        for _ in range(self.chance.randint(2, 6)):
            for_s = 0.05 + 0.25 * self.chance.random()
            self.world.after(at, self._flap, machine.name, other.name, for_s)
            at += for_s + 0.02 + 0.2 * self.chance.random()
        return True

    def _flap(self, a: str, b: str, seconds: float) -> None:
        if not self._is_over:
            self._block([(a, b), (b, a)], seconds)

    def disconnect(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        cut = False
        everything = self.chance.random() < 0.3
        for other in self._others(machine):
            for end in self.network.connections(machine.name, other.name):
                if everything or self.chance.random() < 0.4:
                    end.cut()
                    cut = True
        if cut:
            self.world.note("net", f"connections of {machine.name} are cut")
        return cut

    def slow_link(self) -> bool:
        machine = self._victim()
        others = self._others(machine) if machine is not None else []
        if machine is None or not others:
            return False
        other = self.chance.choice(others)
        paths = [self.network.path(machine.name, other.name), self.network.path(other.name, machine.name)]
        slow_s = self.chance.choice((0.005, 0.02, 0.08))
        if self.chance.random() < 0.4:
            for path in paths:
                path.stalled_until = self.world.now + 0.4
        else:
            for path in paths:
                path.slow_s = slow_s
        self.world.note("net", f"slow {machine.name}<>{other.name}")

        def undo() -> None:
            for path in paths:
                path.slow_s = 0.0

        self._undo_after(0.5 + self.chance.random(), undo)
        return True

    # -- disks

    def slow_disk(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        disk = machine.disk
        before = disk.sync_s
        disk.sync_s = self.chance.choice(((0.002, 0.01), (0.01, 0.06), (0.05, 0.12)))
        self.world.note(machine.name, "has a slow disk")

        def undo() -> None:
            disk.sync_s = min(before, disk.sync_s)

        self._undo_after(0.5 + 1.5 * self.chance.random(), undo)
        return True

    def stall_disk(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        hangs = self.chance.random() < 0.15  # for longer than a leader with such a disk leads on
        machine.disk.next_sync_s = 3.2 + self.chance.random() if hangs else 0.2 + 0.5 * self.chance.random()
        self.world.note(machine.name, f"has a disk that {'hangs' if hangs else 'stalls'}")
        return True

    def break_disk(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        self.world.note(machine.name, "has a disk that fails")
        machine.disk.fails = errno.EIO
        machine.disk.failed = lambda: self._doom(machine)
        return True

    def fill_disk(self) -> bool:
        machine = self._victim()
        if machine is None:
            return False
        self.world.note(machine.name, "has a full disk")
        disk = machine.disk
        disk.is_full = True
        disk.failed = lambda: self._doom(machine)

        def undo() -> None:
            disk.is_full = False

        self._undo_after(0.5 + self.chance.random(), undo)
        return True

    def _doom(self, machine: Machine) -> None:
        """Its process is expected to stop; it is started again, whether it has stopped or not."""
        doomed, number = self.cluster.doomed, machine.number
        doomed.add(number)
        self.world.after(6.0, doomed.discard, number)
        self._undo_after(0.3 + self.chance.random(), machine.start)

    # -- data directories

    def lose_data(self) -> bool:
        """A server comes back on an older copy of its directory, or without a part of it, and later on its own."""
        machine = self._victim()
        if machine is None or machine.server is None or len(self._others(machine)) < 2 or machine.id in self._lossy:
            return False
        self.cluster.crash(machine)
        copy = Kept.of(machine)
        self._start_later(machine)
        self._lossy.add(machine.id)
        self.world.after(0.5 + 4.0 * self.chance.random() ** 2, self._isolate_rest, machine, machine.id, copy)
        return True

    def _isolate_rest(self, machine: Machine, server_id: str, copy: Kept) -> None:
        """Only a bare majority goes on, with this server in it: nobody else has what it acknowledges then."""
        leader = self.cluster.leader()
        others = self._others(machine)
        others.sort(key=lambda other: other.server is not leader)  # the leader first
        partners = others[: len(others) // 2]
        rest = others[len(others) // 2 :]
        if self.chance.random() < 0.7:
            pairs = [(a.name, b.name) for a in rest for b in [machine, *partners]]
            self.world.note("net", "cut off " + " ".join(other.name for other in rest))
            seconds = 0.3 + 0.4 * self.chance.random()
            self._block(pairs + [(b, a) for a, b in pairs], seconds)
            self.world.after(seconds, self._lose, machine, server_id, copy, partners)
        else:
            self._lose(machine, server_id, copy, [])

    def _lose(self, machine: Machine, server_id: str, copy: Kept, partners: list[Machine]) -> None:
        """`partners`: who else has what this server has acknowledged lately; they are away for a while."""
        self._lossy.discard(server_id)
        if self._is_over or machine.server is None or machine.id != server_id or machine.number in self.cluster.doomed:
            return
        self.cluster.crash(machine)
        kept = Kept.of(machine)
        if self._all_know(machine, copy) and self.chance.random() < 0.5:
            self.world.note(machine.name, "has an older copy of all")
            copy.put(machine)
            must_refuse = machine.is_copy = True
        elif self.chance.random() < 0.5:
            self.world.note(machine.name, "has an older copy of its log")
            machine.disk.put(copy.files)
            must_refuse = copy.place < machine.reached
        else:
            self.world.note(machine.name, "has lost files of its log")
            files = dict(kept.files)
            names = sorted(name for name in files if name.startswith("journal-"))
            for name in names if self.chance.random() < 0.5 else names[-1:]:
                del files[name]
            machine.disk.put(files)
            must_refuse = Kept.of(machine).place < machine.reached
        if not must_refuse:  # nothing promises that this is seen
            kept.put(machine)
            self._start_later(machine)
            return
        self.counts["losses"] += 1
        self.counts["losses that only others know"] += machine.is_copy
        machine.has_lost = True
        machine.start()
        for partner in partners:
            if partner.server is not None:
                self._crash(partner, 0.7 + 0.8 * self.chance.random())
        self._undo_after(0.8 + 0.6 * self.chance.random(), lambda: self._put_back(machine, server_id, kept))

    def _put_back(self, machine: Machine, server_id: str, kept: Kept) -> None:
        if not machine.has_lost or machine.id != server_id:  # it was replaced meanwhile
            return
        if machine.server is not None and machine.server.is_up and not machine.is_copy:
            self.world.violated("a loss is seen", f"{machine.name} runs on a directory that has lost what it promised")
        machine.kill()
        kept.put(machine)
        machine.has_lost = machine.is_copy = False
        machine.start()

    def _all_know(self, machine: Machine, copy: Kept) -> bool:
        """Whether every other server has it on its disk that this one was started once more after the copy."""
        for other in self._others(machine):
            data = other.disk.copy().get(WITNESS, b"{}")
            seen = json.loads(data).get("seen", {}) if data else {}
            if seen.get(machine.key_hash, (0, ""))[0] <= len(copy.lineage):
                return False
        return True

    # -- what operators do

    def transfer(self) -> bool:
        leader = self.cluster.leader()
        if leader is None or leader.raft is None:
            return False
        leader.loop.run_now(self._transfer, leader)
        if self.chance.random() < 0.5:  # it hears nothing of what follows
            pairs = [(other.name, leader.host) for other in self._others(leader.machine)]
            self.world.after(0.003 * self.chance.random(), self._deafen, pairs)
        return True

    def _deafen(self, pairs: list[tuple[str, str]]) -> None:
        if not self._is_over:
            self.world.note("net", "swallows " + " ".join(f"{a}>{b}" for a, b in pairs))
            self._block(pairs, 0.2 + 0.3 * self.chance.random())

    def _transfer(self, leader: Server) -> None:
        async def transfer() -> Any:
            try:
                assert leader.raft is not None
                await leader.raft.transfer()
                self.counts["transfers done"] += 1
            except RostraError:
                pass

        self.world.note(leader.host, "hands over")
        leader.spawn(transfer())

    def remove_alone(self) -> bool:
        """A leader without a majority is told to remove those that it cannot reach, one after the other."""
        leader, operator = self.cluster.leader(), self.cluster.operator
        if leader is None or leader.raft is None or not operator.may_disturb:
            return False
        voting = {m.id for m in leader.members if m.votes}
        others = [m for m in self._others(leader.machine) if m.id in voting]
        if len(others) < 2:
            return False
        self.chance.shuffle(others)
        near = [leader.machine, *others[: (len(others) - 1) // 2]]
        far = [m for m in self._others(leader.machine) if m not in near]
        self.world.note("net", "cut off " + " ".join(m.name for m in near))
        pairs = [(a.name, b.name) for a in near for b in far]
        self._block(pairs + [(b, a) for a, b in pairs], 0.4 + 0.8 * self.chance.random())
        at = 0.01
        for machine in far:
            if machine.id in voting:
                self.world.after(at, operator.remove_now, leader, machine.id)
                at += 0.01 + 0.02 * self.chance.random()
        return True

    def move_apart(self) -> bool:
        """Some servers, or all, stop; each comes back under another address, and some cannot be reached yet.

        Each is told at its start where the others are then: of two, the one that came later knows about the other.
        """
        there = [m for m in self.cluster.machines if not m.is_gone]
        if len(there) < 2:
            return False
        moving = there if self.chance.random() < 0.6 else self.chance.sample(there, self.chance.randint(2, len(there)))
        moving = self.chance.sample(moving, len(moving))
        for machine in moving:
            machine.move(power=self.chance.random() < 0.5)
            self._start_later(machine, 0.05 + 2.0 * self.chance.random() ** 2)
        away = moving[: self.chance.randrange(len(moving))]
        if away:
            others = [m for m in there if m not in away]
            pairs = [(a.name, b.name) for a in away for b in others]
            self.world.note("net", "cut off " + " ".join(m.name for m in away))
            self._block(pairs + [(b, a) for a, b in pairs], 0.5 + 2.0 * self.chance.random())
        return True

    def snapshot(self) -> bool:
        machine = self._victim()
        if machine is None or machine.server is None or machine.server.raft is None:
            return False
        raft = machine.server.raft
        self.world.note(machine.name, "is told to take a snapshot")
        machine.server.loop.run_now(raft.take_snapshot)
        return True
