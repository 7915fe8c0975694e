"""How a service and its checks are cut into commands, and what is too large to be registered at all.

`agent/sync.py` sends these commands. An agent refuses at once a registration that the servers would refuse for ever,
and names the bound: over HTTP (`agent/local.py`) and in files (`agent/file_definitions.py`). The bounds are those of
`wire/bounds.py`, which the servers use, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rostra.agent.checks.spec import CheckSpec
from rostra.server.state.catalog import Register
from rostra.server.state.rows import CheckRow, ServiceRow
from rostra.wire.bounds import INSTANCE_BYTES_MAX, ITEMS_MAX, check_arguments
from rostra.wire.codec import encode_value
from rostra.wire.errors import BadRequest, TooLarge
from rostra.wire.frames import RPC_FRAME_BYTES_MAX, pack

#: One command holds so many checks and so many characters of them, or one check alone, beside the largest service.
CHECKS_AT_ONCE, CHECK_CHARS_AT_ONCE = 64, 32 << 10
SERVICE_BYTES_MAX = RPC_FRAME_BYTES_MAX // 2
CHECK_BYTES_MAX = RPC_FRAME_BYTES_MAX // 4
_SERVICE_ITEMS_MAX = ITEMS_MAX - CHECKS_AT_ONCE * len(CheckRow._fields) - len(Register.__slots__)


def service_fields(row: ServiceRow) -> dict[str, Any]:
    """What a command says of a service; the rest is the servers' to know."""
    return {n: v for n, v in row._asdict().items() if n not in ("node", "create_index", "modify_index")}


def check_fields(row: CheckRow) -> dict[str, Any]:
    """As above. The name and tags of the service would be repeated for each check."""
    left_out = ("node", "service_name", "service_tags", "create_index", "modify_index")
    return {n: v for n, v in row._asdict().items() if n not in left_out}


def in_commands(checks: Iterable[CheckRow]) -> Iterator[tuple[CheckRow, ...]]:
    """The checks, as many at a time as go into one command."""
    some: list[CheckRow] = []
    chars = 0
    for check in checks:
        own = len(check.id) + len(check.name) + len(check.notes) + len(check.output)
        if some and (len(some) >= CHECKS_AT_ONCE or chars + own > CHECK_CHARS_AT_ONCE):
            yield tuple(some)
            some, chars = [], 0
        some.append(check)
        chars += own
    if some:
        yield tuple(some)


def refuse_too_large(node: str, service: ServiceRow | None, checks: Iterable[CheckSpec]) -> None:
    """Of a service (None: the node itself) with all its checks. Raises BadRequest, which names the bound."""
    total = tags = 0
    if service is not None:
        tags = len(pack(service.tags))
        total = _bytes(Register(node, service=service_fields(service)), "the service", SERVICE_BYTES_MAX)
    for spec in checks:
        row = CheckRow(node, spec.id, spec.name, spec.status, spec.notes, service_id=spec.service_id, type=spec.type)
        command = Register(node, checks=(check_fields(row),))
        total += _bytes(command, f"check {spec.id[:64]!r}", CHECK_BYTES_MAX) + tags + spec.output_bytes_max
    if total > INSTANCE_BYTES_MAX:
        what = f"service {service.id[:64]!r} and its checks" if service is not None else "the checks of the node"
        raise BadRequest(
            f"{what} take {total} bytes, with the tags and the longest output of each check; "
            f"at most {INSTANCE_BYTES_MAX} are possible"
        )


def _bytes(command: Register, what: str, bytes_max: int) -> int:
    kind, arguments = encode_value(command)
    try:
        check_arguments(arguments, _SERVICE_ITEMS_MAX)
        size = len(pack((kind, arguments)))
    except TooLarge as error:
        raise BadRequest(f"{what}: {error.message}") from None
    except (ValueError, OverflowError, TypeError) as error:
        raise BadRequest(f"{what} cannot be sent to the servers: {error}") from None
    if size > bytes_max:
        raise BadRequest(f"{what} takes {size} bytes; at most {bytes_max} are possible")
    return size
