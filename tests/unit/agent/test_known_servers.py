"""The servers' list as an agent has it, and tells it to whoever joins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rostra.agent.known_servers import KnownServers
from rostra.wire.errors import NoLeader
from tests.support.waiting import eventually


class Session:
    """One that lasts: nobody connects again."""

    def __init__(self) -> None:
        self.keys: list[str] = ["k1"]
        self.is_away = False

    async def act(self, kind: str, args: dict[str, Any], **_: Any) -> Any:
        assert kind == "servers"
        if self.is_away:
            raise NoLeader
        return [{"host": "10.0.0.1", "port": 8300, "key_hash": key, "id": "i", "name": "n"} for key in self.keys]


@pytest.fixture
def session() -> Session:
    return Session()


def keys(known: KnownServers) -> list[str]:
    return [server.key_hash for server in known.remembered()]


async def test_a_server_that_is_replaced_is_known_by_its_new_key_though_no_session_ends(session: Session) -> None:
    known = KnownServers(session, None, every_s=0.01)  # type: ignore[arg-type]
    keeping = asyncio.create_task(known.keep())
    await eventually(lambda: keys(known) == ["k1"])
    session.keys = ["k2"]
    await eventually(lambda: keys(known) == ["k2"])
    session.is_away = True
    await asyncio.sleep(0)
    assert keys(known) == ["k2"]
    keeping.cancel()


async def test_the_servers_are_remembered_for_the_next_start(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    await KnownServers(session, path).learn()  # type: ignore[arg-type]
    assert keys(KnownServers(session, path)) == ["k1"]  # type: ignore[arg-type]
    for damaged in ("", "{", '[{"host": 1}]'):
        path.write_text(damaged)
        assert keys(KnownServers(session, path)) == []  # type: ignore[arg-type]
