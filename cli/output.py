"""Answers in the shapes Consul prints them, so that scripts which cut columns keep working. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table: two spaces between columns, the last one not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row[:-1], widths)), row[-1]]) for row in rows)


def wide_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns with six spaces between them."""
    width = max(len(name) for name, _value in rows) + 6
    return "\n".join(name.ljust(width) + value for name, value in rows)


def tabbed_json(value: Any) -> str:
    return json.dumps(value, indent="\t", ensure_ascii=False)


def pairs(values: Mapping[str, str], separator: str = ", ") -> str:
    """`a=1, b=2`, sorted."""
    return separator.join(f"{key}={value}" for key, value in sorted(values.items()))
