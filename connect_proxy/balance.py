"""Which endpoint of an upstream gets the next connection: pure, with time and chance passed in.

Two endpoints are drawn at random by weight, and the one with fewer open connections for its weight is taken. That is
near to least-connections, and not every proxy of the mesh runs to the same idle endpoint. One that failed rests, longer
each time, and comes back by itself; when all rest, the one whose rest ends first is tried all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate
from typing import Final

from rostra.connect_proxy.snapshot import Endpoint

REST_FIRST_S: Final = 0.5
REST_MAX_S: Final = 30.0
_DRAWS_MAX: Final = 6


class Target:
    """One endpoint and what this proxy knows about it."""

    __slots__ = ("active", "endpoint", "failures", "rests_until")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.active = 0  # connections that are open or being made
        self.failures = 0  # in a row
        self.rests_until = 0.0


class Balancer:
    """The endpoints of one upstream. `random` returns a number in [0, 1)."""

    __slots__ = ("_random", "_reach", "targets")

    def __init__(self, endpoints: Iterable[Endpoint], random: Callable[[], float]) -> None:
        self._random = random
        self.targets: list[Target] = []
        self._reach: list[int] = []
        self.update(endpoints)

    def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Takes the new list; an endpoint that stays keeps what is known about it."""
        known = {(t.endpoint.address, t.endpoint.port): t for t in self.targets}
        targets: dict[tuple[str, int], Target] = {}
        for endpoint in endpoints:
            key = (endpoint.address, endpoint.port)
            target = known.get(key) or Target(endpoint)
            target.endpoint = endpoint
            targets[key] = target
        self.targets = list(targets.values())
        heavy = any(t.endpoint.weight for t in self.targets)
        self._reach = list(accumulate(t.endpoint.weight if heavy else 1 for t in self.targets))

    def pick(self, now_s: float, tried: Collection[Target] = ()) -> Target | None:
        """The endpoint to try next, None when each has been tried. Counts as active until `released`."""
        target = self._draw_two(now_s, tried) or self._least_tired(tried)
        if target is not None:
            target.active += 1
        return target

    def failed(self, target: Target, now_s: float) -> None:
        target.failures += 1
        rest_s = min(REST_MAX_S, REST_FIRST_S * 2 ** min(target.failures - 1, 16))
        target.rests_until = now_s + rest_s * (0.75 + 0.5 * self._random())

    def succeeded(self, target: Target) -> None:
        target.failures = 0
        target.rests_until = 0.0

    def released(self, target: Target) -> None:
        target.active -= 1

    def _draw_two(self, now_s: float, tried: Collection[Target]) -> Target | None:
        best: Target | None = None
        found = 0
        for _ in range(_DRAWS_MAX if self._reach and self._reach[-1] else 0):
            target = self.targets[bisect_right(self._reach, self._random() * self._reach[-1])]
            if target in tried or target.rests_until > now_s:
                continue
            if best is None or _load(target) < _load(best):
                best = target
            found += 1
            if found == 2:
                break
        return best

    def _least_tired(self, tried: Collection[Target]) -> Target | None:
        """Chance has found none: look at all. Weightless ones come last, then those that rest, by the rest's end."""
        candidates = [t for t in self.targets if t not in tried]
        return min(candidates, key=lambda t: (t.rests_until, t.endpoint.weight == 0, _load(t)), default=None)


def _load(target: Target) -> float:
    return (target.active + 1) / max(1, target.endpoint.weight)
