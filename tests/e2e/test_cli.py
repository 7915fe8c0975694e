"""The command line against a dev agent: every noun of ours, and Consul's own program where it is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import REPO, Agent, Done, Processes, eventually, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    return module_processes.dev("cli-node")


# -- ours ------------------------------------------------------------------------------------------------------------


def test_members_lists_the_node_as_alive(agent: Agent) -> None:
    head, row = agent.said("members").splitlines()
    assert head.split()[:4] == ["Node", "Address", "Status", "Type"]
    assert row.split()[:4] == ["cli-node", f"{agent.host}:{agent.ports.serf}", "alive", "server"]
    assert agent.rostra("members", "-status=failed").status == 2


def test_catalog_lists_datacenters_nodes_and_services(agent: Agent) -> None:
    assert agent.said("catalog", "datacenters").split() == ["dc1"]
    assert re.search(rf"^cli-node\s+[0-9a-f]{{8}}\s+{agent.host}\s+dc1$", agent.said("catalog", "nodes"), re.MULTILINE)
    assert "consul" in agent.said("catalog", "services").split()
    assert "cli-node" in agent.said("catalog", "nodes", "-service=consul")


def test_kv_is_put_read_listed_and_deleted(agent: Agent) -> None:
    assert agent.said("kv", "put", "cli/a", "one") == "Success! Data written to: cli/a\n"
    assert agent.said("kv", "put", "cli/b", "-", stdin=b"from stdin") == "Success! Data written to: cli/b\n"
    assert agent.said("kv", "get", "cli/a") == "one\n"
    assert agent.said("kv", "get", "-recurse", "cli/") == "cli/a:one\ncli/b:from stdin\n"
    assert agent.said("kv", "get", "-keys", "cli/").split() == ["cli/a", "cli/b"]
    assert re.search(r"ModifyIndex\s+\d+", agent.said("kv", "get", "-detailed", "cli/a"))
    index = agent.api.get("/v1/kv/cli/a").json()[0]["ModifyIndex"]
    failed = agent.rostra("kv", "put", "-cas", f"-modify-index={index - 1}", "cli/a", "two")
    assert (failed.status, failed.err) == (1, "Error! Did not write to cli/a: CAS failed\n")
    assert agent.rostra("kv", "put", "-cas", f"-modify-index={index}", "cli/a", "two").status == 0
    exported = agent.said("kv", "export", "cli/")
    assert [row["key"] for row in json.loads(exported)] == ["cli/a", "cli/b"]
    assert agent.said("kv", "delete", "-recurse", "cli/") == "Success! Deleted keys with prefix: cli/\n"
    missing = agent.rostra("kv", "get", "cli/a")
    assert (missing.status, missing.err) == (1, "Error! No key exists at: cli/a\n")
    agent.said("kv", "import", "-", stdin=exported.encode())
    assert agent.said("kv", "get", "cli/b") == "from stdin\n"
    assert agent.said("kv", "delete", "cli/b") == "Success! Deleted key: cli/b\n"


def test_services_are_registered_from_flags_and_files(agent: Agent, tmp_path: Path) -> None:
    said = agent.said("services", "register", "-name=flagged", "-port=81", "-tag=x", "-meta=a=b")
    assert said == "Registered service: flagged\n"
    file = tmp_path / "two.hcl"
    file.write_text('services { name = "one" port = 1 }\nservices { name = "two" id = "two-1" tags = ["t"] }\n')
    assert agent.said("services", "register", str(file)).splitlines() == [
        "Registered service: one",
        "Registered service: two",
    ]
    eventually("they are in the catalog", lambda: agent.api.passing("two") == ["two-1"], 5)
    assert re.search(r"^two\s+t$", agent.said("catalog", "services", "-tags"), re.MULTILINE)
    row = agent.api.get("/v1/agent/service/flagged").json()
    assert (row["Port"], row["Tags"], row["Meta"]) == (81, ["x"], {"a": "b"})
    assert agent.said("services", "deregister", "-id=flagged") == "Deregistered service: flagged\n"
    assert "two-1" in agent.said("services", "deregister", str(file))
    eventually("they are gone", lambda: {"one", "two"}.isdisjoint(agent.said("catalog", "services").split()), 5)


def test_intentions_are_created_checked_listed_and_deleted(agent: Agent) -> None:
    assert agent.said("intention", "create", "-deny", "cli-web", "cli-db") == "Created: cli-web => cli-db (deny)\n"
    again = agent.rostra("intention", "create", "-allow", "cli-web", "cli-db")
    assert again.status == 1
    assert again.err.startswith('Error creating intention "cli-web => cli-db (allow)": there is one already')
    checked = agent.rostra("intention", "check", "cli-web", "cli-db")
    assert (checked.status, checked.out) == (1, "Denied\n")
    agent.said("intention", "create", "-replace", "-allow", "cli-web", "cli-db")
    assert agent.said("intention", "check", "cli-web", "cli-db") == "Allowed\n"
    assert re.search(r"cli-web\s+allow\s+cli-db", agent.said("intention", "list"))
    assert agent.said("intention", "match", "cli-db") == "cli-web => cli-db (allow)\n"
    assert re.search(r"^Action:\s+allow$", agent.said("intention", "get", "cli-web", "cli-db"), re.MULTILINE)
    assert agent.said("intention", "delete", "cli-web", "cli-db") == "Intention deleted.\n"
    assert agent.rostra("intention", "get", "cli-web", "cli-db").status == 1


def test_connect_shows_the_cas_configuration(agent: Agent) -> None:
    assert json.loads(agent.said("connect", "ca", "get-config"))["Provider"] == "consul"


def test_info_shows_figures_for_operators(agent: Agent) -> None:
    said = agent.said("info")
    assert re.search(r"^raft:$", said, re.MULTILINE)
    assert re.search(r"^\tserver = true$", said, re.MULTILINE)


def test_keygen_prints_32_random_bytes_that_an_agent_takes(processes: Processes) -> None:
    first, second = processes.rostra("keygen").out.strip(), processes.rostra("keygen").out.strip()
    assert len(first) == 44
    assert first != second
    assert processes.dev("keyed", f"-encrypt={first}").answers()


def test_version_names_the_program(agent: Agent) -> None:
    assert agent.said("version").startswith("Rostra v")
    assert agent.said("-version") == agent.said("version")


def test_validate_accepts_a_directory(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_text('ports { dns = 53, http = 8500 }\nserver = true\ndata_dir = "/tmp/x"\n')
    assert agent.said("validate", str(tmp_path)).splitlines()[-1] == "Configuration is valid!"


def test_an_agent_that_does_not_answer_is_one_line(agent: Agent) -> None:
    done = agent.rostra("members", f"-http-addr={agent.host}:1")
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    assert f"{agent.host}:1" in done.err


@pytest.mark.parametrize("words", [["memebrs"], ["kv", "gett", "x"], ["kv", "get", "-recruse", "x"], ["kv", "get"]])
def test_a_mistyped_command_is_one_line(agent: Agent, words: list[str]) -> None:
    done = agent.rostra(*words)
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


# -- Consul's --------------------------------------------------------------------------------------------------------

Consul = Callable[..., Done]


@pytest.fixture(scope="module")
def consul(agent: Agent) -> Consul:
    """The real consul 1.8.7, told by CONSUL_HTTP_ADDR to speak to our agent."""
    shared = os.environ.get("ROSTRA_SHARED", "")
    program = REPO / ".peers/usr/bin/consul"
    if not shared:
        pytest.skip("ROSTRA_SHARED names no directory with the real consul")
    unpack = Path(shared) / "peers/unpack.sh"
    if not unpack.exists():
        pytest.skip(f"{unpack} is not there")
    if not program.exists():
        subprocess.run(["sh", str(unpack), str(REPO / ".peers")], check=True, capture_output=True, timeout=60)

    def call(*words: str, stdin: bytes = b"") -> Done:
        return run([program, *words], env={**agent.env, "CONSUL_HTTP_ADDR": agent.api.address}, stdin=stdin)

    return call


def _said(done: Done) -> str:
    assert done.status == 0, done.err
    return done.out


def test_the_real_consul_lists_members(consul: Consul, agent: Agent) -> None:
    head, row = _said(consul("members")).splitlines()
    assert head.split() == ["Node", "Address", "Status", "Type", "Build", "Protocol", "DC", "Segment"]
    assert row.split()[:4] == ["cli-node", f"{agent.host}:{agent.ports.serf}", "alive", "server"]
    assert _said(consul("members")).split() == agent.said("members").split()


def test_the_real_consul_lists_the_catalog_as_ours_does(consul: Consul, agent: Agent) -> None:
    assert _said(consul("catalog", "nodes")).split() == agent.said("catalog", "nodes").split()
    assert _said(consul("catalog", "nodes", "-detailed")).split() == agent.said("catalog", "nodes", "-detailed").split()
    assert _said(consul("catalog", "services")).split() == agent.said("catalog", "services").split()
    assert _said(consul("catalog", "services", "-tags")).split() == agent.said("catalog", "services", "-tags").split()
    assert _said(consul("catalog", "datacenters")).split() == ["dc1"]


def test_the_real_consul_puts_gets_and_deletes_keys(consul: Consul, agent: Agent) -> None:
    assert _said(consul("kv", "put", "theirs/a", "one")) == "Success! Data written to: theirs/a\n"
    assert _said(consul("kv", "get", "theirs/a")) == "one\n"
    assert _said(consul("kv", "get", "-detailed", "theirs/a")) == agent.said("kv", "get", "-detailed", "theirs/a")
    assert _said(consul("kv", "get", "-recurse", "theirs/")) == "theirs/a:one\n"
    assert _said(consul("kv", "get", "-keys", "theirs/")) == "theirs/a\n"
    assert consul("kv", "put", "-cas", "-modify-index=1", "theirs/a", "two").status == 1
    assert _said(consul("kv", "delete", "theirs/a")) == "Success! Deleted key: theirs/a\n"
    assert consul("kv", "get", "theirs/a").status == 1
    assert agent.rostra("kv", "get", "theirs/a").status == 1


def test_the_real_consul_registers_and_deregisters_services(consul: Consul, agent: Agent, tmp_path: Path) -> None:
    assert _said(consul("services", "register", "-name=theirs", "-port=82")) == "Registered service: theirs\n"
    eventually("it is in the catalog", lambda: agent.api.passing("theirs") == ["theirs"], 5)
    file = tmp_path / "s.hcl"
    file.write_text(
        'service { name = "filed" port = 83 check { id = "c" name = "c" ttl = "10m" status = "passing" } }\n'
    )
    assert _said(consul("services", "register", str(file))) == "Registered service: filed\n"
    eventually("it is in the catalog", lambda: agent.api.passing("filed") == ["filed"], 5)
    assert _said(consul("services", "deregister", str(file))) == "Deregistered service: filed\n"
    assert _said(consul("services", "deregister", "-id=theirs")) == "Deregistered service: theirs\n"
    eventually("both are gone", lambda: "theirs" not in _said(consul("catalog", "services")).split(), 5)


def test_the_real_consuls_lock_runs_its_command_alone(consul: Consul, agent: Agent, tmp_path: Path) -> None:
    # 15 s of lock-delay hold after a holder that died only: one that ends gives the lock back.
    counter = tmp_path / "n"
    counter.write_text("0")
    script = f"n=$(cat {counter}); echo $((n + 1)) > {counter}"
    for _ in range(2):
        done = consul("lock", "-verbose", "theirs/lock", script)
        assert done.status == 0, done.out + done.err
    assert counter.read_text().strip() == "2"
    # It ends its session while it exits, and does not wait for that: at worst the session ends by its TTL of 15 s.
    eventually("its sessions are over", lambda: agent.api.get("/v1/session/list").json() == [], 40)


def test_the_real_consul_makes_intentions(consul: Consul, agent: Agent) -> None:
    _said(consul("intention", "create", "-deny", "theirs-a", "theirs-b"))
    checked = consul("intention", "check", "theirs-a", "theirs-b")
    assert checked.out == "Denied\n"
    assert agent.rostra("intention", "check", "theirs-a", "theirs-b").out == "Denied\n"
    _said(consul("intention", "delete", "theirs-a", "theirs-b"))
    assert _said(consul("intention", "check", "theirs-a", "theirs-b")) == "Allowed\n"
