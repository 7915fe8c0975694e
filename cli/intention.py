"""`rostra intention create|get|check|match|delete|list`: which service may connect to which.

An intention is named by its source and destination (`/v1/connect/intentions/exact`) or by its ID. An agent that does
not know the exact path (Consul before 1.9 takes "exact" for an ID) is asked through the list and the ID instead.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

from rostra.cli.api import ApiError, Client, path
from rostra.cli.command import Call, Command, Flag, say
from rostra.cli.errors import Failed
from rostra.cli.output import columns

_LIST = path("connect", "intentions")
_EXACT = path("connect", "intentions", "exact")


def _create(call: Call) -> None:
    if call["allow"] and call["deny"]:
        raise Failed("Only one of -allow or -deny may be specified.")
    for wanted in _wanted(call):
        source, destination = wanted["SourceName"], wanted["DestinationName"]
        title = f"{source} => {destination} ({wanted['Action']})"
        try:
            old = _find(call.client, source, destination)
            if old and not call["replace"]:
                raise Failed(f"there is one already: {source} => {destination} ({old['Action']}); -replace replaces it")
            _write(call.client, wanted, old)
        except Failed as e:
            raise Failed(f'Error creating intention "{title}": {e}') from e
        say(f"{'Replaced' if old else 'Created'}: {title}")


def _wanted(call: Call) -> list[dict[str, Any]]:
    if call["file"]:
        if not call.args:
            raise Failed("Error: -file needs at least one FILE, or - for stdin")
        return [_from_file(name) for name in call.args]
    if len(call.args) != 2:
        raise Failed("Error: Must specify two arguments: source and destination")
    return [
        {
            "SourceName": call.args[0],
            "DestinationName": call.args[1],
            "SourceType": "consul",
            "Action": "deny" if call["deny"] else "allow",
            "Meta": call["meta"],
        }
    ]


def _from_file(name: str) -> dict[str, Any]:
    try:
        if name == "-":
            text = sys.stdin.read()
        else:
            with open(name, encoding="utf-8") as file:
                text = file.read()
    except (OSError, UnicodeDecodeError) as e:
        raise Failed(f"Error: cannot read {name}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from e
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise Failed(f"Error: {name}:{e.lineno}:{e.colno}: {e.msg}") from None
    if not isinstance(found, dict):
        raise Failed(f"Error: {name}: expected an object with SourceName, DestinationName and Action")
    known = {"sourcename": "SourceName", "destinationname": "DestinationName", "action": "Action", "meta": "Meta"}
    intention = {known.get(str(key).lower(), str(key)): value for key, value in found.items()}
    for key in ("SourceName", "DestinationName"):
        if not intention.get(key):
            raise Failed(f"Error: {name}: {key} is missing")
    return {"SourceType": "consul", "Action": "allow", **intention}


def _get(call: Call) -> None:
    found = _named(call, "intention get [options] SRC DST | ID")
    rows = [("Source", found["SourceName"]), ("Destination", found["DestinationName"])]
    if found.get("Action"):
        rows.append(("Action", found["Action"]))
    if found.get("ID"):
        rows.append(("ID", found["ID"]))
    if found.get("Description"):
        rows.append(("Description", found["Description"]))
    rows += [(f"Meta[{key}]", value) for key, value in sorted((found.get("Meta") or {}).items())]
    if found.get("CreatedAt"):
        rows.append(("Created At", _rfc850(found["CreatedAt"])))
    width = max(len(name) for name, _value in rows) + 2
    for name, value in rows:
        say(f"{name + ':':<{width}} {value}")


def _check(call: Call) -> int:
    if len(call.args) != 2:
        raise Failed("Error: command requires exactly two arguments: src and dst", 2)
    query = {"source": call.args[0], "destination": call.args[1], "source-type": "consul"}
    try:
        allowed = call.client.get(path("connect", "intentions", "check"), query)["Allowed"]
    except Failed as e:
        raise Failed(f"Error checking the connection: {e}", 2) from e
    say("Allowed" if allowed else "Denied")
    return 0 if allowed else 1


def _match(call: Call) -> None:
    if len(call.args) != 1:
        raise Failed("Error: command requires exactly one argument: src or dst")
    if call["source"] and call["destination"]:
        raise Failed("Error: only one of -source or -destination may be specified")
    query = {"by": "source" if call["source"] else "destination", "name": call.args[0]}
    try:
        found = call.client.get(path("connect", "intentions", "match"), query)
    except Failed as e:
        raise Failed(f"Error matching the connection: {e}") from e
    for row in found.get(call.args[0]) or []:
        say(f"{row['SourceName']} => {row['DestinationName']} ({_action(row)})")


def _delete(call: Call) -> None:
    by_id = len(call.args) == 1
    found = _named(call, "intention delete [options] SRC DST | ID")
    try:
        if by_id or not _knows_exact(call.client):
            call.client.put(path("connect", "intentions", found["ID"]), method="DELETE")
        else:
            query = {"source": found["SourceName"], "destination": found["DestinationName"]}
            call.client.put(_EXACT, None, query, method="DELETE")
    except Failed as e:
        raise Failed(f"Error deleting the intention: {e}") from e
    say("Intention deleted.")


def _list(call: Call) -> None:
    try:
        found = call.client.get(_LIST)
    except Failed as e:
        raise Failed(f"Error listing intentions: {e}") from e
    if not found:
        return
    table = [["ID", "Source", "Action", "Destination", "Precedence"]]
    for row in found:
        table.append(
            [
                row.get("ID") or "",
                row["SourceName"],
                _action(row),
                row["DestinationName"],
                str(row.get("Precedence", "")),
            ]
        )
    say(columns(table))


def _named(call: Call, usage: str) -> dict[str, Any]:
    """The intention that the arguments name. Raises Failed where there is none."""
    if len(call.args) not in (1, 2):
        raise Failed(f"Error: wrong number of arguments; usage: rostra {usage}")
    try:
        if len(call.args) == 1:
            found = call.client.find(path("connect", "intentions", call.args[0]))
            what = f"with ID {call.args[0]!r}"
        else:
            found = _find(call.client, *call.args)
            what = f'with source "{call.args[0]}" and destination "{call.args[1]}"'
    except Failed as e:
        raise Failed(f"Error reading the intention: {e}") from e
    if not found:
        raise Failed(f"Error: Intention {what} not found.")
    return dict(found)


def _find(client: Client, source: str, destination: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = client.find(_EXACT, {"source": source, "destination": destination})
        return found
    except ApiError as e:
        if not _is_old(e):
            raise
    rows = client.get(_LIST) or []
    return next((r for r in rows if (r["SourceName"], r["DestinationName"]) == (source, destination)), None)


def _write(client: Client, wanted: dict[str, Any], old: dict[str, Any] | None) -> None:
    query = {"source": wanted["SourceName"], "destination": wanted["DestinationName"]}
    try:
        client.put(_EXACT, wanted, query)
    except ApiError as e:
        if not _is_old(e):
            raise
        if old:
            client.put(path("connect", "intentions", old["ID"]), wanted)
        else:
            client.put(_LIST, wanted, method="POST")


def _knows_exact(client: Client) -> bool:
    try:
        client.find(_EXACT, {"source": "*", "destination": "*"})
    except ApiError as e:
        if _is_old(e):
            return False
        raise
    return True


def _is_old(error: ApiError) -> bool:
    return error.code in (400, 500) and "UUID must be" in error.text


def _action(row: dict[str, Any]) -> str:
    return row.get("Action") or f"{len(row.get('Permissions') or [])} permissions"


def _rfc850(text: str) -> str:
    try:
        return datetime.fromisoformat(text[:19] + "+00:00").strftime("%A, %d-%b-%y %H:%M:%S UTC")
    except ValueError:
        return text


COMMANDS = {
    "create": Command(
        "intention create [options] SRC DST | -file FILE...",
        "Create intentions",
        _create,
        (
            Flag("allow", "Connections are allowed (this is the default).", "switch"),
            Flag("deny", "Connections are denied; open ones are closed.", "switch"),
            Flag("replace", "Replace the intention that is there.", "switch"),
            Flag("file", "The arguments are JSON files with one intention each; - is stdin.", "switch"),
            Flag("meta", "Metadata of the intention. Repeatable.", "pairs"),
        ),
        reach="server",
    ),
    "get": Command("intention get [options] SRC DST | ID", "Show information about an intention", _get, reach="server"),
    "check": Command(
        "intention check [options] SRC DST",
        "Check whether a connection between two services is allowed",
        _check,
        reach="server",
        text="Exit status: 0 allowed, 1 denied, 2 not known.",
    ),
    "match": Command(
        "intention match [options] SRC|DST",
        "Show intentions that match a source or destination",
        _match,
        (
            Flag("source", "The argument is a source.", "switch"),
            Flag("destination", "The argument is a destination (this is the default).", "switch"),
        ),
        reach="server",
    ),
    "delete": Command("intention delete [options] SRC DST | ID", "Delete an intention", _delete, reach="server"),
    "list": Command("intention list [options]", "List all intentions", _list, reach="server", takes=0),
}
