"""`rostra services`: definitions from flags and files, in the API's spelling."""

from pathlib import Path
from typing import Any

import pytest

HCL = """service { name = "web" id = "web-1" port = 80 tags = ["x"] meta { a_b = "c" }
  check { http = "http://127.0.0.1/" interval = "10s" tls_skip_verify = true header { X_y = ["1"] } }
  tagged_addresses { lan { address = "10.0.0.1" port = 3 } }
  connect { sidecar_service { proxy {
    upstreams = [{ destination_name = "db" local_bind_port = 9 }]
    config { m_x = 1 }
  } } }
}
services = [{ name = "api" }]
"""


@pytest.fixture(autouse=True)
def register(agent: Any) -> None:
    agent.on("PUT", "/v1/agent/service/register", b"")


def test_register_from_flags(rostra_cli: Any, agent: Any) -> None:
    done = rostra_cli(
        *["services", "register", "-name=web", "-id=w1", "-port=80", "-tag=b", "-tag=a", "-meta=k=v=w"],
        *["-address=10.0.0.1", "-tagged-address=lan=10.0.0.1:81"],
    )
    assert done == (0, "Registered service: web\n", "")
    assert agent.asked[-1].json() == {
        "Name": "web", "ID": "w1", "Port": 80, "Tags": ["b", "a"], "Meta": {"k": "v=w"}, "Address": "10.0.0.1",
        "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 81}},
    }  # fmt: skip


def test_register_from_a_file_keeps_what_the_user_named(rostra_cli: Any, agent: Any, tmp_path: Path) -> None:
    (tmp_path / "web.hcl").write_text(HCL)
    assert rostra_cli("services", "register", f"{tmp_path}/web.hcl").out == (
        "Registered service: web\nRegistered service: api\n"
    )
    assert agent.asked[0].json() == {
        "Name": "web", "ID": "web-1", "Port": 80, "Tags": ["x"], "Meta": {"a_b": "c"},
        "Check": {"HTTP": "http://127.0.0.1/", "Interval": "10s", "TLSSkipVerify": True, "Header": {"X_y": ["1"]}},
        "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 3}},
        "Connect": {"SidecarService": {"Proxy": {
            "Upstreams": [{"DestinationName": "db", "LocalBindPort": 9}], "Config": {"m_x": 1},
        }}},
    }  # fmt: skip


def test_deregister_by_id_or_file(rostra_cli: Any, agent: Any, tmp_path: Path) -> None:
    (tmp_path / "web.hcl").write_text(HCL)
    for path in ("a/b", "web-1", "api"):
        agent.on("GET", f"/v1/agent/service/{path}", {"ID": path})
        agent.on("PUT", f"/v1/agent/service/deregister/{path}", b"")
    assert rostra_cli("services", "deregister", "-id=a/b").out == "Deregistered service: a/b\n"
    assert agent.asked[-1].target == "/v1/agent/service/deregister/a%2Fb"
    assert rostra_cli("services", "deregister", f"{tmp_path}/web.hcl").out == (
        "Deregistered service: web-1\nDeregistered service: api\n"
    )


def test_a_wrong_file_is_told_with_its_places_and_nothing_is_registered(
    rostra_cli: Any, agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").write_text('{"service": {"name": "good"}}')
    (tmp_path / "bad.hcl").write_text('service { port = 80 }\nservice { name = "x" check { ttl = "10y" } }')
    (tmp_path / "none.hcl").write_text("")
    done = rostra_cli("services", "register", "good.json", "bad.hcl", "none.hcl", "gone.hcl")
    assert done.status == 1
    assert done.err.splitlines() == [
        "bad.hcl:1:1: service[0]: a service definition needs a name",
        'bad.hcl:2:30: service[1].check.ttl: invalid duration "10y": write it like "30s", "5m" or "1h30m"',
        "none.hcl: no service definition in it",
        "gone.hcl: no such file",
    ]
    assert agent.asked == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("register", "Service registration requires at least one argument or flags."),
        ("register -port=80", "Service registration requires -name."),
        ("register -name=x f.hcl", "Service registration requires arguments or flags, not both."),
        ("deregister", "Service deregistration requires at least one argument or -id."),
        ("deregister -id=x f.hcl", "Service deregistration requires arguments or -id, not both."),
        ("register -name=x -tagged-address=lan=a:b", "-tagged-address: 'a:b' must be address or address:port"),
    ],
)
def test_incomplete_commands_are_one_line(rostra_cli: Any, words: Any, message: str) -> None:
    assert rostra_cli("services", *words.split()) == (1, "", f"{message}\n")


def test_the_agents_refusal_names_the_service(rostra_cli: Any, agent: Any) -> None:
    agent.on("PUT", "/v1/agent/service/register", b"Invalid service address", 400)
    assert rostra_cli("services", "register", "-name=x").err == (
        "Error registering service 'x': Unexpected response code: 400 (Invalid service address)\n"
    )


def test_deregistering_what_is_not_there_is_an_error(rostra_cli: Any, agent: Any) -> None:
    done = rostra_cli("services", "deregister", "-id=nosuch")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error deregistering service 'nosuch': this agent has no service with that ID")
    assert [asked.method for asked in agent.asked] == ["GET"]


def test_a_directory_or_a_missing_file_is_called_so(rostra_cli: Any, agent: Any, tmp_path: Path) -> None:
    for verb in ("register", "deregister"):
        assert rostra_cli("services", verb, str(tmp_path)).err == (
            f"{tmp_path}: a directory; name its files, such as {tmp_path}/*.hcl\n"
        )
        assert rostra_cli("services", verb, "nosuch").err == "nosuch: no such file\n"


@pytest.mark.parametrize("words", ["services register -name=x", "intention create a b", "connect ca get-config"])
def test_the_datacenter_is_passed_on_by_every_command_that_has_it_in_consul(
    words: str, rostra_cli: Any, agent: Any
) -> None:
    first, *rest = words.split()
    group = [first, rest.pop(0)] if first != "connect" else [first, rest.pop(0), rest.pop(0)]
    rostra_cli(*group, "-datacenter=dc9", *rest)
    assert agent.asked[0].query["dc"] == "dc9"
