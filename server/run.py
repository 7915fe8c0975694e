"""The core process: builds one server from its settings, in the order in which the parts need each other.

    data directory, identity, listeners  →  bootstrap or being let in  →  log and state  →  duties

It stops in the reverse order. Exit status 70: a promise could not be kept (disk, log, apply), start again; 78: the
data is damaged, of a newer version or of another node, do not; 1: it cannot start as things are (a port in use).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rostra.runtime import core_dumps
from rostra.runtime import log as logging
from rostra.runtime.data_directory import DataDirectory, UnusableData
from rostra.runtime.identity import NodeIdentity, read_node_id
from rostra.runtime.secret import parse_secrets
from rostra.runtime.service import EXIT_FAIL_STOP, Tasks, cannot, end_with_threads, take_turns_with_threads
from rostra.runtime.steps import LoopSteps
from rostra.server.acts import Acts
from rostra.server.autopilot import Autopilot
from rostra.server.bootstrap import Bootstrap
from rostra.server.endpoint import Endpoint
from rostra.server.enrolment import Enrolment
from rostra.server.founding import JOIN
from rostra.server.leader import LeaderDuties
from rostra.server.lived import look, way_out
from rostra.server.membership import FILE_NAME, Membership, ServerInfo, load
from rostra.server.node import ServerNode
from rostra.server.own_certificate import OwnCertificate
from rostra.server.peers import Peers, ask, dial
from rostra.server.raft.journal import Place, has_journal
from rostra.server.raft.log import RaftLog, Timing
from rostra.server.raft.members import LEARNER, REPLICA, Members, voters
from rostra.server.raft.recovery_disk import peers_files
from rostra.server.requests import Peer
from rostra.server.roster import Roster
from rostra.server.settings import CoreSettings
from rostra.server.standing import Standing
from rostra.server.state import cluster as cluster_commands
from rostra.server.state.rows import MemberRow
from rostra.wire.errors import Conflict, NoLeader, RostraError
from rostra.wire.frames import pack, unpack
from rostra.wire.rpc import RpcClient, hello

log = logging.get("server")

EXIT_CANNOT = 1
EXIT_DAMAGED = 78

#: How long a leader that stops may take to hand leadership over.
HAND_OVER_S = 0.8
#: Where a development server keeps its identity; younger directories may not have taken their lock yet.
DEV_PREFIX = "rostra-dev-"
STALE_S = 60.0
#: Addresses of servers that are remembered beside those of the configuration.
FOUND_MAX = 32


class Core:
    """One running server."""

    def __init__(
        self, settings: CoreSettings, stop: Callable[[], None], *, exit: Callable[[int], Any] = os._exit
    ) -> None:
        """`exit` ends the process with a status, at once."""
        self.settings = settings
        self._stop, self._exit = stop, exit
        self._tasks = Tasks("server", on_crash=self._crashed)
        self._temporary: Path | None = None
        self._found: list[str] = []  # by asking the join addresses, the newest first
        self._standing: Standing | None = None
        self._members: Members = ()
        self._server_ids: dict[str, str] = {}
        self._stranger_ids: dict[str, str] = {}
        self._raft: RaftLog | None = None
        self._place: Place | None = None  # of the journal, to be noted
        self._unnoted = logging.RateLimited(log, 60.0)
        self._steps = LoopSteps()
        self._started = time.monotonic()

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Everything up to the listeners; the rest goes on in the background. What the agent is told."""
        s = self.settings
        if s.data_dir:
            directory = Path(s.data_dir)
        else:
            self._temporary = Path(tempfile.mkdtemp(prefix=DEV_PREFIX))
            directory = self._temporary
        self._directory = directory
        self._lock = DataDirectory.lock(directory / "server")
        listener: socket.socket | None = None
        try:
            self._check_identity(directory)
            self._identity = NodeIdentity.open(directory, s.node_name, parse_secrets(s.secrets), node_id=s.node_id)
            listener = _bind(s.bind, s.rpc_port)
            self.rpc_port = listener.getsockname()[1]
            self._bootstrap = self._open_bootstrap(directory)
        except BaseException:
            if listener is not None:
                listener.close()
            self._release()
            raise
        self._make_parts()
        self._endpoint.listen_tcp(listener, self._identity.server_context)
        path = _socket_path(directory)
        self._endpoint.listen_unix(path)
        self._socket_path = path
        (directory / "server" / "socket").write_text(str(path))
        self._steps.start()
        self._tasks.start("join the cluster", self._join())
        self._tasks.keep("own certificate", OwnCertificate(self._identity, self.node, self._acts, s.node_name).keep)
        if self._temporary is not None:
            self._tasks.start("remove stale directories", asyncio.to_thread(remove_stale, self._temporary.parent))
        return {"socket": str(path), "node_id": self._identity.node_id, "rpc_port": self.rpc_port, "pid": os.getpid()}

    def _make_parts(self) -> None:
        s = self.settings
        node = self.node = ServerNode(
            node_id=self._identity.node_id, name=s.node_name, datacenter=s.datacenter, spawn=self._spawn
        )
        self._peers = Peers(
            me=self._identity.node_id,
            context=self._identity.client_context,
            about=self._about,
            spawn=self._spawn,
        )
        node.peer = self._peers.client
        self._roster = Roster(
            node,
            serf_port=s.serf_port,
            version=s.version,
            hello=self._bootstrap.hello,
            hint=self._peers.hint,
            where=self._peers.where,
            introduce=self._introduce,
        )
        self._autopilot = Autopilot(node, self._roster, heartbeat_s=s.heartbeat_s)
        self._leader = LeaderDuties(
            node,
            sessions=lambda: self._endpoint.agents.heard(),
            peer=self._peers.client,
            probe=self._probe,
            ensure_roots=self._ensure_roots,
            remove_server=lambda node_id: self._roster.remove(node_id=node_id),
            is_leaving=self._roster.leaving.__contains__,
            spawn=self._spawn,
        )
        self._enrolment = Enrolment(
            node,
            s,
            server_id=self._server_ids.get,
            holds=lambda name, key_hash: self._endpoint.agents.holds(name, key_hash),
            others=self._peers.clients,
            probe=self._probe,
            on_enrolled=self._leader.kick,
        )
        self._acts = Acts(
            node,
            self._leader,
            self._peers.client,
            self._roster,
            self._autopilot,
            learn_candidates=self.learn,
            servers=self._servers,
            holds=lambda name, key_hash: self._endpoint.agents.holds(name, key_hash),
            metrics=self.metrics,
        )
        self._endpoint = Endpoint(
            node,
            spawn=self._spawn,
            server_key=self._server_ids.get,
            stranger_key=self._stranger_ids.get,
            enrol=self._enrolment.enrol,
            accept_raft=self._accept_raft,
            bootstrap=self._greeted,
            acts=self._acts.table,
            about=self._about,
            met=self._met,
        )
        node.on_effects = self._note_names

    @property
    def bootstrap_status(self) -> str:
        """Where this server is on its way into a cluster."""
        return self._bootstrap.status

    async def stop(self) -> None:
        if self._raft is not None and self._raft.is_leader and len(voters(self._members)) > 1:
            # Another leads before this one is gone: nobody has to miss it first.
            with contextlib.suppress(RostraError, TimeoutError):
                async with asyncio.timeout(HAND_OVER_S):
                    await self._raft.transfer()
        self._endpoint.hang_up()
        await self._tasks.stop(1.0)
        self._endpoint.close()
        if self._raft is not None:
            await self._raft.stop()
            await asyncio.to_thread(self._note_end)
        with contextlib.suppress(OSError):
            self._socket_path.unlink()
            if self._socket_path.parent != self._directory / "server":
                self._socket_path.parent.rmdir()  # made for it alone, see _socket_path
        self._release()

    def _release(self) -> None:
        self._lock.release()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _check_identity(self, directory: Path) -> None:
        """A server is who it was when it voted, and has what it promised; its id and name stand in the log of the
        others. Raises."""
        s = self.settings
        for path in peers_files(directory):
            raise UnusableData(
                f"{path}: a list of servers is not read at a start. `rostra recover apply -keep={directory}"
                f" -peers={path}` makes it the members and removes it (`rostra recover plan {directory}` says what that"
                " costs); or remove it yourself, and the server starts as before"
            )
        raft = directory / "server" / "raft"
        with _refusing():
            on_disk = read_node_id(directory)
            stored = load(directory / "server" / FILE_NAME)
            self._life = look(directory, stored, has_log=has_journal(raft))
        has_past = stored.committed or stored.prepared or has_journal(raft)
        if s.node_id and on_disk and s.node_id.lower() != on_disk and has_past:
            raise Conflict(
                f"-node-id {s.node_id}: this server is {on_disk} in its cluster and stays so; remove -node-id,"
                " or start with an empty data directory"
            )
        if stored.committed is not None:
            me = next((m for m in stored.committed.members if m.node_id == on_disk), None)
            if me is not None and me.name != s.node_name:
                raise Conflict(
                    f"node name {s.node_name!r}: this server is {me.name!r} in its cluster and stays so;"
                    f" start it with -node={me.name}"
                )

    def _open_bootstrap(self, directory: Path) -> Bootstrap:
        s = self.settings
        me = ServerInfo(
            node_id=self._identity.node_id,
            name=s.node_name,
            address=s.advertise,
            rpc_port=self.rpc_port,
            key_hash=self._identity.key_hash,
            datacenter=s.datacenter,
        )
        raft = directory / "server" / "raft"
        has_log = not s.dev and has_journal(raft)
        with _refusing():
            return Bootstrap(
                directory / "server",
                me,
                expect=s.bootstrap_expect,
                has_data=has_log or any(raft.glob("snapshot-*")),
                has_log=has_log,
                suffrage=REPLICA if s.non_voting_server else LEARNER,
                version=s.version,
            )

    def _spawn(self, coro: Any) -> asyncio.Task[Any]:
        if self._tasks.stopped:
            coro.close()
            raise NoLeader("No cluster leader: this server is stopping")
        return self._tasks.start(getattr(coro, "__qualname__", "task"), coro)

    def _crashed(self, name: str, error: BaseException) -> None:
        self._fail(f"{name} crashed: {error!r}")

    def _fail(self, reason: str) -> NoReturn:
        """A promise can no longer be kept: end at once, before anything wrong is acknowledged."""
        log.err("stopping at once", reason=reason)
        self._exit(EXIT_FAIL_STOP)
        raise SystemExit(EXIT_FAIL_STOP)  # where the exit is a test's

    def _refused(self, reason: str) -> None:
        """The other servers know that this one has lost what it promised. It must not run on what it has."""
        name, node_id, directory = self.settings.node_name, self._identity.node_id, self._directory
        log.err(
            "this server has lost a part of its log, or runs on an older copy of its data: it stops and must not be"
            " started on it",
            reason=reason,
            path=str(directory),
            hint=way_out(node_id, name, directory),
        )
        self._exit(EXIT_DAMAGED)

    # -- notes of this life -----------------------------------------------------------------------------------------

    def _note_start(self) -> None:
        """Nothing has been said yet. Raises OSError."""
        s, identity = self.settings, self._identity
        self._life.begin(self._cluster_id, identity.node_id, s.node_name, identity.key_hash)
        self._bootstrap.note_started()

    def _note_place(self, place: Place) -> None:
        """The journal is on the disk up to there: note it, one at a time, the last one at the end."""
        is_noting, self._place = self._place is not None, place
        if not is_noting and not self._tasks.stopped:
            self._tasks.start("note how far the log goes", self._keep_place())

    async def _keep_place(self) -> None:
        while (place := self._place) is not None:
            try:
                await asyncio.to_thread(self._life.reached, place)
            except OSError as e:  # the disk of the log decides what becomes of this server
                self._unnoted.warn("how far the log goes could not be noted", reason=str(e))
            if self._place is place:
                self._place = None

    def _note_end(self) -> None:
        if self._place is not None:
            with contextlib.suppress(OSError):  # it is noted less far then, and that is true as well
                self._life.reached(self._place)

    async def _join(self) -> None:
        membership = self._bootstrap.committed
        if membership is None:
            membership = await self._bootstrap.run(self._candidates, self._call_bootstrap)
        await self._lead_in(membership)

    async def _lead_in(self, membership: Membership) -> None:
        s = self.settings
        self._cluster_id = membership.cluster_id
        self.node.cluster_id = membership.cluster_id
        members = membership.as_members()
        self._members_changed(members)
        raft = RaftLog(
            directory=None if s.dev else self._directory / "server" / "raft",
            node_id=self._identity.node_id,
            cluster_id=membership.cluster_id,
            members=members,
            state=self.node,
            dial=self._peers.dial_raft,
            timing=Timing(heartbeat_s=s.heartbeat_s, election_min_s=s.election_min_s, election_max_s=s.election_max_s),
            on_role_change=self._role_changed,
            on_members=self._members_changed,
            on_opened=(lambda: None) if s.dev else self._note_start,
            starts=self._life.starts,
            lineage=() if s.dev else self._life.lineage,
            reached=self._life.place,
            on_reached=(lambda _place: None) if s.dev else self._note_place,
            fail_stop=self._fail,
            on_outlived=self._refused,
        )
        if any(m.id == self._identity.node_id and not m.votes for m in members):
            # It was let in later. The log puts older lists in force while it is read, of servers that may be gone:
            # those that let it in are heard as well, until `standing.py` finds that the list in force needs no help.
            raft.introduce(members)
        try:
            await raft.start()
        except RostraError as e:
            hint = way_out(self._identity.node_id, s.node_name, self._directory)
            log.err("this server's log cannot be used, it does not start", reason=e.message, hint=hint)
            self._exit(EXIT_DAMAGED)
            return
        except OSError as e:
            log.err("this server's log cannot be opened, it does not start", reason=cannot(e))
            self._exit(EXIT_CANNOT)
            return
        self._raft = self.node.raft = raft
        self._follow_servers()
        # Loaded rows stay: cyclic collection over them would only pause the loop (25 ms per 100,000 rows).
        gc.collect()
        gc.freeze()
        gc.disable()
        self._tasks.keep("leader duties", self._leader.run)
        self._tasks.keep("autopilot", self._autopilot.run)
        standing = self._standing = Standing(
            self.node,
            raft,
            self._peers,
            host=s.advertise,
            port=self.rpc_port,
            candidates=self._candidates,
            asking=lambda: {**self._bootstrap.asking(), **self._roster.introduction()},
            ask=self._call_bootstrap,
            moved=self._roster.moved,
            introduce=self._introduce,
            hear=self._roster.hear,
        )
        self._tasks.keep("standing", standing.keep)

    # -- who the servers are ------------------------------------------------------------------------------------

    def _members_changed(self, members: Members) -> None:
        """Another list of servers is in force."""
        if self._tasks.stopped:
            return
        me = self._identity.node_id
        if any(m.id == me for m in self._members) and not any(m.id == me for m in members):
            log.warn("this server was removed from the cluster; it keeps its data and takes no part any more")
        self._members = members
        self._follow_servers()

    def _introduce(self, members: Members) -> None:
        """A server says that these are the servers now. Only the log changes the list, but whoever leads may be one
        that it does not have yet, and is heard."""
        for member in members:
            self._peers.hear_say(member.id, member.host, member.port)
        if self._raft is not None:
            self._raft.introduce(members)  # and comes back through `_members_changed`

    def _follow_servers(self) -> None:
        ids, keys = {m.id for m in self._members}, {m.key_hash for m in self._members}
        heard = self._raft.heard if self._raft is not None else ()
        strangers = [m for m in heard if m.id not in ids and m.key_hash not in keys]
        servers = (*self._members, *strangers)
        self._server_ids.clear()
        self._server_ids.update({m.key_hash: m.id for m in self._members})
        # Raft hears servers that were only introduced, and counts them for nothing; at any other door they are no
        # servers.
        self._stranger_ids.clear()
        self._stranger_ids.update({m.key_hash: m.id for m in strangers})
        if self._raft is not None:
            self._peers.follow(servers)
        self._endpoint.drop_former_servers()

    def _met(self, server_id: str, said: dict[str, Any]) -> None:
        """A server has connected and says where it can be reached."""
        host, port = said.get("address"), said.get("rpc_port")
        if isinstance(host, str) and 0 < len(host) <= 253 and type(port) is int and 0 < port < 65536:
            self._peers.hint(server_id, host, port)
        self._roster.note_version(server_id, said.get("version"))

    def _note_names(self, effects: Sequence[tuple[Any, ...]]) -> None:
        """Names of nodes have gone to other keys."""
        for effect in effects:
            if effect[0] == "name-bound":
                self._enrolment.bound(*effect[1:])
                self._endpoint.agents.end_former(*effect[1:3])
            elif effect[0] == "adopted":
                self._endpoint.agents.end_all_former(self.node.store.tables.members.rows)

    def _greeted(self, kind: str, args: dict[str, Any], peer: Peer) -> dict[str, Any]:
        if kind == JOIN:
            return self._roster.answer_join(args, peer)
        return self._bootstrap.handle(kind, args, peer.key_hash)

    def _role_changed(self, is_leader: bool, leader_id: str | None, term: int) -> None:
        heard = self._raft.heard if self._raft is not None else self._members  # it may be a stranger still
        name = next((m.name for m in heard if m.id == leader_id), "")
        log.info("leadership", leader=name or "none", term=term, mine=is_leader)
        self.node.role_changed(is_leader, leader_id, term)
        self._leader.kick()

    def _accept_raft(self, server_id: str, connection: Any) -> None:
        if self._raft is None:
            connection.abort("not ready")
        else:
            self._raft.accept(server_id, connection)

    # -- who is here ------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        s = self.settings
        return {
            "name": s.node_name,
            "node_id": self._identity.node_id,
            "cluster": self.node.cluster_id,
            "datacenter": s.datacenter,
            "version": s.version,
            "address": s.advertise,
            "rpc_port": self.rpc_port,
        }

    def _servers(self) -> list[dict[str, Any]]:
        return [
            {"id": m.id, "name": m.name, "host": m.host, "port": m.port, "key_hash": m.key_hash} for m in self._members
        ]

    def learn(self, addresses: list[str]) -> bool:
        """Servers were found there; whether more such addresses would help."""
        self._found = list(dict.fromkeys([*addresses, *self._found]))[:FOUND_MAX]
        return self._standing is None or self._standing.misses_others()

    def _candidates(self) -> list[str]:
        return [*self.settings.candidates, *self._found]

    async def _call_bootstrap(self, address: str, kind: str, args: dict[str, Any]) -> tuple[dict[str, Any], str]:
        host, _, port = address.rpartition(":")
        connection, _, key_hash = await dial(
            host.strip("[]"),
            int(port),
            self._identity.client_context(),
            hello("bootstrap", **self._about()),
            key_hash=None,
        )
        try:
            client = RpcClient(connection)
            connection.on_frame, connection.on_lost = client.on_frame, client.on_lost
            async with asyncio.timeout(2.0):
                return await client.call(kind, args), key_hash
        except TimeoutError:
            raise NoLeader(f"{address} does not answer") from None
        finally:
            connection.close()

    # -- what the first leader makes -----------------------------------------------------------------------------

    async def _ensure_roots(self) -> None:
        """The first leader of a cluster writes down who its servers are and makes the mesh's first root."""
        node, tables = self.node, self.node.store.tables
        if not node.store.cluster_id:
            await self._found_cluster()
        await self._roster.keep_rows()
        if not any(r.active for r in tables.roots.rows.values()):
            from rostra.server.ca.issue import create_root
            from rostra.server.state.ca import SetRoot

            trust_domain = f"{self._cluster_id}.consul"
            fields, key_pem = await asyncio.to_thread(create_root, trust_domain, int(time.time() * 1000), 1)
            await node.own_write(SetRoot(root=fields, private_key_pem=key_pem, expected_active=""), hold_s=5)
            log.info("made the mesh CA's first root", trust_domain=trust_domain)

    async def _found_cluster(self) -> None:
        from rostra.server.ca.issue import create_cluster_ca

        certificate, key = await asyncio.to_thread(create_cluster_ca, int(time.time() * 1000))
        await self.node.own_write(
            cluster_commands.Bootstrap(
                cluster_id=self._cluster_id,
                members=tuple((m.id, m.name, m.host, m.key_hash) for m in self._members),
                datacenter=self.settings.datacenter,
                cluster_ca_cert_pem=certificate,
                cluster_ca_key_pem=key,
                at_ms=int(time.time() * 1000),
            ),
            hold_s=5,
        )
        log.info("founded the cluster", cluster=self._cluster_id, servers=len(self._members))

    async def _probe(self, member: MemberRow) -> bool:
        """Does the agent on `member` still answer on its join port, under the same name, id and key?"""
        try:
            connection, answer, _ = await ask(
                member.address,
                member.serf_port,
                self._identity.client_context(),
                pack({"kind": "ping"}),
                key_hash=member.key_hash,
                timeout_s=1.0,
            )
        except RostraError:
            return False
        connection.close()
        try:
            said = unpack(answer)["self"]
            return (said["name"], said["node_id"]) == (member.name, member.node_id)
        except (ValueError, TypeError, KeyError):
            return False

    def metrics(self) -> dict[str, Any]:
        """Numbers of this core, for /v1/agent/metrics: {"gauges": {name: n}, "counters": …, "histograms": …}."""
        node, raft = self.node, self._raft
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "is_leader": node.is_leader,
            "index": node.store.index,
            "raft": raft.metrics() if raft is not None else {},
            "counts": {
                **node.counts,
                "watch_deltas": node.watches.deltas,
                "internal_errors": len(node.store.internal_errors),
                "connections_rejected": self._endpoint.rejected,
                "connections_dropped": self._endpoint.dropped,
            },
            "watches": len(node.watches),
            "connections": self._endpoint.connections,
            "steps": {"buckets": self._steps.buckets, "count": self._steps.count, "longest_ms": self._steps.longest_ms},
            "rss_bytes": usage.ru_maxrss * 1024,
            "uptime_s": time.monotonic() - self._started,
        }


