"""The one table from the error taxonomy to HTTP. Bodies are plain text that starts with the reason, as clients expect.

Clients of Consul match texts and statuses that differ from our taxonomy: a handler raises `HttpError` for those. As
500 says little, a change that failed also has a header that tells whether repeating it could do it twice.
"""

from __future__ import annotations

import asyncio
from typing import Any

from rostra.agent.http.routing import Response, text_response
from rostra.runtime.log import get
from rostra.wire.caller import Caller
from rostra.wire.errors import BadRequest, NoLeader, RostraError
from rostra.wire.rpc import Lost

log = get("http")

STATUS = {
    "bad_request": 400,
    "denied": 403,
    "not_found": 404,
    "conflict": 409,
    "too_large": 413,
    "no_leader": 500,
    "timeout": 500,
    "internal": 500,
}


#: On answers to failed changes: refused (and would be again), not-done (safe to repeat), unknown (perhaps done).
OUTCOME_HEADER = "X-Rostra-Outcome"

#: "false" on answers to changes that are done here and not in the catalog yet, and why in the second one.
SYNCED_HEADER, SYNC_ERROR_HEADER = "X-Rostra-Synced", "X-Rostra-Sync-Error"


class HttpError(Exception):
    """A status and text that Consul's clients know."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


def error_response(error: BaseException) -> Response:
    """What the client is told. Anything unexpected is logged here, once, and never shown."""
    if isinstance(error, HttpError):
        return text_response(error.message, status=error.status, headers=error.headers)
    if isinstance(error, RostraError):
        return text_response(error.message, status=STATUS.get(error.code, 500))
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return text_response("The request took too long", status=500)
    log.err("a request failed", exc_info=error)
    return text_response("Internal error, see the agent's log", status=500)


def outcome(error: BaseException) -> str:
    """What became of a change that ended with this."""
    if isinstance(error, NoLeader):
        return "unknown" if isinstance(error, Lost) else "not-done"
    if isinstance(error, HttpError) and error.status == 408:
        return "not-done"
    if isinstance(error, HttpError) or (isinstance(error, RostraError) and error.code not in ("timeout", "internal")):
        return "refused"
    return "unknown"


async def write(servers: Any, command: Any, caller: Caller) -> Any:
    """`servers.write`, where a refusal by the state is 500 with its text, as Consul answers refusals of its servers."""
    try:
        return await servers.write(command, caller=caller)
    except BadRequest as e:
        raise HttpError(500, e.message) from None
