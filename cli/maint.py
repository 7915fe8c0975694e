"""`rostra maint`: takes a node or a service out of health queries and DNS, and lets it in again."""

from __future__ import annotations

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Flag, say
from rostra.cli.errors import Failed

_NODE_CHECK = "_node_maintenance"
_SERVICE_CHECK = "_service_maintenance:"


def _maint(call: Call) -> None:
    enable, disable, service = call["enable"], call["disable"], call["service"]
    if enable and disable:
        raise Failed("Only one of -enable or -disable may be provided")
    if call["reason"] and not enable:
        raise Failed("Reason may only be provided with -enable")
    if service and not enable and not disable:
        raise Failed("Service requires either -enable or -disable")
    if not enable and not disable:
        _show(call)
        return
    doing, done = ("enabling", "enabled") if enable else ("disabling", "disabled")
    query = {"enable": "true" if enable else "false", "reason": call["reason"] or None}
    what = "service" if service else "node"
    where = path("agent", "service", "maintenance", service) if service else path("agent", "maintenance")
    try:
        call.client.put(where, query=query)
    except Failed as e:
        raise Failed(f"Error {doing} {what} maintenance: {e}") from e
    say(f"{what.capitalize()} maintenance is now {done}" + (f' for "{service}"' if service else ""))


def _show(call: Call) -> None:
    try:
        checks = call.client.get(path("agent", "checks"))
        name = call.client.get(path("agent", "self"))["Config"]["NodeName"] if _NODE_CHECK in checks else ""
    except Failed as e:
        raise Failed(f"Error getting checks: {e}") from e
    if _NODE_CHECK in checks:
        say(f"Node:\n  Name:   {name}\n  Reason: {checks[_NODE_CHECK]['Notes']}\n")
    for check_id, check in sorted(checks.items()):
        if check_id.startswith(_SERVICE_CHECK):
            say(f"Service:\n  ID:     {check['ServiceID']}\n  Reason: {check['Notes']}\n")


COMMANDS = {
    "": Command(
        "maint [options]",
        "Controls node or service maintenance mode",
        _maint,
        (
            Flag("enable", "Begin maintenance: a critical check keeps it out of health queries and DNS.", "switch"),
            Flag("disable", "End maintenance.", "switch"),
            Flag("reason", "Text that says why; shown in the check's notes."),
            Flag("service", "ID of a service of this agent, in the place of the node."),
        ),
        reach="agent",
        text="Without flags it shows what is under maintenance. It outlives a restart of the agent.",
        takes=0,
    )
}
