from __future__ import annotations

import pytest

from rostra.server.state.catalog import Deregister
from rostra.server.state.kv import GetKey, SetKey
from rostra.server.state.session import (
    CreateSession,
    DestroySession,
    ExpireSession,
    NodeSessions,
    RenewSessions,
    SessionInfo,
    Sessions,
)
from rostra.wire.errors import BadRequest, Conflict

PASSING = {"id": "serfHealth", "status": "passing"}


@pytest.fixture
def node(log):
    """A log with node n1, its serfHealth, service web and its check."""
    log.register("n1", "web", PASSING, {"id": "web:1", "status": "passing", "service_id": "web"})
    return log


def held(log, key):
    found = log.ask(GetKey(key)).get(key)
    return found.session if found else None


def test_a_session_relies_on_the_node_by_default(node):
    assert node.do(CreateSession("s", "n1")) == "s"
    row = node.ask(SessionInfo("s"))["s"]
    assert row[:8] == ("s", "n1", "", 15000, "release", 0, ("serfHealth",), ())
    assert row.create_index == row.modify_index == node.store.index
    assert node.effects("session-created") == [("s",)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"node": "ghost"}, "^Missing node registration$"),
        ({"node_checks": ("nope",)}, "^Missing check 'nope' registration$"),
        ({"service_checks": ("nope",)}, "^Missing check 'nope' registration$"),
        ({"node_checks": ("bad",)}, "^Check 'bad' is in critical state$"),
        ({"behavior": "zap"}, "^Invalid Behavior setting 'zap'$"),
        ({"ttl_ms": -1}, "^Invalid Session TTL"),
        ({"id": ""}, "^Missing session id"),
    ],
)
def test_a_session_needs_a_node_and_checks_that_are_there_and_not_critical(node, fields, text):
    node.register("n1", None, {"id": "bad", "status": "critical"})
    with pytest.raises(BadRequest, match=text):
        node.do(CreateSession(**{"id": "s", "node": "n1", **fields}))
    assert node.ask(Sessions()) == {}


def test_two_sessions_cannot_share_an_id(node):
    node.do(CreateSession("s", "n1"))
    with pytest.raises(Conflict):
        node.do(CreateSession("s", "n1"))


def test_lock_delay_is_at_most_a_minute(node):
    node.do(CreateSession("s", "n1", lock_delay_ms=70_000))
    assert node.ask(SessionInfo("s"))["s"].lock_delay_ms == 60_000


def test_the_node_of_a_session_is_found_in_any_spelling(node):
    node.do(CreateSession("s", "N1"))
    assert list(node.ask(NodeSessions("n1"))) == ["s"]


def end_by_destroying(log):
    log.do(DestroySession("s"))


def end_by_expiry(log):
    assert log.do(ExpireSession("s", log.store.session_seen("s"))) is True


def end_by_its_node(log):
    log.do(Deregister("n1"))


def end_by_a_critical_node_check(log):
    log.register("n1", None, {"id": "serfHealth", "status": "critical"})


def end_by_a_critical_service_check(log):
    log.register("n1", None, {"id": "web:1", "service_id": "web", "status": "critical"})


def end_by_removing_a_check(log):
    log.do(Deregister("n1", check_id="web:1"))


def end_by_removing_the_service(log):
    log.do(Deregister("n1", service_id="web"))


@pytest.mark.parametrize(
    "end",
    [
        end_by_destroying,
        end_by_expiry,
        end_by_its_node,
        end_by_a_critical_node_check,
        end_by_a_critical_service_check,
        end_by_removing_a_check,
        end_by_removing_the_service,
    ],
)
@pytest.mark.parametrize("behavior", ["release", "delete"])
def test_the_end_of_a_session_frees_its_locks(node, end, behavior):
    node.do(CreateSession("s", "n1", behavior=behavior, lock_delay_ms=5000, service_checks=("web:1",)))
    node.do(SetKey("b", b"v", acquire="s"))
    node.do(SetKey("a", b"v", acquire="s"))
    end(node)
    assert node.ask(Sessions()) == {}
    assert held(node, "a") == ("" if behavior == "release" else None)
    if behavior == "release":
        row = node.ask(GetKey("a"))["a"]
        assert (row.value, row.lock_index, row.modify_index) == (b"v", 1, node.store.index)
    assert node.effects("lock-released") == [("a", 5000), ("b", 5000)]
    assert node.effects("session-gone") == [("s",)]
    assert {"kv:a", "kv:b", "kvdir:", "session:s", "table:sessions"} <= node.touched()
    assert node.index_of(SessionInfo("s")) == node.store.index


