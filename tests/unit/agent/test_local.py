from __future__ import annotations

import asyncio
import io
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rostra.agent import local as local_module
from rostra.agent.definition import Scripts, ScriptsDisabled
from rostra.agent.local import LocalAgent
from rostra.runtime import log
from rostra.wire.errors import BadRequest, Conflict, NotFound
from tests.support.waiting import eventually


@asynccontextmanager
async def agent(data_dir: Path | None = None, **options: Any) -> AsyncIterator[LocalAgent]:
    options = {"random": lambda: 0.0, "port_is_busy": lambda address, port: False, **options}
    local = LocalAgent(node="n", data_dir=data_dir, **options)
    await local.start()
    try:
        yield local
    finally:
        await local.stop()


@asynccontextmanager
async def listening() -> AsyncIterator[str]:
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()


def statuses(local: LocalAgent) -> dict[str, str]:
    return {i: c.row.status for i, c in local.checks.items()}


def output(local: LocalAgent, check_id: str) -> str:
    return local.checks[check_id].row.output


async def test_a_service_comes_with_its_checks_and_leaves_with_them() -> None:
    async with agent() as local:
        await local.register_service({"Name": "web", "ID": "w1", "Port": 80, "Check": {"TTL": "10s"}})
        assert local.services["w1"].row.node == "n"
        assert statuses(local) == {"service:w1": "critical"}
        await local.deregister_service("w1")
        assert not local.services
        assert not local.checks
        with pytest.raises(NotFound):
            await local.deregister_service("w1")


async def test_a_new_check_runs_at_once() -> None:
    async with agent() as local, listening() as address:
        await local.register_service({"Name": "web", "Check": {"TCP": address, "Interval": "1h"}})
        await eventually(lambda: statuses(local) == {"service:web": "passing"}, within_s=1.0)


async def test_a_service_that_listens_only_after_its_registration_is_seen_soon() -> None:
    async with agent() as local:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
            await local.register_service({"Name": "web", "Check": {"TCP": f"127.0.0.1:{port}", "Interval": "1h"}})
            await eventually(lambda: "refused" in output(local, "service:web"))
            reserved.listen()
            await eventually(lambda: statuses(local) == {"service:web": "passing"}, within_s=3.0)


async def test_a_check_that_turns_is_announced() -> None:
    async with agent() as local, listening() as address:
        seen: list[dict[str, str]] = []
        local.on_change(lambda: seen.append(statuses(local)))
        await local.register_service({"Name": "web", "Check": {"TCP": address, "Interval": "1h"}})
        await eventually(lambda: seen and seen[-1] == {"service:web": "passing"})


async def test_a_ttl_check_expires_and_tells_what_was_said_last() -> None:
    async with agent() as local:
        await local.register_check({"Name": "alive", "TTL": "50ms"})
        await local.set_ttl_status("alive", "passing", "good")
        assert statuses(local) == {"alive": "passing"}
        await eventually(lambda: statuses(local) == {"alive": "critical"})
        assert output(local, "alive") == "TTL expired (last output before timeout follows): good"


async def test_only_a_ttl_check_can_be_told_its_status() -> None:
    async with agent() as local:
        await local.register_check({"Name": "port", "TCP": "127.0.0.1:1", "Interval": "1h"})
        with pytest.raises(NotFound, match='CheckID "port" does not have associated TTL'):
            await local.set_ttl_status("port", "passing")


async def test_registering_again_keeps_the_status_and_does_not_run_an_equal_check_anew() -> None:
    async with agent() as local:
        definition = {"Name": "web", "Check": {"TTL": "1h"}}
        await local.register_service(definition)
        await local.set_ttl_status("service:web", "passing", "fine")
        running = local.checks["service:web"]
        await local.register_service(definition)
        assert local.checks["service:web"] is running
        await local.register_service({"Name": "web", "Tags": ["new"], "Check": {"TTL": "2h"}})
        check = local.checks["service:web"]
        assert check is not running
        assert (check.row.status, check.row.output, check.row.service_tags) == ("passing", "fine", ("new",))


