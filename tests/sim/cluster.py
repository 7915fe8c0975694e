"""A cluster of simulated machines, its clients and its operator, and how one run of it goes.

First everything is done to it that can happen (`faults.py`) while clients write and read; then all is healed, and the
cluster has to take a write and converge within bounded time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rostra.server.raft.core import Timing
from rostra.server.raft.snapshotting import Limits
from tests.sim.changes import Operator
from tests.sim.clients import Client
from tests.sim.network import Network
from tests.sim.oracle import Oracle
from tests.sim.server import Machine, Server
from tests.sim.world import World

#: A seed counts from here on.
OPERATIONS_MIN, FAULTS_MIN, LEADERSHIPS_MIN = 500, 10, 3

#: After everything is healed: a write is done, and all servers are equal, within so many seconds of true time.
WRITE_WITHIN_S, CONVERGED_WITHIN_S = 8.0, 20.0


#: Clients begin nothing new while so many writes are open.
OPEN_WRITES_MAX = 40


@dataclass(slots=True)
class Profile:
    """What kind of run a seed is."""

    voters: int = 3
    clients: int = 3
    keys: int = 6
    drift: float = 0.05
    #: chance that a turn of a loop is interrupted; how much time each look at the fine clock takes
    interrupted: float = 0.02
    perf_step: float = 0.0
    timing: Timing = field(default_factory=lambda: Timing(0.08, 0.3, 0.6))
    limits: Limits = field(default_factory=Limits)
    operations: int = 540
    faults: int = 12
    #: operations a second that clients try, faults a second
    rate: float = 130.0
    fault_rate: float = 2.8
    operator: bool = False
    seconds_max: float = 45.0

    @staticmethod
    def of(seed: int, chance: Any) -> Profile:
        """The usual mixture."""
        snapshots = chance.random() < 0.6
        kib = chance.choice((8, 16, 32))
        return Profile(
            voters=chance.choices((1, 2, 3, 4, 5), (1, 2, 78, 4, 15))[0],
            clients=chance.randint(2, 4),
            keys=chance.randint(2, 8),
            drift=chance.choice((0.0, 0.02, 0.05)),
            interrupted=chance.choice((0.0, 0.02, 0.2)),
            perf_step=chance.choice((0.0, 0.00005, 0.0004)),
            limits=Limits(
                segment_bytes=kib << 10,
                snapshot_log_bytes=(chance.choice((12, 24, 48)) << 10) if snapshots else 8 << 20,
                log_bytes_max=(chance.choice((24, 48, 96)) << 10) if snapshots else 16 << 20,
                chunk_bytes=chance.choice((512, 2048, 16384)),
            ),
            timing=Timing() if chance.random() < 0.25 else Timing(0.08, 0.3, 0.6),
            operator=chance.random() < 0.5,
        )


class Cluster:
    def __init__(self, world: World, profile: Profile) -> None:
        self.world, self.profile, self.chance = world, profile, world.chance
        self.network = Network(world)
        self.oracle = Oracle(world)
        self.counts: Counter[str] = Counter()
        self.operator = Operator(self)
        self._incarnations = 0
        self.machines = [Machine(self, number) for number in range(1, profile.voters + 1)]
        members = tuple(machine.member("voter") for machine in self.machines)
        for machine in self.machines:
            machine.members = members
        self.clients = [Client(self, number) for number in range(1, profile.clients + 1)]
        self.keys = [f"{'abc'[n % 3]}/{n}" for n in range(profile.keys)]
        self.operations = 0  # acknowledged
        self.open_writes = 0
        self.healed_at = 0.0
        self.written_s = 0.0  # when the first write that began after that was acknowledged
        self._values = 0
        self._silent_until = 0.0  # clients do not write for a while
        #: What the fault injector expects to see stopping, by the number of its machine.
        self.doomed: set[int] = set()
        self.dead: list[Server] = []
        self.is_quiet = False  # clients begin nothing new

    # -- what the parts tell

    def incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def acknowledged(self) -> None:
        self.operations += 1

    def written(self, begun_s: float) -> None:
        """A write that began at `begun_s` was acknowledged."""
        if self.healed_at and self.written_s == 0.0 and begun_s >= self.healed_at:
            self.written_s = self.world.now

    def role_changed(self, server: Server, is_leader: bool, term: int) -> None:
        if is_leader and not self.is_quiet:
            for _ in range(3):
                self.world.after(0.01 * self.chance.random() ** 2, self._read_at, server)
            for machine in self.machines:
                other = machine.server
                if other is not None and other is not server and other.raft is not None and other.raft.is_leader:
                    self.world.after(0.0003, self._challenge, server, other)

    def _read_at(self, server: Server) -> None:
        if not server.loop.is_dead:
            self.chance.choice(self.clients).read("default", self.chance.choice(self.keys), server)

    def _challenge(self, new: Server, old: Server) -> None:
        """A write at the new leader; once it is acknowledged, reads at one that does not know yet."""
        chance = self.chance

        def written() -> None:
            for _ in range(4):
                self.world.after(0.02 * chance.random() ** 2, self._read_at, old)

        self._values += 1
        key, value = chance.choice(self.keys), b"%d" % self._values
        chance.choice(self.clients).write("kv.set", {"key": key, "value": value}, new, written)

    def loaded(self, server: Server, position: int) -> None:
        self.counts["snapshots installed" if server.is_up else "snapshots restored"] += 1
        self.oracle.compare_hash(server.id, position, server.node.store)

    def died(self, server: Server) -> None:
        # What it leaves is kept to the end: finalizers of dead coroutines must not run in the middle.
        self.dead.append(server)
        for question in list(server.asked):
            question.lost(server)
        server.asked.clear()

    def clear(self) -> None:
        """The run is over."""
        running = [machine.server for machine in self.machines if machine.server is not None]
        for server in [*self.dead, *running]:
            server.loop.clear()
        self.dead.clear()

    def crash(self, machine: Machine, *, power: bool | None = None) -> None:
        """`machine` stops now, in the middle of whatever it does."""
        if power is None:
            power = self.chance.random() < 0.6
        if power:
            machine.cut_power()
        else:
            machine.kill()

    def fail_stopped(self, server: Server, reason: str) -> None:
        machine = server.machine
        if machine.number in self.doomed:
            self.doomed.discard(machine.number)
            self.counts["fail-stops"] += 1
        elif machine.has_lost:
            self.counts["losses seen"] += 1
        else:
            self.world.violated("stops only for a reason", f"{server.host} stopped: {reason}")
        machine.kill()

    def leader(self) -> Server | None:
        """Who leads in the highest term, as far as the servers themselves believe."""
        found: Server | None = None
        highest = -1
        for machine in self.machines:
            server = machine.server
            if server is not None and server.raft is not None and server.raft.is_leader and server.raft.term > highest:
                found, highest = server, server.raft.term
        return found

    # -- the end

    def new_machine(self) -> Machine:
        machine = Machine(self, len(self.machines) + 1)
        machine.is_gone = True  # until it is a member
        self.machines.append(machine)
        return machine

    def has_converged(self) -> bool:
        """All writes are settled, and all members have applied the same, all of it."""
        leader = self.leader()
        if self.open_writes or not self.operator.is_idle or leader is None:
            return False
        everything = len(self.oracle.entries)
        listed = {member.id for member in leader.members}
        servers = [m.server for m in self.machines if m.id in listed]
        for server in servers:
            if server is None or not server.is_up or server.members != leader.members:
                return False
            if server.state.position != everything:
                return False
        for server in servers:
            assert server is not None
            self.oracle.compare_hash(server.id, everything, server.node.store)
        return len(servers) == len(listed)

    def describe(self) -> str:
        """Where everyone stands, for people."""
        lines = [
            f"{self.open_writes} writes open, {len(self.oracle.entries)} entries, operator: {self.operator.describe()}"
        ]
        for machine in self.machines:
            server = machine.server
            raft = server.raft if server is not None else None
            if server is None or raft is None:
                lines.append(f"{machine.name} {machine.id}: {'down' if server is None else 'starting'}")
            else:
                lines.append(
                    f"{machine.name} {server.id}: term {raft.term} leads {raft.is_leader} follows {raft.leader_id} "
                    f"commit {raft.commit_index} applied {raft.applied_index} position {server.state.position}"
                )
        return "\n  ".join(lines)

    # -- load

    def offer(self) -> None:
        """The next operations of some client; then again after a while."""
        if self.is_quiet:
            return
        if self.open_writes > OPEN_WRITES_MAX:
            self.world.after(0.05, self.offer)
            return
        chance = self.chance
        client = chance.choice(self.clients)
        what = chance.random()
        count = 1
        if self.world.now < self._silent_until:
            what = 0.68 + 0.32 * what  # only reads
        elif chance.random() < 0.004 and not self.healed_at:
            self._silent_until = self.world.now + 0.4 + 0.4 * chance.random()
        if what < 0.68:
            if chance.random() < 0.08:
                count = chance.randint(8, 40)
            for _ in range(count):
                self._write(client)
        else:
            mode = "default" if what < 0.84 else "consistent" if what < 0.96 else "stale"
            client.read(mode, chance.choice(self.keys))
        rate = self.profile.rate
        if self.healed_at:
            rate /= 5
        self.world.after(count * chance.expovariate(rate), self.offer)

    def _write(self, client: Client) -> None:
        chance = self.chance
        self._values += 1
        key = chance.choice(self.keys)
        value = b"%d" % self._values
        if chance.random() < 0.1:
            value = value.ljust(chance.randint(20, 900), b".")
        args: dict[str, Any] = {"key": key, "value": value}
        what = chance.random()
        if what < 0.25:
            args["cas"] = self.oracle.version(key) if chance.random() < 0.8 else chance.randint(0, 50)
        elif what < 0.28:
            args["acquire"] = "no-such-session"
        elif what < 0.33:
            client.write("kv.delete", {"key": key})
            return
        client.write("kv.set", args)