def remove_stale(where: Path) -> None:
    """Remove the directories of this user's development servers that ended without a chance to do it themselves."""
    for directory in where.glob(f"{DEV_PREFIX}*"):
        try:
            about = directory.lstat()
            if (
                not stat.S_ISDIR(about.st_mode)
                or about.st_uid != os.geteuid()
                or time.time() - about.st_mtime < STALE_S
            ):
                continue
            if (directory / "server").exists():
                DataDirectory.lock(directory / "server").release()  # raises where its server lives
            shutil.rmtree(directory, ignore_errors=True)
        except (OSError, RostraError):
            continue


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong in here is wrong with the data."""
    try:
        yield
    except RostraError as e:
        raise UnusableData(e.message) from None


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as e:
        listener.close()
        flag = "-bind" if e.errno == errno.EADDRNOTAVAIL else "-server-port or ports.server"
        raise Conflict(f"cannot listen for RPC on {host}:{port}: {e.strerror}; change it with {flag}") from None
    return listener


def _socket_path(directory: Path) -> Path:
    """Beside the data where that is short enough for the kernel (107 bytes), else in the user's run-time directory."""
    path = (directory / "server" / "core.sock").absolute()
    if len(os.fsencode(path)) <= 100:
        return path
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=f"rostra-{os.getpid()}-", dir=base)) / "core.sock"