async def test_checks_that_are_not_named_again_stay_unless_they_are_to_be_replaced() -> None:
    async with agent() as local:
        await local.register_service({"Name": "web", "Checks": [{"CheckID": "a", "TTL": "1h"}]})
        await local.service_maintenance("web", True)
        await local.register_service({"Name": "web", "Checks": [{"CheckID": "b", "TTL": "1h"}]})
        assert set(local.checks) == {"a", "b", "_service_maintenance:web"}
        await local.register_service(
            {"Name": "web", "Check": {"CheckID": "c", "TTL": "1h"}}, replace_existing_checks=True
        )
        assert set(local.checks) == {"c", "_service_maintenance:web"}


async def test_a_check_for_an_unknown_service_is_refused() -> None:
    async with agent() as local:
        with pytest.raises(NotFound, match='ServiceID "zz" does not exist'):
            await local.register_check({"Name": "a", "TTL": "1s", "ServiceID": "zz"})


async def test_scripts_run_only_where_they_are_allowed() -> None:
    definition = {"Name": "s", "Args": ["true"], "Interval": "1h"}
    async with agent() as local:
        with pytest.raises(ScriptsDisabled, match="Scripts are disabled on this agent from remote calls"):
            await local.register_check(definition)
    async with agent(scripts=Scripts(local=True)) as local:
        with pytest.raises(ScriptsDisabled):
            await local.register_check(definition)
        await local.register_check(definition, from_file=True)
        await eventually(lambda: statuses(local) == {"s": "passing"})
    async with agent(scripts=Scripts(remote=True)) as local:
        await local.register_check(definition)
        await eventually(lambda: statuses(local) == {"s": "passing"})


async def test_maintenance_is_a_critical_check_with_the_reason() -> None:
    async with agent() as local:
        await local.register_service({"Name": "web", "Tags": ["t"]})
        await local.service_maintenance("web", True, "broken")
        row = local.checks["_service_maintenance:web"].row
        assert (row.status, row.notes, row.service_name, row.service_tags) == ("critical", "broken", "web", ("t",))
        assert local.status_of("web") == "maintenance"
        await local.service_maintenance("web", False)
        await local.node_maintenance(True)
        assert "no reason was provided" in local.checks["_node_maintenance"].row.notes
        await local.node_maintenance(False)
        assert not local.checks
        with pytest.raises(NotFound, match='No service registered with ID "nope"'):
            await local.service_maintenance("nope", True)


async def test_output_alone_is_announced_at_once_and_then_not_before_the_interval() -> None:
    async with agent(check_update_interval_s=0.2) as local:
        await local.register_check({"Name": "a", "TTL": "1h", "Status": "passing"})
        calls: list[str] = []
        local.on_change(lambda: calls.append(output(local, "a")))
        await local.set_ttl_status("a", "passing", "one")
        await local.set_ttl_status("a", "passing", "two")
        await local.set_ttl_status("a", "passing", "three")
        assert calls == ["one"]
        assert local.deferred_outputs() == {"a"}
        await eventually(lambda: calls == ["one", "three"])
        assert not local.deferred_outputs()


async def test_a_new_status_is_announced_although_an_output_waits() -> None:
    async with agent() as local:
        await local.register_check({"Name": "a", "TTL": "1h", "Status": "passing"})
        await local.set_ttl_status("a", "passing", "one")
        await local.set_ttl_status("a", "passing", "two")
        calls: list[str] = []
        local.on_change(lambda: calls.append(output(local, "a")))
        await local.set_ttl_status("a", "warning", "three")
        assert calls == ["three"]
        assert not local.deferred_outputs()


