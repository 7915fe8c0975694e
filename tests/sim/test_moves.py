"""Servers that come back under other addresses while they cannot reach each other: told in order, on virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.sim.cluster import CONVERGED_WITHIN_S, Cluster, Profile
from tests.sim.run import _no_collections, _virtual
from tests.sim.server import Machine
from tests.sim.world import World

SEEDS = range(5)


class Story:
    """A quiet cluster whose machines do what the test says."""

    def __init__(self, seed: int, voters: int) -> None:
        self.world = World(seed)
        self.cluster = Cluster(self.world, Profile(voters=voters, interrupted=0.0))
        self.machines = self.cluster.machines

    def wait(self, seconds: float) -> None:
        ended: list[bool] = []
        self.world.after(seconds, ended.append, True)
        self.world.run(lambda: bool(ended), self.world.now + seconds + 1.0)

    def until(self, condition: Callable[[], bool], what: str, within_s: float = CONVERGED_WITHIN_S) -> None:
        deadline = self.world.now + within_s
        while not condition() and self.world.now < deadline and self.world.violation is None:
            self.wait(0.05)
        assert self.world.violation is None, self.world.violation
        assert condition(), f"{what}: not within {within_s} s: {self.cluster.describe()}"

    def start(self, *machines: Machine) -> None:
        for machine in machines or self.machines:
            machine.start()

    def write(self) -> None:
        client = self.cluster.clients[0]
        client.write("kv.set", {"key": "k", "value": b"v"})
        self.until(lambda: not client.outstanding, "a write")

    def has_converged(self) -> None:
        self.until(self.cluster.has_converged, "all servers are equal and know where each of them is")

    def cut(self, machine: Machine) -> Callable[[], None]:
        """Cut off from all others. Ends the cut."""
        network = self.cluster.network
        others = [m.name for m in self.machines if m is not machine]
        pairs = [(machine.name, o) for o in others] + [(o, machine.name) for o in others]
        for a, b in pairs:
            network.block(a, b)

        def end() -> None:
            for a, b in pairs:
                network.unblock(a, b)

        return end


@pytest.fixture
def story(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Story]]:
    stories: list[Story] = []
    world_of: World = World(request.param)
    with _virtual(world_of), _no_collections():

        def tell(voters: int) -> Story:
            told = Story(request.param, voters)
            stories.append(told)
            return told

        yield tell
        for told in stories:
            told.world.leave()
            told.cluster.clear()


@pytest.mark.parametrize("story", SEEDS, indirect=True)
def test_a_server_that_knows_only_old_addresses_is_looked_for_by_those_that_have_a_leader(
    story: Callable[[int], Story],
) -> None:
    told = story(3)
    away, *rest = told.machines
    told.start()
    told.write()
    for machine in told.machines:
        machine.move()
    told.start(away)  # it is told where the others are: there is nobody
    for machine in rest:
        machine.move()
    end = told.cut(away)
    told.start(*rest)
    told.write()
    told.wait(5.0)  # they have found each other, and lead without it
    end()
    told.has_converged()


@pytest.mark.parametrize("story", SEEDS, indirect=True)
def test_who_knows_where_all_are_tells_those_that_know_only_where_it_is(story: Callable[[int], Story]) -> None:
    told = story(5)
    middle, *rest = told.machines
    told.start()
    told.write()
    middle.kill()
    told.write()  # so that it cannot lead them
    for machine in told.machines:
        machine.move()
    for machine in rest:
        machine.start()
        assert machine.server is not None
        machine.server._joins = []
    told.start(middle)
    told.has_converged()


@pytest.mark.parametrize("story", SEEDS, indirect=True)
@pytest.mark.parametrize("voters", [3, 5])
def test_servers_that_have_all_moved_find_each_other_by_what_each_was_told_at_its_start(
    story: Callable[[int], Story], voters: int
) -> None:
    told = story(voters)
    told.start()
    told.write()
    for machine in told.machines:
        machine.move(power=True)
        told.start(machine)
    told.has_converged()
    told.write()
