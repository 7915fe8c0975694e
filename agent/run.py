"""The agent process: reads its configuration, builds every part, owns their start and their end.

    core (spawned before the rest is imported)  →  HTTP  →  session with a server  →  local state, sync, DNS, join port
    →  sidecars

Parts stop in the reverse order; a stop takes less than two seconds. Nothing here decides anything about the catalog.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rostra import __version__
from rostra.agent.config import Config, ConfigErrors, load
from rostra.agent.core_process import CoreProcess
from rostra.runtime import core_dumps
from rostra.runtime import log as logging
from rostra.runtime.service import cannot, end_with_threads, take_turns_with_threads
from rostra.wire.errors import BadRequest, Conflict, NoLeader, RostraError

if TYPE_CHECKING:
    from rostra.agent.servers import ServerAddress
    from rostra.runtime.identity import DataDirectory, NodeIdentity, Secret

log = logging.get("agent")

STOP_S = 1.6
FDS_NEEDED = 4096
FDS_LEAST = 64  # with fewer the loop itself cannot be made, and the process is aborted
#: How often a server's agent asks its core whether the join addresses are to be asked again.
LOOK_AGAIN_S = 5.0


def main(argv: Sequence[str]) -> int:
    """`rostra agent`. The exit status: 0 after SIGINT or SIGTERM, 1 where it could not start."""
    core_dumps.switch_off()
    try:
        config = load(argv)
    except ConfigErrors as e:
        for problem in e.problems:
            print(f"rostra agent: {problem}", file=sys.stderr)
        return 1
    logging.configure(config.log_level, as_json=config.log_json)
    try:
        _check_bind(config.bind_addr)
        for warning in config.warnings:
            log.warn(warning)
        return _run(config)
    except RostraError as e:
        print(f"rostra agent: {e.message}", file=sys.stderr)
        return _status(e)
    except OSError as e:
        print(f"rostra agent: cannot start: {cannot(e)}", file=sys.stderr)
        return 1


def _status(error: RostraError) -> int:
    """78 where another start would find the same: a person has to look at the data directory."""
    from rostra.runtime.identity import UnusableData

    return 78 if isinstance(error, UnusableData) else 1


def main_server(argv: Sequence[str]) -> int:
    """`rostra server`: the core alone, for a unit of its own; an agent on this host attaches to it."""
    try:
        config = load(["-server", *argv])
    except ConfigErrors as e:
        for problem in e.problems:
            print(f"rostra server: {problem}", file=sys.stderr)
        return 1
    from rostra.server.run import run
    from rostra.server.settings import CoreSettings

    failed: list[str] = []

    def ready(message: dict[str, Any]) -> None:
        if "error" in message:
            failed.append(message["error"][1])
            print(f"rostra server: {message['error'][1]}", file=sys.stderr)

    try:
        return run(CoreSettings.from_map(core_settings(config)), ready, None)
    except RostraError as e:
        print(f"rostra server: {e.message}", file=sys.stderr)
        return 1


def core_settings(config: Config) -> dict[str, Any]:
    """What the core of this node is told; see `server/settings.py`."""
    import base64

    advertise = config.advertise_addr or config.bind_addr
    joins = (*config.retry_join, *config.start_join)
    secrets = _secrets(config)

    # A development server waits for nobody, so its clockwork may run as fast as the library allows.
    scale = config.raft_multiplier
    return {
        "node_name": config.node_name,
        "node_id": config.node_id,
        "data_dir": _data_dir(config),
        "bind": config.bind_addr,
        "advertise": advertise,
        "datacenter": config.datacenter,
        "rpc_port": config.server_port,
        "serf_port": config.join_port,
        "bootstrap_expect": 1 if config.dev or config.bootstrap else config.bootstrap_expect,
        "non_voting_server": config.non_voting_server,
        "candidates": [_with_port(host, config.server_port) for host in joins],
        "secrets": [base64.b64encode(s.value).decode() for s in secrets],
        "dev": config.dev,
        "retry_interval_s": config.retry_interval_s,
        "heartbeat_s": 0.05 * scale,
        "election_min_s": 0.4 * scale,
        "election_max_s": 0.7 * scale,
        "log_level": config.log_level,
        "log_json": config.log_json,
        "version": __version__,
    }


def _secrets(config: Config) -> tuple[Secret, ...]:
    """What proves that this node may enrol. None are needed where the cluster has issued it a certificate before."""
    from rostra.runtime.identity import generate_secret, has_certificate, is_loopback, parse_secret, resolve_secrets

    encrypt = config.encrypt.reveal() or None
    joins = (*config.retry_join, *config.start_join)
    addresses = (config.bind_addr, config.advertise_addr or config.bind_addr)
    if config.dev and encrypt is None and not joins and all(map(is_loopback, addresses)):
        return (parse_secret(generate_secret()),)  # nobody else joins it: it needs no file of this user's
    if encrypt is None and _data_dir(config) and has_certificate(_data_dir(config)):
        return ()
    return resolve_secrets(encrypt.split(",") if encrypt else None, [*addresses, *joins])


def _data_dir(config: Config) -> str:
    """Where state is kept; "" in development mode, which keeps none."""
    return "" if config.dev else config.data_dir


def _with_port(host: str, port: int) -> str:
    """The RPC address on a join address's host. A port in it is the join port's, which the agent asks, not the core."""
    bare = host.rpartition(":")[0] if host.count(":") == 1 else host
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def _check_bind(host: str) -> None:
    """Said before all that follows from an address: of a foreign one an operator would first be asked for a secret."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(
                    f"-bind: {host} is no address of this host: choose one that `ip address` shows"
                ) from None