async def test_an_alias_follows_its_service() -> None:
    async with agent() as local:
        await local.register_check({"Name": "mirror", "AliasService": "web"})
        assert output(local, "mirror") == "Service web could not be found on node n"
        await local.register_service({"Name": "web", "Check": {"TTL": "1h"}})
        assert output(local, "mirror") == "Aliased check \"Service 'web' check\" failing: "
        await local.set_ttl_status("service:web", "passing")
        assert statuses(local)["mirror"] == "passing"
        await local.deregister_service("web")
        assert statuses(local)["mirror"] == "critical"


async def test_two_aliases_of_each_other_come_to_rest() -> None:
    async with agent() as local:
        await local.register_service({"Name": "a", "Check": {"AliasService": "b"}})
        await local.register_service({"Name": "b", "Check": {"AliasService": "a"}})
        assert set(statuses(local).values()) == {"critical"}


async def test_a_service_that_is_critical_for_too_long_is_deregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent() as local:
        check = {"TTL": "1h", "DeregisterCriticalServiceAfter": "1s"}
        await local.register_service({"Name": "web", "Check": check})
        await local.reap_critical()
        assert "web" in local.services  # the least time is a minute
        since = local.checks["service:web"].critical_since
        assert since is not None
        local.checks["service:web"].critical_since = since - 61
        await local.reap_critical()
        assert not local.services


# -- sidecars ---------------------------------------------------------------------------------------------------------


def with_sidecar(name: str, **sidecar: Any) -> dict[str, Any]:
    return {"Name": name, "Port": 80, "Connect": {"SidecarService": sidecar}}


async def test_a_sidecar_gets_a_port_a_listener_check_and_an_alias() -> None:
    async with agent(bind_address="127.0.0.9") as local:
        await local.register_service(with_sidecar("web"))
        proxy = local.services["web-sidecar-proxy"]
        assert proxy.row.port == 21000
        assert proxy.sidecar_of == "web"
        listener = local.checks["service:web-sidecar-proxy:1"].spec
        alias = local.checks["service:web-sidecar-proxy:2"].spec
        assert listener is not None
        assert (listener.name, listener.tcp, listener.interval_s) == (
            "Connect Sidecar Listening",
            "127.0.0.9:21000",
            10.0,
        )
        assert alias is not None
        assert (alias.name, alias.alias_service) == ("Connect Sidecar Aliasing web", "web")


async def test_a_sidecar_leaves_with_its_service() -> None:
    async with agent() as local:
        await local.register_service(with_sidecar("web"))
        await local.deregister_service("web")
        assert not local.services
        assert not local.checks


async def test_ports_of_sidecars_skip_those_that_are_used_or_busy_and_are_kept() -> None:
    async with agent(port_is_busy=lambda address, port: port == 21001) as local:
        await local.register_service({"Name": "other", "Port": 21000})
        await local.register_service(with_sidecar("a"))
        await local.register_service(with_sidecar("b"))
        await local.register_service(with_sidecar("a"))
        ports = {i: s.row.port for i, s in local.services.items() if s.sidecar_of}
        assert ports == {"a-sidecar-proxy": 21002, "b-sidecar-proxy": 21003}


async def test_a_port_that_something_listens_on_is_busy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with agent(sidecar_ports=(port, port), port_is_busy=None) as local:
            with pytest.raises(Conflict, match="no free port for a sidecar"):
                await local.register_service(with_sidecar("web"))


# -- restarts ---------------------------------------------------------------------------------------------------------


