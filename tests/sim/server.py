"""One simulated machine, and the server process on it: the real ServerNode, RaftLog, Peers and Endpoint on our loop.

What `server/run.py` composes is composed here from the same parts; TLS, enrolment and bootstrap are left out (the
transport knows whose key the other side shows). A machine keeps its disk and clock when a process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rostra.server.endpoint import Act, Endpoint
from rostra.server.node import ServerNode
from rostra.server.peers import Peers, dial
from rostra.server.raft.core import LEADER
from rostra.server.raft.journal import BEGINNING_PLACE, Place
from rostra.server.raft.log import RaftLog
from rostra.server.raft.members import Member, Members
from rostra.server.raft.messages import LINEAGE_MAX
from rostra.server.raft.transport import Link, Links
from rostra.server.requests import Peer
from rostra.server.roster import Roster
from rostra.server.standing import Standing
from rostra.server.state import cluster
from rostra.server.state.kv import GetKey
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import NoLeader, RostraError
from rostra.wire.frames import unpack
from rostra.wire.rpc import RpcClient, hello
from tests.sim.disk import EXECUTOR, OpenDisk, VirtualDisk
from tests.sim.network import End
from tests.sim.world import Clock, Loop, ProcessExit

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

CLUSTER_ID = "5c1f7f0e-4c5e-4f2b-9a57-0f6d6f1f7a10"
PORT = 8300
DATACENTER = "dc1"
#: Nothing is encrypted here; that servers alone have it counts.
CA_KEY = "the key of the cluster CA"
#: When every run begins.
EPOCH_S = 1_700_000_000.0

#: Kinds of Raft messages (messages.py) that promise something under their term.
_ANSWER, _REQUEST_VOTE, _VOTE, _STALE = 4, 5, 6, 9


class Machine:
    """A host, its disk and clock, and the identity of the server that is installed on it."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.world = cluster.world
        self.name = f"s{number}"
        self.moves = 0
        self.generation = 0
        self.clock = self._new_clock()
        self.disk = VirtualDisk(self.world, self.name)
        self.server: Server | None = None
        #: switched off for good
        self.is_gone = False
        #: what is noted beside the server's key: its processes, and how far its journal has been on the disk
        self.lineage: tuple[str, ...] = ()
        self.reached = BEGINNING_PLACE
        #: a part of what it had is missing: it is expected not to start, or to stop
        self.has_lost = False
        #: all of it was put back from an older copy: what it says under terms is not its own word
        self.is_copy = False
        #: what it starts with where neither log nor snapshot says otherwise
        self.members: Members = ()
        self._identify()

    def _identify(self) -> None:
        # The order of ids decides who dials whom, and must not be that of the machines.
        self.id = f"{self.world.chance.getrandbits(16):04x}-{self.name}-{self.generation}"
        self.key_hash = f"key-of-{self.id}"

    def _new_clock(self) -> Clock:
        drift = self.cluster.profile.drift
        return Clock(self.world.chance.uniform(10, 1000), 1 + self.world.chance.uniform(-drift, drift))

    def member(self, suffrage: str) -> Member:
        return Member(self.id, self.name, PORT, self.key_hash, self.server_name, suffrage)

    @property
    def server_name(self) -> str:
        return f"server-{self.number}-{self.generation}"

    def start(self) -> None:
        if self.server is None and not self.is_gone:
            self.cluster.network.powered_off.discard(self.name)
            self.server = Server(self)

    def kill(self) -> None:
        """kill -9: what was written and sent is in the hands of the system."""
        server = self._stop("killed")
        if server is not None:
            self.disk.process_died()
            self.cluster.network.died(server, power_lost=False)

    def cut_power(self) -> None:
        server = self._stop("loses its power")
        self.cluster.network.powered_off.add(self.name)
        if server is not None:
            self.cluster.network.died(server, power_lost=True)
        self.disk.power_cut()
        self.clock = self._new_clock()

    def _stop(self, how: str) -> Server | None:
        server, self.server = self.server, None
        if server is not None:
            self.world.note(self.name, how)
            server.loop.kill()
            self.cluster.network.processes.pop(self.name, None)
            self.cluster.died(server)
        return server

    def replace(self) -> None:
        """Another server is installed here, with an empty disk and a new identity; not started yet."""
        self.disk.wipe()
        self.generation += 1
        self.lineage, self.reached = (), BEGINNING_PLACE
        self.has_lost = self.is_copy = False
        self._identify()

    def move(self, *, power: bool = False) -> None:
        """It stops, and will come back under another address."""
        if power:
            self.cut_power()
        else:
            self.kill()
        self.moves += 1
        self.name = f"s{self.number}{'abcdefghijklmnopqrstuvwxyz'[self.moves % 26]}"


