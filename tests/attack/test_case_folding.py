"""Intentions and names in random case: check, match, authorize and a proxy's decision follow one rule, Consul 1.8.7's.

Destinations do not differ by case, sources do; two intentions whose names differ by case only are one. The rule is
written down below, and asked of a real Consul as well where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from rostra.acl.identity import ServiceIdentity
from rostra.agent.http.mesh import ROUTES as MESH_ROUTES
from rostra.agent.proxycfg import intentions_in_order
from rostra.connect_proxy.inbound import decide
from rostra.connect_proxy.snapshot import Leaf, ProxySnapshot, Rule
from rostra.server.state.ca import SetRoot
from rostra.server.state.intention import IntentionsFor
from tests.support.real_consul import CONSUL, Asked, needs_consul, running_consul
from tests.support.store_servers import CLUSTER
from tests.unit.agent.http.conftest import Api, make_api

NAMES = ("web", "db", "api")
INTENTIONS = "/v1/connect/intentions"
TRUST_DOMAIN = f"{CLUSTER}.consul"
ROOT = {
    "id": "1f:6e",
    "name": "root",
    "serial": 7,
    "signing_key_id": "ec",
    "trust_domain": TRUST_DOMAIN,
    "not_before_ms": 1,
    "not_after_ms": 2,
    "cert_pem": "pem",
}
Triple = tuple[str, str, str]


def spelled(rng: random.Random, name: str) -> str:
    return "".join(rng.choice((c.lower(), c.upper())) for c in name)


def folded(source: str, destination: str) -> tuple[str, str]:
    return source.lower(), destination.lower()


def rule(intentions: list[Triple], source: str, destination: str) -> bool:
    """Who wins, told as plainly as it can be."""
    best: tuple[int, bool] | None = None
    for named, target, action in intentions:
        if named in (source, "*") and target.lower() in (destination.lower(), "*"):
            rank = (2 * (target != "*") + (named != "*"), action == "deny")
            best = max(best or rank, rank)
    return best is None or not best[1]


class Ours:
    """Rostra's API over a store, asked from a thread, and what its agent gives to a proxy."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.ask = Asked(api.host, api.port)

    def proxy_allows(self, source: str, destination: str) -> bool:
        rows = [row for _, row in self.api.servers.store.evaluate(IntentionsFor(destination)).rows()]
        given = intentions_in_order(rows)
        rules = tuple(Rule(r["Source"], r["Action"], r["Precedence"], r["ID"]) for r in given)
        leaf = Leaf("cert", "key")
        snapshot = ProxySnapshot(
            "p", destination, TRUST_DOMAIN, "dc1", leaf, ("root",), default_allow=True, intentions=rules
        )
        return decide(snapshot, source).allowed


def allowed(ask: Asked, trust_domain: str, source: str, destination: str) -> tuple[bool, bool]:
    """What check and authorize say."""
    _, checked = ask("GET", f"{INTENTIONS}/check?source={source}&destination={destination}")
    uri = ServiceIdentity(trust_domain, "dc1", source).uri
    body = {"Target": destination, "ClientCertURI": uri, "ClientCertSerial": "1"}
    _, authorized = ask("POST", "/v1/agent/connect/authorize", body)
    return checked["Allowed"], authorized["Authorized"]


def matched(ask: Asked, by: str, name: str) -> list[Triple]:
    _, found = ask("GET", f"{INTENTIONS}/match?by={by}&name={name}")
    return [(i["SourceName"], i["DestinationName"], i["Action"]) for i in found[name] or ()]


def compare(rng: random.Random, ours: Ours, theirs: Asked | None, pairs: int, per_set: int) -> None:
    trust_domain = theirs("GET", "/v1/connect/ca/roots")[1]["TrustDomain"] if theirs else ""
    for _ in range(pairs // per_set):
        for ask in filter(None, (ours.ask, theirs)):
            for row in ask("GET", INTENTIONS)[1]:
                assert ask("DELETE", f"{INTENTIONS}/{row['ID']}")[0] == 200
        there: list[Triple] = []
        for _ in range(rng.randint(1, 6)):
            source, destination = (rng.choice(("*", spelled(rng, rng.choice(NAMES)))) for _ in range(2))
            action = rng.choice(("allow", "deny"))
            body = {"SourceName": source, "DestinationName": destination, "Action": action}
            is_new = folded(source, destination) not in {folded(s, d) for s, d, _ in there}
            for ask in filter(None, (ours.ask, theirs)):
                status, text = ask("POST", INTENTIONS, body)
                assert (status == 200) is is_new, (there, body, text)
            if is_new:
                there.append((source, destination, action))
        for _ in range(per_set):
            source, destination = (spelled(rng, rng.choice(NAMES)) for _ in range(2))
            expected = rule(there, source, destination)
            shown = (there, source, destination)
            assert allowed(ours.ask, TRUST_DOMAIN, source, destination) == (expected, expected), shown
            assert ours.proxy_allows(source, destination) is expected, shown
            mine = [matched(ours.ask, "source", source), matched(ours.ask, "destination", destination)]
            assert {t for t in there if folded(*t[:2])[1] in (destination.lower(), "*")} == set(mine[1]), shown
            if theirs is not None:
                assert allowed(theirs, trust_domain, source, destination) == (expected, expected), shown
                assert [matched(theirs, "source", source), matched(theirs, "destination", destination)] == mine, shown


@contextlib.asynccontextmanager
async def serving() -> Any:
    api = await make_api([route for route in MESH_ROUTES if route.path.endswith("/authorize")])
    api.servers.apply(SetRoot(ROOT, "key"))
    try:
        yield Ours(api)
    finally:
        await api.server.close(1.0)
        await api.agent.results.close()


async def play(pairs: int, seed: int, *, with_consul: bool) -> None:
    async with serving() as ours:
        with running_consul() if with_consul else contextlib.nullcontext() as address:
            theirs = Asked(*address) if address else None
            await asyncio.to_thread(compare, random.Random(seed), ours, theirs, pairs, 20)


@pytest.mark.parametrize("with_consul", [False, pytest.param(True, marks=needs_consul)])
async def test_check_match_authorize_and_the_proxy_agree_in_any_case(with_consul: bool) -> None:
    await play(200, 9, with_consul=with_consul)


@pytest.mark.long
async def test_ten_thousand_names_in_random_case_are_decided_as_consul_does() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    await play(10_000, seed, with_consul=bool(CONSUL))
