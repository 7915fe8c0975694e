"""Who may be what: founding over real TLS, enrolment, certificates of the cluster CA, names and keys, and attackers
that hold the secret. Real servers in one process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rostra.agent.enrolment import Certificate
from rostra.agent.join import JoinListener, discover
from rostra.agent.servers import ServerAddress, ServerLink
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from rostra.runtime.service import Tasks
from rostra.runtime.tls import peer_key_hash
from rostra.runtime.wall import Wall
from rostra.server import enrolment
from rostra.server.own_certificate import OwnCertificate
from rostra.server.peers import dial
from rostra.server.requests import Peer
from rostra.server.run import Core, UnusableData
from rostra.server.settings import CoreSettings
from rostra.server.state.catalog import Register
from rostra.server.state.kv import GetKey, SetKey
from rostra.wire.errors import BadRequest, Conflict, Denied, NoLeader, RostraError, TooLarge
from rostra.wire.rpc import RpcClient, hello
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster


class Client:
    """A client agent's part in this: identity, session, certificate."""

    def __init__(self, cluster: Cluster, name: str, secrets: list[str] | None = None, **options: Any) -> None:
        said, wall = options.pop("about", {}), options.pop("wall", None)
        directory = cluster.directory / f"client-{options.pop('directory', name)}"
        known = parse_secrets([cluster.secret] if secrets is None else secrets)
        self.identity = NodeIdentity.open(directory, name, known, **options)
        self._tasks = Tasks("client")

        async def addresses() -> list[ServerAddress]:
            return [ServerAddress(host="127.0.0.1", port=c.rpc_port) for c in cluster.cores.values()]

        self.session = ServerLink(
            addresses=addresses,
            context=self.identity.client_context,
            about=lambda: {"name": name, "node_id": self.identity.node_id, "role": "client", **said},
            key_of=peer_key_hash,
            spawn=lambda coro: self._tasks.start("session", coro),
        )
        self.attempts = 0
        self._dial, self.session._dial = self.session._dial, self._counted  # type: ignore[method-assign]
        self.certificate = Certificate(self.identity, self.session, wall=wall)
        self.session.on_connected.append(self.certificate.kick)

    async def _counted(self, address: ServerAddress) -> Any:
        self.attempts += 1
        return await self._dial(address)

    async def __aenter__(self) -> Client:
        self._tasks.start("session", self.session.run())
        self._tasks.start("certificate", self.certificate.keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.stop()


@contextlib.asynccontextmanager
async def line(core: Core, identity: NodeIdentity, protocol: str = "rpc", **about: Any) -> AsyncIterator[RpcClient]:
    """A connection of a node that says what it likes. Raises what the server refuses it with."""
    said = {"name": identity.node_name, "node_id": identity.node_id, **about}
    connection, _, _ = await dial(
        "127.0.0.1", core.rpc_port, identity.client_context(), hello(protocol, **said), key_hash=None
    )
    caller = RpcClient(connection)
    connection.on_frame, connection.on_lost = caller.on_frame, caller.on_lost
    try:
        yield caller
    finally:
        connection.abort("test over")


def enrolled(cluster: Cluster, name: str, directory: str = "") -> NodeIdentity:
    return NodeIdentity.open(cluster.directory / (directory or name), name, parse_secrets([cluster.secret]))


def leader(cluster: Cluster) -> Core:
    core = cluster.leader()
    assert core is not None
    return core


# -- certificates ----------------------------------------------------------------------------------------------------


async def test_servers_give_themselves_certificates_of_the_cluster_ca_and_report_it(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await eventually(lambda: all(c._identity.is_enrolled for c in cluster.cores.values()))
        members = leader(cluster).node.store.tables.members.rows
        anchors = {c._identity.anchor_hashes for c in cluster.cores.values()}
        assert len(anchors) == 1
        assert len(next(iter(anchors))) == 2  # the cluster CA and the enrolment CA
        await eventually(lambda: {members[n].anchors for n in cluster.names} == anchors)


async def test_a_client_gets_a_certificate_keeps_it_and_needs_no_secret_any_more(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        members = leader(cluster).node.store.tables.members.rows
        async with Client(cluster, "c1") as client:
            await eventually(lambda: client.identity.is_enrolled)
            await eventually(lambda: members["c1"].anchors == client.identity.anchor_hashes)
            version, pem = client.identity.version, client.identity.cert_path.read_text()
        async with Client(cluster, "c1") as again:
            assert again.identity.is_enrolled
            assert again.identity.cert_path.read_text() == pem
            await eventually(lambda: again.session.connected)
            await again.certificate.renew()
            assert (again.identity.version, version) == (1, 2)  # nothing new was installed
        async with Client(cluster, "c1", secrets=[]) as bare:
            await eventually(lambda: bare.session.connected)
            assert await bare.session.write(SetKey("k", b"v"))
            await eventually(lambda: members["c1"].anchors == bare.identity.anchor_hashes)
            assert len(bare.identity.anchor_hashes) == 1


async def test_servers_restart_without_the_secret(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await eventually(lambda: all(c._identity.is_enrolled for c in cluster.cores.values()))
        await cluster.session(leader(cluster)).write(SetKey("k", b"v"))
        for name in cluster.names:
            await cluster.stop(name)
        for name in cluster.names:
            port = cluster._ports[name]
            cluster.cores[name] = await started(settings(cluster, name, rpc_port=port, bootstrap_expect=3, secrets=()))
        await eventually(cluster.leader)
        session = cluster.session(cluster.followers()[0])
        barrier = await session.barrier("default")
        assert (await session.read(GetKey("k"), min_index=barrier.index)).rows[0][1][1] == b"v"


async def test_a_certificate_is_renewed_after_two_thirds_of_its_life(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster, Client(cluster, "c1") as client:
        await eventually(lambda: client.identity.is_enrolled)
        first = client.identity.cert_path.read_text()
        leader(cluster)._acts._certificates.clear()
        client.certificate._wall.now = lambda: client.identity.renew_at - 1
        await client.certificate.renew()
        assert client.identity.cert_path.read_text() == first
        client.certificate._wall.now = lambda: client.identity.renew_at + 1
        await client.certificate.renew()
        assert client.identity.cert_path.read_text() != first
        assert await client.session.write(SetKey("k", b"v"))


async def test_a_clock_that_jumps_past_the_renewal_has_the_certificate_renewed_within_seconds(tmp_path: Path) -> None:
    set_by_s = 0.0
    wall = Wall(lambda: time.time() + set_by_s, look_s=0.01)
    async with Cluster(tmp_path, size=1) as cluster, Client(cluster, "c1", wall=wall) as client:
        await eventually(lambda: client.identity.is_enrolled)
        await eventually(lambda: client.identity.anchor_hashes == reported(cluster, "c1"))
        first = client.identity.cert_path.read_text()
        leader(cluster)._acts._certificates.clear()
        set_by_s = client.identity.renew_at - time.time() + 1
        await eventually(lambda: client.identity.cert_path.read_text() != first)


def reported(cluster: Cluster, name: str) -> tuple[str, ...]:
    return leader(cluster).node.store.tables.members.rows[name].anchors


async def test_servers_give_no_certificate_again_from_before_their_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        async with line(core, enrolled(cluster, "c1")) as caller:
            first = await caller.call("act", "node.certificate", {}, "")
            assert await caller.call("act", "node.certificate", {}, "") == first  # asking again costs nothing
            real = time.time
            for set_by_s in (400 * 86400.0, -400 * 86400.0):
                monkeypatch.setattr(time, "time", lambda set_by_s=set_by_s: real() + set_by_s)
                assert await caller.call("act", "node.certificate", {}, "") != first


async def test_a_certificate_is_for_the_proved_key_and_the_bound_name_only(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        identity = enrolled(cluster, "c1")
        async with line(core, identity, role="server") as caller:
            asked = {"name": "s1", "role": "server", "public_key": b"x", "node_id": core._identity.node_id}
            answer = await caller.call("act", "node.certificate", asked, "")
            identity.install_certificate(answer["cert_pem"], answer["anchors_pem"])  # refuses any but its own
            assert "OU=client" in subject(answer["cert_pem"])
            assert answer == await caller.call("act", "node.certificate", {}, "")  # asking again costs nothing
        session = cluster.session(core)
        with pytest.raises(Denied, match="its server"):
            await session.act("node.certificate", {})


def subject(pem: str) -> str:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string()


async def test_a_newcomer_with_the_secret_joins_a_cluster_whose_nodes_all_have_certificates(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await eventually(lambda: all(c._identity.is_enrolled for c in cluster.cores.values()))
        async with Client(cluster, "c1") as first, Client(cluster, "c2") as second:
            await eventually(lambda: first.identity.is_enrolled and second.identity.is_enrolled)


# -- enrolment -------------------------------------------------------------------------------------------------------


async def test_a_wrong_secret_is_one_clear_line_on_each_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        capsys.readouterr()
        wrong = base64.b64encode(os.urandom(32)).decode()
        async with Client(cluster, "c1", secrets=[wrong]) as client:
            await eventually(lambda: client.attempts > 5)
            assert not client.session.connected
        lines = capsys.readouterr().err.splitlines()
        assert len([x for x in lines if "no server can be reached" in x and "is `encrypt` the same" in x]) == 1
        assert len([x for x in lines if "rejected a connection" in x]) <= 1
        assert "c1" not in leader(cluster).node.store.tables.members.rows


async def test_a_name_of_another_key_is_one_line_and_few_attempts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rostra.agent.servers.REFUSED_RETRY_S", 0.2)
    async with Cluster(tmp_path) as cluster, Client(cluster, "c1") as owner:
        await eventually(lambda: owner.session.connected)

        async def is_quiet() -> bool:
            before = leader(cluster).node.store.index
            await asyncio.sleep(1.0)
            return leader(cluster).node.store.index == before

        await eventually(is_quiet, 30)
        index = leader(cluster).node.store.index
        capsys.readouterr()
        async with Client(cluster, "c1", directory="other") as stranger:
            await eventually(lambda: stranger.attempts > 12)
            assert "belongs to another node key" in stranger.session.last_error
            assert "choose another node name" in stranger.session.last_error
            with pytest.raises(NoLeader):
                await asyncio.wait_for(stranger.session.read(GetKey("k")), 10)
        lines = [x for x in capsys.readouterr().err.splitlines() if "refuse this node" in x]
        assert len(lines) == 1
        assert "[ERROR]" in lines[0]
        assert leader(cluster).node.store.index - index < 10  # refusals do not fill the log
        assert owner.session.connected


async def test_the_name_is_free_again_when_its_node_has_failed(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        members = leader(cluster).node.store.tables.members.rows
        async with Client(cluster, "c1") as owner:
            await eventually(lambda: owner.session.connected)
        async with Client(cluster, "c1", directory="other") as heir:
            await eventually(lambda: heir.session.connected, 20)
            assert members["c1"].key_hash == heir.identity.key_hash


async def test_node_ids_and_names_that_clash_are_refused_with_what_to_do(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster, Client(cluster, "c1") as owner:
        core = leader(cluster)
        await eventually(lambda: owner.session.connected)
        taken = owner.identity.node_id
        async with Client(cluster, "c2", node_id=taken) as twin:
            await eventually(lambda: twin.session.last_error)
            assert f"node id {taken} of node c1" in twin.session.last_error
        async with Client(cluster, "c3", node_id=core._identity.node_id) as twin:
            await eventually(lambda: "of node s1" in twin.session.last_error)
        async with Client(cluster, "C1") as shouting:
            await eventually(lambda: "differs only by case" in shouting.session.last_error)
        async with Client(cluster, "c9", directory="c1") as copy:
            await eventually(lambda: "shows the key of node c1" in copy.session.last_error)
        assert set(core.node.store.tables.members.rows) == {"s1", "c1"}
        assert core.node.store.tables.nodes.get("s1") is not None


async def test_a_configured_node_id_is_the_clients_also_when_it_is_changed(tmp_path: Path) -> None:
    first, second = "11111111-2222-3333-4444-555555555555", "21111111-2222-3333-4444-555555555555"
    async with Cluster(tmp_path, size=1) as cluster:
        tables = leader(cluster).node.store.tables
        members, nodes = tables.members.rows, tables.nodes.rows
        for node_id in (first, second):
            async with Client(cluster, "c1", node_id=node_id) as client:
                await eventually(lambda: client.identity.is_enrolled, 20)
                assert members["c1"].node_id == node_id

                def is_listed(node_id: str = node_id) -> bool:
                    return nodes["c1"].id == node_id

                await eventually(is_listed)


async def test_a_node_listed_by_others_under_another_id_is_refused_and_holds_up_no_one(tmp_path: Path) -> None:
    other = "99999999-2222-3333-4444-555555555555"
    check = {"id": "serfHealth", "name": "x", "status": "passing"}
    async with Cluster(tmp_path, size=1) as cluster, Client(cluster, "c1") as prankster:
        checks = leader(cluster).node.store.tables.checks.rows
        await prankster.session.write(Register(node="c2", address="10.0.0.1", node_id=other, checks=(check,)))
        async with Client(cluster, "c2") as victim, Client(cluster, "c3"):
            await eventually(lambda: f"with node id {other}" in victim.session.last_error)
            await eventually(lambda: ("c3", "serfHealth") in checks)


# -- founding, and what a server's data says -------------------------------------------------------------------------


def settings(cluster: Cluster, name: str, **changed: Any) -> CoreSettings:
    fields = {
        "node_name": name,
        "data_dir": str(cluster.directory / name),
        "bind": "127.0.0.1",
        "advertise": "127.0.0.1",
        "rpc_port": 0,
        "bootstrap_expect": 1,
        "secrets": (cluster.secret,),
        "version": "test",
    }
    return CoreSettings(**{**fields, **changed})


async def started(wanted: CoreSettings) -> Core:
    core = Core(wanted, lambda: None)
    await core.start()
    return core


async def test_a_server_whose_founding_was_lost_refuses_its_data(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        await cluster.stop("s1")
        founding = tmp_path / "s1" / "server" / "bootstrap.json"
        kept = founding.read_bytes()
        founding.unlink()
        with pytest.raises(UnusableData, match=r"bootstrap\.json: gone, .*server s1"):
            await started(settings(cluster, "s1"))
        founding.write_text("{")
        with pytest.raises(UnusableData, match="damaged"):
            await started(settings(cluster, "s1"))
        founding.write_bytes(kept)
        core = await started(settings(cluster, "s1", rpc_port=cluster._ports["s1"]))
        cluster.cores["s1"] = core
        await eventually(cluster.leader)


async def test_a_server_stays_who_it_is(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        node_id = leader(cluster)._identity.node_id
        await cluster.stop("s1")
        with pytest.raises(Conflict, match=f"this server is {node_id} in its cluster"):
            await started(settings(cluster, "s1", node_id="11111111-2222-3333-4444-555555555555"))
        with pytest.raises(Conflict, match="start it with -node=s1"):
            await started(settings(cluster, "s1", node_name="s2"))
        core = await started(settings(cluster, "s1", node_id=node_id.upper()))
        assert core._identity.node_id == node_id
        await core.stop()


async def test_a_server_has_the_configured_node_id(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        wanted = "11111111-2222-3333-4444-555555555555"
        core = await started(settings(cluster, "x1", node_id=wanted))
        try:
            assert core._identity.node_id == wanted
            await eventually(lambda: core.node.is_leader and "x1" in core.node.store.tables.members.rows)
            assert core.node.store.tables.members.rows["x1"].node_id == wanted
        finally:
            await core.stop()


async def test_requests_of_the_founding_are_answered_after_it_too_and_change_nothing(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        core = leader(cluster)
        committed = core._bootstrap.committed
        assert committed is not None
        other = enrolled(cluster, "late")
        greeting = {
            "node_id": other.node_id,
            "name": "late",
            "address": "127.0.0.1",
            "rpc_port": 1,
            "key_hash": other.key_hash,
            "datacenter": "dc1",
            "instance": "i",
            "expect": 3,
        }
        file = (tmp_path / core.settings.node_name / "server" / "bootstrap.json").read_bytes()
        async with line(core, other, "bootstrap") as caller:
            said = await caller.call("bootstrap.hello", greeting)
            assert said["cluster_id"] == committed.cluster_id
            said = await caller.call("bootstrap.refuse", {"cluster_id": "another"})
            assert said["ok"] is True
            said = await caller.call("bootstrap.commit", {"cluster_id": "another"})
            assert said["reason"] == "in another cluster"
            junk: list[Any] = [{}, None, [1], {"cluster_id": 7}, {"proposal": {}}]
            for kind in ("bootstrap.refuse", "bootstrap.commit", "bootstrap.prepare", "bootstrap.hello", "elect me"):
                for args in junk:
                    with pytest.raises(BadRequest):
                        await caller.call(kind, args)
        assert file == (tmp_path / core.settings.node_name / "server" / "bootstrap.json").read_bytes()


# -- an enrolled attacker --------------------------------------------------------------------------------------------


async def test_what_the_hello_says_must_be_what_the_certificate_says(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        identity = enrolled(cluster, "c1")
        for about, message in (
            ({"name": "s1"}, "certificate is that of 'c1'"),
            ({"node_id": core._identity.node_id}, "certificate is that of 'c1'"),
            ({"name": 7}, "name is not a text"),
            ({"name": "x" * 65}, "name is not a text"),
            ({"serf_port": "x"}, "serf_port is not a port"),
            ({"serf_port": 1 << 40}, "serf_port is not a port"),
            ({"address": "a b"}, "neither an IP address"),
            ({"address": ["127.0.0.1"]}, "address is not a text"),
            ({"datacenter": "dc2"}, "-datacenter has to be the same"),
            ({"version": "\n" * 5}, "version is not a text"),
            ({"cluster": "another"}, "belongs to cluster another"),
            ({"protocol": None}, "unknown protocol"),
        ):
            protocol = about.pop("protocol", "rpc")
            with pytest.raises((BadRequest, Denied), match=message):
                async with line(core, identity, protocol, **about):  # type: ignore[arg-type]
                    pass
        assert set(core.node.store.tables.members.rows) == {"s1"}


@pytest.mark.parametrize("protocol", ["raft", "peer"])
async def test_a_client_is_no_server_whatever_it_says(tmp_path: Path, protocol: str) -> None:
    async with Cluster(tmp_path) as cluster:
        core = leader(cluster)
        term = core.node.raft.metrics().get("term")  # type: ignore[union-attr]
        identity = NodeIdentity.open(
            tmp_path / "c1", "c1", parse_secrets([cluster.secret]), node_id=core._identity.node_id
        )
        with pytest.raises(Denied, match="is not a server of this cluster"):
            async with line(core, identity, protocol, role="server"):
                pass
        assert cluster.leader() is core
        assert core.node.raft.metrics().get("term") == term  # type: ignore[union-attr]


async def test_an_agent_that_calls_itself_a_server_may_not_say_who_is_alive(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        async with line(core, enrolled(cluster, "c1"), role="server") as caller:
            with pytest.raises(Denied, match="only servers report"):
                await caller.call("act", "heard", {"names": ("dead",)}, "")
            with pytest.raises(Denied, match="only the agent of this host"):
                await caller.call("act", "join.found", {"addresses": ("127.0.0.1:1",)}, "")
        session = cluster.session(core)
        with pytest.raises(Denied, match="only servers report"):
            await session.act("heard", {"names": ["dead"]})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


async def test_requests_that_make_no_sense_are_answered_and_the_server_lives_on(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        write = ("c", 1, 1)
        node = {"node": "n", "address": "127.0.0.1"}
        junk: list[Any] = [{}, None, 7, {"id": []}, {"names": 1}]
        requests: list[tuple[Any, ...]] = [
            *(("act", kind, args, "") for kind in core._acts.table for args in junk),
            ("act", "node.report", {"anchors": ("x",)}, ""),
            ("act", "node.report", {"anchors": ("a" * 64,) * 99}, ""),
            ("act", ["x"], {}, ""),
            ("write", write, "cluster.forget-node", {"name": "s1"}, ""),
            ("write", write, "cluster.bootstrap", {}, ""),
            ("write", write, "session.expire", {"id": "x", "seen_index": 1}, ""),
            ("write", write, ["kv.set"], {}, ""),
            ("write", write, "kv.set", {"key": "k" * 20_000, "value": b""}, ""),
            ("write", write, "kv.set", {"key": "k", "value": b"", "flags": float("nan")}, ""),
            ("write", write, "catalog.register", {**node, "service": {"name": "x", "proxy": nested(480)}}, ""),
            ("write", write, "catalog.register", {**node, "service": {"name": "x", "proxy": {"a": [b"bytes"]}}}, ""),
            ("write", write, "catalog.register", {**node, "service": {"name": "x", "proxy": {"a": float("inf")}}}, ""),
            ("write", write, "catalog.register", {**node, "service": {"name": "x", "tags": ["t"] * 17_000}}, ""),
            ("write", ("c", -1, -1), "kv.delete", {"key": "k"}, ""),
            ("write", ("c" * 99, 1, 1), "kv.delete", {"key": "k"}, ""),
            ("write", ("c", 1 << 63, 1), "kv.delete", {"key": "k"}, ""),
            ("write", (7, 1, 1), "kv.delete", {"key": "k"}, ""),
            ("write", 7, "kv.delete", {"key": "k"}, ""),
            ("write",),
            ("read", "kv.get", {"key": "k"}, float("inf"), ""),
            ("read", "kv.get", {"key": "k"}, -1, ""),
            ("read", "kv.get", {"key": "k" * 20_000}, 0, ""),
            ("read", "kv.get", {"key": []}, 0, ""),
            ("read", "no such query", {}, 0, ""),
            ("watch", "kv.get", None, ""),
            ("barrier", "best", 0),
            ("barrier", [], 0),
            ("barrier", "default", "x"),
            ("propose", write, "cluster.forget-node", {"name": "s1"}, "", ""),
            ("index", "default"),
            ("bootstrap.hello", {}),
            ("x" * 1000,),
        ]
        harmless = {"ping", "status.leader", "status.peers", "servers", "server.metrics", "node.certificate"}
        harmless |= {"raft.configuration", "raft.waiting", "raft.transfer-leader", "autopilot.health"}
        async with line(core, enrolled(cluster, "c1")) as caller:
            for request in requests:
                if request[0] == "act" and str(request[1]) in harmless and isinstance(request[2], dict):
                    continue
                with pytest.raises(RostraError) as caught:
                    async with asyncio.timeout(30):
                        await caller.call(*request)
                assert isinstance(caught.value, (BadRequest, Denied, TooLarge)), (request, caught.value)
                assert "unforeseen" not in caught.value.message, (request, caught.value)
                assert caller.open, request
            ok = {**node, "service": {"name": "x", "proxy": nested(20)}}
            assert await caller.call("write", write, "catalog.register", ok, "") is True
            many = [
                caller.call("write", (f"client-{i}", 1, 1), "kv.set", {"key": "k", "value": b""}, "") for i in range(9)
            ]
            done = await asyncio.gather(*many, return_exceptions=True)
            assert len([d for d in done if isinstance(d, Denied)]) == 2
        assert core.node.store.internal_errors == {}
        assert not core._tasks.stopped


async def test_connections_of_one_node_are_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = leader(cluster)
        identity = enrolled(cluster, "c1")
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(line(core, identity)) for _ in range(12)]
            await eventually(lambda: sum(c.open for c in callers) == 8)
            assert [c.open for c in callers[-8:]] == [True] * 8
            await callers[-1].call("ping")
        await eventually(lambda: not core._endpoint._of_node)
        assert not core._endpoint.agents.sessions


async def test_a_silent_session_is_not_a_living_node_and_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rostra.server.agents.FRESH_S", 0.3)
    monkeypatch.setattr("rostra.server.endpoint.SILENT_S", 1.0)
    async with Cluster(tmp_path, size=1) as cluster:
        core, identity = leader(cluster), enrolled(cluster, "c1")
        async with line(core, identity) as caller:
            assert "c1" in dict(core._endpoint.agents.heard())
            await eventually(lambda: "c1" not in dict(core._endpoint.agents.heard()))
            assert core._endpoint.agents.holds("c1", identity.key_hash)
            await eventually(lambda: not caller.open)
            assert not core._endpoint.agents.holds("c1", identity.key_hash)


async def test_an_agent_may_register_services_on_other_nodes(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster, Client(cluster, "c1") as client:
        service = {"id": "db", "name": "db", "port": 5432}
        assert await client.session.write(Register(node="outside", address="10.0.0.9", service=service))


# -- port 8301 -------------------------------------------------------------------------------------------------------


async def test_the_join_port_tells_a_stranger_nothing_and_survives_him(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        listener = JoinListener(enrolled(cluster, "a"), lambda: None, list)  # type: ignore[arg-type, return-value]
        port = await listener.start("127.0.0.1", 0)
        try:
            stranger = NodeIdentity.open(
                tmp_path / "stranger", "x", parse_secrets([base64.b64encode(os.urandom(32)).decode()])
            )
            reasons: list[str] = []
            found = await discover([f"127.0.0.1:{port}"], stranger, on_failure=lambda _, why: reasons.append(why))
            assert not found
            assert "is `encrypt` the same" in reasons[0]
            plain = ssl.create_default_context()
            plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=plain)
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        finally:
            await listener.stop()


async def test_a_server_that_has_stopped_writes_no_certificate_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        await eventually(lambda: core._identity.renew_at > time.time())
        begun, may_end, written = threading.Event(), threading.Event(), []

        def install(*_: Any, **__: Any) -> None:
            begun.set()
            may_end.wait(10)
            written.append(True)

        monkeypatch.setattr(core._identity, "install_certificate", install)
        core._identity.renew_at = 0.0
        own = OwnCertificate(core._identity, core.node, core._acts, "s1")
        certifying = asyncio.create_task(own.keep())
        await eventually(begun.is_set)
        certifying.cancel()
        asyncio.get_running_loop().call_later(0.05, may_end.set)
        await asyncio.wait([certifying])
        assert (certifying.cancelled(), written) == (True, [True])


async def test_who_is_refused_again_and_again_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        await eventually(lambda: core.node.store.tables.members.get("s1"))
        for refused_s in (0.0, 0.0, 60.0, 60.0):
            monkeypatch.setattr(enrolment, "REFUSED_S", refused_s)
            with pytest.raises(Conflict, match="belongs to another node key"):
                await core._endpoint._enrol(
                    Peer(key_hash="0" * 64, address="127.0.0.1", name="s1", node_id="an impostor")
                )
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o) is Peer and o.node_id == "an impostor"]
