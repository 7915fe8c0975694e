"""Who asks: the map that every verb carries, from the edge at which a request came in to the server that decides.

On the wire it is a map that may grow: each side takes what it knows and ignores the rest. Up to 0.1.0 a token stood in
its place, as a text, which is still read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rostra.wire.errors import BadRequest

TOKEN_CHARS_MAX, TRACE_CHARS_MAX, FIELDS_MAX = 255, 128, 32


@dataclass(frozen=True, slots=True)
class Caller:
    """`token`: its secret, "" for the anonymous one. `trace`: a W3C `traceparent`, "" where nothing is traced."""

    token: str = ""
    trace: str = ""

    def __repr__(self) -> str:  # a secret is in no log
        return f"Caller(token={'…' if self.token else ''!r}, trace={self.trace!r})"

    def packed(self) -> dict[str, str]:
        """As it is sent."""
        if not self.trace:
            return {"token": self.token} if self.token else {}
        return {"token": self.token, "trace": self.trace} if self.token else {"trace": self.trace}


ANONYMOUS = Caller()


def read_caller(value: Any) -> Caller:
    """The caller that a peer names. Raises BadRequest."""
    if not value:
        return ANONYMOUS
    if type(value) is str:
        value = {"token": value}
    if type(value) is not dict or len(value) > FIELDS_MAX:
        raise BadRequest("the caller of a request is a small map")
    token, trace = value.get("token", ""), value.get("trace", "")
    if type(token) is not str or len(token) > TOKEN_CHARS_MAX:
        raise BadRequest(f"a token is a text of at most {TOKEN_CHARS_MAX} characters")
    if type(trace) is not str or len(trace) > TRACE_CHARS_MAX:
        raise BadRequest(f"a trace is a text of at most {TRACE_CHARS_MAX} characters")
    return Caller(token, trace)
