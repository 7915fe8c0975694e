"""The choice of endpoints: tables and a seeded crowd."""

from __future__ import annotations

import random
from collections import Counter

from rostra.connect_proxy.balance import REST_MAX_S, Balancer, Target
from rostra.connect_proxy.snapshot import Endpoint


def endpoints(*weights: int) -> list[Endpoint]:
    return [Endpoint(f"10.0.0.{n}", 8000, weight) for n, weight in enumerate(weights, 1)]


def balancer(*weights: int, seed: int = 7) -> Balancer:
    return Balancer(endpoints(*weights), random.Random(seed).random)


def shares(chosen: Balancer, count: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for _ in range(count):
        target = chosen.pick(0.0)
        assert target
        seen[target.endpoint.address] += 1
    return seen


def test_open_connections_spread_by_weight():
    seen = shares(balancer(1, 1, 2), 4000)
    assert abs(seen["10.0.0.1"] - 1000) < 60
    assert abs(seen["10.0.0.2"] - 1000) < 60
    assert abs(seen["10.0.0.3"] - 2000) < 60


def test_weightless_endpoints_are_used_only_when_nothing_else_is_left():
    chosen = balancer(0, 1)
    assert shares(chosen, 50) == {"10.0.0.2": 50}
    chosen.failed(chosen.targets[1], 0.0)
    assert shares(chosen, 3) == {"10.0.0.1": 3}
    assert sum(shares(balancer(0, 0), 10).values()) == 10


def test_there_is_nothing_to_pick_from_nothing():
    assert Balancer([], random.random).pick(0.0) is None


def test_each_endpoint_is_tried_once_and_then_none():
    chosen, tried = balancer(1, 1, 1), list[Target]()
    while target := chosen.pick(0.0, tried):
        tried.append(target)
    assert len(tried) == 3
    assert len({t.endpoint for t in tried}) == 3


def test_one_that_failed_rests_longer_each_time_and_comes_back():
    chosen = balancer(1, 1)
    bad, good = chosen.targets
    rests = []
    for _ in range(12):
        chosen.failed(bad, 100.0)
        rests.append(bad.rests_until - 100.0)
    assert 0.3 < rests[0] < 0.7
    assert rests[3] > 2 * rests[0]
    assert max(rests) <= REST_MAX_S * 1.25
    assert all(chosen.pick(100.0) is good for _ in range(20))
    assert any(chosen.pick(200.0) is bad for _ in range(20))
    chosen.succeeded(bad)
    assert bad.rests_until == 0.0


def test_when_all_rest_the_first_to_wake_is_tried():
    chosen = balancer(1, 1)
    chosen.failed(chosen.targets[0], 0.0)
    chosen.failed(chosen.targets[1], 5.0)
    assert chosen.pick(5.1) is chosen.targets[0]


def test_what_is_known_of_an_endpoint_survives_an_update():
    chosen = balancer(1, 1)
    chosen.failed(chosen.targets[0], 0.0)
    kept = chosen.targets[0]
    chosen.update([*endpoints(3), Endpoint("10.0.0.9", 8000)])
    assert chosen.targets[0] is kept
    assert kept.failures == 1
    assert kept.endpoint.weight == 3


def test_released_connections_count_no_more():
    chosen = balancer(1)
    target = chosen.pick(0.0)
    assert target
    assert target.active == 1
    chosen.released(target)
    assert target.active == 0
