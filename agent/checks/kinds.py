"""The kinds of check: what of a definition asks for each, what it needs besides, and what finds its result.

A new kind is one object in `KINDS`. Definitions (`agent/definition.py`), registrations in the catalog
(`agent/http/catalog.py`) and the running agent (`agent/local.py`) ask this table. Names of fields are those of
definitions; error texts are Consul's. A kind that is unknown here, as a newer version may have left it, is never run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rostra.agent.checks import http, script, tcp
from rostra.agent.checks.check import Result
from rostra.agent.checks.spec import TIMEOUT_DEFAULT_S, CheckSpec
from rostra.wire.errors import BadRequest

Probe = Callable[[CheckSpec], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class Kind:
    """`probe` finds a result once an interval; without one, results come from elsewhere: reports, or other checks."""

    name: str
    asked_by: tuple[str, ...]  # fields; any of them asks for it
    needs: tuple[str, ...] = ()  # fields without which a catalog registration is not of this kind
    probe: Probe | None = None
    missing: str = ""  # how Consul calls a kind that is not available here
    timeout_s: float = TIMEOUT_DEFAULT_S  # where the definition has none
    runs_programs: bool = False  # only where the operator allows it, and never more often than its interval


async def _refuse(spec: CheckSpec) -> Result:
    raise ValueError(f"this version runs no check of type {spec.type!r}")


TTL = Kind("ttl", ("ttl",))
ALIAS = Kind("alias", ("alias_node", "alias_service"))

#: Where a definition asks for several, the first one counts.
KINDS = (
    Kind("grpc", ("grpc",), ("interval",), _refuse, missing="gRPC"),
    Kind("http", ("http",), ("interval",), http.run),
    TTL,
    Kind("tcp", ("tcp",), ("interval",), tcp.run),
    ALIAS,
    Kind("docker", ("docker_container_id",), ("interval", "args"), _refuse, missing="Docker"),
    Kind("script", ("args",), (), script.run, timeout_s=30.0, runs_programs=True),
)
_BY_NAME = {kind.name: kind for kind in KINDS}


def of(spec: CheckSpec) -> Kind:
    return _BY_NAME.get(spec.type) or Kind(spec.type, (), probe=_refuse)


def shown_as(given: Mapping[str, Any]) -> str:
    """The name of the kind that a catalog registration describes, which need not be one that an agent could run."""
    said = {name for name, value in given.items() if _is_set(value)}
    return next((kind.name for kind in KINDS if said.issuperset(kind.needs) and not said.isdisjoint(kind.asked_by)), "")


def asked_for(given: Mapping[str, Any]) -> Kind:
    """The kind that a definition asks for. Raises BadRequest where it asks for none, or for what no kind can do."""
    said = {name for name, value in given.items() if _is_set(value)}
    asked = [kind for kind in KINDS if not said.isdisjoint(kind.asked_by)]
    for kind in asked:
        if kind.missing:
            raise _invalid(f"{kind.missing} checks are not available")
    is_probed = any(kind.probe for kind in asked)
    has_interval, has_ttl = "interval" in said, "ttl" in said
    if has_interval and has_ttl:
        raise _invalid("Interval and TTL cannot both be specified")
    if is_probed and not has_interval:
        raise _invalid("Interval must be > 0 for Script, HTTP, or TCP checks")
    if is_probed and ALIAS in asked:
        raise _invalid("Interval cannot be set for Alias checks")
    if has_ttl and ALIAS in asked:
        raise _invalid("TTL must be not be set for Alias checks")
    if not asked:
        raise _invalid("TTL must be > 0 for TTL checks")
    return asked[0]


def _is_set(value: Any) -> bool:
    return bool(value) and (not isinstance(value, int) or value > 0)


def _invalid(problem: str) -> BadRequest:
    return BadRequest(f"Invalid check: {problem}")
