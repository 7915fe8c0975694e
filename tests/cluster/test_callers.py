"""Callers without rights: no verb of a server gives them a byte of data or takes a change from them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rostra.server.state.ca import Roots
from rostra.server.state.commands import EDGE_COMMANDS, QUERIES
from rostra.server.state.kv import SetKey
from rostra.wire.caller import Caller
from rostra.wire.errors import Denied, RostraError
from tests.support.authorizers import Nothing
from tests.support.cores import Cluster
from tests.unit.server.state.test_commands import sample

#: What anybody may know: it is in every handshake, or clients need it before they have a token.
PUBLIC = {Roots.kind}
OPEN_ACTS = {"ping", "status.leader", "status.peers"}
#: The node asks for itself by the key that it shows, and what it is decides.
ACTS_OF_NODES = {
    *(
        "heard",
        "session.held",
        "node.certificate",
        "node.report",
        "server.metrics",
        "servers",
        "join.found",
        "raft.moved",
    )
}


async def test_who_may_do_nothing_gets_nothing_by_any_verb(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        session = cluster.session(core)
        for key in ("x", "x/1"):
            await session.write(SetKey(key, b"secret"))
        tables = core.node.store.tables

        def stored() -> list[Any]:  # what servers write on their own behalf meanwhile is none of it
            return [dict(t.rows) for t in (tables.kv, tables.intentions, tables.sessions, tables.autopilot)]

        before = stored()
        asked: list[Caller] = []

        def refuse(caller: Caller) -> Any:
            asked.append(caller)
            return Nothing()

        core.node._authorize = refuse
        for query in [sample(cls) for cls in QUERIES if cls.kind not in PUBLIC]:
            with suppress(Denied):
                assert (await session.read(query, token="t")).rows == [], query.kind
            watch = session.watch(query, token="t")
            with suppress(Denied):
                assert (await anext(watch)).rows == [], query.kind
            await watch.aclose()  # type: ignore[attr-defined]
        for command in [sample(cls) for cls in EDGE_COMMANDS]:
            if command.kind == "session.destroy":  # there is no session x: nothing to protect, and nothing said
                continue
            with pytest.raises(Denied, match=f"Permission denied: {command.kind}"):
                await session.write(command, caller=Caller("t"))
        for kind in core._acts.table.keys() - OPEN_ACTS - ACTS_OF_NODES:
            arguments = {"name": "s1", "id": "x", "service": "x", "csr_pem": "x", "prune": True}
            if kind == "session.renew":
                assert await session.act(kind, arguments, caller=Caller("t")) is None  # as above
                continue
            with pytest.raises(Denied, match=f"Permission denied: {kind}"):
                await session.act(kind, arguments, caller=Caller("t"))
        assert stored() == before
        assert not tables.nodes.get("x")
        assert asked
        assert set(asked) == {Caller("t")}


async def test_every_act_says_who_may_ask_for_it(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        tables = core.node.store.tables
        arguments = {"name": "s1", "id": "x", "service": "x"}
        granted = {kind for kind, act in core._acts.table.items() if act.may(Nothing(), tables, arguments)}
        assert granted == OPEN_ACTS | ACTS_OF_NODES | {"session.renew"}


async def test_callers_reach_the_leader_through_a_follower(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        leader = cluster.leader()
        assert leader is not None
        follower = next(core for core in cluster.cores.values() if core is not leader)
        session = cluster.session(follower)
        seen: list[Caller] = []

        def note(caller: Caller) -> Any:
            seen.append(caller)
            return Nothing()

        leader.node._authorize = note
        with pytest.raises(RostraError, match=r"Permission denied: kv\.set"):
            await session.write(SetKey("a", b""), caller=Caller("secret", "00-trace"))
        with pytest.raises(RostraError, match=r"Permission denied: autopilot\.health"):
            await session.act("autopilot.health", {}, caller=Caller("other"))
        assert set(seen) == {Caller("secret", "00-trace"), Caller("other")}
