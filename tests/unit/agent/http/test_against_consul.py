"""The same requests to our API and to a real Consul: same statuses, same bodies, but for ids, indexes and times.

Runs where ROSTRA_CONSUL_BIN names a consul binary (1.8.7). What differs on purpose stands in docs/differences.md and is
not asked here. Texts are compared where clients match them: all but those of what cannot be decoded.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.real_consul import Asked, needs_consul, running_consul

pytestmark = needs_consul

REGISTER, DEREGISTER = "/v1/catalog/register", "/v1/catalog/deregister"
CREATE, INTENTIONS = "/v1/session/create", "/v1/connect/intentions"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def consul() -> Iterator[Asked]:
    with running_consul() as address:
        ask = Asked(*address)
        yield ask
        ask.close()


def shown(value: Any) -> Any:
    """Without what every server chooses by itself, and without the node that each of the two runs on."""
    if isinstance(value, dict):
        left_out = ("CreateIndex", "ModifyIndex", "CreatedAt", "UpdatedAt", "Hash", "consul")
        value = {k: shown(v) for k, v in value.items() if k not in left_out}
        for name in ("Node", "ServiceID"):  # of which ours keeps one spelling, see docs/differences.md
            if isinstance(value.get(name), str):
                value[name] = value[name].lower()
        return {**value, "NodeChecks": value["NodeChecks"] or []} if "NodeChecks" in value else value
    if isinstance(value, list):
        rows = [shown(v) for v in value if not (isinstance(v, dict) and v.get("Node") in ("o", "s1"))]
        return sorted(rows, key=repr) if rows and "Behavior" in rows[0] else rows  # sessions: by their ids
    return UUID.sub("UUID", value) if isinstance(value, str) else value


class Both:
    """Asks both and compares. `$name` in a path or body is what `keep` has kept of an earlier answer."""

    def __init__(self, ours: Ask, theirs: Ask) -> None:
        self._sides = {"ours": ours, "theirs": theirs}
        self._kept: dict[str, dict[str, str]] = {"ours": {}, "theirs": {}}
        self._changes: list[tuple[str, str, Any]] = []
        self.compares_texts = True  # of refusals

    def __call__(self, method: str, path: str, body: Any = None, *, keep: str = "", **headers: str) -> Any:
        answers = {}
        if method != "GET":
            self._changes.append((method, path, body))
        for side, ask in self._sides.items():
            status, got = ask(method, self._filled(side, path), body, **headers)
            if keep and status == 200:
                self._kept[side][keep] = got["ID"]
            undecoded = isinstance(got, str) and "decode" in got and "unknown field" not in got
            untold = undecoded or (status >= 400 and not self.compares_texts)
            answers[side] = (status, "refused" if untold else shown(got))
        assert answers["ours"] == answers["theirs"], (method, path, body, self._changes[-20:])
        return answers["ours"]

    def _filled(self, side: str, text: str) -> str:
        for name, value in self._kept[side].items():
            text = text.replace("$" + name, value)
        return text


@pytest.fixture
async def both(api: Any, consul: Asked) -> Any:
    """`both(story)` plays a story in a thread; Consul begins it without intentions, sessions, keys or nodes."""

    async def play(story: Callable[..., None], *args: Any) -> None:
        await asyncio.to_thread(_play, Asked(api.host, api.port), consul, story, *args)

    return play


def _play(ours: Asked, theirs: Asked, story: Callable[..., None], *args: Any) -> None:
    for row in theirs("GET", INTENTIONS)[1]:
        theirs("DELETE", f"{INTENTIONS}/{row['ID']}")
    for row in theirs("GET", "/v1/catalog/nodes")[1]:
        if row["Node"] != "o":
            theirs("PUT", DEREGISTER, {"Node": row["Node"]})
    theirs("DELETE", "/v1/kv/?recurse")
    try:
        story(Both(ours, theirs), *args)
    finally:
        ours.close()


def node(**fields: Any) -> dict[str, Any]:
    return {"Node": "n9", "Address": "10.9.0.1", **fields}


def services_and_checks(ask: Both) -> None:
    views = [
        "catalog/nodes",
        "catalog/services",
        "catalog/node/N9",
        "catalog/node-services/n9",
        "catalog/service/app",
        "catalog/connect/app",
        "health/node/n9",
        "health/checks/APP",
        "health/service/app",
        "health/service/app?passing",
        "health/connect/app",
        "health/state/any?node-meta=a:b",
        "health/state/passing?node-meta=a:b",
        "session/node/n9",
    ]

    def look() -> None:
        for view in views:
            ask("GET", "/v1/" + view)

    look()
    ask("PUT", REGISTER, node(NodeMeta={"a": "b"}))
    look()
    for service_id, port in (("App-1", 1), ("app-1", 2)):
        ask("PUT", REGISTER, node(NodeMeta={"a": "b"}, Service={"ID": service_id, "Service": "app", "Port": port}))
        look()
    for check_id, status in (("C1", "passing"), ("c1", "warning"), ("c1", "")):
        check = {"CheckID": check_id, "Name": "n", "Status": status, "ServiceID": "app-1"}
        ask("PUT", REGISTER, node(SkipNodeUpdate=True, Check=check))
        look()
    native = {"ID": "a2", "Service": "app", "Connect": {"Native": True}, "Tags": ["x"], "Meta": {"k": "v"}}
    ask("PUT", REGISTER, node(SkipNodeUpdate=True, Service=native, Check={"Name": "node", "Status": "passing"}))
    look()
    ask("PUT", DEREGISTER, {"Node": "N9", "CheckID": "C1"})
    ask("PUT", DEREGISTER, {"Node": "N9", "ServiceID": "APP-1"})
    look()
    ask("PUT", DEREGISTER, {"Node": "N9"})
    look()


def refused_registrations(ask: Both) -> None:
    for fields in (
        {"Foo": 1},
        {"Namespace": "t"},
        {"Service": {"Service": "s", "Name": "s"}},
        {"Service": {"Service": "s", "enable_tag_override": True}},
        {"Service": {"Service": "s", "Weights": {"Foo": 1}}},
        {"Service": {"Service": "s", "Connect": {"Foo": 1}}},
        {"Service": {"Service": "s", "Proxy": {"Foo": 1}}},
        {"Service": {"Service": "s", "Proxy": {"Upstreams": [{"IngressHosts": []}]}}},
        {"Service": {"Service": "s", "Proxy": {"Mode": "x"}}},
        {"Service": {"Service": "s", "Proxy": {"mesh_gateway": {"mode": "local"}}}},
        {"Service": {"Service": "s", "Proxy": {"Upstreams": 5}}},
        {"Service": {"Service": "s", "Proxy": {"Upstreams": [5]}}},
        {"Service": {"Service": "s", "Proxy": {"Upstreams": [{"LocalBindPort": "x"}]}}},
        {"Service": {"Service": "s", "Proxy": {"Config": 5}}},
        {"Service": {"Service": "s", "Proxy": {"Expose": {"Paths": "x"}}}},
        {"Service": {"Service": "s", "Proxy": {"local_service_port": 9, "destination_service_name": "x"}}},
        {"Service": {"Service": "s", "Proxy": {"LocalServicePort": None, "Expose": {"Checks": True}}}},
        {"Service": {"Service": "s", "Proxy": [{"DestinationServiceName": "x"}]}},
        {"Service": {"Service": "s", "Proxy": {"LocalServicePort": 80.0}}},
        {"Service": {"Service": "s", "Proxy": {"Upstreams": {"DestinationName": "b"}}}},
        {"Service": {"Service": "s", "Proxy": {"UPSTREAMS": [{"localbindport": 9, "meshgateway": {"MODE": "local"}}]}}},
        {"Service": {"Service": "s", "TaggedAddresses": {"lan": {"Port": 80.0}}}},
        {"Service": {"Service": "s", "TaggedAddresses": {"lan": {"address": "1.1.1.1"}, "wan": None}}},
        {"Service": {"Service": "s", "Weights": {}}},
        {"Service": {"Service": "s", "Weights": {"Warning": 3}}},
        {"Service": {"Service": "s", "Weights": {"Passing": 3}}},
        {"Service": {"ID": "s"}},
        {"Check": {"Name": "c", "HTTP": "x"}},
        {"Check": {"Name": "c", "Definition": {"Foo": 1}}},
        {
            "Check": {
                "Name": "c",
                "Definition": {"http": "http://x", "interval": "90s", "TCP": ""},
            }
        },
        {"Check": {"Name": "c", "Definition": {"HTTP": "http://x", "Header": {"a": ["b"]}, "ScriptArgs": ["a"]}}},
        {"Check": {"Name": "c", "Definition": {"TTL": "10s", "GRPC": "x", "GRPCUseTLS": True, "AliasNode": "n"}}},
        {"Check": {"Name": "c", "Definition": {"Interval": "x"}}},
        {"Check": {"Name": "c", "Definition": {"HTTP": 5}}},
        {"Check": {"Name": "c", "Node": "N9"}},
        {"Checks": [{"CheckID": "a", "Node": "n9"}, {"CheckID": "b", "Node": "other"}]},
        {"Address": ""},
        {"Node": ""},
        {"Node": 5},
    ):
        ask("PUT", REGISTER, node(**fields))
        ask("GET", "/v1/health/node/n9")
        ask("GET", "/v1/catalog/service/s")
    for body in ({"Node": "n9", "Name": "s"}, {"Node": "n9", "Namespace": "t"}, {"Node": ""}, {}, "", "{"):
        ask("PUT", DEREGISTER, body)
    ask("GET", "/v1/catalog/node/n9")


def namespaces(ask: Both) -> None:
    for method, path, body in (
        ("GET", "kv/a", None),
        ("PUT", "kv/a", "x"),
        ("DELETE", "kv/a", None),
        ("GET", "health/service/web", None),
        ("GET", "health/state/any", None),
        ("GET", "catalog/service/web", None),
        ("GET", "catalog/nodes", None),
        ("GET", "session/list", None),
        ("PUT", "session/destroy/adf4238a-882b-9ddc-4a9d-5b6758e4159e", None),
        ("PUT", "catalog/register", node()),
        ("PUT", "catalog/deregister", node()),
        ("GET", "connect/intentions", None),
        ("GET", "connect/intentions/check?source=a&destination=b", None),
    ):
        and_ns = "&ns=" if "?" in path else "?ns="
        for wanted in ("team1", "default", ""):
            ask(method, f"/v1/{path}{and_ns}{wanted}", body)
            ask(method, f"/v1/{path}", body, **{"X-Consul-Namespace": wanted})


def sessions(ask: Both) -> None:
    def made(**fields: Any) -> None:
        ask("PUT", CREATE, {"Node": "n9", **fields}, keep="S")
        ask("GET", "/v1/session/node/n9")
        ask("GET", "/v1/session/info/$S")
        ask("PUT", "/v1/session/destroy/$S")

    checks = [{"CheckID": c, "Name": c, "Status": "passing"} for c in ("serfHealth", "c1", "c2")]
    for registered in (checks[1:], checks):
        ask("PUT", REGISTER, node(Checks=registered))
        for given in (None, [], ["c1"], ["C1"], ["serfHealth"], ["serfHealth", "c1"], ["nope"]):
            for node_checks in ("absent", None, [], ["c2"], ["serfHealth"]):
                lists = {} if node_checks == "absent" else {"NodeChecks": node_checks}
                made(Checks=given, **lists)
                made(**lists)
    for ttl in ("15s", "1h", "10000ms", "0", "0s", "24h", "1m0.5s", "90s", "", "5s", "-5s", "25h", "x", 15):
        made(TTL=ttl)
    for delay in ("15s", "1ms", "1us", 0, 5, 999, 1000, "70s", 1.5, None, "x", ""):
        made(LockDelay=delay)
    for fields in (
        {"Behavior": "delete"},
        {"Behavior": "x"},
        {"Node": ""},
        {"Node": "no"},
        {"Foo": 1},
        {"lock_delay": 1},
    ):
        made(**fields)
    made(ServiceChecks=[{"ID": "c1"}])
    made(ServiceChecks=[{"ID": "nope"}])


def ends_of_sessions(ask: Both) -> None:
    passing = [{"CheckID": c, "Name": c, "Status": "passing"} for c in ("serfHealth", "c1", "c2")]
    lists: dict[str, Any]
    for lists in ({"Checks": ["c1"]}, {"NodeChecks": ["C1"]}, {"ServiceChecks": [{"ID": "c2"}]}, {"NodeChecks": []}):
        for ends in ("serfHealth", "c1", "c2", "C1"):
            ask("PUT", REGISTER, node(Checks=passing))
            ask("PUT", CREATE, {"Node": "n9", "TTL": "1h", **lists}, keep="S")
            ask("PUT", REGISTER, node(Check={"CheckID": ends, "Name": ends, "Status": "critical"}))
            ask("GET", "/v1/session/info/$S")
            ask("PUT", "/v1/session/destroy/$S")


def intentions(ask: Both) -> None:
    def body(**fields: Any) -> dict[str, Any]:
        return {"SourceName": "u1", "DestinationName": "ud", "Action": "deny", **fields}

    ask("POST", INTENTIONS, body(), keep="X")
    ask("POST", INTENTIONS, body(SourceName="u2", Action="allow"), keep="Y")
    for change in (
        {"SourceName": "u2"},
        {"SourceName": "U2"},
        {"DestinationName": "UD"},
        {"SourceName": "U1", "Description": "d"},
        {"SourceName": ""},
        {"SourceName": "u3", "DestinationName": "ud3", "ID": "adf4238a-882b-9ddc-4a9d-5b6758e4159e"},
        {"Action": "DENY"},
        {"Foo": 1},
    ):
        ask("PUT", f"{INTENTIONS}/$X", body(**change))
        ask("GET", INTENTIONS)
    for fields in (
        {"ID": "adf4238a-882b-9ddc-4a9d-5b6758e4159e"},
        {"Action": "ALLOW"},
        {"Action": ""},
        {"SourceName": "", "DestinationName": "", "Action": "x"},
        {"SourceName": "a*"},
        {"SourceType": "bogus"},
        {"SourceType": "", "SourceName": "t1"},
        {"SourceName": "t2", "Description": 512 * "x"},
        {"SourceName": "t3", "Description": 257 * "é"},
        {"SourceName": "t4", "Meta": {f"k{i}": "v" for i in range(64)}},
        {"SourceName": "t5", "Meta": {f"k{i}": "v" for i in range(65)}},
        {"SourceName": "t6", "Meta": {129 * "k": "v"}},
        {"SourceName": "t7", "Meta": {"k": 513 * "v"}},
        {"SourceName": "t8", "Meta": {"k": 5}},
        {"SourceName": "t9", "Precedence": 3},
        {"SourceName": "*"},
        {"DestinationName": "*"},
        {"SourceName": "*", "DestinationName": "*"},
        {"SourceName": "T9"},
        {"SourceName": "t9", "Foo": 1},
    ):
        ask("POST", INTENTIONS, body(**fields))
    for text in ("", "null", "[]", "{"):
        ask("POST", INTENTIONS, text)
    ask("GET", INTENTIONS)
    for query in (
        "match",
        "match?by=x",
        "match?by=destination&name=ud&name=UD&name=ud&name=zz",
        "match?by=source&name=T9",
        "match?by=destination&name=default/ud",
        "match?by=destination&name=a/b/c",
        "check?source=a",
        "check?source=t9&destination=UD",
        "check?source=T9&destination=UD",
        "check?source=a/b/c&destination=ud",
        "check?source=a&destination=b&source-type=x",
    ):
        ask("GET", f"{INTENTIONS}/{query}")
    for method in ("DELETE", "DELETE", "GET"):
        ask(method, f"{INTENTIONS}/$Y")


def random_keys(ask: Both, seed: int) -> None:
    """Writes of which each says by its answer whether it was done; locks are of two sessions and of none."""
    rng = random.Random(seed)
    ask("PUT", REGISTER, node())
    for name in ("S", "T"):
        ask("PUT", CREATE, {"Node": "n9", "NodeChecks": [], "LockDelay": 0}, keep=name)
    for _ in range(400):
        key = rng.choice(("a", "a/b", "a/c", "m", "x%20y"))
        method = rng.choice(("PUT", "PUT", "DELETE", "GET"))
        session = rng.choice(("$S", "$T", "", "x", "adf4238a-882b-9ddc-4a9d-5b6758e4159e"))
        values = {
            "cas": rng.choice(("0", "", "x", "-1", "18446744073709551616", "00")),
            "flags": rng.choice(("0", "1", "", "x", "-1", "18446744073709551615")),
            "acquire": session,
            "release": session,
            "separator": "/",
        }
        sets: dict[str, list[str]] = {
            "PUT": ["", "", "cas", "acquire", "release", "flags", "flags cas", "flags acquire", "cas acquire"],
            "DELETE": ["", "cas", "cas", "recurse", "recurse cas"],
            "GET": ["raw", "keys", "keys separator"],
        }
        chosen = rng.choice(sets[method]).split()
        query = "&".join(f"{name}={values[name]}" if name in values else name for name in chosen)
        ask(method, f"/v1/kv/{key}?{query}", rng.choice((b"v", b"w", b"")) if method == "PUT" else None)


def random_registrations(ask: Both, seed: int) -> None:
    """Names in random case, ids that move between names, checks and services that come and go, sessions that end."""
    rng, ask.compares_texts = random.Random(seed), False
    ids = ["adf4238a-882b-9ddc-4a9d-5b6758e4159e", "bdf4238a-882b-9ddc-4a9d-5b6758e4159e"]

    def case(text: str) -> str:
        return rng.choice((text, text.upper(), text.capitalize()))

    for _ in range(150):
        body: dict[str, Any] = {"Node": rng.choice(("n9", "m9")), "Address": rng.choice(("10.9.0.1", "10.9.0.2"))}
        what = rng.random()
        if what < 0.2:
            gone: dict[str, str] = rng.choice(({}, {"ServiceID": case("web-1")}, {"CheckID": case("c1")}))
            ask("PUT", DEREGISTER, {"Node": case(body["Node"]), **gone})
        elif what < 0.3:
            lists: dict[str, Any] = rng.choice(
                ({}, {"Checks": [case("c1")]}, {"NodeChecks": [case("c1")]}, {"NodeChecks": []})
            )
            ask("PUT", CREATE, {"Node": case(body["Node"]), **lists})
        else:
            body["ID"] = rng.choice(ids)
            if rng.random() < 0.5:
                name = rng.choice(("web", "Db"))
                body["Service"] = {"ID": case(name + "-1"), "Service": name, "Port": rng.choice((0, 80))}
            if rng.random() < 0.7:
                check = {"CheckID": rng.choice((case("c1"), "serfHealth")), "Name": "c"}
                check["Status"] = rng.choice(("passing", "passing", "warning", "critical", ""))
                body["Check"] = {**check, "ServiceID": rng.choice(("", case("web-1")))}
            ask("PUT", REGISTER, body)
        for name in ("n9", "m9"):
            for view in ("catalog/node", "catalog/node-services", "health/node", "session/node"):
                ask("GET", f"/v1/{view}/{case(name)}")
        for view in ("health/service/web?passing", "health/checks/db", "health/service/db", "catalog/services"):
            ask("GET", f"/v1/{view}")


@pytest.mark.parametrize(
    "story",
    [services_and_checks, refused_registrations, namespaces, sessions, ends_of_sessions, intentions],
    ids=lambda story: story.__name__,
)
async def test_our_answers_are_consuls(both: Any, story: Callable[[Both], None]) -> None:
    await both(story)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("story", [random_keys, random_registrations], ids=lambda story: story.__name__)
async def test_what_becomes_of_random_writes_is_what_consul_does(both: Any, story: Any, seed: int) -> None:
    await both(story, seed)
