"""The error taxonomy: everything that can go wrong, in eight codes that know neither HTTP nor DNS.

The domain raises these (or returns a refusal as a value), and they cross the wire as (code, message). HTTP maps
`code` to a status in one table, `agent/http/errors.py`. DNS never meets them: `agent/dns_source.py` goes on with what
it last knew. A program that cannot start prints the message, and the CLI prints what HTTP answered. `message` is
written for the operator: what, where, what to do.
"""

from __future__ import annotations

from typing import ClassVar


class RostraError(Exception):
    """Base of all errors that an edge may show. `str(e)` is the message for the operator."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequest(RostraError):
    """The request can never succeed as it stands."""

    code = "bad_request"


class Denied(RostraError):
    """The token, certificate or enrolment does not permit it."""

    code = "denied"


class NotFound(RostraError):
    code = "not_found"


class Conflict(RostraError):
    """It contradicts what is there: a name bound to another key, a directory in use."""

    code = "conflict"


class TooLarge(RostraError):
    code = "too_large"


class NoLeader(RostraError):
    """Definitely not done: there is no leader to do it now. Safe to try again."""

    code = "no_leader"

    def __init__(self, message: str = "No cluster leader") -> None:
        super().__init__(message)


class Timeout(RostraError):
    """It may or may not have been done. A write is safe to repeat only under the same (client id, sequence)."""

    code = "timeout"


class Internal(RostraError):
    """A defect of ours, already logged where it happened."""

    code = "internal"


_BY_CODE: dict[str, type[RostraError]] = {
    c.code: c for c in (BadRequest, Denied, NotFound, Conflict, TooLarge, NoLeader, Timeout, Internal)
}


def from_wire(code: str, message: str) -> RostraError:
    """The error that a peer sent as (code, message); an unknown code of a newer peer becomes Internal."""
    return _BY_CODE.get(code, Internal)(message)
