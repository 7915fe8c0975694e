"""A whole HTTP server on port 0 over a plain Store, and a raw client in a thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from rostra.agent.context import Agent
from rostra.agent.http import acl, catalog, connect, health, kv, operator, session, status
from rostra.agent.http.app import HttpServer
from rostra.agent.http.routing import Route
from rostra.agent.results import Results
from rostra.server.state.catalog import Register
from tests.support.store_servers import StoreServers

ROUTES = [route for module in (acl, catalog, connect, health, kv, operator, session, status) for route in module.ROUTES]
SERF = {"id": "serfHealth", "name": "Serf Health Status", "status": "passing", "output": "Agent alive and reachable"}


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def index(self) -> int:
        return int(self.headers["X-Consul-Index"])


#: Blocking clients each need a thread; the loop's own executor has only a few.
_CLIENTS = ThreadPoolExecutor(64, thread_name_prefix="client")


class Api:
    """What a client sees. Every call is a connection of its own unless `keep` is given."""

    def __init__(self, host: str, port: int, servers: StoreServers, agent: Agent, server: HttpServer) -> None:
        self.host, self.port = host, port
        self.servers, self.agent, self.server = servers, agent, server

    async def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        return await asyncio.get_running_loop().run_in_executor(_CLIENTS, self._call, method, path, body, headers or {})

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.call("GET", path, headers=headers)

    async def put(self, path: str, body: Any = b"") -> Reply:
        return await self.call("PUT", path, body)

    async def delete(self, path: str) -> Reply:
        return await self.call("DELETE", path)

    async def raw(self, *pieces: bytes, until: bytes | None = None) -> bytes:
        """Send the pieces; all that comes back until the server closes (or `until` was seen)."""
        return await asyncio.get_running_loop().run_in_executor(_CLIENTS, self._raw, pieces, until)

    def _call(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return Reply(response.status, response.msg, response.read())
        finally:
            connection.close()

    def _raw(self, pieces: tuple[bytes, ...], until: bytes | None) -> bytes:
        with socket.create_connection((self.host, self.port), timeout=20) as s:
            for piece in pieces:
                s.sendall(piece)
            got = b""
            while until is None or until not in got:
                data = s.recv(65536)
                if not data:
                    break
                got += data
            return got


async def make_api(routes: list[Route] | None = None, **options: Any) -> Api:
    servers = StoreServers()
    servers.apply(Register("s1", "127.0.0.1", checks=(SERF,)))
    agent = Agent(servers=servers, results=Results(servers), node_name="s1")
    server = HttpServer(agent, routes=ROUTES + (routes or []), **options)
    await server.start()
    host, port = await server.listen_tcp("127.0.0.1", 0)
    return Api(host, port, servers, agent, server)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api = await make_api()
    yield api
    await api.server.close(1.0)
    await api.agent.results.close()
