"""What a definition of a service, its sidecar or a check may say: each field once.

Files (`agent/config/loading.py`), bodies of requests (`agent/definition_fields.py`), registrations in the catalog
(`agent/http/catalog.py`) and the command line (`cli/services.py`) read these tables, each in its own words. What a kind
of check asks for is `agent/checks/kinds.py`'s. The case of a name does not count, and CamelCase is snake_case.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Type(Enum):
    """Of one value. A MAP is the user's, with all that is in it; of namespaces there is one."""

    TEXT, WHOLE, SWITCH, DURATION, TEXTS, MAP, TEXT_MAP, HEADER, STATUS, NAMESPACE = range(10)


class Known(Enum):
    """Where a field is known. A file may say more than an agent can do, which then says so."""

    EVERYWHERE, IN_FILES, IN_BODIES = range(3)


class Field(NamedTuple):
    name: str  # as files and rows spell it
    api: str
    form: Form
    known: Known


class Table:
    """The fields of one object, and where a value is a table, of an object in it."""

    def __init__(self, *groups: tuple[Field, ...]) -> None:
        fields = [field for group in groups for field in group]
        self.in_files = {f.name: f for f in fields if f.known is not Known.IN_BODIES}
        self.in_bodies = {f.name: f for f in fields if f.known is not Known.IN_FILES}
        self._folded = {_fold(name): field for name, field in self.in_bodies.items()}

    def in_body(self, name: str) -> Field | None:
        return self._folded.get(_fold(name))

    def without(self, name: str) -> Table:
        return self.only(" ".join(other for other in self.in_bodies if other != name))

    def only(self, names: str) -> Table:
        return Table(tuple(self.in_bodies[name] for name in names.split()))


class Many(NamedTuple):
    """A list of objects; one object alone is a list of one."""

    table: Table


class MapOf(NamedTuple):
    """A map from any name to objects."""

    table: Table


Form = Type | Table | Many | MapOf


def fields(form: Form, names: str, known: Known = Known.EVERYWHERE) -> tuple[Field, ...]:
    return tuple(Field(name, api_name(name), form, known) for name in names.split())


_ACRONYMS = {w: w.upper() for w in ("grpc", "h2ping", "http", "id", "os", "sni", "tcp", "tls", "ttl", "udp", "url")}


def api_name(name: str) -> str:
    """`check_id` as the API writes it: `CheckID`."""
    return "".join(_ACRONYMS.get(word, word[:1].upper() + word[1:]) for word in name.split("_"))


def _fold(name: str) -> str:
    return name.replace("_", "").lower()


CHECK = Table(
    fields(Type.TEXT, "id check_id name notes service_id token partition"),
    fields(Type.TEXT, "type output proxy_http proxy_grpc", Known.IN_BODIES),  # what an agent shows may be sent back
    fields(Type.NAMESPACE, "namespace"),
    fields(Type.STATUS, "status"),
    fields(Type.DURATION, "interval timeout deregister_critical_service_after"),
    fields(Type.WHOLE, "success_before_passing failures_before_warning failures_before_critical output_max_size"),
    fields(Type.TEXT, "http method body tls_server_name"),
    fields(Type.HEADER, "header"),
    fields(Type.SWITCH, "tls_skip_verify"),
    fields(Type.SWITCH, "disable_redirects", Known.IN_FILES),
    fields(Type.TEXT, "tcp"),
    fields(Type.SWITCH, "tcp_use_tls", Known.IN_FILES),
    fields(Type.TEXTS, "args script_args"),
    fields(Type.DURATION, "ttl"),
    fields(Type.TEXT, "alias_node alias_service"),
    fields(Type.TEXT, "grpc docker_container_id shell"),
    fields(Type.SWITCH, "grpc_use_tls"),
    fields(Type.TEXT, "udp h2ping os_service", Known.IN_FILES),
    fields(Type.SWITCH, "h2ping_use_tls", Known.IN_FILES),
)
ADDRESS = Table(fields(Type.TEXT, "address"), fields(Type.WHOLE, "port"))
WEIGHTS = Table(fields(Type.WHOLE, "passing warning"))
_GATEWAY = Table(fields(Type.TEXT, "mode"))
_UPSTREAM = Table(
    fields(Type.TEXT, "destination_type destination_namespace destination_name datacenter local_bind_address"),
    fields(Type.WHOLE, "local_bind_port"),
    fields(Type.MAP, "config"),
    fields(_GATEWAY, "mesh_gateway"),
    fields(
        Type.TEXT,
        "destination_partition destination_peer local_bind_socket_path local_bind_socket_mode",
        Known.IN_FILES,
    ),
)
_EXPOSED = Table(
    fields(Type.WHOLE, "listener_port"),
    fields(Type.TEXT, "path"),
    fields(Type.WHOLE, "local_path_port"),
    fields(Type.TEXT, "protocol"),
    fields(Type.SWITCH, "parsed_from_check", Known.IN_BODIES),
)
PROXY = Table(
    fields(Type.TEXT, "destination_service_name destination_service_id local_service_address"),
    fields(Type.WHOLE, "local_service_port"),
    fields(Type.TEXT, "mode"),
    fields(Type.MAP, "config"),
    fields(Many(_UPSTREAM), "upstreams"),
    fields(_GATEWAY, "mesh_gateway"),
    fields(Table(fields(Type.SWITCH, "checks"), fields(Many(_EXPOSED), "paths")), "expose"),
    fields(Type.TEXT, "local_service_socket_path", Known.IN_FILES),
    fields(Type.MAP, "transparent_proxy access_logs", Known.IN_FILES),
)
_PORT = Table(fields(Type.TEXT, "name"), fields(Type.WHOLE, "port"), fields(Type.SWITCH, "default"))
_COMMON = (
    *fields(Type.TEXT, "id name"),
    *fields(Type.TEXT, "service", Known.IN_BODIES),  # as the catalog calls a name
    *fields(Type.TEXT, "kind address token partition"),
    *fields(Type.TEXT, "socket_path", Known.IN_FILES),
    *fields(Type.NAMESPACE, "namespace"),
    *fields(Type.TEXTS, "tags"),
    *fields(Type.WHOLE, "port"),
    *fields(Many(_PORT), "ports", Known.IN_FILES),
    *fields(MapOf(ADDRESS), "tagged_addresses"),
    *fields(Type.TEXT_MAP, "meta"),
    *fields(WEIGHTS, "weights"),
    *fields(Type.SWITCH, "enable_tag_override"),
    *fields(Table(fields(Type.TEXT, "region zone")), "locality"),
    *fields(CHECK, "check"),
    *fields(Many(CHECK), "checks"),
    *fields(PROXY, "proxy"),
)


def _with_connect(sidecar: Table) -> Table:
    return Table(_COMMON, fields(Table(fields(Type.SWITCH, "native"), fields(sidecar, "sidecar_service")), "connect"))


SERVICE = _with_connect(_with_connect(Table(_COMMON)))  # a sidecar of a sidecar is refused, but in Consul's words
