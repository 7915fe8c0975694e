"""Who asks, on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from rostra.wire.caller import ANONYMOUS, Caller, read_caller
from rostra.wire.errors import BadRequest
from rostra.wire.frames import pack, unpack


@pytest.mark.parametrize("caller", [ANONYMOUS, Caller("a"), Caller("", "t"), Caller("a", "t")])
def test_a_caller_crosses_the_wire_unchanged(caller: Caller) -> None:
    assert read_caller(unpack(pack(caller.packed()))) == caller


@pytest.mark.parametrize("value", [None, "", {}, {"token": ""}])
def test_who_says_nothing_is_anonymous(value: Any) -> None:
    assert read_caller(value) == ANONYMOUS


def test_the_text_of_older_agents_is_their_token() -> None:
    assert read_caller("secret") == Caller("secret")


def test_what_a_newer_peer_says_besides_is_ignored() -> None:
    assert read_caller({"token": "a", "datacenter": "dc2", "deadline": 17}) == Caller("a")


@pytest.mark.parametrize(
    "value",
    [
        1,
        b"secret",
        ("token", "a"),
        {"token": 1},
        {"token": "x" * 256},
        {"trace": "x" * 129},
        {"trace": None},
        {str(n): n for n in range(33)},
    ],
)
def test_what_is_no_caller_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        read_caller(value)


def test_a_secret_is_in_no_log() -> None:
    assert "secret" not in f"{Caller('secret')!r} {Caller('secret')}"
