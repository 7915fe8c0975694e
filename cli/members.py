"""`rostra members`: who is in the cluster, as the agent sees it."""

from __future__ import annotations

import re
import time
from typing import Any

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Flag, note, say
from rostra.cli.errors import Failed
from rostra.cli.output import columns, pairs

_STATUS = {0: "none", 1: "alive", 2: "leaving", 3: "left", 4: "failed"}
_TYPE = {"consul": "server", "node": "client"}


def _members(call: Call) -> int:
    try:
        wanted = re.compile(call["status"] or "")
    except re.error as e:
        raise Failed(f"-status: {call['status']!r} is not a regular expression: {e}") from None
    try:
        query = {"wan": "1"} if call["wan"] else {"segment": "_all"}
        members, headers = call.client.get_with_headers(path("agent", "members"), query)
    except Failed as e:
        raise Failed(f"Error retrieving members: {e}") from e
    if headers.get("X-Consul-KnownLeader") == "false":
        age = headers.get("X-Consul-LastContact", "")
        at = time.time() - int(age) / 1000 if age.isdigit() else None
        since = f"as of {time.strftime('%H:%M:%S', time.localtime(at))}" if at is not None else "what was known last"
        note(f"No cluster leader: this is {since}")
    shown = [m for m in members if wanted.search(_STATUS.get(m.get("Status", 0), "unknown"))]
    if not shown:
        return 2
    shown.sort(key=lambda m: str(m["Name"]))
    say(columns(_detailed(shown) if call["detailed"] else _plain(shown)))
    return 0


def _plain(members: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["Node", "Address", "Status", "Type", "Build", "Protocol", "DC", "Segment"]]
    for m in members:
        tags = _tags(m)
        rows.append(
            [
                m["Name"],
                _address(m),
                _STATUS.get(m.get("Status", 0), "unknown"),
                _TYPE.get(tags.get("role", ""), "unknown"),
                tags.get("build", "").partition(":")[0],
                str(m.get("ProtocolCur", "")),
                tags.get("dc", ""),
                tags["segment"],
            ]
        )
    return rows


def _detailed(members: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["Node", "Address", "Status", "Tags"]]
    rows += [
        [m["Name"], _address(m), _STATUS.get(m.get("Status", 0), "unknown"), pairs(_tags(m), ",")] for m in members
    ]
    return rows


def _tags(member: dict[str, Any]) -> dict[str, str]:
    tags = dict(member.get("Tags") or {})
    tags["segment"] = tags.get("segment") or ("<all>" if tags.get("role") == "consul" else "<default>")
    return tags


def _address(member: dict[str, Any]) -> str:
    host = member.get("Addr", "")
    return f"[{host}]:{member.get('Port', 0)}" if ":" in host else f"{host}:{member.get('Port', 0)}"


COMMANDS = {
    "": Command(
        "members [options]",
        "Outputs the members of the cluster that the agent is in; exit status 2 where none matches.",
        _members,
        (
            Flag("detailed", "Show all tags of each node.", "switch"),
            Flag("status", "Only nodes whose status matches this regular expression."),
            Flag("wan", "Show the servers of all datacenters.", "switch"),
        ),
        reach="agent",
        takes=0,
    )
}
