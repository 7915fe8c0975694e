"""`rostra intention` over the exact paths, and over IDs where an older agent has only those."""

import json
from pathlib import Path
from typing import Any

import pytest

EXACT = "/v1/connect/intentions/exact"
DENY = {
    "ID": "226b932a-7977-68bb-81ad-25ade6fafe31", "SourceName": "web", "DestinationName": "db", "Action": "deny",
    "Description": "why", "Meta": {"a": "b"}, "Precedence": 9, "CreatedAt": "2026-11-22T18:18:19.316863788Z",
}  # fmt: skip


def test_create_writes_the_exact_intention(rostra_cli: Any, agent: Any) -> None:
    agent.on("PUT", EXACT, b"true")
    assert rostra_cli("intention", "create", "web", "db").out == "Created: web => db (allow)\n"
    assert rostra_cli("intention", "create", "-deny", "-meta=a=b", "*", "db").out == "Created: * => db (deny)\n"
    asked = agent.asked[-1]
    assert asked.query == {"source": "*", "destination": "db"}
    assert asked.json() == {
        "SourceName": "*", "DestinationName": "db", "SourceType": "consul", "Action": "deny", "Meta": {"a": "b"},
    }  # fmt: skip


def test_create_of_one_that_is_there_needs_replace(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", EXACT, DENY)
    agent.on("PUT", EXACT, b"true")
    assert rostra_cli("intention", "create", "web", "db") == (
        1,
        "",
        'Error creating intention "web => db (allow)": there is one already: web => db (deny); -replace replaces it\n',
    )
    assert all(a.method == "GET" for a in agent.asked)
    assert rostra_cli("intention", "create", "-replace", "-allow", "web", "db").out == "Replaced: web => db (allow)\n"


def test_create_from_files(rostra_cli: Any, agent: Any, tmp_path: Path) -> None:
    agent.on("PUT", EXACT, b"true")
    (tmp_path / "i.json").write_text('{"sourcename": "f1", "DestinationName": "f2", "Action": "deny"}')
    assert rostra_cli("intention", "create", "-file", f"{tmp_path}/i.json").out == "Created: f1 => f2 (deny)\n"
    (tmp_path / "bad.json").write_text('{"SourceName":\n')
    done = rostra_cli("intention", "create", "-file", f"{tmp_path}/bad.json")
    assert done.err == f"Error: {tmp_path}/bad.json:2:1: Expecting value\n"
    (tmp_path / "half.json").write_text('{"SourceName": "a"}')
    done = rostra_cli("intention", "create", "-file", f"{tmp_path}/half.json")
    assert done.err == f"Error: {tmp_path}/half.json: DestinationName is missing\n"
    assert rostra_cli("intention", "create", "-file", "/nonexistent").err == (
        "Error: cannot read /nonexistent: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("create x", 1, "Error: Must specify two arguments: source and destination"),
        ("create -allow -deny x y", 1, "Only one of -allow or -deny may be specified."),
        ("create -file", 1, "Error: -file needs at least one FILE, or - for stdin"),
        ("check x", 2, "Error: command requires exactly two arguments: src and dst"),
        ("match", 1, "Error: command requires exactly one argument: src or dst"),
        ("match -source -destination x", 1, "Error: only one of -source or -destination may be specified"),
        ("get no such", 1, 'Error: Intention with source "no" and destination "such" not found.'),
        ("get 12345678-1234-1234-1234-123456789012", 1,
         "Error: Intention with ID '12345678-1234-1234-1234-123456789012' not found."),
        ("delete no such", 1, 'Error: Intention with source "no" and destination "such" not found.'),
        ("delete", 1, "Error: wrong number of arguments; usage: rostra intention delete [options] SRC DST | ID"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(rostra_cli: Any, agent: Any, words: Any, status: int, message: str) -> None:
    assert rostra_cli("intention", *words.split()) == (status, "", f"{message}\n")


def test_get_by_names_and_by_id(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", EXACT, DENY)
    agent.on("GET", f"/v1/connect/intentions/{DENY['ID']}", DENY)
    by_names, by_id = rostra_cli("intention", "get", "web", "db").out, rostra_cli("intention", "get", DENY["ID"]).out
    assert by_names == by_id == (
        "Source:       web\nDestination:  db\nAction:       deny\nID:           226b932a-7977-68bb-81ad-25ade6fafe31\n"
        "Description:  why\nMeta[a]:      b\nCreated At:   Sunday, 22-Nov-26 18:18:19 UTC\n"
    )  # fmt: skip


def test_check_says_so_in_words_and_in_its_exit_status(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/connect/intentions/check", {"Allowed": True})
    assert rostra_cli("intention", "check", "web", "db") == (0, "Allowed\n", "")
    agent.on("GET", "/v1/connect/intentions/check", {"Allowed": False})
    assert rostra_cli("intention", "check", "web", "db") == (1, "Denied\n", "")
    agent.on("GET", "/v1/connect/intentions/check", b"No cluster leader", 500)
    assert rostra_cli("intention", "check", "web", "db").status == 2


def test_match_lists_in_the_order_of_evaluation(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/connect/intentions/match", {"db": [DENY, {**DENY, "SourceName": "*", "Action": "allow"}]})
    assert rostra_cli("intention", "match", "db").out == "web => db (deny)\n* => db (allow)\n"
    assert agent.asked[-1].query == {"by": "destination", "name": "db"}
    rostra_cli("intention", "match", "-source", "db")
    assert agent.asked[-1].query["by"] == "source"


def test_list(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/connect/intentions", [DENY])
    assert rostra_cli("intention", "list").out == (
        "ID                                    Source  Action  Destination  Precedence\n"
        "226b932a-7977-68bb-81ad-25ade6fafe31  web     deny    db           9\n"
    )
    agent.on("GET", "/v1/connect/intentions", [])
    assert rostra_cli("intention", "list") == (0, "", "")


def test_delete_by_names(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", EXACT, DENY)
    agent.on("DELETE", EXACT, b"true")
    assert rostra_cli("intention", "delete", "web", "db").out == "Intention deleted.\n"
    assert agent.asked[-1].query == {"source": "web", "destination": "db"}


def test_an_agent_without_the_exact_paths_is_asked_by_id(rostra_cli: Any, agent: Any) -> None:
    no_exact = b"Bad request: failed intention lookup: index error: UUID must be 36 characters"
    for method in ("GET", "PUT", "DELETE"):
        agent.on(method, EXACT, no_exact, 400)
    agent.on("GET", "/v1/connect/intentions", [DENY])
    agent.on("POST", "/v1/connect/intentions", {"ID": "x"})
    by_id = f"/v1/connect/intentions/{DENY['ID']}"
    agent.on("PUT", by_id, {"ID": "x"})
    agent.on("DELETE", by_id, b"true")
    assert rostra_cli("intention", "create", "a", "b").out == "Created: a => b (allow)\n"
    assert agent.asked[-1].method == "POST"
    assert rostra_cli("intention", "create", "-replace", "web", "db").out == "Replaced: web => db (allow)\n"
    assert json.loads(agent.asked[-1].body)["Action"] == "allow"
    assert agent.asked[-1].path == by_id
    assert rostra_cli("intention", "delete", "web", "db").out == "Intention deleted.\n"
    assert (agent.asked[-1].method, agent.asked[-1].path) == ("DELETE", by_id)