def _run(config: Config) -> int:
    lock = _lock(config)
    pid_file = Path(config.pid_file) if config.pid_file else None
    if pid_file is not None:
        try:
            pid_file.write_text(f"{os.getpid()}\n")
        except OSError as e:
            raise BadRequest(f"cannot write the pid file {pid_file}: {e.strerror}; change it with -pid-file") from None
    _raise_fd_limit()
    end_with_threads()
    take_turns_with_threads()
    core: CoreProcess | None = None
    if config.server or config.dev:
        core = CoreProcess(core_settings(config))
        core.begin()  # it starts while the imports below go on
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, core))
    except RostraError as e:
        print(f"rostra agent: {e.message}", file=sys.stderr)
        return (core.exit_status if core is not None else 0) or _status(e)
    finally:
        if pid_file is not None:
            pid_file.unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def _lock(config: Config) -> DataDirectory | None:
    if not _data_dir(config):
        return None
    from rostra.runtime.identity import DataDirectory

    return DataDirectory.lock(config.data_dir, "agent.lock")


def _raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft < FDS_LEAST:
        raise BadRequest(
            f"{soft} file descriptors are too few to start, {FDS_LEAST} are the least:"
            " ulimit -n, or LimitNOFILE= in the unit"
        )
    if soft < FDS_NEEDED:
        log.warn(
            "few file descriptors: watches and proxies will be refused when they run out",
            limit=soft,
            wanted=FDS_NEEDED,
            change="ulimit -n, or LimitNOFILE= in the unit",
        )


