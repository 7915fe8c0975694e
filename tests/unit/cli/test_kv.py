"""`rostra kv`: grammar, output and exit codes of Consul's."""

import base64
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def row(key: str, value: bytes, **more: Any) -> dict[str, Any]:
    encoded = base64.b64encode(value).decode() if value else None
    fields = {"LockIndex": 0, "Key": key, "Flags": 0, "Value": encoded, "CreateIndex": 5, "ModifyIndex": 7}
    return {**fields, **more}


def test_get_prints_the_value(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a/b c", [row("a/b c", b"1")])
    assert rostra_cli("kv", "get", "a/b c") == (0, "1\n", "")
    assert agent.asked[-1].target == "/v1/kv/a/b%20c"


def test_get_drops_a_leading_slash_as_no_key_has_one(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a", [row("a", b"1")])
    assert rostra_cli("kv", "get", "/a").out == "1\n"


def test_get_of_a_missing_key_is_exit_1(rostra_cli: Any, agent: Any) -> None:
    assert rostra_cli("kv", "get", "nope") == (1, "", "Error! No key exists at: nope\n")


def test_get_detailed(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a", [row("a", b"xyz", Flags=42, Session="s-1")])
    assert rostra_cli("kv", "get", "-detailed", "a").out == (
        "CreateIndex      5\nFlags            42\nKey              a\nLockIndex        0\n"
        "ModifyIndex      7\nSession          s-1\nValue            xyz\n"
    )


def test_get_recurse_lists_pairs_and_nothing_is_no_error(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a", [row("a/1", b"x"), row("a/2", b"")])
    assert rostra_cli("kv", "get", "-recurse", "a").out == "a/1:x\na/2:\n"
    assert rostra_cli("kv", "get", "-recurse", "-base64", "a").out == "a/1:eA==\na/2:\n"
    assert rostra_cli("kv", "get", "-recurse", "nope") == (0, "", "")
    detailed = rostra_cli("kv", "get", "-recurse", "-detailed", "a").out
    assert detailed.endswith("Session          -\nValue\n")
    assert "Value            x\n\nCreateIndex" in detailed


def test_get_keys_with_a_separator(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a", ["a/", "ab"])
    assert rostra_cli("kv", "get", "-keys", "a").out == "a/\nab\n"
    assert agent.asked[-1].query == {"keys": "", "separator": "/"}
    rostra_cli("kv", "get", "-keys", "-separator=", "a")
    assert agent.asked[-1].query["separator"] == ""


@pytest.mark.parametrize(
    ("words", "query", "out"),
    [
        (["k", "v"], {}, "Success! Data written to: k\n"),
        (["-flags=42", "k", "v"], {"flags": "42"}, "Success! Data written to: k\n"),
        (["-cas", "-modify-index=5", "k", "v"], {"cas": "5"}, "Success! Data written to: k\n"),
        (["-cas", "-modify-index=0", "k", "v"], {"cas": "0"}, "Success! Data written to: k\n"),
        (["-acquire", "-session=s", "k", "v"], {"acquire": "s"}, "Success! Lock acquired on: k\n"),
        (["-release", "-session=s", "k", "v"], {"release": "s"}, "Success! Lock released on: k\n"),
    ],
)
def test_put_sends_what_the_flags_say(rostra_cli: Any, agent: Any, words: Any, query: dict[str, str], out: str) -> None:
    agent.on("PUT", "/v1/kv/k", b"true")
    assert rostra_cli("kv", "put", *words) == (0, out, "")
    assert (agent.asked[-1].query, agent.asked[-1].body) == (query, b"v")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-cas", "-modify-index=5", "k", "v"], "Error! Did not write to k: CAS failed"),
        (["-acquire", "-session=s", "k"], "Error! Did not acquire lock"),
        (["-release", "-session=s", "k"], "Error! Did not release lock"),
        (["-cas", "k", "v"], "Must specify -modify-index with -cas!"),
        (["-acquire", "k", "v"], "Error! Missing -session (required with -acquire and -release)"),
        (["/k", "v"], "Error! Failed writing data: Invalid key. Key must not begin with a '/': /k"),
        ([], "Error! Missing KEY argument"),
        (["a", "b", "c"], "rostra kv put: too many arguments (expected 2, got 3) (rostra kv put -h)"),
        (["k", "@/nonexistent"], "Error! Failed to read file: /nonexistent: No such file or directory"),
    ],
)
def test_put_that_did_not_happen_is_exit_1(rostra_cli: Any, agent: Any, words: Any, message: str) -> None:
    agent.on("PUT", "/v1/kv/k", b"false")
    assert rostra_cli("kv", "put", *words) == (1, "", f"{message}\n")


def test_put_refuses_data_that_is_not_base_64_and_writes_nothing(rostra_cli: Any, agent: Any) -> None:
    assert rostra_cli("kv", "put", "-base64", "k", "***").err.startswith("Error! Cannot base 64 decode data")
    assert agent.asked == []


def test_put_takes_data_from_a_file_stdin_or_base_64_byte_for_byte(
    rostra_cli: Any, agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.on("PUT", "/v1/kv/k", b"true")
    (tmp_path / "f").write_bytes(b"\x00\xff\n")
    rostra_cli("kv", "put", "k", f"@{tmp_path}/f")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xfe\n")))
    rostra_cli("kv", "put", "k", "-")
    rostra_cli("kv", "put", "-base64", "k", "AP8=")
    rostra_cli("kv", "put", "k")
    rostra_cli("kv", "put", "k", "-5")
    rostra_cli("kv", "put", "k", "a\udcffb")  # how Python hands over an argument that is not UTF-8
    assert [a.body for a in agent.asked] == [b"\x00\xff\n", b"\xfe\n", b"\x00\xff", b"", b"-5", b"a\xffb"]


def test_delete(rostra_cli: Any, agent: Any) -> None:
    agent.on("DELETE", "/v1/kv/k", b"true")
    assert rostra_cli("kv", "delete", "k") == (0, "Success! Deleted key: k\n", "")
    assert rostra_cli("kv", "delete", "-recurse", "k") == (0, "Success! Deleted keys with prefix: k\n", "")
    assert agent.asked[-1].query == {"recurse": ""}
    assert rostra_cli("kv", "delete", "-cas", "-recurse", "k").err == "Cannot specify both -cas and -recurse!\n"
    assert rostra_cli("kv", "delete").err == "Error! Missing KEY argument\n"
    agent.on("DELETE", "/v1/kv/k", b"false")
    assert rostra_cli("kv", "delete", "-cas", "-modify-index=3", "k").err == "Error! Did not delete key k: CAS failed\n"


def test_what_is_exported_can_be_imported(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/kv/a", [row("a/1", b"\x00x", Flags=3), row("a/2", b"")])
    exported = rostra_cli("kv", "export", "a").out
    assert exported.startswith('[\n\t{\n\t\t"key": "a/1",\n\t\t"flags": 3,\n\t\t"value": "AHg="\n\t},\n')
    agent.on("PUT", "/v1/kv/a/1", b"true")
    agent.on("PUT", "/v1/kv/a/2", b"true")
    assert rostra_cli("kv", "import", exported).out == "Imported: a/1\nImported: a/2\n"
    assert [(a.path, a.query, a.body) for a in agent.asked[-2:]] == [
        ("/v1/kv/a/1", {"flags": "3"}, b"\x00x"), ("/v1/kv/a/2", {}, b""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[{]", "Cannot import data: line 1, column 3: Expecting property name enclosed in double quotes"),
        ("{}", "Cannot import data: expected a list such as 'rostra kv export' prints"),
        ('[{"key":"a","value":"eA=="},{"key":"b","value":"*"}]',
         "Cannot import data: entry 1 needs a key, flags and a value in base64"),
    ],
)  # fmt: skip
def test_import_of_something_else_writes_nothing(rostra_cli: Any, agent: Any, data: Any, message: str) -> None:
    assert rostra_cli("kv", "import", data) == (1, "", f"{message}\n")
    assert agent.asked == []


def test_an_empty_word_is_a_key_that_is_missing_and_never_skipped(rostra_cli: Any, agent: Any) -> None:
    for words in (["put", "", "val"], ["get", ""], ["delete", ""], ["put", ""]):
        assert rostra_cli("kv", *words) == (1, "", "Error! Missing KEY argument\n")
    assert rostra_cli("kv", "", "put", "a", "b").status == 1
    assert not agent.asked


def test_what_the_api_prints_can_be_imported(rostra_cli: Any, agent: Any) -> None:
    agent.on("PUT", "/v1/kv/a/b", True)
    rows = [{"LockIndex": 0, "Key": "a/b", "Flags": 7, "Value": "eA==", "CreateIndex": 3, "ModifyIndex": 3}]
    assert rostra_cli("kv", "import", json.dumps(rows)) == (0, "Imported: a/b\n", "")
    assert (agent.asked[-1].query, agent.asked[-1].body) == ({"flags": "7"}, b"x")
