"""`rostra catalog datacenters|nodes|services`: what is registered in the cluster."""

from __future__ import annotations

from typing import Any

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Flag, note, say
from rostra.cli.errors import Failed
from rostra.cli.output import columns, pairs, wide_columns

_NODE_META = Flag("node-meta", "Only nodes with this metadata. Repeatable.", "pairs")


def _datacenters(call: Call) -> None:
    for name in _ask(call, "datacenters", path("catalog", "datacenters"), {}):
        say(name)


def _nodes(call: Call) -> None:
    query = {"near": call["near"], "filter": call["filter"], "node-meta": _meta(call)}
    if call["service"]:
        rows = _ask(call, "nodes for service", path("catalog", "service", call["service"]), query)
        nodes = list({row["Node"]: {**row, "Meta": row.get("NodeMeta")} for row in rows}.values())
    else:
        nodes = _ask(call, "nodes", path("catalog", "nodes"), query)
    if not nodes:
        note("No nodes match the given query - try expanding your search.")
        return
    if call["detailed"]:
        table = [["Node", "ID", "Address", "DC", "TaggedAddresses", "Meta"]]
        for n in nodes:
            addresses, meta = pairs(n.get("TaggedAddresses") or {}), pairs(n.get("Meta") or {})
            table.append([n["Node"], n.get("ID") or "", n["Address"], n.get("Datacenter") or "", addresses, meta])
    else:
        table = [["Node", "ID", "Address", "DC"]]
        for n in nodes:
            table.append([n["Node"], (n.get("ID") or "").partition("-")[0], n["Address"], n.get("Datacenter") or ""])
    say(columns(table))


def _services(call: Call) -> None:
    if call["node"]:
        found = _ask(call, "services", path("catalog", "node", call["node"]), {"node-meta": _meta(call)}) or {}
        services: dict[str, set[str]] = {}
        for service in (found.get("Services") or {}).values():
            services.setdefault(service["Service"], set()).update(service.get("Tags") or [])
    else:
        found = _ask(call, "services", path("catalog", "services"), {"node-meta": _meta(call)})
        services = {name: set(tags or []) for name, tags in found.items()}
    if not services:
        note("No services match the given query - try expanding your search.")
    elif call["tags"]:
        say(wide_columns([(name, ",".join(sorted(tags))) for name, tags in sorted(services.items())]))
    else:
        for name in sorted(services):
            say(name)


def _ask(call: Call, what: str, where: str, query: dict[str, Any]) -> Any:
    try:
        return call.client.get(where, query)
    except Failed as e:
        raise Failed(f"Error listing {what}: {e}") from e


def _meta(call: Call) -> list[str] | None:
    return [f"{key}:{value}" for key, value in call["node-meta"].items()] or None


COMMANDS = {
    "datacenters": Command(
        "catalog datacenters [options]", "Lists all known datacenters", _datacenters, reach="server", takes=0
    ),
    "nodes": Command(
        "catalog nodes [options]",
        "Lists all nodes in the given datacenter",
        _nodes,
        (
            Flag("detailed", "Show full IDs, all addresses and metadata.", "switch"),
            Flag("filter", "Filter expression."),
            Flag("near", "Sort by round-trip time from this node; _agent is the agent's own."),
            _NODE_META,
            Flag("service", "Only nodes that provide this service."),
        ),
        reach="server",
        takes=0,
    ),
    "services": Command(
        "catalog services [options]",
        "Lists all registered services in a datacenter",
        _services,
        (
            Flag("node", "Only services of this node (name or ID)."),
            _NODE_META,
            Flag("tags", "Show the tags of each service beside it.", "switch"),
        ),
        reach="server",
        takes=0,
    ),
}