async def test_everything_registered_survives_a_restart(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        web = with_sidecar("web", Checks=[{"TTL": "2h"}])
        await local.register_service({**web, "Meta": {"a": "b"}, "Token": "t", "Check": {"TTL": "1h"}})
        await local.register_check({"Name": "disk", "TTL": "1h"})
        await local.service_maintenance("web", True, "why")
        await local.set_ttl_status("service:web", "passing", "fine")
        before = {i: s.row for i, s in local.services.items()}, {i: c.row for i, c in local.checks.items()}
        specs = {i: c.spec for i, c in local.checks.items()}
    async with agent(tmp_path) as local:
        assert ({i: s.row for i, s in local.services.items()}, {i: c.row for i, c in local.checks.items()}) == before
        assert {i: c.spec for i, c in local.checks.items()} == specs
        assert local.services["web"].token == "t"
        assert local.services["web-sidecar-proxy"].sidecar_of == "web"


async def test_a_kept_check_of_a_type_that_is_unknown_here_is_critical_and_is_never_run_as_a_script(
    tmp_path: Path,
) -> None:
    ran = tmp_path / "ran"
    async with agent(tmp_path) as local:
        check = {"HTTP": "http://127.0.0.1:1", "Interval": "1h"}
        await local.register_service({"Name": "web", "Port": 80, "Check": check})
        await local.register_check({"Name": "alone", **check})
    newer = 0  # a newer version has left them, or somebody who writes to the data directory
    for file in tmp_path.glob("*/*.json"):
        text = file.read_text()
        if '"type":"http"' in text:
            text = text.replace('"type":"http"', '"type":"udp"').replace('"args":[]', f'"args":["touch","{ran}"]')
            file.write_text(text)
            newer += 1
    assert newer == 2
    async with agent(tmp_path, scripts=Scripts(False, False)) as local:
        assert len(local.checks) == 2
        await eventually(lambda: all("of type 'udp'" in c.row.output for c in local.checks.values()))
        assert {c.row.status for c in local.checks.values()} == {"critical"}
    assert not ran.exists()


async def test_a_sidecar_that_passed_has_time_to_listen_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_id = "service:web-sidecar-proxy:1"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        async with agent(tmp_path, sidecar_ports=(port, port)) as local:
            await local.register_service(with_sidecar("web"))
            await eventually(lambda: local.checks[check_id].row.status == "passing")
    monkeypatch.setattr(local_module, "SIDECAR_SETTLES_S", 1.0)
    began = time.monotonic()
    async with agent(tmp_path, sidecar_ports=(port, port)) as local:
        assert local.checks[check_id].row.status == "passing"
        await eventually(lambda: local.checks[check_id].row.status == "critical")
        assert time.monotonic() - began >= 1.0


async def test_what_was_deregistered_stays_away(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        await local.register_service({**with_sidecar("web"), "Checks": [{"TTL": "1h"}, {"CheckID": "x", "TTL": "1h"}]})
        await local.register_service({"Name": "gone"})
        await local.register_check({"Name": "disk", "TTL": "1h"})
        await local.deregister_check("disk")
        await local.deregister_check("x")
        await local.deregister_service("gone")
    async with agent(tmp_path) as local:
        assert set(local.services) == {"web", "web-sidecar-proxy"}
        assert set(local.checks) == {
            "service:web:1",
            "service:web-sidecar-proxy:1",
            "service:web-sidecar-proxy:2",
        }


async def test_a_ttl_that_ran_out_while_the_agent_was_away_is_critical(tmp_path: Path) -> None:
    now = 1000.0
    async with agent(tmp_path, wall=lambda: now) as local:
        await local.register_check({"Name": "alive", "TTL": "60s"})
        await local.set_ttl_status("alive", "passing", "good")
    now += 59
    async with agent(tmp_path, wall=lambda: now) as local:
        assert statuses(local) == {"alive": "passing"}
    now += 2
    async with agent(tmp_path, wall=lambda: now) as local:
        await eventually(lambda: statuses(local) == {"alive": "critical"})
        assert "good" in output(local, "alive")


async def test_a_sidecar_of_a_configuration_file_keeps_its_port(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        await local.register_service(with_sidecar("a"), from_file=True)
        await local.register_service(with_sidecar("b"), from_file=True)
    async with agent(tmp_path) as local:
        assert not local.services  # the files say what there is
        await local.register_service(with_sidecar("b"), from_file=True)
        assert local.services["b-sidecar-proxy"].row.port == 21001


async def test_files_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        await local.register_service({"Name": "web", "Check": {"TTL": "1h"}})
        await local.set_ttl_status("service:web", "passing")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 2
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}


async def test_a_damaged_file_is_left_alone_and_stops_nothing(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        await local.register_service({"Name": "web"})
    damaged = tmp_path / "services" / "x.json"
    damaged.write_text("{")
    (tmp_path / "services" / "y.json").write_text('{"service": {"id": "y"}}')
    async with agent(tmp_path) as local:
        assert set(local.services) == {"web"}
    assert damaged.read_text() == "{"


async def test_a_bad_definition_changes_nothing(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        with pytest.raises(BadRequest):
            await local.register_service({"Name": "web", "Check": {"HTTP": "http://x"}})
        assert not local.services
    assert not list(tmp_path.rglob("*.json"))


async def test_a_check_that_changes_its_status_is_one_line_without_its_output() -> None:
    told = io.StringIO()
    log.configure("info", stream=told)
    try:
        async with agent() as local:
            await local.register_service({"Name": "web", "Check": {"TTL": "1h"}})
            await local.set_ttl_status("service:web", "passing", "secret")
            await local.set_ttl_status("service:web", "passing", "another")
            await local.set_ttl_status("service:web", "critical", "secret")
    finally:
        log.configure("info")
    assert [line.split(" ", 1)[1] for line in told.getvalue().splitlines()] == [
        "[INFO]  agent.local: check changed: check=service:web service=web status=passing was=critical",
        "[WARN]  agent.local: check changed: check=service:web service=web status=critical was=passing",
    ]


async def test_a_registration_is_made_whole_though_its_client_goes_away(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        for i in range(5):
            registering = asyncio.ensure_future(local.register_service({"Name": f"s{i}", "Check": {"TTL": "1h"}}))
            await asyncio.sleep(0)
            registering.cancel()
        await eventually(lambda: len(local.services) == 5)
        assert len(local.checks) == 5
    async with agent(tmp_path) as local:
        assert len(local.services) == len(local.checks) == 5


async def test_changes_of_one_service_keep_their_order_and_many_of_different_ones_are_all_kept(tmp_path: Path) -> None:
    async def flap(local: LocalAgent, name: str) -> None:
        for port in range(1, 6):
            await local.register_service({"Name": name, "Port": port, "Check": {"TTL": "1h"}})
            if port < 5:
                await local.deregister_service(name)

    async with agent(tmp_path) as local:
        await asyncio.gather(*(flap(local, f"s{i}") for i in range(16)))
        assert not local._changing, "the locks of what nobody changes are gone"
    async with agent(tmp_path) as local:
        assert {s.row.port for s in local.services.values()} == {5}
        assert len(local.services) == len(local.checks) == 16


async def test_sidecars_that_are_registered_at_once_get_different_ports(tmp_path: Path) -> None:
    async with agent(tmp_path, sidecar_ports=(21000, 21007)) as local:
        connect: dict[str, Any] = {"SidecarService": {}}
        await asyncio.gather(*(local.register_service({"Name": f"s{i}", "Connect": connect}) for i in range(8)))
        ports = [s.row.port for s in local.services.values() if s.sidecar_of]
        assert sorted(ports) == list(range(21000, 21008))


async def test_a_service_whose_checks_are_replaced_is_never_seen_without_one(tmp_path: Path) -> None:
    async with agent(tmp_path) as local:
        await local.register_service({"Name": "web", "Checks": [{"CheckID": "a", "TTL": "1h"}]})
        seen: set[frozenset[str]] = set()
        replacing = asyncio.ensure_future(
            local.register_service(
                {"Name": "web", "Checks": [{"CheckID": "b", "TTL": "1h"}]}, replace_existing_checks=True
            )
        )
        while not replacing.done():
            seen.add(frozenset(local.checks))
            await asyncio.sleep(0)
        assert seen | {frozenset(local.checks)} <= {frozenset({"a"}), frozenset({"b"})}
