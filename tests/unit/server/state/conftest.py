"""A store with its log beside it: commands go in as the bytes that a server would apply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from rostra.server.state.capture import Loader
from rostra.server.state.catalog import Register
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_entry
from rostra.server.state.store import Applied, Store
from rostra.wire.errors import from_wire

CLUSTER = "11111111-2222-3333-4444-555555555555"
FOUNDING = Bootstrap(CLUSTER, (("id-1", "s1", "10.0.0.1", "key-1"),), "dc1", "CA CERT", "CA KEY", 1700000000000)


class Log:
    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.entries: list[bytes] = []
        self.last: Applied

    def apply(self, command: Any, client: tuple[str, int, int] = ("", 0, 0), at_ms: int = 0) -> Applied:
        data = encode_entry(command, cluster_id=CLUSTER, client=client, at_ms=at_ms)
        self.entries.append(data)
        self.last = self.store.apply(data)
        return self.last

    def do(self, command: Any, **how: Any) -> Any:
        """The result of a command; a refusal is raised, as a client would see it."""
        result = self.apply(command, **how).result
        if result[0] == "err":
            raise from_wire(result[1], result[2])
        return result[1]

    def ask(self, query: Any) -> dict[Any, Any]:
        return dict(self.store.evaluate(query).rows())

    def index_of(self, query: Any) -> int:
        return self.store.evaluate(query).index

    def effects(self, name: str) -> list[tuple[Any, ...]]:
        """The effects of the last command that are called `name`."""
        return [effect[1:] for effect in self.last.effects if effect[0] == name]

    def touched(self) -> set[str]:
        return {granule for granule, _ in self.last.touched}

    def replayed(self) -> Store:
        store = Store()
        for entry in self.entries:
            store.apply(entry)
        return store

    def register(self, node: str = "n1", service: Any = None, *checks: dict[str, Any], **fields: Any) -> bool:
        if isinstance(service, str):
            service = {"name": service}
        return self.do(Register(node, fields.pop("address", "10.1.0.1"), service=service, checks=checks, **fields))


def loaded(chunks: Iterable[bytes | None]) -> Store:
    """What another server has after it installed a snapshot."""
    loader = Loader()
    for chunk in chunks:
        if chunk is not None:
            loader.feed(chunk)
    loader.finish()
    store = Store()
    store.adopt(loader)
    return store


@pytest.fixture
def log() -> Log:
    log = Log()
    log.do(FOUNDING)
    return log


@pytest.fixture(name="loaded", scope="session")
def loaded_fixture():
    return loaded


@pytest.fixture(scope="session")
def reloaded():
    """A copy of a store through a snapshot."""
    return lambda store: loaded(store.capture())


@pytest.fixture
def founding() -> Bootstrap:
    return FOUNDING


@pytest.fixture(scope="session")
def make_log():
    """For properties: a fresh log for each example."""

    def make() -> Log:
        log = Log()
        log.do(FOUNDING)
        return log

    return make
