"""The catalog: nodes, the services on them and their checks.

Everything enters by `Register` and leaves by `Deregister`. Registering what is there already changes nothing and
moves no index. A change to a node or to a check of a node touches every service on it, because health answers join
the three. Names of nodes and services, and ids of services and checks, do not differ by case: a node keeps the
spelling under which it came first, an id has that of its last registration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow
from rostra.server.state.session import end_session, end_sessions_of_check
from rostra.server.state.tables import Tables, mesh_destination
from rostra.server.state.transaction import Tx, View
from rostra.wire.codec import decode_fields
from rostra.wire.errors import BadRequest, Conflict

SERF_HEALTH = "serfHealth"
#: The first words of a refusal: another node has the name.
NAME_RESERVED = "Node name"
STATUSES = ("passing", "warning", "critical")

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_EMPTY: dict[str, Any] = {}

R = TypeVar("R", NodeRow, ServiceRow, CheckRow)


@dataclass(frozen=True, slots=True)
class Register:
    """Create or update a node and, with it, one service and any checks. All or nothing.

    `service` and `checks` are maps of the fields of ServiceRow and CheckRow by name, without node and indexes.
    """

    kind: ClassVar[str] = "catalog.register"
    node: str
    address: str = ""
    node_id: str = ""
    datacenter: str = ""
    tagged_addresses: dict[str, str] = field(default_factory=dict)
    node_meta: dict[str, str] = field(default_factory=dict)
    skip_node_update: bool = False
    service: dict[str, Any] | None = None
    checks: tuple[dict[str, Any], ...] = ()

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        """A change of a node needs the right to write it; one of a service or its checks, the right to write all it is
        or was."""
        node = tables.node_name(self.node)
        if (self._changes_node(tables.nodes.get(node)) or self._names_node_checks()) and not can.node_write(node):
            return False
        names = {check["service_name"] for check in self.checks if isinstance(check.get("service_name"), str)}
        ids = {str(check.get("service_id")) for check in self.checks if check.get("service_id")}
        if self.service is not None:
            names.add(str(self.service.get("name") or ""))
            ids.add(str(self.service.get("id") or self.service.get("name") or ""))
        names |= {tables.services.rows[key].name for each in ids for key in tables.services_like(node, each)}
        return all(can.service_write(name) for name in names if name)

    def _changes_node(self, old: NodeRow | None) -> bool:
        return old is None or not (
            self.skip_node_update
            or (
                old.address == self.address
                and self.node_id.lower() in ("", old.id)
                and old.tagged_addresses == self.tagged_addresses
                and old.meta == self.node_meta
            )
        )

    def _names_node_checks(self) -> bool:
        return any(not check.get("service_id") for check in self.checks)

    def apply(self, tx: Tx) -> bool:
        if not self.node:
            raise BadRequest("Must provide node")
        node = self._put_node(tx)
        if self.service is not None:
            put_service(tx, service_fields(node, self.service))
        for given in self.checks:
            put_check(tx, check_fields(tx.tables, node, given))
        return True

    def _put_node(self, tx: Tx) -> str:
        """The name of the node, which exists afterwards."""
        tables = tx.tables
        name = tables.node_name(self.node)
        old = tables.nodes.get(name)
        if old is not None and self.skip_node_update:
            return name
        if not self.address and not self.skip_node_update:
            raise BadRequest("Must provide address if SkipNodeUpdate is not set")
        node_id = self.node_id.lower()
        if node_id and not _UUID.fullmatch(node_id):
            raise BadRequest(f"Bad node ID: {self.node_id!r} is not a UUID")
        if old is not None and not node_id:
            node_id = old.id  # whoever registers a service from outside need not know it
        former: NodeRow | None = None
        if node_id and (old is None or old.id != node_id):
            if old is not None and old.id and _is_up(tables, name):
                raise Conflict(
                    f"{NAME_RESERVED} {name} is reserved by node {old.id} with name {name} ({old.address}): "
                    "give this node another name, or wait until that one has failed or left"
                )
            former = tables.nodes.get(tables.node_by_id.get(node_id, ""))
            if former is not None:  # the same node under a new name
                remove_node(tx, former.name)
        fields = {
            "name": name,
            "id": node_id,
            "address": self.address,
            "datacenter": self.datacenter or (tables.cluster.rows[""].datacenter if "" in tables.cluster.rows else ""),
            "tagged_addresses": canonical(self.tagged_addresses),
            "meta": canonical(self.node_meta),
        }
        row = _row(NodeRow, tx, fields, old)
        if row is not None:
            if former is not None:
                row = row._replace(create_index=former.create_index)
            tx.put(tables.nodes, name, row)
            touch_node(tx, name)
        return name


@dataclass(frozen=True, slots=True)
class Deregister:
    """Remove a check, a service with its checks, or a whole node. True as well when there is none."""

    kind: ClassVar[str] = "catalog.deregister"
    node: str
    service_id: str | None = None
    check_id: str | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        """The right to write the node is enough, or to write the service that goes or whose check goes."""
        node = tables.node_name(self.node)
        if can.node_write(node):
            return True
        if self.service_id:
            names = [tables.services.rows[key].name for key in tables.services_like(node, self.service_id)]
        elif self.check_id:
            names = [tables.checks.rows[key].service_name for key in tables.checks_like(node, self.check_id)]
        else:
            return False
        return bool(names) and all(name and can.service_write(name) for name in names)

    def apply(self, tx: Tx) -> bool:
        if not self.node:
            raise BadRequest("Must provide node")
        tables = tx.tables
        node = tables.node_name(self.node)
        if self.service_id:
            for _, service_id in tables.services_like(node, self.service_id):
                remove_service(tx, node, service_id)
        elif self.check_id:
            for _, check_id in tables.checks_like(node, self.check_id):
                remove_check(tx, node, check_id)
        elif node in tables.nodes.rows:
            remove_node(tx, node)
        return True


@dataclass(frozen=True, slots=True)
class Nodes:
    """{name: NodeRow} of all nodes."""

    kind: ClassVar[str] = "catalog.nodes"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:nodes")
        return list(view.tables.nodes.order or ())

    def row(self, view: View, key: str) -> NodeRow | None:
        return view.tables.nodes.get(key)

    def visible(self, can: Authorizer, key: str, row: NodeRow) -> bool:
        return can.node_read(key)


@dataclass(frozen=True, slots=True)
class ServiceNames:
    """{service name: (its tags over all instances, sorted,)}."""

    kind: ClassVar[str] = "catalog.services"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[str]:
        view.reads("table:service-names")
        return list(view.tables.service_name_order)

    def row(self, view: View, key: str) -> tuple[tuple[str, ...]] | None:
        name = view.tables.service_names.get(key)
        return name.row if name is not None else None

    def visible(self, can: Authorizer, key: str, row: tuple[tuple[str, ...]]) -> bool:
        return can.service_read(key)


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """{(node, service id): (address, service name)} of the instances that have an address of their own."""

    kind: ClassVar[str] = "catalog.addresses"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[tuple[str, str]]:
        view.reads("table:service-addresses")
        return list(view.tables.services.rows)

    def row(self, view: View, key: tuple[str, str]) -> tuple[str, str] | None:
        service = view.tables.services.get(key)
        return (service.address, service.name) if service is not None and service.address else None

    def visible(self, can: Authorizer, key: tuple[str, str], row: tuple[str, str]) -> bool:
        return can.service_read(row[1]) and can.node_read(key[0])


@dataclass(frozen=True, slots=True)
class NodeServices:
    """{("",): NodeRow, ("s", service id): ServiceRow}, empty when there is no such node."""

    kind: ClassVar[str] = "catalog.node"
    name: str

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return True

    def keys(self, view: View) -> list[tuple[str, ...]]:
        tables = view.tables
        node = tables.node_name(self.name)
        view.reads("node:" + node.lower())
        if node not in tables.nodes.rows:
            return []
        return [("",), *[("s", service_id) for service_id in tables.services_on.get(node, ())]]

    def row(self, view: View, key: tuple[str, ...]) -> NodeRow | ServiceRow | None:
        node = view.tables.node_name(self.name)
        if key == ("",):
            return view.tables.nodes.get(node)
        if len(key) == 2 and key[0] == "s" and type(key) is tuple:
            return view.tables.services.get((node, key[1]))
        return None  # the key of a check: the granule of a node is shared with NodeChecks

    # -- rows from what was asked for ---------------------------------------------------------------------------------

    def visible(self, can: Authorizer, key: tuple[str, ...], row: NodeRow | ServiceRow) -> bool:
        return can.node_read(row.name if isinstance(row, NodeRow) else row.node) and (
            isinstance(row, NodeRow) or can.service_read(row.name)
        )


def service_fields(node: str, given: dict[str, Any]) -> dict[str, Any]:
    """The checked fields of the ServiceRow that `given` describes, all but its indexes. Raises BadRequest."""
    name, service_id = given.get("name"), given.get("id")
    if not name:
        raise BadRequest("Must provide service name with ID" if service_id else "Must provide service name")
    fields = decode_fields(ServiceRow, given, "service")
    fields["node"] = node
    fields["id"] = service_id or name
    port = fields.get("port", 0)
    if not 0 <= port <= 65535:
        raise BadRequest(f"service {name!r}: port {port} is not between 0 and 65535")
    for weight in ("weight_passing", "weight_warning"):
        if not 0 <= fields.get(weight, 1) <= 65535:
            raise BadRequest(f"service {name!r}: weights must be between 0 and 65535")
    if fields.get("kind") == "connect-proxy":
        if not (fields.get("proxy") or _EMPTY).get("destination_service_name"):
            raise BadRequest("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
        if not port:
            raise BadRequest("Port must be set for a Connect proxy")
    for field_name in ("meta", "tagged_addresses", "proxy"):
        if field_name in fields:
            fields[field_name] = canonical(fields[field_name])
    return fields


def check_fields(tables: Tables, node: str, given: dict[str, Any]) -> dict[str, Any]:
    """The checked fields of the CheckRow that `given` describes, all but its indexes.

    Its service's name and tags come from there; a status that is not given is that of the check there. Raises
    BadRequest.
    """
    fields = decode_fields(CheckRow, given, "check")
    check_id = fields.get("id") or fields.get("name")
    if not check_id:
        raise BadRequest("Must provide check id or name")
    fields["node"] = node
    fields["id"] = check_id
    service_id = fields.get("service_id")
    if service_id:
        service = tables.services.get((node, service_id))
        if service is None:
            like = tables.services_like(node, service_id)
            if not like:
                raise BadRequest(
                    f'Missing service registration: check {check_id!r} names service {service_id!r} on node "{node}"'
                )
            service = tables.services.rows[like[0]]
        fields["service_id"], fields["service_name"], fields["service_tags"] = service.id, service.name, service.tags
    else:
        fields["service_name"], fields["service_tags"] = "", ()
    status = fields.get("status")
    if not status:
        like = tables.checks_like(node, check_id)
        fields["status"] = tables.checks.rows[like[0]].status if like else "critical"
    elif status not in STATUSES:
        raise BadRequest(f"check {check_id!r}: status {status!r} is none of {', '.join(STATUSES)}")
    if "definition" in fields:
        fields["definition"] = canonical(fields["definition"])
    return fields


def canonical(value: Any) -> Any:
    """`value` with its maps in order of their keys, so that equal states are equal bytes."""
    kind = type(value)
    if kind is dict:
        if not value:
            return _EMPTY
        return {name: canonical(value[name]) for name in sorted(value)}
    if kind is tuple or kind is list:
        return tuple([canonical(item) for item in value])
    return value


# -- changes ------------------------------------------------------------------------------------------------------


def put_service(tx: Tx, fields: dict[str, Any]) -> None:
    """Create or change a service instance; its checks follow its id, name and tags."""
    tables = tx.tables
    rows = tables.services.rows
    key = (fields["node"], fields["id"])
    others = tables.other_services(key)
    old = rows.get(key) or (rows[others[0]] if others else None)
    row = _row(ServiceRow, tx, fields, old)
    if row is None:
        if old is None or not others:
            return
        row = old
    before = {row.name: _name_row(tables, row.name)}
    checks: tuple[CheckRow, ...] = ()
    for pair in (key, *others) if old is not None else ():
        one = rows.get(pair)
        if one is None:
            continue
        before.setdefault(one.name, _name_row(tables, one.name))
        checks += tables.checks_for.get(pair, ())
        touch_instance(tx, one)
        if pair != key:  # the same service, spelled otherwise
            tx.touch("node:" + one.node.lower(), ("s", one.id))
            if one.address:
                tx.touch("table:service-addresses", pair)
            tx.delete(tables.services, pair)
    tx.put(tables.services, key, row)
    touch_instance(tx, row)
    tx.touch("node:" + row.node.lower(), ("s", row.id))
    addressed = (old.address, old.name) if old is not None and old.id == row.id else ("", row.name)
    if addressed != (row.address, row.name):
        tx.touch("table:service-addresses", key)
    for name, was in before.items():
        if was != _name_row(tables, name):
            tx.touch("table:service-names", name)
    for check in checks:
        if check.service_id != row.id or check.service_name != row.name or check.service_tags != row.tags:
            put_check(tx, check._replace(service_id=row.id, service_name=row.name, service_tags=row.tags)._asdict())


def put_check(tx: Tx, fields: dict[str, Any]) -> None:
    """Create or change a check; a critical one ends the sessions that rely on it."""
    tables = tx.tables
    rows = tables.checks.rows
    key = (fields["node"], fields["id"])
    others = tables.other_checks(key)
    old = rows.get(key) or (rows[others[0]] if others else None)
    row = _row(CheckRow, tx, fields, old)
    if row is None:
        if old is None or not others:
            return
        row = old
    for pair in others:  # the same check, spelled otherwise
        touch_check(tx, rows[pair])
        tx.delete(tables.checks, pair)
    if old is not None and old.service_id != row.service_id:
        touch_check(tx, old)
    tx.put(tables.checks, key, row)
    touch_check(tx, row)
    if row.status == "critical":
        end_sessions_of_check(tx, row.node, row.id)


def _row(row_type: type[R], tx: Tx, fields: dict[str, Any], old: R | None) -> R | None:
    """The row to write, with its indexes; None when it is there already."""
    if old is None:
        fields["create_index"] = fields["modify_index"] = tx.index
        return row_type(**fields)
    fields["create_index"], fields["modify_index"] = old.create_index, old.modify_index
    if row_type(**fields) == old:
        return None
    fields["modify_index"] = tx.index
    return row_type(**fields)


def remove_check(tx: Tx, node: str, check_id: str) -> None:
    row = tx.tables.checks.rows[(node, check_id)]
    touch_check(tx, row)
    tx.delete(tx.tables.checks, (node, check_id))
    end_sessions_of_check(tx, node, check_id)


def remove_service(tx: Tx, node: str, service_id: str) -> None:
    """Remove an instance that exists, and its checks."""
    tables = tx.tables
    for check in tables.checks_for.get((node, service_id), ()):
        remove_check(tx, node, check.id)
    row = tables.services.rows[(node, service_id)]
    before = _name_row(tables, row.name)
    touch_instance(tx, row)
    tx.touch("node:" + node.lower(), ("s", service_id))
    if row.address:
        tx.touch("table:service-addresses", (node, service_id))
    tx.delete(tables.services, (node, service_id))
    if before != _name_row(tables, row.name):
        tx.touch("table:service-names", row.name)


def remove_node(tx: Tx, node: str) -> None:
    """Remove a node that exists, with everything on it."""
    tables = tx.tables
    for service_id in list(tables.services_on.get(node, ())):
        remove_service(tx, node, service_id)
    for _, check_id in list(tables.checks_on.get(node, ())):
        remove_check(tx, node, check_id)
    for session_id in list(tables.sessions_on.get(node, ())):
        end_session(tx, session_id)
    touch_node(tx, node)
    tx.delete(tables.nodes, node)


# -- who sees a change --------------------------------------------------------------------------------------------


def touch_instance(tx: Tx, row: ServiceRow) -> None:
    key = (row.node, row.id)
    tx.touch("service:" + row.name.lower(), key)
    destination = mesh_destination(row)
    if destination:
        tx.touch("connect:" + destination.lower(), key)


def touch_check(tx: Tx, row: CheckRow) -> None:
    node = row.node
    tx.touch("node:" + node.lower(), row.id)
    tx.touch("table:checks", (node, row.id))
    if row.service_id:
        service = tx.tables.services.get((node, row.service_id))
        if service is not None:
            touch_instance(tx, service)
    else:
        touch_instances_on(tx, node)


def touch_node(tx: Tx, node: str) -> None:
    tx.touch("node:" + node.lower(), ("",))
    tx.touch("table:nodes", node)
    touch_instances_on(tx, node)


def touch_instances_on(tx: Tx, node: str) -> None:
    services = tx.tables.services.rows
    for service_id in tx.tables.services_on.get(node, ()):
        touch_instance(tx, services[(node, service_id)])


def _name_row(tables: Tables, name: str) -> tuple[tuple[str, ...]] | None:
    found = tables.service_names.get(name)
    return found.row if found is not None else None


def _is_up(tables: Tables, node: str) -> bool:
    """Whether the name is taken by a node that answers; one that nobody probes cannot defend its name."""
    checks = [tables.checks.rows[key] for key in tables.checks_like(node, SERF_HEALTH)]
    member = tables.members.get(node)
    return any(check.status != "critical" for check in checks) and (member is None or member.status == "alive")
