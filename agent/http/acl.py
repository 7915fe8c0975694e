"""`/v1/acl/`: all of Consul's routes, which answer as Consul does while ACLs are off, so that its clients know."""

from __future__ import annotations

from rostra.agent.context import Agent
from rostra.agent.http.declared import parameters
from rostra.agent.http.errors import HttpError
from rostra.agent.http.permissions import anybody
from rostra.agent.http.routing import Request, Response, Route

_ROUTES = """
    PUT /v1/acl/bootstrap
    GET /v1/acl/replication
    GET /v1/acl/policies
    PUT /v1/acl/policy
    GET,PUT,DELETE /v1/acl/policy/{id}
    GET /v1/acl/roles
    PUT /v1/acl/role
    GET,PUT,DELETE /v1/acl/role/{id}
    GET /v1/acl/binding-rules
    PUT /v1/acl/binding-rule
    GET,PUT,DELETE /v1/acl/binding-rule/{id}
    GET /v1/acl/auth-methods
    PUT /v1/acl/auth-method
    GET,PUT,DELETE /v1/acl/auth-method/{name}
    GET /v1/acl/tokens
    PUT /v1/acl/token
    GET,PUT,DELETE /v1/acl/token/{id}
    POST /v1/acl/login
    POST /v1/acl/logout
    POST /v1/acl/rules/translate
    GET /v1/acl/rules/translate/{id}
    PUT /v1/acl/create
    PUT /v1/acl/update
    PUT /v1/acl/destroy/{id}
    GET /v1/acl/info/{id}
    PUT /v1/acl/clone/{id}
    GET /v1/acl/list
    POST /v1/internal/acl/authorize
"""


async def disabled(request: Request, agent: Agent) -> Response:
    raise HttpError(401, "ACL support disabled")


ROUTES = tuple(
    Route(method, path, disabled, anybody, query=parameters(), datacenter=False)
    for methods, path in (line.split() for line in _ROUTES.strip().splitlines())
    for method in methods.split(",")
)
