"""All parts of one agent: which there are, who is told of whom, and their start and end.

    HTTP  →  session with a server  →  local state, sync, DNS, join port  →  sidecars

Parts stop in the reverse order; a stop takes less than two seconds. Nothing here decides anything about the catalog.
Imported when the core of this node, which takes longer to start, has been spawned.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from rostra import __version__
from rostra.agent.config import Config
from rostra.agent.context import Agent
from rostra.agent.core_process import CoreProcess
from rostra.agent.definition import Scripts
from rostra.agent.dns_source import CatalogSource
from rostra.agent.enrolment import Certificate, follow_core
from rostra.agent.http.app import HttpServer
from rostra.agent.http.gate import Gate
from rostra.agent.join import AgentInfo, JoinListener, ServerHint, discover
from rostra.agent.known_servers import EVERY_AT_SERVER_S, EVERY_S, KnownServers
from rostra.agent.leaf import Leaves
from rostra.agent.local import LocalAgent
from rostra.agent.metrics import Metrics
from rostra.agent.node_settings import data_dir, secrets
from rostra.agent.proxycfg import ProxyConfigs
from rostra.agent.results import Results
from rostra.agent.servers import ServerAddress, ServerLink
from rostra.agent.sidecars import Sidecars
from rostra.agent.sync import NodeIdentity as AboutNode
from rostra.agent.sync import Sync
from rostra.dns.answer import DnsConfig
from rostra.dns.serve import DnsServer
from rostra.runtime import log as logging
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.service import Tasks
from rostra.runtime.steps import LoopSteps
from rostra.runtime.tls import peer_key_hash
from rostra.runtime.wall import Wall
from rostra.wire.errors import BadRequest, Conflict, NoLeader, RostraError

log = logging.get("agent")

#: How often a server's agent asks its core whether the join addresses are to be asked again.
LOOK_AGAIN_S = 5.0


class RunningAgent:
    """All parts of one agent. `start` raises RostraError for what an operator has to mend."""

    def __init__(self, config: Config, core: CoreProcess | None, give_up: Callable[[], None]) -> None:
        self.config, self._core = config, core
        self._give_up = give_up
        self.status = 0  # the process's exit status, once it stops
        self._joining_since: float | None = None
        self._tasks = Tasks("agent")
        self._wall = Wall()
        self._ends: list[tuple[str, Callable[[], Awaitable[Any]]]] = []
        self._identity: NodeIdentity | None = None
        self._unreachable = logging.RateLimited(log, config.retry_interval_s)

    async def start(self) -> None:
        config, metrics = self.config, Metrics()
        LoopSteps(lambda ms: metrics.observe("loop.step", ms)).start()
        node_id = await self._open_identity()
        if config.start_join:
            await self._join_now()
        session = self._session = self._session_of(node_id)
        is_server = self._core is not None
        remembered = Path(config.data_dir) / "servers.json" if config.data_dir and not is_server else None
        self._known = KnownServers(session, remembered, every_s=EVERY_AT_SERVER_S if is_server else EVERY_S)
        agent = self._agent(node_id, metrics)
        http_url = await self._serve_http(agent)
        self._meet_the_cluster()
        local, sync = agent.local, agent.sync
        assert sync is not None
        await local.start()
        self._ends.append(("local state", local.stop))
        await self._register_from_files(local)
        await sync.start()
        self._ends.append(("sync", sync.stop))
        dns_port = await self._serve_dns(agent.results, metrics)
        await agent.proxies.start()
        self._ends.append(("proxy snapshots", agent.proxies.stop))
        self._ends.append(("leaves", agent.leaves.stop))
        sidecars = Sidecars(local, http_addr=http_url, log_level=config.log_level)
        await sidecars.start()
        self._ends.append(("sidecars", sidecars.stop))
        if is_server and not config.dev and (config.retry_join or config.start_join):
            self._tasks.keep("tell the core where to join", self._tell_core_where)
        gc.collect()
        gc.freeze()
        # A collection walks all young objects in one step of the loop: 300 parked watchers have 40,000 (8 ms).
        # Reference counts free all that requests and rows leave behind, so only cycles and growth reach this bound.
        gc.set_threshold(100_000, 20, 1000)
        log.info("agent is running", node=config.node_name, http=http_url, dns=dns_port, server=is_server)

    # -- the parts ------------------------------------------------------------------------------------------------

    def _session_of(self, node_id: str) -> ServerLink:
        config = self.config
        return ServerLink(
            addresses=self._addresses,
            context=self._context,
            about=lambda: {
                "name": config.node_name,
                "node_id": node_id,
                "role": "server" if self._core is not None else "client",
                "address": config.advertise_addr or config.bind_addr,
                "serf_port": config.join_port,
                "datacenter": config.datacenter,
                "version": __version__,
            },
            key_of=peer_key_hash,
            spawn=self._spawn,
        )

    def _agent(self, node_id: str, metrics: Metrics) -> Agent:
        config, session = self.config, self._session
        results = Results(session)
        local = LocalAgent(
            node=config.node_name,
            data_dir=Path(data_dir(config)) if data_dir(config) else None,
            bind_address=config.bind_addr,
            scripts=Scripts(
                remote=config.enable_script_checks,
                local=config.enable_script_checks or config.enable_local_script_checks,
            ),
            results=results,
            sidecar_ports=(config.sidecar_min_port, config.sidecar_max_port),
            check_update_interval_s=config.check_update_interval_s,
            output_bytes_max=config.check_output_bytes_max,
            discard_output=config.discard_check_output,
        )
        address = config.advertise_addr or config.bind_addr
        about = AboutNode(
            name=config.node_name,
            id=node_id,
            address=address,
            datacenter=config.datacenter,
            tagged_addresses={k: address for k in ("lan", "lan_ipv4", "wan", "wan_ipv4")},
            meta={"consul-network-segment": "", **config.node_meta},
        )
        sync = Sync(local, session, results, about, is_server=self._core is not None)
        session.on_connected.append(sync.trigger)
        leaves = Leaves(session, results, datacenter=config.datacenter, wall=self._wall)
        proxies = ProxyConfigs(
            local,
            leaves,
            results,
            datacenter=config.datacenter,
            bind_address=config.bind_addr,
            default_allow=config.intentions_default_allow,
        )
        self._gauges(metrics, session, results)
        return Agent(
            servers=session,
            results=results,
            metrics=metrics,
            node_name=config.node_name,
            node_id=node_id,
            datacenter=config.datacenter,
            config=config,
            local=local,
            leaves=leaves,
            proxies=proxies,
            sync=sync,
            core=self._core,
            force_leave=self._force_leave,
        )

    async def _serve_http(self, agent: Agent) -> str:
        """The URL under which this host's own proxies reach the API."""
        config = self.config
        http = HttpServer(
            agent,
            connections_per_client=config.http_max_conns_per_client,
            kv_value_bytes_max=config.kv_max_value_bytes,
            gate=Gate(config.http_block_endpoints, config.allow_write_http_from, config.http_response_headers),
        )
        await http.start()
        # After HTTP and before the core, so that nobody looks for a core that was told to end.
        self._ends.append(("background tasks", lambda: self._tasks.stop(0.5)))
        self._ends.append(("http", lambda: http.close(0.3)))
        url = await self._listen_http(http)
        if not config.dev:
            await self._open_join_port()
        return url

    def _meet_the_cluster(self) -> None:
        session = self._session
        if self._core is not None:
            self._tasks.keep("core", self._core.live)
        self._tasks.keep("session with a server", session.run)
        session.on_connected.append(self._connected)
        self._tasks.keep("follow the servers", self._known.keep)
        if self._core is None:
            assert self._identity is not None
            certificate = Certificate(self._identity, session, wall=self._wall)
            session.on_connected.append(certificate.kick)
            self._tasks.keep("node certificate", certificate.keep)

    async def _serve_dns(self, results: Results, metrics: Metrics) -> int:
        """The port."""
        config = self.config
        if config.dns_port < 0:
            return config.dns_port
        source = CatalogSource(results, datacenter=config.datacenter)
        source.start()
        dns = DnsServer(
            DnsConfig(
                domain=config.domain,
                alt_domain=config.alt_domain,
                datacenter=config.datacenter,
                only_passing=config.dns_only_passing,
                node_ttl_s=int(config.dns_node_ttl_s),
                service_ttl_s={k: int(v) for k, v in config.dns_service_ttl_s.items()},
                soa_refresh_s=config.dns_soa_refresh_s,
                soa_retry_s=config.dns_soa_retry_s,
                soa_expire_s=config.dns_soa_expire_s,
                soa_min_ttl_s=config.dns_soa_min_ttl_s,
                a_record_limit=config.dns_a_record_limit,
                udp_answer_limit=config.dns_udp_answer_limit,
                recursors=config.recursors,
                truncation_flag="always" if config.dns_enable_truncate else "size",
            ),
            source,
            hosts=config.dns_addrs or config.client_addrs,
            port=config.dns_port,
            count=metrics.count,
        )
        await dns.start()
        self._ends.append(("dns", dns.stop))
        return dns.port

    async def stop(self) -> None:
        for name, end in reversed(self._ends):
            try:
                await end()
            except Exception as e:  # one part's failure must not keep the others alive
                log.err("part did not stop cleanly", part=name, error=repr(e))
        await self._tasks.stop(0.5)

    def _spawn(self, coro: Any) -> asyncio.Task[Any]:
        return self._tasks.start(getattr(coro, "__qualname__", "task"), coro)

    # -- who and where ----------------------------------------------------------------------------------------

    async def _open_identity(self) -> str:
        """The node's id. Clients open their key now; server agents talk over the local socket and need it later."""
        if self._core is not None:
            await self._core.ready()
            self._ends.append(("core", self._core.stop))
            return self._core.node_id
        self._identity = await asyncio.to_thread(self._identity_in, Path(self.config.data_dir))
        return self._identity.node_id

    def _identity_in(self, directory: Path) -> NodeIdentity:

        config = self.config
        node_id = config.node_id if self._core is None else ""  # a server's is its core's business
        return NodeIdentity.open(directory, config.node_name, secrets(config), node_id=node_id)

    def _context(self) -> Any:
        assert self._identity is not None
        return self._identity.client_context()

    async def _addresses(self) -> list[ServerAddress]:

        if self._core is not None:
            return [ServerAddress(path=self._core.socket_path)] if self._core.socket_path else []
        known = self._known.remembered()
        random.shuffle(known)
        if known and not self._session.last_error:
            return known

        assert self._identity is not None
        joins = [*self.config.retry_join, *self.config.start_join]
        found = await discover(joins, self._identity, on_failure=self._not_joined)
        self._count_attempts(bool(found or known))
        # Servers whose keys are known come first: what others say of new ones is hearsay.
        seen = {(k.host, k.port, key) for k in known for key in (k.key_hash, "")}
        addresses = [ServerAddress(host=s.host, port=s.port, key_hash=s.key_hash) for s in found]
        return known + [a for a in addresses if (a.host, a.port, a.key_hash) not in seen]

    def _count_attempts(self, joined: bool) -> None:
        """End the agent where `retry_max` says so; an attempt is what fits into a retry interval."""
        config, now = self.config, time.monotonic()
        if joined or not config.retry_max:
            self._joining_since = None
        elif self._joining_since is None:
            self._joining_since = now
        elif now - self._joining_since >= config.retry_max * config.retry_interval_s:
            log.err("no server could be joined, giving up", attempts=config.retry_max, change="-retry-max")
            self.status = 1
            self._give_up()

    async def _join_now(self) -> None:
        """`-join`: somebody has to answer now. Raises NoLeader with what each address said."""

        if self._identity is None:
            self._identity = await asyncio.to_thread(self._identity_in, Path(self.config.data_dir))
        answered: list[str] = []
        reasons: list[str] = []
        await discover(
            self.config.start_join,
            self._identity,
            on_agent=lambda address, info: answered.append(address),
            on_failure=lambda address, reason: reasons.append(f"{address}: {reason}"),
        )
        if not answered:
            raise NoLeader(f"cannot join: {'; '.join(reasons)} (-retry-join would keep trying)")

    def _not_joined(self, address: str, reason: str) -> None:
        self._unreachable.warn("cannot join there, trying again", key=address, address=address, reason=reason)

    async def _force_leave(self, node: str, prune: bool) -> None:
        await self._session.act("member.force-leave", {"name": node, "prune": prune})

    def _connected(self) -> None:
        self._tasks.start("learn the servers", self._known.learn())

    async def _open_join_port(self) -> None:
        """Answer probes and joins on 8301. Raises Conflict: a node that cannot be probed would be declared failed."""

        if self._identity is None:
            self._identity = await asyncio.to_thread(self._identity_in, Path(self.config.data_dir))
        config, identity = self.config, self._identity
        is_server = self._core is not None
        if is_server:
            self._tasks.keep("node certificate", partial(follow_core, identity, self._wall))
        info = AgentInfo(
            node_id=identity.node_id,
            name=config.node_name,
            role="server" if is_server else "client",
            datacenter=config.datacenter,
            version=__version__,
            rpc_address=(config.advertise_addr or config.bind_addr) if is_server else "",
            rpc_port=config.server_port if is_server else 0,
            key_hash=identity.key_hash,
        )
        listener = JoinListener(
            identity,
            lambda: info,
            lambda: [ServerHint(s.host, s.port, s.key_hash) for s in self._known.now],
        )
        try:
            await listener.start(config.bind_addr, config.join_port)
        except OSError as e:
            raise Conflict(
                f"cannot listen for joins and probes on {config.bind_addr}:{config.join_port}: "
                f"{_in_the_way(e, '-serf-lan-port or ports.serf_lan', '-bind')}"
            ) from None
        self._ends.append(("join port", listener.stop))

    async def _tell_core_where(self) -> None:

        joins = [*self.config.retry_join, *self.config.start_join]
        assert self._identity is not None
        found: list[Any] = []
        while True:
            is_searching = True
            with contextlib.suppress(RostraError):  # without a core there is nobody to tell
                is_searching = await self._session.act("join.found", {"addresses": [str(s) for s in found]}) is True
            # All servers may have moved since it was configured: as long as its core misses one, names are resolved
            # again and all addresses are asked again.
            found = await discover(joins, self._identity, on_failure=self._not_joined) if is_searching else []
            if not self._known:
                await self._known.learn()
            await asyncio.sleep(min(LOOK_AGAIN_S if self._known else 1.0, self.config.retry_interval_s))

    async def _listen_http(self, http: Any) -> str:
        """Open every HTTP address; the URL under which this host's own proxies reach the API."""
        config, own = self.config, ""
        for host in config.http_addrs or config.client_addrs:
            try:
                if host.startswith("unix://"):
                    await http.listen_unix(host.removeprefix("unix://"))
                    own = own or host
                elif config.http_port >= 0:
                    bound, port = await http.listen_tcp(host, config.http_port)
                    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound)
                    own = own or f"http://[{reach}]:{port}" if ":" in reach else own or f"http://{reach}:{port}"
            except OSError as e:
                place = host if host.startswith("unix://") else f"{host}:{config.http_port}"
                flags = (
                    ("addresses.http", "addresses.http") if host == place else ("-http-port or ports.http", "-client")
                )
                raise Conflict(f"cannot listen for HTTP on {place}: {_in_the_way(e, *flags)}") from None
        return own

    # -- what configuration files register -----------------------------------------------------------------------

    async def _register_from_files(self, local: Any) -> None:
        for definition in self.config.services:
            try:
                await local.register_service(definition.value, from_file=True)
            except RostraError as e:
                raise BadRequest(f"{definition.where}: service: {e.message}") from None
        for definition in self.config.checks:
            try:
                await local.register_check(definition.value, from_file=True)
            except RostraError as e:
                raise BadRequest(f"{definition.where}: check: {e.message}") from None

    def _gauges(self, metrics: Any, session: Any, results: Any) -> None:
        metrics.gauge("session.connected", lambda: int(session.connected))
        metrics.gauge("session.reconnects", lambda: session.reconnects)
        if (core := self._core) is not None:
            metrics.gauge("core.up", lambda: int(session.connected if core.attached else core.is_up))
        metrics.gauge("runtime.rss_bytes", _rss_bytes)


def _in_the_way(error: OSError, port_flag: str, address_flag: str) -> str:
    """Why an address cannot be listened on, and what changes that."""
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return f"{reason}; change it with {address_flag if error.errno == errno.EADDRNOTAVAIL else port_flag}"


def _rss_bytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