class Server:
    """One process: from its start to its death."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.cluster = machine, machine.cluster
        self.world, self.host = machine.world, machine.name
        self.id, self.key_hash, self.name = machine.id, machine.key_hash, machine.server_name
        world, profile = self.world, self.cluster.profile
        self.loop = loop = Loop(world, self.host, machine.clock, unhandled=self._unhandled)  # type: ignore[abstract]
        loop.interrupted, loop.perf_step = profile.interrupted, profile.perf_step
        loop.burnt = self._burnt
        loop.process = self
        self.disk = OpenDisk(machine.disk, loop)
        loop.executor = lambda work, done: self.disk.submit(EXECUTOR, work, done)
        loop.connector = lambda factory, host: self.cluster.network.connect(self, factory, host)
        self.chance = random.Random(world.chance.getrandbits(48))
        self.process = f"process {self.cluster.incarnation()}"
        self.raft: RaftLog | None = None
        self._starting: RaftLog | None = None
        self.is_up = False  # has applied what it knew to be committed
        self.members: Members = ()
        self._server_ids: dict[str, str] = {}
        self._stranger_ids: dict[str, str] = {}
        #: Its -retry-join: where the others are when it is started. Whoever moves later is not where it says.
        self._joins = [f"{m.name}:{PORT}" for m in self.cluster.machines if m is not machine and not m.is_gone]
        #: what clients have asked of this process: told when it dies
        self.asked: dict[Any, None] = {}
        world.note(self.host, f"starts as {self.id}")
        loop.run_now(self._start)

    @property
    def term(self) -> int:
        return self.raft.term if self.raft is not None else 0

    # -- composition

    def _start(self) -> None:
        self.node = ServerNode(
            node_id=self.id,
            name=self.name,
            datacenter=DATACENTER,
            spawn=self.spawn,
            clock=self.loop.time,
            wall=lambda: EPOCH_S + self.world.now,
            client_id=f"{self.id}-{self.cluster.incarnation()}",
        )
        self.node.cluster_id = CLUSTER_ID
        self.state = RecordedState(self)
        self.peers = Peers(me=self.id, context=lambda: self, about=self._about, spawn=self.spawn)  # type: ignore[arg-type,return-value]
        self.node.peer = self.peers.client
        self.roster = Roster(
            self.node,
            serf_port=8301,
            version="1",
            hello=self._hello,
            hint=self.peers.hint,
            where=self.peers.where,
            introduce=self._introduce,
            now=self.loop.time,
        )
        self.endpoint = Endpoint(
            self.node,
            spawn=self.spawn,
            server_key=self._server_ids.get,
            stranger_key=self._stranger_ids.get,
            enrol=_refuse_all,
            accept_raft=self._accept_raft,
            bootstrap=self._greeted,
            acts={"ping": Act(_pong, _anybody), "raft.moved": Act(self._moved, _anybody)},
            about=self._about,
            met=self._met,
        )
        self.cluster.network.processes[self.host] = self
        self._members_changed(self.machine.members)
        self.spawn(self._run())

    async def _run(self) -> None:
        profile = self.cluster.profile
        raft = ObservedRaftLog(
            directory=Path("/") / self.host,  # so that the journal is opened beside the loop
            disk=self.disk,
            node_id=self.id,
            cluster_id=CLUSTER_ID,
            members=self.machine.members,
            state=self.state,
            dial=self.peers.dial_raft,
            timing=profile.timing,
            limits=profile.limits,
            on_role_change=self._role_changed,
            on_members=self._members_changed,
            on_opened=self._opened,
            starts=len(self.machine.lineage) + 1,
            lineage=(*self.machine.lineage, self.process)[-LINEAGE_MAX:],
            reached=self.machine.reached,
            on_reached=self._reached,
            fail_stop=self.fail_stop,
            clock=self.loop.boottime_ns,
            perf=self.loop.perf,
            chance=self.chance,
        )
        self._starting = raft
        if any(m.id == self.id and not m.votes for m in self.machine.members):
            raft.introduce(self.machine.members)
        try:
            await raft.start()
        except (OSError, RostraError) as e:  # the program ends with a message
            self.fail_stop(f"cannot start: {e}")
        self.raft = self.node.raft = raft
        self._follow_servers()
        self.is_up = True
        self.world.note(self.host, f"is up at {raft.applied_index}, term {raft.term}")
        standing = Standing(
            self.node,
            raft,
            self.peers,
            host=self.host,
            port=PORT,
            candidates=lambda: self._joins,
            asking=lambda: {**self._hello(), **self.roster.introduction(), "suffrage": "learner", "version": "1"},
            ask=self._call_bootstrap,
            moved=self.roster.moved,
            introduce=self._introduce,
            hear=self.roster.hear,
            now=self.loop.time,
        )
        await standing.keep()

    # -- as in server/run.py and server/lived.py

    def _opened(self) -> None:
        self.machine.lineage += (self.process,)

    def _reached(self, place: Place) -> None:
        self.world.after(0.002, self._note, place)

    def _note(self, place: Place) -> None:
        if self.machine.server is self:
            self.machine.reached = max(place, self.machine.reached)

    async def stop(self) -> None:
        """In order; the process ends with it."""
        raft = self.raft
        if raft is not None and raft.is_leader:
            with contextlib.suppress(RostraError, TimeoutError):
                async with asyncio.timeout(0.8):
                    await raft.transfer()
        self.endpoint.close()
        if raft is not None:
            await raft.stop()
        self.world.after(0.0, self._exit)

    def _exit(self) -> None:
        if self.machine.server is self:
            self.machine.kill()

    def _about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "node_id": self.id,
            "cluster": CLUSTER_ID,
            "datacenter": DATACENTER,
            "version": "1",
            "address": self.host,
            "rpc_port": PORT,
        }

    def _hello(self) -> dict[str, Any]:
        return {**self._about(), "key_hash": self.key_hash}

    def _greeted(self, kind: str, args: dict[str, Any], peer: Peer) -> dict[str, Any]:
        return self.roster.answer_join(args, peer)

    async def _moved(self, peer: Peer, args: dict[str, Any], _caller: Any) -> None:
        await self.roster.moved(peer.node_id, args["host"], args["port"])

    async def _call_bootstrap(self, address: str, kind: str, args: dict[str, Any]) -> tuple[dict[str, Any], str]:
        host, _, port = address.rpartition(":")
        connection, _, key_hash = await dial(
            host,
            int(port),
            self,  # type: ignore[arg-type]
            hello("bootstrap", **self._about()),
            key_hash=None,
        )
        try:
            caller = RpcClient(connection)
            connection.on_frame, connection.on_lost = caller.on_frame, caller.on_lost
            async with asyncio.timeout(2.0):
                return await caller.call(kind, args), key_hash
        except TimeoutError:
            raise NoLeader(f"{address} does not answer") from None
        finally:
            connection.close()

    def _introduce(self, members: Members) -> None:
        for member in members:
            self.peers.hear_say(member.id, member.host, member.port)
        if self.raft is not None:
            before = self.raft.heard
            self.raft.introduce(members)
            if self.raft.heard != before:
                self.world.note(self.host, "hears " + " ".join(m.host for m in self.raft.heard))

    def _follow_servers(self) -> None:
        listed = {m.id for m in self.members}
        heard = self.raft.heard if self.raft is not None else ()
        strangers = [m for m in heard if m.id not in listed]
        servers = (*self.members, *strangers)
        self._server_ids.clear()
        self._server_ids.update({m.key_hash: m.id for m in self.members})
        self._stranger_ids.clear()
        self._stranger_ids.update({m.key_hash: m.id for m in strangers})
        if self.raft is not None:
            self.peers.follow(servers)
        self.endpoint.drop_former_servers()

    def _met(self, server_id: str, said: dict[str, Any]) -> None:
        self.peers.hint(server_id, said["address"], said["rpc_port"])

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.loop.is_dead:
            self._unhandled({"message": "a task has failed", "exception": error})

    def _unhandled(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None:
            import traceback

            where = "".join(traceback.format_exception(error)[-4:])
        else:
            where = ""
        self.world.violated("no exceptions", f"{self.host}: {context.get('message')}: {error!r}\n{where}")

    # -- what the parts say

    def _role_changed(self, is_leader: bool, leader_id: str | None, term: int) -> None:
        self.world.note(self.host, f"{'leads' if is_leader else f'follows {leader_id}'} in term {term}")
        self.cluster.role_changed(self, is_leader, term)
        self.node.role_changed(is_leader, leader_id, term)
        if is_leader and not self.node.store.cluster_id:
            self.spawn(self._found())

    async def _found(self) -> None:
        members = tuple((m.id, m.name, m.host, m.key_hash) for m in self.members)
        try:
            await self.node.own_write(cluster.Bootstrap(CLUSTER_ID, members, DATACENTER, "", CA_KEY, 0))
        except RostraError:
            pass  # the next leader will

    def _members_changed(self, members: Members) -> None:
        if self._starting is not None and self.raft is None and not self.machine.is_copy:
            self.cluster.oracle.restarted(self.id, self._starting.term)
        self.world.note(self.host, "members " + " ".join(f"{m.host}:{m.suffrage}" for m in members))
        self.members = members
        self._follow_servers()

    def fail_stop(self, reason: str) -> NoReturn:
        self.world.note(self.host, f"stops: {reason}")
        self.cluster.fail_stopped(self, reason)
        raise ProcessExit

    def _burnt(self) -> None:
        self.cluster.crash(self.machine)

    # -- connections

    def incoming(self, transport: End) -> None:
        other = transport.other
        connection, first = self.endpoint._expecting(other.host)
        transport.protocol = connection
        connection.connection_made(transport)  # type: ignore[arg-type]
        peer = Peer(key_hash=other.key_hash, address=other.host, node_id=other.id, name=other.name)  # type: ignore[attr-defined]
        self.spawn(self.endpoint._greet(connection, first, peer))

    def _accept_raft(self, server_id: str, connection: Any) -> None:
        if self.raft is None:
            connection.abort("raft is not running")
        else:
            self.raft.accept(server_id, connection)

    def spoke(self, to: str, payload: bytes) -> None:
        """A Raft message leaves this process."""
        kind, oracle = payload[1], self.cluster.oracle
        if kind not in (_ANSWER, _REQUEST_VOTE, _VOTE, _STALE) or self.machine.is_copy:
            return
        message = unpack(payload)
        if kind == _VOTE:
            oracle.votes_for(self.id, message[2], to)
        elif kind == _REQUEST_VOTE:
            oracle.votes_for(self.id, message[2], self.id)
        elif kind == _STALE or message[5] or message[6]:  # "heard you" promises nothing
            oracle.speaks(self.id, message[2])

    # -- what clients ask. Outcomes go to `answer(outcome)`.

    def ask(self, question: Any, work: Coroutine[Any, Any, Any]) -> None:
        self.asked[question] = None
        self.loop.create_task(self._answer(question, work))

    async def _answer(self, question: Any, work: Coroutine[Any, Any, Any]) -> None:
        try:
            outcome: Any = await work
        except RostraError as e:
            outcome = e
        except Exception as e:
            self._unhandled({"message": f"{question} failed", "exception": e})
            return
        self.asked.pop(question, None)
        question.answered(self, outcome)

    async def read(self, mode: str, key: str) -> tuple[int, int, bytes | None]:
        """(the state's index, the answer's index, the value)."""
        if not self.is_up:
            raise NoLeader
        await self.node.barrier(mode)
        return self.look(key)

    def look(self, key: str) -> tuple[int, int, bytes | None]:
        """What the state is now."""
        evaluation = self.node.store.evaluate(GetKey(key))
        rows = evaluation.rows()
        return self.node.store.index, evaluation.index, rows[0][1].value if rows else None


class ObservedRaftLog(RaftLog):
    """Tells the oracle of leaderships as they begin."""

    def state_changed(self, old: int, new: int) -> None:
        if new == LEADER:
            server: Server = self._loop.process  # type: ignore[attr-defined]
            server.cluster.oracle.leads(server.id, self._core.term())
        super().state_changed(old, new)


class ObservedLinks(Links):
    """Lets the oracle see what leaves."""

    def _attach(self, link: Link, connection: FrameConnection) -> None:
        connection.__class__ = _ObservedConnection
        connection.speaks = partial(self._loop.process.spoke, link.member.id)  # type: ignore[attr-defined]
        super()._attach(link, connection)


class _ObservedConnection(FrameConnection):
    speaks: Callable[[bytes], None]

    def send(self, payload: bytes) -> None:
        if self.open:
            self.speaks(payload)
        super().send(payload)


class RecordedState:
    """The state machine that RaftLog drives: ServerNode's, with a note of every step for the oracle."""

    def __init__(self, server: Server) -> None:
        self._server, self._node = server, server.node
        self.position = 0  # entries applied, ever

    def apply(self, entries: Sequence[bytes]) -> list[Any]:
        results = self._node.apply(entries)
        cluster = self._server.cluster
        self.position = cluster.oracle.applied(self._server.id, self.position, entries, results, self._node.store)
        return results

    def capture(self) -> Iterator[bytes | None]:
        cluster = self._server.cluster
        cluster.counts["snapshots taken"] += 1
        cluster.oracle.compare_hash(self._server.id, self.position, self._node.store)
        header = self.position.to_bytes(8, "big")
        is_first = True
        for chunk in self._node.capture():
            if chunk is not None and is_first:
                yield header
                is_first = False
            yield chunk

    def loader(self) -> _Loader:
        return _Loader(self)


class _Loader:
    def __init__(self, state: RecordedState) -> None:
        self._state = state
        self._loader = state._node.loader()
        self._position = -1

    def feed(self, chunk: bytes) -> None:
        if self._position < 0:
            self._position = int.from_bytes(chunk, "big")
        else:
            self._loader.feed(chunk)

    def finish(self) -> Callable[[], None]:
        swap = self._loader.finish()

        def swapped() -> None:
            state = self._state
            server = state._server
            swap()
            state.position = self._position
            server.world.note(server.host, f"has loaded a snapshot at {self._position}")
            server.cluster.loaded(server, self._position)

        return swapped


def _anybody(*_: Any) -> bool:
    return True


async def _pong(peer: Any, args: Any, _caller: Any) -> dict[str, Any]:
    return {}


async def _refuse_all(peer: Any) -> None:
    raise NoLeader
