"""`rostra kv get|put|delete|export|import`: the key-value store."""

from __future__ import annotations

import binascii
import json
import os
import sys
from typing import Any

from rostra.cli.api import key_path
from rostra.cli.command import Call, Command, Flag, say
from rostra.cli.errors import Failed
from rostra.cli.output import tabbed_json, wide_columns


def _get(call: Call) -> int | None:
    key = _key(call, optional=bool(call["recurse"] or call["keys"]))
    client = call.client
    try:
        if call["keys"]:
            for name in client.find(key_path(key), {"keys": "", "separator": call["separator"]}) or []:
                say(name)
            return 0
        rows = client.find(key_path(key), {"recurse": ""} if call["recurse"] else {})
    except Failed as e:
        raise Failed(f"Error querying the agent: {e}") from e
    if not rows:
        if call["recurse"]:
            return 0
        raise Failed(f"Error! No key exists at: {key}")
    for i, row in enumerate(rows):
        value = (row["Value"] or "").encode() if call["base64"] else _decoded(row["Value"])
        if call["detailed"]:
            _write((b"\n" if i else b"") + _details(row, value))
        else:
            _write((f"{row['Key']}:".encode() if call["recurse"] else b"") + value + b"\n")
    return 0


def _details(row: dict[str, Any], value: bytes) -> bytes:
    head = [
        ("CreateIndex", str(row["CreateIndex"])),
        ("Flags", str(row["Flags"])),
        ("Key", row["Key"]),
        ("LockIndex", str(row["LockIndex"])),
        ("ModifyIndex", str(row["ModifyIndex"])),
        ("Session", row.get("Session") or "-"),
        ("Value", ""),
    ]
    text = wide_columns(head).encode()
    return (text + value if value else text.rstrip()) + b"\n"


def _put(call: Call) -> None:
    key = _key(call, is_read=False)
    data = _data(call.args[1]) if len(call.args) > 1 else b""
    if call["base64"]:
        try:
            data = binascii.a2b_base64(data.strip(), strict_mode=True)
        except binascii.Error as e:
            raise Failed(f"Error! Cannot base 64 decode data: {e}") from None
    if key.startswith("/"):
        raise Failed(f"Error! Failed writing data: Invalid key. Key must not begin with a '/': {key}")
    query: dict[str, Any] = {"flags": call["flags"] or None}
    if call["cas"]:
        if call["modify-index"] is None:
            raise Failed("Must specify -modify-index with -cas!")
        query["cas"] = call["modify-index"]
    for lock in ("acquire", "release"):
        if call[lock]:
            if not call["session"]:
                raise Failed("Error! Missing -session (required with -acquire and -release)")
            query[lock] = call["session"]
    try:
        done = call.client.put(key_path(key), data, query).text == "true"
    except Failed as e:
        raise Failed(f"Error! Failed writing data: {e}") from e
    if not done and call["acquire"]:
        raise Failed("Error! Did not acquire lock")
    if not done and call["release"]:
        raise Failed("Error! Did not release lock")
    if not done:
        raise Failed(f"Error! Did not write to {key}: CAS failed")
    what = "Lock acquired on" if call["acquire"] else "Lock released on" if call["release"] else "Data written to"
    say(f"Success! {what}: {key}")


def _delete(call: Call) -> None:
    key = _key(call, optional=bool(call["recurse"]))
    if call["cas"] and call["recurse"]:
        raise Failed("Cannot specify both -cas and -recurse!")
    if call["cas"] and not call["modify-index"]:
        raise Failed("Must specify -modify-index with -cas!")
    query = {"recurse": "" if call["recurse"] else None, "cas": call["modify-index"] if call["cas"] else None}
    try:
        done = call.client.put(key_path(key), None, query, method="DELETE").text == "true"
    except Failed as e:
        raise Failed(f"Error! Did not delete {key}: {e}") from e
    if not done:
        raise Failed(f"Error! Did not delete key {key}: CAS failed")
    say(f"Success! Deleted keys with prefix: {key}" if call["recurse"] else f"Success! Deleted key: {key}")


def _export(call: Call) -> None:
    key = _key(call, optional=True)
    try:
        rows = call.client.find(key_path(key), {"recurse": ""}) or []
    except Failed as e:
        raise Failed(f"Error querying the agent: {e}") from e
    say(tabbed_json([{"key": r["Key"], "flags": r["Flags"], "value": r["Value"] or ""} for r in rows]))


