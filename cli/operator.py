"""`rostra operator raft …|autopilot …`: who the servers are, who leads, and what autopilot may do with them."""

from __future__ import annotations

from typing import Any

from rostra.cli.api import ApiError, path
from rostra.cli.command import Call, Command, Flag, note, say
from rostra.cli.errors import Failed
from rostra.cli.output import columns, tabbed_json

_RAFT = path("operator", "raft", "configuration")
_PEER = path("operator", "raft", "peer")
_TRANSFER = path("operator", "raft", "transfer-leader")
_AUTOPILOT = path("operator", "autopilot", "configuration")
_STATE = path("operator", "autopilot", "state")

# -- raft --------------------------------------------------------------------------------------------------------------


def _list_peers(call: Call) -> None:
    try:
        found = call.client.get(_RAFT)
    except Failed as e:
        hint = " (try -stale)" if isinstance(e, ApiError) and "No cluster leader" in e.text else ""
        raise Failed(f"Error getting peers: {e}{hint}") from e
    rows = [["Node", "ID", "Address", "State", "Voter", "RaftProtocol"]]
    for server in found["Servers"] or ():
        voter = "true" if server["Voter"] else "false"
        rows.append(
            [server["Node"], server["ID"], server["Address"], _state_of(server), voter, server["ProtocolVersion"]]
        )
    say(columns(rows))
    waiting = found.get("Waiting") or ()
    names = [server["Node"] for server in waiting]
    for server in waiting:  # on stderr: scripts count the lines of the table
        name = server["Node"]
        which = name if names.count(name) == 1 else f"-id={server['ID']}"
        step = server.get("Problem") or f"rostra operator raft add-peer {which}"
        heard = f", heard {server['LastHeard']} ago" if server.get("LastHeard") else ""
        note(f"{name} ({server['Address']}, id {server['ID']}{heard}) waits to be let in: {step}")


def _state_of(server: dict[str, Any]) -> str:
    suffrage = str(server.get("Suffrage") or "voter")
    if server["Leader"]:
        return "leader"
    return "follower" if suffrage == "voter" else suffrage


def _remove_peer(call: Call) -> None:
    address, server_id = call["address"], call["id"]
    if call.args and (address or server_id):
        raise Failed("Error removing peer: give a name, an -id or an -address, and only one of them")
    server_id = server_id or "".join(call.args)  # agents take a name for an id
    try:
        if not address and not server_id:
            raise Failed("an address or id is required for the peer to remove")
        if address and server_id:
            raise Failed("cannot give both an address and id")
        call.client.put(_PEER, query={"address": address or None, "id": server_id or None}, method="DELETE")
    except Failed as e:
        raise Failed(f"Error removing peer: {e}") from e
    if address:
        say(f'Removed peer with address "{address}"')
    else:
        say(f'Removed peer with id "{server_id}"')


def _add_peer(call: Call) -> None:
    if len(call.args) + bool(call["id"]) != 1:
        raise Failed("Error adding peer: the name of one waiting server, or its -id, must be given")
    query = {"id": call["id"]} if call["id"] else {"name": call.args[0]}
    try:
        server = call.client.post(_PEER, query)
    except Failed as e:
        raise Failed(f"Error adding peer: {e}") from e
    say(f"Added {server['Node']} ({server['Address']}) as {server['Suffrage']}")
    if server["Suffrage"] == "learner":
        note("It gets a vote once it has caught up and been stable for autopilot's ServerStabilizationTime.")


def _transfer_leader(call: Call) -> None:
    try:
        done = call.client.post(_TRANSFER, {"id": call["id"] or None})
    except Failed as e:
        raise Failed(f"Error transferring leadership: {e}") from e
    if not done.get("Success"):
        raise Failed("Error transferring leadership: it was not transferred")
    say("Success")
    if done.get("Leader"):
        note(f"The leader is {done['Leader']['Node']} ({done['Leader']['Address']}) now.")


# -- autopilot ---------------------------------------------------------------------------------------------------------


def _get_config(call: Call) -> None:
    try:
        config = call.client.get(_AUTOPILOT)
    except Failed as e:
        raise Failed(f"Error querying Autopilot configuration: {e}") from e
    for name in ("CleanupDeadServers", "LastContactThreshold", "MaxTrailingLogs", "MinQuorum"):
        say(f"{name} = {_shown(config.get(name, 0))}")
    say(f"ServerStabilizationTime = {config['ServerStabilizationTime']}")
    for name in ("RedundancyZoneTag", "UpgradeVersionTag"):
        config[name] = f'"{config.get(name, "")}"'
    for name in ("RedundancyZoneTag", "DisableUpgradeMigration", "UpgradeVersionTag"):
        say(f"{name} = {_shown(config.get(name, False))}")
    if "AutoAdmitServers" in config:
        say(f"AutoAdmitServers = {_shown(config['AutoAdmitServers'])}")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_SETTINGS = {
    "cleanup-dead-servers": "CleanupDeadServers",
    "last-contact-threshold": "LastContactThreshold",
    "max-trailing-logs": "MaxTrailingLogs",
    "min-quorum": "MinQuorum",
    "server-stabilization-time": "ServerStabilizationTime",
    "redundancy-zone-tag": "RedundancyZoneTag",
    "disable-upgrade-migration": "DisableUpgradeMigration",
    "upgrade-version-tag": "UpgradeVersionTag",
    "auto-admit-servers": "AutoAdmitServers",
}


