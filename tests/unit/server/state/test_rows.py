"""Rows of servers of other versions."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from rostra.server.state import rows
from rostra.server.state.rows import SessionRow, read_row, session_row

ROOT = Path(__file__).parents[4]
KINDS: list[Any] = [kind for kind in vars(rows).values() if isinstance(kind, type) and issubclass(kind, tuple)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_newer_server_adds_to_a_row_is_left_out(kind: Any) -> None:
    known = tuple(f"{name}-value" for name in kind._fields)
    assert read_row(kind, known) == read_row(kind, (*known, "new", {"newer": 1})) == kind(*known)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_an_older_server_does_not_send_has_its_default(kind: Any) -> None:
    required = tuple(f"{name}-value" for name in kind._fields if name not in kind._field_defaults)
    assert read_row(kind, required) == kind(*required)
    if required:
        with pytest.raises(TypeError):
            read_row(kind, required[:-1])


def test_a_session_keeps_its_tail_and_nothing_that_comes_behind_it() -> None:
    plain = tuple(range(10))
    tail = (("c",), "15s", 7)
    assert session_row(*plain) == SessionRow(*plain)  # type: ignore[arg-type]
    assert session_row(*plain, *tail).ttl == "15s"
    assert session_row(*plain, *tail, "new") == session_row(*plain, *tail)


def test_agents_read_every_row_so() -> None:
    names = {kind.__name__ for kind in KINDS}
    unpacked = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted((ROOT / "agent").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in names
        and any(isinstance(argument, ast.Starred) for argument in call.args)
    ]
    assert len(names) > 10
    assert unpacked == []
