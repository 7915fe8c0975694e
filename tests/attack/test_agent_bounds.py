"""What is too large, too deep or too many for the servers: the agent says so at once, over HTTP and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Agent, Processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    return value


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("30000 tags", {"Tags": [f"t{i}" for i in range(30_000)]}, " items in "),
    ("18000 tags", {"Tags": [f"t{i}" for i in range(18_000)]}, "items in maps and lists"),
    ("3000 checks", {"Checks": [{"CheckID": f"c{i}", "TTL": "1h"} for i in range(3_000)]}, "at most 4194304"),
    ("a tag of 200 kB", {"Tags": ["t" * 200_000]}, "at most 131072"),
    ("depth 40", {"Proxy": {"Config": nested(40)}}, "nested more than 32"),
    ("depth 900", {"Proxy": {"Config": nested(900)}}, "nested "),
    ("notes of 140 kB", {"Check": {"TTL": "1h", "Notes": "n" * 140_000}}, "at most 131072"),
    ("an id of 600", {"ID": "i" * 600}, "at most 512"),
    ("65 meta", {"Meta": {f"k{i}": "v" for i in range(65)}}, "more than 64"),
    ("a meta value of 513", {"Meta": {"k": "v" * 513}}, "limit: 512"),
]


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    return module_processes.dev("bounds")


@pytest.mark.parametrize(("what", "extra", "bound"), HOSTILE, ids=[what for what, _, _ in HOSTILE])
def test_what_the_servers_would_refuse_for_ever_is_refused_by_the_agent(
    agent: Agent, tmp_path: Path, what: str, extra: dict[str, Any], bound: str
) -> None:
    definition = {"Name": "hostile", **extra}
    answer = agent.api.put("/v1/agent/service/register", definition)
    assert answer.status == 400
    assert bound in answer.text
    assert len(answer.text) < 1000
    assert agent.api.get("/v1/agent/services").json() == {}
    file = tmp_path / "service.json"
    file.write_text(json.dumps({"data_dir": "/tmp/x", "node_name": "n", "service": definition}))
    judged = agent.rostra("validate", str(file))
    assert judged.status == 1
    assert bound in judged.err
    assert "Traceback" not in judged.err + agent.process.log
    assert "refuse a registration" not in agent.process.log


def test_checks_that_come_one_by_one_meet_the_same_bound_and_all_that_were_accepted_are_in_the_catalog(
    agent: Agent,
) -> None:
    api = agent.api
    api.done("/v1/agent/service/register", {"Name": "many", "Tags": ["t" * 100_000]})
    accepted = 0
    for i in range(60):
        body = {"Name": f"m{i}", "ServiceID": "many", "TTL": "1h", "Notes": "n" * 10_000}
        answer = api.put("/v1/agent/check/register", body)
        if answer.status != 200:
            assert (answer.status, "at most 4194304" in answer.text) == (400, True)
            break
        assert "X-Rostra-Synced" not in answer.headers
        accepted += 1
    assert 20 < accepted < 60
    assert len(api.get("/v1/health/checks/many").json()) == accepted
    api.done("/v1/catalog/deregister", {"Node": agent.name, "ServiceID": "many"})
    api.done("/v1/agent/service/register", {"Name": "many", "Tags": ["t" * 100_000, "again"]})
    assert len(api.get("/v1/health/checks/many").json()) == accepted
    api.done("/v1/agent/service/deregister/many")