def _set_config(call: Call) -> None:
    """Read, change, write back if nobody else did meanwhile: settings that are not named stay as they are."""
    try:
        config = call.client.get(_AUTOPILOT)
    except Failed as e:
        raise Failed(f"Error querying Autopilot configuration: {e}") from e
    config.pop("AutoAdmitServers", None)  # not given, it stays as it is; to set it takes an agent on a server's host
    config |= {name: call[flag] for flag, name in _SETTINGS.items() if call[flag] is not None}
    try:
        done = call.client.put(_AUTOPILOT, config, {"cas": config["ModifyIndex"]}).text == "true"
    except Failed as e:
        raise Failed(f"Error setting Autopilot configuration: {e}") from e
    if not done:
        raise Failed("Configuration could not be atomically updated, please try again")
    say("Configuration updated!")


def _state(call: Call) -> None:
    if call["format"] not in ("pretty", "json"):
        raise Failed(f'-format: "{call["format"]}" must be pretty or json')
    try:
        state = call.client.get(_STATE)
    except ApiError as e:
        hint = "; Consul has it from 1.9 on" if e.code == 404 else ""
        raise Failed(f"Error querying Autopilot state: {e}{hint}") from e
    except Failed as e:
        raise Failed(f"Error querying Autopilot state: {e}") from e
    say(tabbed_json(state) if call["format"] == "json" else _pretty(state))


def _pretty(state: dict[str, Any]) -> str:
    head = [
        ("Healthy:", state["Healthy"]),
        ("Failure Tolerance:", state["FailureTolerance"]),
        ("Optimistic Failure Tolerance:", state.get("OptimisticFailureTolerance", 0)),
        ("Leader:", state["Leader"]),
    ]
    lines = [f"{name:<29} {_shown(value)}" for name, value in head]
    lines += ["Voters:", *(f"   {server_id}" for server_id in state.get("Voters") or ())]
    if state.get("ReadReplicas"):
        lines += ["Read Replicas:", *(f"   {server_id}" for server_id in state["ReadReplicas"])]
    lines.append("Servers:")
    for server_id, server in sorted((state.get("Servers") or {}).items()):
        lines.append(f"   {server_id}")
        for name in _OF_SERVER:
            lines.append(f"      {name + ':':<16} {_shown(server.get(name.replace(' ', ''), ''))}")
        if server.get("Meta"):
            lines += ["      Meta", *(f'         "{key}": "{value}"' for key, value in sorted(server["Meta"].items()))]
    return "\n".join(lines)


_OF_SERVER = (
    "Name",
    "Address",
    "Version",
    "Status",
    "Node Type",
    "Node Status",
    "Healthy",
    "Last Contact",
    "Last Term",
    "Last Index",
)


COMMANDS = {
    "raft list-peers": Command(
        "operator raft list-peers [options]",
        "Display the servers, and those that wait to be let in",
        _list_peers,
        reach="server",
        takes=0,
        text="With -stale any server answers, also where there is no leader.",
    ),
    "raft remove-peer": Command(
        "operator raft remove-peer [options] [NAME]",
        "Remove a server from the cluster",
        _remove_peer,
        (
            Flag("address", "Address (IP:port) of the server to remove."),
            Flag("id", "ID or name of the server to remove."),
        ),
        reach="server",
        takes=1,
        text="The others refuse it from then on, alive or not, until it is let in again.",
    ),
    "raft add-peer": Command(
        "operator raft add-peer [options] NAME",
        "Let a server in that waits for it",
        _add_peer,
        (Flag("id", "ID of the waiting server, where two have its name."),),
        reach="server",
        takes=1,
        text="""
It becomes a learner and gets every secret of the cluster: be sure that it is yours.
Only the agents of servers' hosts take this command.""",
    ),
    "raft transfer-leader": Command(
        "operator raft transfer-leader [options]",
        "Make another server the leader",
        _transfer_leader,
        (Flag("id", "ID or name of the server to lead; default: the one that has the most of the log."),),
        reach="server",
        takes=0,
    ),
    "autopilot get-config": Command(
        "operator autopilot get-config [options]",
        "Display autopilot's configuration",
        _get_config,
        reach="server",
        takes=0,
    ),
    "autopilot set-config": Command(
        "operator autopilot set-config [options]",
        "Change autopilot's configuration",
        _set_config,
        (
            Flag("cleanup-dead-servers", "Remove failed servers when others keep the majority.", "choice"),
            Flag("last-contact-threshold", 'A server not heard for longer is not healthy, such as "200ms".'),
            Flag("max-trailing-logs", "A server that is more log entries behind is not healthy.", "whole"),
            Flag("min-quorum", "Never clean up below this many voting servers.", "whole"),
            Flag("server-stabilization-time", 'How long a new server must be healthy to get a vote, such as "10s".'),
            Flag("auto-admit-servers", "Let in new servers that hold the cluster secret, unasked.", "choice"),
            Flag("redundancy-zone-tag", "Of Consul Enterprise."),
            Flag("disable-upgrade-migration", "Of Consul Enterprise.", "choice"),
            Flag("upgrade-version-tag", "Of Consul Enterprise."),
        ),
        reach="server",
        takes=0,
        text="Settings that are not given stay as they are.",
    ),
    "autopilot state": Command(
        "operator autopilot state [options]",
        "Display how autopilot judges the servers",
        _state,
        (Flag("format", "pretty or json.", default="pretty"),),
        reach="server",
        takes=0,
    ),
}
