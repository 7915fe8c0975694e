"""Health: instances of a service joined with their node and checks, and the checks by themselves.

An instance's row is (NodeRow, ServiceRow, checks of the node then checks of the service). Catalog and health
endpoints, DNS and proxies all derive their answers from it; filtering by status or tag is the agent's, so that one
watch serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow
from rostra.server.state.tables import Pair, Tables, mesh_destination
from rostra.server.state.transaction import View

Instance = tuple[NodeRow, ServiceRow, tuple[CheckRow, ...]]


@dataclass(frozen=True, slots=True)
class ServiceInstances:
    """{(node, service id): Instance} of the services called `name`."""

    kind: ClassVar[str] = "health.service"
    name: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[Pair]:
        name = self.name.lower()
        view.reads("service:" + name)
        return list(view.tables.instances_of.get(name, ()))

    def row(self, view: View, key: Pair) -> Instance | None:
        tables = view.tables
        service = tables.services.get(key)
        if service is None or (service.name != self.name and service.name.lower() != self.name.lower()):
            return None
        return _instance(tables, key, service)

    def visible(self, can: Authorizer, key: Pair, row: Instance) -> bool:
        return sees_instance(can, row)


@dataclass(frozen=True, slots=True)
class ConnectInstances:
    """{(node, service id): Instance} of what accepts connections of the mesh for the service `name`."""

    kind: ClassVar[str] = "health.connect"
    name: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[Pair]:
        name = self.name.lower()
        view.reads("connect:" + name)
        return list(view.tables.meshed_for.get(name, ()))

    def row(self, view: View, key: Pair) -> Instance | None:
        tables = view.tables
        service = tables.services.get(key)
        if service is None or mesh_destination(service).lower() != self.name.lower():
            return None
        return _instance(tables, key, service)

    def visible(self, can: Authorizer, key: Pair, row: Instance) -> bool:
        return sees_instance(can, row)


@dataclass(frozen=True, slots=True)
class NodeChecks:
    """{check id: CheckRow} of all checks on a node, those of its services included."""

    kind: ClassVar[str] = "health.node"
    node: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        node = view.tables.node_name(self.node)
        view.reads("node:" + node.lower())
        return [check_id for _, check_id in view.tables.checks_on.get(node, ())]

    def row(self, view: View, key: str) -> CheckRow | None:
        # A tuple is a key of NodeServices, with which the granule is shared.
        return view.tables.checks.get((view.tables.node_name(self.node), key)) if type(key) is str else None

    def visible(self, can: Authorizer, key: str, row: CheckRow) -> bool:
        return sees_check(can, row)


@dataclass(frozen=True, slots=True)
class Checks:
    """{(node, check id): CheckRow} of all checks."""

    kind: ClassVar[str] = "health.state"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[Pair]:
        view.reads("table:checks")
        return view.tables.check_pairs()

    def row(self, view: View, key: Pair) -> CheckRow | None:
        return view.tables.checks.get(key)

    def visible(self, can: Authorizer, key: Pair, row: CheckRow) -> bool:
        return sees_check(can, row)


def sees_instance(can: Authorizer, row: Instance) -> bool:
    return can.node_read(row[0].name) and can.service_read(row[1].name)


def sees_check(can: Authorizer, row: CheckRow) -> bool:
    return can.node_read(row.node) and (not row.service_name or can.service_read(row.service_name))


def _instance(tables: Tables, key: Pair, service: ServiceRow) -> Instance:
    node, service_id = key
    checks_for = tables.checks_for
    return tables.nodes.rows[node], service, checks_for.get((node, ""), ()) + checks_for.get((node, service_id), ())
