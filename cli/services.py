"""`rostra services register|deregister`: services of the agent that is asked, from flags or definition files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Flag, say
from rostra.cli.errors import Failed

_TEXT_FLAGS = {"name": "Name", "id": "ID", "address": "Address", "kind": "Kind"}


def _register(call: Call) -> None:
    given = any(call[name] for name in (*_TEXT_FLAGS, "port", "tag", "meta", "tagged-address"))
    if call.args and given:
        raise Failed("Service registration requires arguments or flags, not both.")
    if not call.args and not given:
        raise Failed("Service registration requires at least one argument or flags.")
    services = _from_files(call.args) if call.args else [_from_flags(call)]
    for service in services:
        try:
            call.client.put(path("agent", "service", "register"), service)
        except Failed as e:
            raise Failed(f"Error registering service {service['Name']!r}: {e}") from e
        say(f"Registered service: {service['Name']}")


def _deregister(call: Call) -> None:
    if call.args and call["id"]:
        raise Failed("Service deregistration requires arguments or -id, not both.")
    if not call.args and not call["id"]:
        raise Failed("Service deregistration requires at least one argument or -id.")
    ids = [call["id"]] if call["id"] else [s.get("ID") or s["Name"] for s in _from_files(call.args)]
    for service_id in ids:
        try:
            if call.client.find(path("agent", "service", service_id)) is None:  # deregistering itself would not say
                raise Failed("this agent has no service with that ID; /v1/agent/services lists what it has")
            call.client.put(path("agent", "service", "deregister", service_id))
        except Failed as e:
            raise Failed(f"Error deregistering service {service_id!r}: {e}") from e
        say(f"Deregistered service: {service_id}")


def _from_flags(call: Call) -> dict[str, Any]:
    service: dict[str, Any] = {key: call[flag] for flag, key in _TEXT_FLAGS.items() if call[flag]}
    if not service.get("Name"):
        raise Failed("Service registration requires -name.")
    if call["port"]:
        service["Port"] = call["port"]
    if call["tag"]:
        service["Tags"] = call["tag"]
    if call["meta"]:
        service["Meta"] = call["meta"]
    if call["tagged-address"]:
        service["TaggedAddresses"] = {k: _address_port(v) for k, v in call["tagged-address"].items()}
    return service


def _address_port(text: str) -> dict[str, Any]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return {"Address": text.strip("[]")}
    if not port.isdigit():
        raise Failed(f"-tagged-address: {text!r} must be address or address:port")
    return {"Address": host.strip("[]"), "Port": int(port)}


def _from_files(files: list[str]) -> list[dict[str, Any]]:
    """The service definitions of all files, in the API's spelling; none is registered while one is wrong."""
    from rostra.agent import config, schema

    services: list[dict[str, Any]] = []
    problems: list[str] = []
    for file in files:
        if os.path.isdir(file):
            problems.append(f"{file}: a directory; name its files, such as {os.path.join(file, '*.hcl')}")
            continue
        if not os.path.exists(file):
            problems.append(f"{file}: no such file")
            continue
        try:
            found = config.read_definitions(file)
        except config.ConfigErrors as e:
            problems.append(str(e))
            continue
        if not found:
            problems.append(f"{file}: no service definition in it")
        services += [api_form(d.value, schema.SERVICE) for d in found]
    if problems:
        raise Failed("\n".join(problems))
    return services


def api_form(value: Mapping[str, Any], table: Any) -> dict[str, Any]:
    """A definition with the API's names; what is inside meta, config and header stays as written."""
    return {table.in_files[name].api: _api_value(one, table.in_files[name].form) for name, one in value.items()}


def _api_value(value: Any, form: Any) -> Any:
    from rostra.agent import schema

    if isinstance(form, schema.Table):
        return api_form(value, form)
    if isinstance(form, schema.Many):
        return [api_form(one, form.table) for one in value]
    if isinstance(form, schema.MapOf):
        return {name: api_form(one, form.table) for name, one in value.items()}
    return value


COMMANDS = {
    "register": Command(
        "services register [options] [FILE...]",
        "Register services with the local agent",
        _register,
        (
            Flag("name", "Name of the service."),
            Flag("id", "ID of the service. Default: its name."),
            Flag("address", "Address of the service. Default: the node's."),
            Flag("port", "Port of the service.", "whole"),
            Flag("tag", "Tag of the service. Repeatable.", "texts"),
            Flag("meta", "Metadata of the service. Repeatable.", "pairs"),
            Flag("tagged-address", "NAME=ADDRESS[:PORT]. Repeatable.", "pairs"),
            Flag("kind", "Kind of the service."),
        ),
        reach="server",
        text="FILE is a JSON or HCL file with service definitions; without it the flags describe one service.",
    ),
    "deregister": Command(
        "services deregister [options] [FILE...]",
        "Deregister services with the local agent",
        _deregister,
        (Flag("id", "ID of the service."),),
        reach="server",
    ),
}
