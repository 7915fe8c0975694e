"""Finds faults in the services and checks of configuration files, before anything is started with them.

`agent/config/rules.py` calls it for `rostra agent` and `rostra validate` alike, with the rules of the running agent
(`agent/definition.py`); so both say the same, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rostra.agent.bounds import refuse_too_large
from rostra.agent.checks.spec import CheckSpec
from rostra.agent.definition import Scripts, parse_check, parse_service
from rostra.agent.local_files import is_kept
from rostra.wire.errors import NotFound, RostraError


class FileDefinition(Protocol):
    @property
    def value(self) -> dict[str, Any]: ...
    @property
    def where(self) -> str: ...


def problems(
    services: Iterable[FileDefinition],
    checks: Iterable[FileDefinition],
    *,
    node: str,
    scripts: Scripts,
    data_dir: str,
) -> Iterator[tuple[str, str, str]]:
    """(where, "service" or "check", what is wrong). `data_dir`: services that were registered over HTTP count too."""
    known: set[str] = set()

    def service(value: dict[str, Any]) -> None:
        wanted = parse_service(value, node=node)
        for part in (wanted, wanted.sidecar):
            if part is not None:
                known.add(part.row.id)
                allow(part.checks)
                refuse_too_large(node, part.row, part.checks)

    def check(value: dict[str, Any]) -> None:
        spec = parse_check(value, from_file=True)
        allow((spec,))
        refuse_too_large(node, None, (spec,))
        if not spec.service_id or spec.service_id in known:
            return
        if not data_dir or not is_kept(Path(data_dir), "services", spec.service_id):
            raise NotFound(f'ServiceID "{spec.service_id}" does not exist')

    def allow(specs: Iterable[CheckSpec]) -> None:
        for spec in specs:
            scripts.allow(spec, from_file=True)

    judges: tuple[tuple[str, Iterable[FileDefinition], Callable[[dict[str, Any]], None]], ...]
    judges = (("service", services, service), ("check", checks, check))
    for what, definitions, judge in judges:
        for definition in definitions:
            try:
                judge(definition.value)
            except RostraError as error:
                yield definition.where, what, one_line(error.message)


def one_line(message: str) -> str:
    """Several problems in the shape of Consul's API, as one line of a log."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line.removeprefix("* ") for line in lines if line.startswith("* ")]
    return "; ".join(told or lines)
