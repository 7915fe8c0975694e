"""The table of hazards in docs/raft.md is true: what it names is there, and what is there is named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutants.catalogue import MUTANTS

ROOT = Path(__file__).parents[4]
#: Of the research that this layer stands on.
HAZARDS = {f"H{number}" for number in range(1, 25)}
#: Rules that the issue names beside them.
RULES = {"ACK", "LEASE", "DEDUP", "CRC", "BOOTSTRAP"}


class Row(NamedTuple):
    id: str
    hazard: str
    rule: str
    tests: str
    mutants: str


def rows() -> list[Row]:
    lines = (ROOT / "docs" / "raft.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [A-Z]+\d* \|", line)
    ]
    return [Row(*each) for each in cells if len(each) == len(Row._fields)]


ROWS = {row.id: row for row in rows()}


def named(cell: str, directory: str) -> Iterator[tuple[str, str]]:
    """(path, name in it) of each `file.py` and the `names` that follow it; the file alone with an empty name."""
    path = ""
    for word in re.findall(r"`([^`]+)`", cell):
        if word.endswith(".py"):
            path = word if "/" in word else f"{directory}/{word}"
            yield path, ""
        else:
            yield path, word


@cache
def names_in(path: str) -> frozenset[str]:
    """The functions, methods and classes of a file: "f", "C", "C.f"."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return frozenset(found)


def test_every_hazard_and_rule_has_a_row_and_every_row_once() -> None:
    assert set(ROWS) >= HAZARDS | RULES
    assert len(ROWS) == len(rows())


def test_the_mutants_of_the_catalogue_and_of_the_table_are_the_same() -> None:
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)
    of: dict[str, list[str]] = {row: [] for row in ROWS}
    for mutant in MUTANTS:
        of.setdefault(mutant.hazard, []).append(mutant.id)
    assert {row.id: row.mutants.split() for row in ROWS.values()} == of
    assert all(of.values()), "each rule can be switched off"


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
def test_each_rule_is_where_the_table_says(row: Row) -> None:
    found = list(named(row.rule, "server/raft"))
    assert any(name for _, name in found)
    for path, name in found:
        assert (ROOT / path).is_file(), path
        assert not name or name in names_in(path), f"{name} in {path}"


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
def test_each_rule_has_the_tests_that_the_table_names_and_those_of_its_mutants(row: Row) -> None:
    said = set(named(row.tests, "tests/unit/server/raft"))
    assert any(name or path for path, name in said)
    for path, name in said:
        assert (ROOT / path).is_file(), path
        assert not name or name in names_in(path), f"{name} in {path}"
    for mutant in MUTANTS:
        if mutant.hazard == row.id:
            for test in mutant.tests:
                path, _, name = test.partition("::")
                assert (path, name) in said, f"{test} catches {mutant.id}"


def test_each_mutant_still_fits_its_file() -> None:
    assert [problem for mutant in MUTANTS if (problem := mutant.problem(ROOT))] == []


def test_the_rules_of_the_code_name_hazards_of_the_table() -> None:
    for path in sorted((ROOT / "server" / "raft").glob("*.py")):
        for named_there in re.findall(r"\bH\d+\b", path.read_text(encoding="utf-8")):
            assert named_there in ROWS, f"{named_there} in {path.name}"
