"""py-consul, a client that knows nothing of Rostra, against a dev agent: keys, sessions, services, intentions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import consul
import pytest

from tests.support.processes import Agent, EchoServer, HealthPage, Processes, Timed, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    return module_processes.dev("client-node", "-enable-script-checks", '-hcl=session_ttl_min = "1s"')


@pytest.fixture
def client(agent: Agent) -> Iterator[Any]:
    with consul.Consul(host=agent.host, port=agent.ports.http) as found:
        yield found


class Later(threading.Thread):
    """A call on a thread of its own; `result` waits for it."""

    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self._work, self._found = work, None
        self._error: Exception | None = None
        self.started_at = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            self._found = self._work()
        except Exception as e:
            self._error = e
        self.took_s = time.monotonic() - self.started_at

    def result(self, within_s: float) -> Any:
        self.join(within_s)
        assert not self.is_alive(), f"no answer within {within_s} s"
        if self._error is not None:
            raise self._error
        return self._found


def another(agent: Agent) -> Any:
    return consul.Consul(host=agent.host, port=agent.ports.http)


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_put_read_listed_and_deleted(client: Any) -> None:
    assert client.kv.put("py/a", "one", flags=7)
    assert client.kv.put("py/dir/b", b"\x00\xff")
    _, row = client.kv.get("py/a")
    assert (row["Value"], row["Flags"], row["LockIndex"]) == (b"one", 7, 0)
    _, rows = client.kv.get("py/", recurse=True)
    assert [(r["Key"], r["Value"]) for r in rows] == [("py/a", b"one"), ("py/dir/b", b"\x00\xff")]
    assert client.kv.get("py/", keys=True)[1] == ["py/a", "py/dir/b"]
    assert client.kv.get("py/", keys=True, separator="/")[1] == ["py/a", "py/dir/"]
    assert client.kv.delete("py/", recurse=True)
    assert client.kv.get("py/a")[1] is None


def test_a_blocking_read_answers_when_its_key_changes_and_not_for_others(client: Any, agent: Agent) -> None:
    client.kv.put("watched/a", "1")
    index, _ = client.kv.get("watched/a")
    waiting = Later(lambda: another(agent).kv.get("watched/a", index=index, wait="20s"))
    client.kv.put("unwatched", "x")
    waiting.join(0.3)
    assert waiting.is_alive(), "an unrelated write woke it"
    client.kv.put("watched/a", "2")
    later, row = waiting.result(3)
    assert row["Value"] == b"2"
    assert int(later) > int(index)


def test_a_blocking_read_waits_for_a_key_that_is_not_there_yet(client: Any, agent: Agent) -> None:
    index, row = client.kv.get("not/yet")
    assert row is None
    waiting = Later(lambda: another(agent).kv.get("not/yet", index=index, wait="20s"))
    waiting.join(0.2)
    assert waiting.is_alive()
    client.kv.put("not/yet", "now")
    assert waiting.result(3)[1]["Value"] == b"now"


def test_a_blocking_read_of_a_prefix_sees_deletions(client: Any, agent: Agent) -> None:
    client.kv.put("tree/a", "1")
    client.kv.put("tree/b", "1")
    index, _ = client.kv.get("tree/", recurse=True)
    waiting = Later(lambda: another(agent).kv.get("tree/", recurse=True, index=index, wait="20s"))
    client.kv.delete("tree/b")
    assert [r["Key"] for r in waiting.result(3)[1]] == ["tree/a"]


def test_a_wait_that_runs_out_answers_with_the_same_index(client: Any) -> None:
    client.kv.put("quiet", "1")
    index, _ = client.kv.get("quiet")
    with Timed() as took:
        later, row = client.kv.get("quiet", index=index, wait="1s")
    assert (later, row["Value"]) == (index, b"1")
    assert took.s > 0.9


def test_check_and_set_writes_only_over_the_version_that_was_read(client: Any) -> None:
    assert client.kv.put("cas", "first", cas=0)
    assert not client.kv.put("cas", "second", cas=0)
    _, row = client.kv.get("cas")
    assert client.kv.put("cas", "second", cas=row["ModifyIndex"])
    assert not client.kv.put("cas", "third", cas=row["ModifyIndex"])
    assert client.kv.get("cas")[1]["Value"] == b"second"
    assert not client.kv.delete("cas", cas=row["ModifyIndex"])
    assert client.kv.delete("cas", cas=client.kv.get("cas")[1]["ModifyIndex"])


@pytest.mark.parametrize("consistency", ["default", "consistent", "stale"])
def test_all_consistency_modes_read_what_was_written(client: Any, consistency: str) -> None:
    client.kv.put("modes", consistency)
    if consistency == "stale":
        eventually("stale sees it", lambda: client.kv.get("modes", consistency="stale")[1]["Value"] == b"stale", 2)
    else:
        assert client.kv.get("modes", consistency=consistency)[1]["Value"] == consistency.encode()


# -- sessions and locks ----------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_session_until_it_is_released(client: Any) -> None:
    mine, theirs = client.session.create(name="mine", lock_delay=0), client.session.create(lock_delay=0)
    assert client.kv.put("lock", "me", acquire=mine)
    assert not client.kv.put("lock", "them", acquire=theirs)
    _, row = client.kv.get("lock")
    assert (row["Session"], row["LockIndex"], row["Value"]) == (mine, 1, b"me")
    assert not client.kv.put("lock", "", release=theirs)
    assert client.kv.put("lock", "me", acquire=mine)  # again, by its holder
    assert client.kv.get("lock")[1]["LockIndex"] == 1
    assert client.kv.put("lock", "", release=mine)
    assert "Session" not in client.kv.get("lock")[1]
    assert client.kv.put("lock", "them", acquire=theirs)
    assert client.kv.get("lock")[1]["LockIndex"] == 2
    assert client.session.destroy(mine)
    assert client.session.destroy(theirs)


def test_destroying_a_session_wakes_who_waits_for_its_lock(client: Any, agent: Agent) -> None:
    session = client.session.create(lock_delay=0)
    assert client.kv.put("woken", "held", acquire=session)
    index, _ = client.kv.get("woken")
    waiting = Later(lambda: another(agent).kv.get("woken", index=index, wait="20s"))
    assert client.session.destroy(session)
    assert "Session" not in waiting.result(3)[1]
    assert client.session.info(session)[1] is None


def test_a_session_that_deletes_takes_its_keys_along(client: Any) -> None:
    session = client.session.create(lock_delay=0, behavior="delete")
    assert client.kv.put("ephemeral", "x", acquire=session)
    client.session.destroy(session)
    assert client.kv.get("ephemeral")[1] is None


def test_lock_delay_holds_the_lock_after_its_session_was_destroyed(client: Any) -> None:
    session = client.session.create(lock_delay=1)
    assert client.kv.put("delayed", "x", acquire=session)
    client.session.destroy(session)
    other = client.session.create(lock_delay=0)
    assert not client.kv.put("delayed", "y", acquire=other)
    eventually("the delay is over", lambda: client.kv.put("delayed", "y", acquire=other), 4)
    client.session.destroy(other)


def test_a_session_with_a_ttl_lives_while_it_is_renewed_and_is_listed(client: Any) -> None:
    session = client.session.create(name="with ttl", ttl=10, lock_delay=0)
    shown = client.session.renew(session)
    assert (shown["ID"], shown["TTL"], shown["Name"]) == (session, "10s", "with ttl")
    _, info = client.session.info(session)
    assert (info["Node"], info["Behavior"], info["LockDelay"]) == ("client-node", "release", 0)
    assert session in [s["ID"] for s in client.session.list()[1]]
    assert session in [s["ID"] for s in client.session.node("client-node")[1]]
    client.session.destroy(session)
    with pytest.raises(consul.NotFound):
        client.session.renew(session)


def test_a_session_that_is_not_renewed_ends_and_gives_its_lock_back(client: Any, agent: Agent) -> None:
    # py-consul lets nobody ask for less than 10 s; this agent's session_ttl_min is 1 s.
    session = agent.api.put("/v1/session/create", {"TTL": "2s", "LockDelay": "0s"}).json()["ID"]
    assert client.kv.put("expiring", "x", acquire=session)
    with Timed() as took:
        client.session.renew(session)
        index, _ = client.kv.get("expiring")
        _, row = client.kv.get("expiring", index=index, wait="30s")
    assert "Session" not in row
    assert took.s >= 2.0  # never early
    assert client.session.info(session)[1] is None


# -- services and checks ---------------------------------------------------------------------------------------------


def _passing(client: Any, name: str) -> list[str]:
    return [row["Service"]["ID"] for row in client.health.service(name, passing=True)[1]]


def _status(client: Any, name: str, check_id: str) -> str:
    rows = client.health.checks(name)[1]
    return next((row["Status"] for row in rows if row["CheckID"] == check_id), "")


def test_a_service_with_a_ttl_check_passes_when_it_says_so(client: Any) -> None:
    client.agent.service.register("ttl", service_id="ttl-1", port=80, tags=["a"], check=consul.Check.ttl("10m"))
    eventually("registered", lambda: _status(client, "ttl", "service:ttl-1") == "critical", 3)
    assert _passing(client, "ttl") == []
    client.agent.check.ttl_pass("service:ttl-1", "all well")
    eventually("passing", lambda: _passing(client, "ttl") == ["ttl-1"], 3)
    client.agent.check.ttl_warn("service:ttl-1", "hm")
    eventually("warning", lambda: _status(client, "ttl", "service:ttl-1") == "warning", 3)
    client.agent.check.ttl_fail("service:ttl-1", "broken")
    eventually("critical", lambda: _status(client, "ttl", "service:ttl-1") == "critical", 3)
    assert client.health.checks("ttl")[1][0]["Output"] == "broken"
    client.agent.service.deregister("ttl-1")
    eventually("gone", lambda: "ttl" not in client.catalog.services()[1], 3)


def test_a_ttl_that_is_not_renewed_turns_critical(client: Any) -> None:
    client.agent.service.register("lapsing", check=consul.Check.ttl("1s"))
    client.agent.check.ttl_pass("service:lapsing")
    eventually("passing", lambda: _passing(client, "lapsing") == ["lapsing"], 1)
    eventually("critical", lambda: _status(client, "lapsing", "service:lapsing") == "critical", 4)
    client.agent.service.deregister("lapsing")


def test_an_http_check_follows_the_page(client: Any, agent: Agent) -> None:
    page = HealthPage(agent.host)
    try:
        client.agent.service.register("page", port=page.port, check=consul.Check.http(page.url, "1s", timeout="1s"))
        eventually("passing", lambda: _passing(client, "page") == ["page"], 5)
        page.status = 429
        eventually("warning", lambda: _status(client, "page", "service:page") == "warning", 5)
        page.status = 500
        eventually("critical", lambda: _status(client, "page", "service:page") == "critical", 5)
        assert "HTTP GET" in client.health.checks("page")[1][0]["Output"]
        page.status = 200
        eventually("passing again", lambda: _passing(client, "page") == ["page"], 5)
    finally:
        client.agent.service.deregister("page")
        page.close()


def test_a_tcp_check_follows_the_port(client: Any, agent: Agent) -> None:
    echo = EchoServer(agent.host)
    client.agent.service.register("port", port=echo.port, check=consul.Check.tcp(agent.host, echo.port, "1s"))
    eventually("passing", lambda: _passing(client, "port") == ["port"], 5)
    echo.close()
    eventually("critical", lambda: _status(client, "port", "service:port") == "critical", 5)
    client.agent.service.deregister("port")


def test_a_script_check_follows_the_exit_status(client: Any, tmp_path: Any) -> None:
    status = tmp_path / "status"
    status.write_text("1")
    check = consul.Check.script(["sh", "-c", f"echo said; exit $(cat {status})"], "1s")
    client.agent.service.register("script", check=check)
    eventually("warning", lambda: _status(client, "script", "service:script") == "warning", 5)
    status.write_text("2")
    eventually("critical", lambda: _status(client, "script", "service:script") == "critical", 5)
    assert client.health.checks("script")[1][0]["Output"].startswith("said")
    client.agent.service.deregister("script")


def test_the_catalog_shows_what_is_registered(client: Any, agent: Agent) -> None:
    client.agent.service.register("shown", service_id="shown-1", port=80, tags=["a", "b"], meta={"m": "1"})
    eventually("in the catalog", lambda: client.catalog.services()[1].get("shown") == ["a", "b"], 3)
    [row] = client.catalog.service("shown")[1]
    assert (row["Node"], row["Address"], row["ServicePort"]) == ("client-node", agent.host, 80)
    assert (row["ServiceTags"], row["ServiceMeta"]) == (["a", "b"], {"m": "1"})
    assert [n["Node"] for n in client.catalog.nodes()[1]] == ["client-node"]
    assert "shown-1" in client.catalog.node("client-node")[1]["Services"]
    assert client.catalog.datacenters() == ["dc1"]
    assert client.agent.services()["shown-1"]["Port"] == 80
    client.agent.service.deregister("shown-1")


def test_a_node_of_someone_elses_is_registered_and_deregistered(client: Any) -> None:
    service = {"Service": "external", "ID": "ext", "Port": 443}
    assert client.catalog.register("elsewhere", "10.9.8.7", service=service)
    assert [r["Address"] for r in client.catalog.service("external")[1]] == ["10.9.8.7"]
    assert client.catalog.deregister("elsewhere")
    assert client.catalog.service("external")[1] == []


def test_a_watch_on_healthy_instances_sees_them_come_and_go(client: Any, agent: Agent) -> None:
    index, rows = client.health.service("coming", passing=True)
    assert rows == []
    waiting = Later(lambda: another(agent).health.service("coming", passing=True, index=index, wait="20s"))
    client.agent.service.register("coming", port=1)
    index, rows = waiting.result(5)
    assert [r["Service"]["ID"] for r in rows] == ["coming"]
    waiting = Later(lambda: another(agent).health.service("coming", passing=True, index=index, wait="20s"))
    client.agent.service.deregister("coming")
    assert waiting.result(5)[1] == []


def test_a_service_that_the_catalog_lost_comes_back(client: Any) -> None:
    client.agent.service.register("lost", service_id="lost-1", port=80, check=consul.Check.ttl("10m"))
    client.agent.check.ttl_pass("service:lost-1")
    eventually("passing", lambda: _passing(client, "lost") == ["lost-1"], 3)
    before = client.catalog.service("lost")[1][0]["CreateIndex"]
    assert client.catalog.deregister("client-node", service_id="lost-1")
    eventually("it is back", lambda: _passing(client, "lost") == ["lost-1"], 10)
    assert client.catalog.service("lost")[1][0]["CreateIndex"] > before
    client.agent.service.deregister("lost-1")


def test_maintenance_takes_a_service_and_a_node_out_and_back(client: Any) -> None:
    client.agent.service.register("mended", port=80)
    eventually("passing", lambda: _passing(client, "mended") == ["mended"], 3)
    client.agent.service.maintenance("mended", "true", "oil")
    eventually("out", lambda: _passing(client, "mended") == [], 3)
    notes = [c["Notes"] for c in client.health.checks("mended")[1]]
    assert notes == ["oil"]
    client.agent.service.maintenance("mended", "false")
    eventually("back", lambda: _passing(client, "mended") == ["mended"], 3)
    client.agent.maintenance("true", "rack")
    eventually("out", lambda: _passing(client, "mended") == [], 3)
    client.agent.maintenance("false")
    eventually("back", lambda: _passing(client, "mended") == ["mended"], 3)
    client.agent.service.deregister("mended")


# -- agent, status, mesh ---------------------------------------------------------------------------------------------


def test_the_agent_tells_about_itself_and_its_cluster(client: Any, agent: Agent) -> None:
    shown = client.agent.self()
    assert (shown["Config"]["NodeName"], shown["Config"]["Server"]) == ("client-node", True)
    assert [m["Name"] for m in client.agent.members()] == ["client-node"]
    assert client.status.leader() == f"{agent.host}:{agent.ports.server}"
    assert client.status.peers() == [f"{agent.host}:{agent.ports.server}"]
    assert client.agent.metrics()["Gauges"]
    assert "# TYPE" in client.agent.metrics(format_prometheus=True)
    assert client.health.state("passing")[1]


def test_intentions_and_certificates_by_their_client(client: Any) -> None:
    assert client.connect.intentions.upsert("py-web", "py-db", action="deny", description="no")
    assert client.connect.intentions.read("py-web", "py-db")["Action"] == "deny"
    assert client.connect.intentions.check("py-web", "py-db") is False
    assert client.connect.intentions.upsert("py-web", "py-db", action="allow")
    assert client.connect.intentions.check("py-web", "py-db") is True
    assert client.connect.intentions.upsert("*", "py-db", action="deny")
    assert client.connect.intentions.check("other", "py-db") is False
    found = client.connect.intentions.match("destination", "py-db")["py-db"]
    assert [(i["SourceName"], i["Precedence"]) for i in found] == [("py-web", 9), ("*", 8)]
    assert len(client.connect.intentions.list()) == 2
    assert client.connect.intentions.delete("py-web", "py-db")
    assert client.connect.intentions.delete("*", "py-db")
    assert client.connect.intentions.check("py-web", "py-db") is True
    roots = client.connect.ca.roots()
    assert roots["ActiveRootID"] == next(r["ID"] for r in roots["Roots"] if r["Active"])
    leaf = client.agent.connect.ca.leaf("py-web")
    assert leaf["ServiceURI"] == f"spiffe://{roots['TrustDomain']}/ns/default/dc/dc1/svc/py-web"
    assert leaf["CertPEM"].startswith("-----BEGIN CERTIFICATE-----")
