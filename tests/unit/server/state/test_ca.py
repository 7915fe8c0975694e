from __future__ import annotations

import pytest

from rostra.server.state.ca import CaConfig, DropRoot, NextSerial, Roots, SetCaConfig, SetRoot
from rostra.server.state.commands import QUERIES
from rostra.wire.errors import BadRequest, Conflict


def root(root_id: str, **fields):
    return {
        "id": root_id,
        "name": "Rostra CA Root Cert",
        "serial": 1,
        "signing_key_id": "k",
        "trust_domain": "td.consul",
        "not_before_ms": 0,
        "not_after_ms": 1,
        "cert_pem": f"CERT {root_id}",
        **fields,
    }


def test_there_are_no_roots_before_the_first_is_set(log):
    assert log.ask(Roots()) == {}
    assert log.do(SetRoot(root("a"), "KEY", expected_active="")) is True
    rows = log.ask(Roots())
    assert rows[""] == ("td.consul", "a")
    assert rows["a"].active
    assert log.store.secret("root:a") == "KEY"


def test_two_leaders_cannot_both_make_the_first_root(log):
    log.do(SetRoot(root("a"), "KEY", expected_active=""))
    assert log.do(SetRoot(root("b"), "KEY2", expected_active="")) is False
    assert log.ask(Roots())[""] == ("td.consul", "a")
    assert log.store.secret("root:b") is None


def test_rotation_publishes_then_activates_then_drops(log):
    log.do(SetRoot(root("a"), "KEY A"))
    log.do(SetRoot(root("b", active=False), "KEY B"))
    assert [(k, r.active) for k, r in log.ask(Roots()).items() if k] == [("a", True), ("b", False)]
    log.do(SetRoot(root("b"), expected_active="a"))
    assert [(k, r.active) for k, r in log.ask(Roots()).items() if k] == [("a", False), ("b", True)]
    assert log.ask(Roots())[""] == ("td.consul", "b")
    with pytest.raises(Conflict, match="active one"):
        log.do(DropRoot("b"))
    log.do(DropRoot("a"))
    assert list(log.ask(Roots())) == ["", "b"]
    assert log.store.secret("root:a") is None


def test_a_root_without_a_key_cannot_sign(log):
    with pytest.raises(BadRequest, match="private key"):
        log.do(SetRoot(root("a")))


def test_the_active_root_cannot_be_switched_off(log):
    log.do(SetRoot(root("a"), "KEY"))
    with pytest.raises(Conflict, match="make another root active"):
        log.do(SetRoot(root("a", active=False)))


def test_the_trust_domain_stays(log):
    log.do(SetRoot(root("a"), "KEY"))
    with pytest.raises(Conflict, match="trust domain"):
        log.do(SetRoot(root("b", trust_domain="other.consul"), "KEY"))


def test_no_query_shows_a_private_key(log):
    log.do(SetRoot(root("a"), "SECRET KEY"))
    for query in QUERIES:
        fields = {name: "a" for name in query.__match_args__}
        assert "SECRET KEY" not in repr(log.ask(query(**fields)))


def test_the_configuration_is_replaced_by_version(log):
    assert log.ask(CaConfig()) == {}
    assert log.do(SetCaConfig({"leaf_cert_ttl": "72h"}, cas=0)) is True
    _, version = log.ask(CaConfig())["config"]
    assert log.do(SetCaConfig({"leaf_cert_ttl": "1h"}, cas=version - 1)) is False
    assert log.do(SetCaConfig({"leaf_cert_ttl": "1h"}, cas=version)) is True
    assert log.ask(CaConfig())["config"] == ({"leaf_cert_ttl": "1h"}, log.store.index)
    assert Roots().row(log.store.view(), "config") is None


def test_serial_numbers_are_never_given_twice(log):
    assert [log.do(NextSerial()), log.do(NextSerial(10)), log.do(NextSerial())] == [1, 2, 12]
    with pytest.raises(BadRequest):
        log.do(NextSerial(0))
