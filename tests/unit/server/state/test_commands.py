from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rostra.acl.authorizer import EVERYTHING
from rostra.server.state.commands import (
    COMMAND_VOCABULARY,
    COMMANDS,
    EDGE_COMMANDS,
    QUERIES,
    QUERY_VOCABULARY,
)
from rostra.server.state.rows import SessionRow
from rostra.server.state.tables import Tables
from rostra.wire.codec import encode_value
from tests.support.authorizers import Nothing

EDGE = {
    "kv.set",
    "kv.delete",
    "kv.delete-tree",
    "catalog.register",
    "catalog.deregister",
    "session.create",
    "session.destroy",
    "intention.set",
    "intention.delete",
    "ca.config",
    "operator.autopilot",
}


def sample(cls):
    values: dict[str, Any] = {"str": "x", "bytes": b"x", "int": 1, "bool": True}
    required = (f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING)
    types = {f.name: str(f.type) for f in required}
    return cls(**{name: values.get(kind, () if kind.startswith("tuple") else {}) for name, kind in types.items()})


@pytest.mark.parametrize("cls", [*COMMANDS, *QUERIES], ids=lambda cls: cls.__name__)
def test_commands_and_queries_are_immutable_values_without_a_dict(cls):
    assert cls.__dataclass_params__.frozen
    assert not hasattr(sample(cls), "__dict__")
    assert cls.__doc__


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_every_command_asks_for_a_permission(cls):
    tables = Tables()
    tables.sessions.put("x", SessionRow("x", "n1"))
    assert sample(cls).allowed(EVERYTHING, tables) is True
    assert sample(cls).allowed(Nothing(), tables) is False


@pytest.mark.parametrize("cls", [*COMMANDS, *QUERIES], ids=lambda cls: cls.__name__)
def test_everything_crosses_the_wire_unchanged(cls):
    value = sample(cls)
    vocabulary = COMMAND_VOCABULARY if cls in COMMANDS else QUERY_VOCABULARY
    assert vocabulary.decode(*encode_value(value)) == value


@pytest.mark.parametrize("cls", QUERIES, ids=lambda cls: cls.__name__)
def test_queries_can_name_a_cached_answer(cls):
    assert hash(sample(cls)) == hash(sample(cls))
    assert sample(cls).allowed(EVERYTHING, Tables()) is True
    assert callable(cls.visible)


def test_agents_can_ask_for_these_commands_and_no_others():
    assert {cls.kind for cls in EDGE_COMMANDS} == EDGE


def test_every_query_reads_at_most_sixteen_granules(log):
    for cls in QUERIES:
        assert 1 <= len(log.store.evaluate(sample(cls)).granules) <= 16
