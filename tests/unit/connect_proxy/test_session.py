"""The session machine, event by event."""

from __future__ import annotations

import pytest

from rostra.connect_proxy.session import Close, Dial, Finish, Identify, ProxiedConnection, Refusal, Relay, Side, State
from rostra.connect_proxy.tls import PeerCertificate

PEER = PeerCertificate("spiffe://a.consul/ns/default/dc/dc1/svc/web", 1e12, "01")
FIRST, SECOND = Dial("127.0.0.1", 1, 5.0), Dial("127.0.0.1", 2, 5.0)


class Scripted:
    """A policy that dials the given targets and admits or not."""

    def __init__(self, *targets: Dial, dials_first: bool, refusal: str = "") -> None:
        self.dials_first = dials_first
        self._targets = list(targets)
        self._refusal = refusal
        self.failures: list[str] = []
        self.is_used = False

    def admit(self, certificate: PeerCertificate) -> Refusal | None:
        return Refusal(self._refusal) if self._refusal else None

    def target(self) -> Dial | None:
        return self._targets.pop(0) if self._targets else None

    def failed(self, reason: str) -> None:
        self.failures.append(reason)

    def succeeded(self) -> None:
        self.is_used = True


def relaying() -> ProxiedConnection:
    session = ProxiedConnection(Scripted(FIRST, dials_first=False))
    session.identified(PEER)
    session.connected()
    return session


def test_inbound_dials_the_application_only_after_the_peer_is_admitted():
    session = ProxiedConnection(Scripted(FIRST, dials_first=False))
    assert session.accepted() == ()
    assert session.identified(PEER) == (FIRST,)
    assert session.state is State.AUTHORIZED
    assert session.connected() == (Relay(),)


def test_inbound_refusal_closes_and_dials_nothing():
    session = ProxiedConnection(Scripted(FIRST, dials_first=False, refusal="denied"))
    assert session.identified(PEER) == (Close("denied", True),)
    assert session.certificate is None


def test_outbound_relays_only_to_an_identified_peer():
    policy = Scripted(FIRST, dials_first=True)
    session = ProxiedConnection(policy)
    assert session.accepted() == (FIRST,)
    assert session.connected() == (Identify(),)
    assert not policy.is_used
    assert session.identified(PEER) == (Relay(),)
    assert policy.is_used


@pytest.mark.parametrize("stage", ["refused", "handshake", "identity"])
def test_outbound_goes_to_the_next_endpoint_whatever_fails(stage):
    policy = Scripted(FIRST, SECOND, dials_first=True, refusal="wrong_identity" if stage == "identity" else "")
    session = ProxiedConnection(policy)
    session.accepted()
    if stage != "refused":
        session.connected()
    actions = session.identified(PEER) if stage == "identity" else session.dial_failed(stage)
    assert actions == (SECOND,)
    assert policy.failures == ["wrong_identity" if stage == "identity" else stage]
    assert session.connected() == (Identify(),)


def test_outbound_gives_up_with_the_last_reason():
    session = ProxiedConnection(Scripted(FIRST, dials_first=True))
    session.accepted()
    assert session.dial_failed("refused") == (Close("refused", True),)


def test_each_direction_ends_by_itself_and_both_end_the_session():
    session = relaying()
    assert session.ended(Side.PLAIN) == (Finish(Side.SECURE),)
    assert session.flushed(Side.SECURE) == ()
    assert session.state is State.RELAYING
    assert session.ended(Side.SECURE) == (Finish(Side.PLAIN),)
    assert session.flushed(Side.PLAIN) == (Close("done", False),)


def test_the_session_waits_for_what_is_not_flushed():
    session = relaying()
    session.ended(Side.PLAIN)
    session.ended(Side.SECURE)
    assert session.flushed(Side.PLAIN) == ()
    assert session.flushed(Side.SECURE) == (Close("done", False),)


def test_a_second_end_of_the_same_side_means_nothing():
    session = relaying()
    session.ended(Side.PLAIN)
    assert session.ended(Side.PLAIN) == ()


def test_a_break_aborts_once():
    session = relaying()
    assert session.broken("peer_reset") == (Close("peer_reset", True),)
    assert session.broken("again") == ()
    assert (
        session.ended(Side.PLAIN) == session.connected() == session.identified(PEER) == session.dial_failed("x") == ()
    )
    assert session.close_reason == "peer_reset"