async def serve(settings: CoreSettings, ready: Callable[[dict[str, Any]], None], stop: asyncio.Event) -> None:
    core = Core(settings, stop.set)
    try:
        ready({"ready": await core.start()})
        await stop.wait()
    finally:
        with contextlib.suppress(AttributeError):
            await core.stop()


def run(settings: CoreSettings, ready: Callable[[dict[str, Any]], None], watch: Callable[[Any], Any] | None) -> int:
    """Run a server until SIGTERM, SIGINT (outside child mode) or the end of the lifeline. The exit status."""
    import uvloop

    logging.configure(settings.log_level, as_json=settings.log_json)
    end_with_threads()
    take_turns_with_threads()
    core_dumps.switch_off()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        if watch is None:
            loop.add_signal_handler(signal.SIGINT, stop.set)
        else:
            watch(lambda: loop.call_soon_threadsafe(stop.set))
        await serve(settings, ready, stop)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except RostraError as e:
        ready({"error": [e.code, e.message]})
        return EXIT_DAMAGED if isinstance(e, UnusableData) else EXIT_CANNOT
    except OSError as e:
        ready({"error": ["conflict", f"the core cannot start: {cannot(e)}"]})
        return EXIT_CANNOT
    return 0


def main_child() -> NoReturn:
    """Started by the agent: settings come down the lifeline, readiness goes up."""
    from rostra.runtime.lifeline import FLAG, Lifeline, LifelineClosed

    lifeline = Lifeline(int(sys.argv[sys.argv.index(FLAG) + 1]))
    try:
        settings = CoreSettings.from_map(lifeline.receive())
    except LifelineClosed:  # the agent was stopped while both were starting
        sys.exit(0)
    sys.exit(run(settings, lifeline.send, lambda on_end: lifeline.watch(on_end, grace_s=1.0)))