def _import(call: Call) -> None:
    if not call.args:
        raise Failed("Error! Missing DATA argument")
    try:
        entries = json.loads(_data(call.args[0]))
    except json.JSONDecodeError as e:
        raise Failed(f"Cannot import data: line {e.lineno}, column {e.colno}: {e.msg}") from None
    except UnicodeDecodeError as e:
        raise Failed(f"Cannot import data: not UTF-8 text at byte {e.start}") from None
    for i, entry in enumerate(_checked(entries)):
        key, flags, value = entry
        try:
            call.client.put(key_path(key), value, {"flags": flags or None})
        except Failed as e:
            raise Failed(f"Error! Failed writing data for key {key}: {e} ({i} of {len(entries)} imported)") from e
        say(f"Imported: {key}")


def _checked(entries: Any) -> list[tuple[str, int, bytes]]:
    """All entries as (key, flags, value), before the first of them is written."""
    if not isinstance(entries, list):
        raise Failed("Cannot import data: expected a list such as 'rostra kv export' prints")
    found = []
    for i, entry in enumerate(entries):
        try:
            entry = {name.lower(): given for name, given in entry.items()}  # the API's "Key" is export's "key"
            value = binascii.a2b_base64(entry.get("value") or "", strict_mode=True)
            if not entry["key"]:
                raise ValueError
            found.append((str(entry["key"]), int(entry.get("flags") or 0), value))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Failed(f"Cannot import data: entry {i} needs a key, flags and a value in base64") from None
    return found


def _key(call: Call, *, is_read: bool = True, optional: bool = False) -> str:
    """The key that was named; a leading slash is dropped where keys are read, as no key begins with one."""
    key = call.args[0] if call.args else ""
    if is_read:
        key = key.removeprefix("/")
    if not key and not optional:
        raise Failed("Error! Missing KEY argument")
    return key


def _data(text: str) -> bytes:
    """The bytes meant by an argument: @file, - for stdin, or itself."""
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                return file.read()
        except OSError as e:
            raise Failed(f"Error! Failed to read file: {text[1:]}: {e.strerror}") from e
    return os.fsencode(text)


def _decoded(value: str | None) -> bytes:
    return binascii.a2b_base64(value or "")


def _write(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)


_BASE64 = Flag("base64", "The value is shown, or was given, in base 64.", "switch")
_CAS = Flag("cas", "Check-and-set: only if the key still has the index given by -modify-index.", "switch")
_RECURSE = Flag("recurse", "All keys that begin with the argument.", "switch")

COMMANDS = {
    "get": Command(
        "kv get [options] [KEY_OR_PREFIX]",
        "Retrieves or lists data from the KV store",
        _get,
        (
            _BASE64,
            _RECURSE,
            Flag("detailed", "Show indexes, flags and session too.", "switch"),
            Flag("keys", "List the names of the keys only.", "switch"),
            Flag("separator", 'With -keys, stop at this character. Default: "/".', default="/"),
        ),
        reach="server",
        takes=1,
    ),
    "put": Command(
        "kv put [options] KEY [DATA]",
        "Sets or updates data in the KV store",
        _put,
        (
            _BASE64,
            _CAS,
            Flag("modify-index", "Index for -cas; 0 writes only where there is no such key.", "whole"),
            Flag("flags", "A number to keep beside the value.", "whole", 0),
            Flag("acquire", "Take the lock on the key for -session.", "switch"),
            Flag("release", "Give up the lock on the key held by -session.", "switch"),
            Flag("session", "ID of a session."),
        ),
        reach="server",
        takes=2,
        text="DATA is taken as it is, from a file with @FILE, or from stdin with -. Without it the value is empty.",
    ),
    "delete": Command(
        "kv delete [options] KEY_OR_PREFIX",
        "Removes data from the KV store",
        _delete,
        (_CAS, _RECURSE, Flag("modify-index", "Index for -cas.", "whole")),
        reach="server",
        takes=1,
    ),
    "export": Command(
        "kv export [KEY_OR_PREFIX]", "Exports a tree from the KV store as JSON", _export, reach="server", takes=1
    ),
    "import": Command(
        "kv import [DATA]",
        "Imports a tree stored as JSON to the KV store",
        _import,
        reach="server",
        takes=1,
        text="""
DATA is what 'kv export' or /v1/kv/?recurse prints: as it is, from a file with @FILE, or from stdin with -.""",
    ),
}