async def _serve(config: Config, core: CoreProcess | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(
        signal.SIGHUP,
        lambda: log.warn(
            "reload is not available yet: `rostra services register FILE` applies a changed service at once; other"
            " settings need a restart, which proxies with supervise = false and a core of its own outlive"
        ),
    )
    running = RunningAgent(config, core, give_up=stop.set)
    starting = asyncio.ensure_future(running.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        # A signal must end a start that waits for something, too.
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not stop.is_set():
            starting.result()
            await stopping
        log.info("stopping")
        return running.status
    finally:
        starting.cancel()
        stopping.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await running.stop()


class RunningAgent:
    """All parts of one agent. `start` raises RostraError for what an operator has to mend."""

    def __init__(self, config: Config, core: CoreProcess | None, give_up: Callable[[], None]) -> None:
        from rostra.runtime.service import Tasks
        from rostra.runtime.wall import Wall

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
        from rostra.agent.context import Agent
        from rostra.agent.definition import Scripts
        from rostra.agent.dns_source import CatalogSource
        from rostra.agent.http.app import HttpServer
        from rostra.agent.http.gate import Gate
        from rostra.agent.known_servers import EVERY_AT_SERVER_S, EVERY_S, KnownServers
        from rostra.agent.leaf import Leaves
        from rostra.agent.local import LocalAgent
        from rostra.agent.metrics import Metrics
        from rostra.agent.proxycfg import ProxyConfigs
        from rostra.agent.results import Results
        from rostra.agent.servers import ServerSession
        from rostra.agent.sidecars import Sidecars
        from rostra.agent.sync import NodeIdentity as AboutNode
        from rostra.agent.sync import Sync
        from rostra.dns.answer import DnsConfig
        from rostra.dns.serve import DnsServer
        from rostra.runtime.steps import LoopSteps
        from rostra.runtime.tls import peer_key_hash

        config = self.config
        metrics = Metrics()
        steps = LoopSteps(lambda ms: metrics.observe("loop.step", ms))
        steps.start()
        node_id = await self._open_identity()
        if config.start_join:
            await self._join_now()
        advertise = config.advertise_addr or config.bind_addr
        session = self._session = ServerSession(
            addresses=self._addresses,
            context=self._context,
            about=lambda: {
                "name": config.node_name,
                "node_id": node_id,
                "role": "server" if self._core is not None else "client",
                "address": advertise,
                "serf_port": config.join_port,
                "datacenter": config.datacenter,
                "version": __version__,
            },
            key_of=peer_key_hash,
            spawn=self._spawn,
        )
        is_server = self._core is not None
        remembered = Path(config.data_dir) / "servers.json" if config.data_dir and not is_server else None
        self._known = KnownServers(session, remembered, every_s=EVERY_AT_SERVER_S if is_server else EVERY_S)
        results = Results(session)
        local = LocalAgent(
            node=config.node_name,
            data_dir=Path(_data_dir(config)) if _data_dir(config) else None,
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
        about = AboutNode(
            name=config.node_name,
            id=node_id,
            address=advertise,
            datacenter=config.datacenter,
            tagged_addresses={k: advertise for k in ("lan", "lan_ipv4", "wan", "wan_ipv4")},
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
        agent = Agent(
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
        self._gauges(metrics, session, results)

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
        own_address = await self._listen_http(http)
        if not config.dev:
            await self._open_join_port()
        if self._core is not None:
            self._tasks.keep("core", self._core.live)
        self._tasks.keep("session with a server", session.run)
        session.on_connected.append(self._connected)
        self._tasks.keep("follow the servers", self._known.keep)
        if self._core is None:
            from rostra.agent.enrolment import Certificate

            assert self._identity is not None
            certificate = Certificate(self._identity, session, wall=self._wall)
            session.on_connected.append(certificate.kick)
            self._tasks.keep("node certificate", certificate.keep)

        await local.start()
        self._ends.append(("local state", local.stop))
        await self._register_from_files(local)
        await sync.start()
        self._ends.append(("sync", sync.stop))
        dns_port = config.dns_port
        if config.dns_port >= 0:
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
            dns_port = dns.port
            self._ends.append(("dns", dns.stop))
        await proxies.start()
        self._ends.append(("proxy snapshots", proxies.stop))
        self._ends.append(("leaves", leaves.stop))
        sidecars = Sidecars(local, http_addr=own_address, log_level=config.log_level)
        await sidecars.start()
        self._ends.append(("sidecars", sidecars.stop))
        if self._core is not None and not config.dev and (config.retry_join or config.start_join):
            self._tasks.keep("tell the core where to join", self._tell_core_where)
        gc.collect()
        gc.freeze()
        # A collection walks all young objects in one step of the loop: 300 parked watchers have 40,000 (8 ms).
        # Reference counts free all that requests and rows leave behind, so only cycles and growth reach this bound.
        gc.set_threshold(100_000, 20, 1000)
        log.info(
            "agent is running",
            node=config.node_name,
            http=own_address,
            dns=dns_port,
            server=self._core is not None,
        )

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
        from rostra.runtime.identity import NodeIdentity

        config = self.config
        node_id = config.node_id if self._core is None else ""  # a server's is its core's business
        return NodeIdentity.open(directory, config.node_name, _secrets(config), node_id=node_id)

    def _context(self) -> Any:
        assert self._identity is not None
        return self._identity.client_context()

    async def _addresses(self) -> list[ServerAddress]:
        from rostra.agent.servers import ServerAddress

        if self._core is not None:
            return [ServerAddress(path=self._core.socket_path)] if self._core.socket_path else []
        known = self._known.remembered()
        random.shuffle(known)
        if known and not self._session.last_error:
            return known
        from rostra.agent.join import discover

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
        from rostra.agent.join import discover

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
        from rostra.agent.join import AgentInfo, JoinListener, ServerHint

        if self._identity is None:
            self._identity = await asyncio.to_thread(self._identity_in, Path(self.config.data_dir))
        config, identity = self.config, self._identity
        is_server = self._core is not None
        if is_server:
            from rostra.agent.enrolment import follow_core

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
        from rostra.agent.join import discover

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
