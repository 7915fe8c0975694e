"""What each route asks of its caller's rights: a function in its `Route`, called before the handler.

Most routes are answered by servers, which ask by themselves, with the same caller. What this agent answers on its own,
its services, checks, proxies and keys, is asked for here.
"""

from __future__ import annotations

from collections.abc import Callable

from rostra.acl.authorizer import Authorizer
from rostra.agent.context import Agent
from rostra.agent.http.routing import Request

May = Callable[[Authorizer, Request, Agent], bool]


def at_servers(can: Authorizer, request: Request, agent: Agent) -> bool:
    """The servers decide about every byte of the answer, and about every change."""
    return True


def anybody(can: Authorizer, request: Request, agent: Agent) -> bool:
    """Nothing that needs a right is in the answer."""
    return True


def row_by_row(can: Authorizer, request: Request, agent: Agent) -> bool:
    """The handler leaves out, or answers as absent, what `request.can` may not see."""
    return True


def agent_read(can: Authorizer, request: Request, agent: Agent) -> bool:
    return can.agent_read(agent.node_name)


def agent_write(can: Authorizer, request: Request, agent: Agent) -> bool:
    return can.agent_write(agent.node_name)


def node_write(can: Authorizer, request: Request, agent: Agent) -> bool:
    return can.node_write(agent.node_name)


def operator_read(can: Authorizer, request: Request, agent: Agent) -> bool:
    return can.operator_read()


def operator_write(can: Authorizer, request: Request, agent: Agent) -> bool:
    return can.operator_write()


def writes_service(can: Authorizer, request: Request, agent: Agent) -> bool:
    """`{id}` names a service here: its name counts. One that is not here is the handler's to say, to node:write."""
    found = agent.local.services.get(request.params["id"])
    return can.service_write(found.row.name) if found is not None else can.node_write(agent.node_name)


def writes_check(can: Authorizer, request: Request, agent: Agent) -> bool:
    found = agent.local.checks.get(request.params["id"])
    if found is None or not found.row.service_name:
        return can.node_write(agent.node_name)
    return can.service_write(found.row.service_name)


def registers_service(can: Authorizer, request: Request, agent: Agent) -> bool:
    """By the name that it is to have, and by the one that it has."""
    given = request.json_object()
    name = str(given.get("Name") or "")
    found = agent.local.services.get(str(given.get("ID") or name))
    return can.service_write(name) and (found is None or can.service_write(found.row.name))


def registers_check(can: Authorizer, request: Request, agent: Agent) -> bool:
    given = request.json_object()
    found = agent.local.checks.get(str(given.get("ID") or given.get("CheckID") or given.get("Name") or ""))
    names = {found.row.service_name} if found is not None else set[str]()
    service = agent.local.services.get(str(given.get("ServiceID") or ""))
    names.add(service.row.name if service is not None else "")
    return all(can.service_write(name) if name else can.node_write(agent.node_name) for name in names)


def holds_key_of_service(can: Authorizer, request: Request, agent: Agent) -> bool:
    """A leaf comes with its private key: whoever has it speaks as that service."""
    return can.service_write(request.params["service"])


def holds_key_of_proxy(can: Authorizer, request: Request, agent: Agent) -> bool:
    """A proxy's snapshot has the key of what it stands for."""
    found = agent.local.services.get(request.params["id"])
    if found is None:
        return can.node_write(agent.node_name)
    destination = (found.row.proxy or {}).get("destination_service_name") or found.row.name
    return can.service_write(str(destination))