def test_a_lock_given_back_is_not_freed_again(node):
    node.do(CreateSession("s", "n1"))
    node.do(SetKey("a", b"v", acquire="s"))
    node.do(SetKey("a", b"v", release="s"))
    node.do(DestroySession("s"))
    assert node.effects("lock-released") == []


def test_a_warning_does_not_end_a_session(node):
    node.do(CreateSession("s", "n1"))
    node.register("n1", None, {"id": "serfHealth", "status": "warning"})
    assert list(node.ask(Sessions())) == ["s"]


def test_a_session_without_checks_survives_them(node):
    node.do(CreateSession("s", "n1", node_checks=()))
    end_by_a_critical_node_check(node)
    assert list(node.ask(Sessions())) == ["s"]


def test_destroying_a_session_that_is_gone_succeeds(node):
    assert node.do(DestroySession("gone")) is True


def test_expiry_does_nothing_when_the_session_was_renewed_after_it_was_seen(node):
    node.do(CreateSession("s", "n1", ttl_ms=10_000))
    seen = node.store.session_seen("s")
    node.do(RenewSessions(("s", "gone")))
    assert node.effects("session-renewed") == [("s",)]
    assert node.do(ExpireSession("s", seen)) is False
    assert node.do(ExpireSession("s", node.store.session_seen("s"))) is True
    assert node.do(ExpireSession("s", 1 << 60)) is False


def test_a_renewal_changes_nothing_that_a_query_shows(node):
    node.do(CreateSession("s", "n1"))
    before = node.ask(Sessions()), node.index_of(Sessions())
    node.do(RenewSessions(("s",)))
    assert node.last.touched == ()
    assert (node.ask(Sessions()), node.index_of(Sessions())) == before


def test_sessions_of_a_node_are_listed_alone(node):
    node.register("n2")
    node.do(CreateSession("s1", "n1"))
    node.do(CreateSession("s2", "n2", node_checks=()))
    assert list(node.ask(NodeSessions("n2"))) == ["s2"]
    assert NodeSessions("n2").row(node.store.view(), "s1") is None
    assert list(node.ask(Sessions())) == ["s1", "s2"]


def test_checks_are_relied_on_beside_those_of_the_node(node):
    node.register("n1", None, {"id": "c1", "status": "passing"})
    node.do(CreateSession("s", "n1", checks=("c1",)))
    node.do(CreateSession("t", "n1", node_checks=("C1",)))
    node.register("n1", None, {**PASSING, "status": "critical"})
    assert list(node.ask(Sessions())) == ["t"]
    node.register("n1", None, {"id": "c1", "status": "critical"})
    assert node.ask(Sessions()) == {}


def test_what_is_shown_of_a_session_is_what_was_given(node):
    node.do(CreateSession("s", "n1", lock_delay_ms=1, ttl_ms=3600_000, ttl="1h", lock_delay_ns=1000))
    assert node.ask(SessionInfo("s"))["s"][-2:] == ("1h", 1000)


def test_an_ordinary_session_has_the_fields_that_older_versions_read_and_others_survive_a_snapshot(node, reloaded):
    node.do(CreateSession("s", "n1", ttl_ms=15000))
    node.do(CreateSession("t", "n1", checks=("web:1",)))
    assert {key: len(row) for key, row in node.ask(Sessions()).items()} == {"s": 10, "t": 13}
    node.store = reloaded(node.store)
    assert {key: (row.checks, row.ttl) for key, row in node.ask(Sessions()).items()} == {
        "s": ((), ""),
        "t": (("web:1",), ""),
    }
    node.register("n1", None, {"id": "web:1", "status": "critical", "service_id": "web"})
    assert list(node.ask(Sessions())) == ["s"]
