from __future__ import annotations

import pytest

from rostra.server.state.intention import DeleteIntention, Intentions, IntentionsFor, SetIntention
from rostra.wire.errors import BadRequest


def test_an_intention_is_created_and_changed_under_one_id(log):
    first = log.do(SetIntention("web", "db", "allow", id="chosen"), at_ms=5)
    assert first == "chosen"
    created = log.store.index
    assert log.do(SetIntention("web", "db", "deny", id="ignored"), at_ms=9) == "chosen"
    row = log.ask(Intentions())["web", "db"]
    assert (row.action, row.precedence, row.created_at_ms, row.updated_at_ms) == ("deny", 9, 5, 9)
    assert (row.create_index, row.modify_index) == (created, log.store.index)


def test_an_id_that_nobody_chose_is_the_same_on_every_server(log):
    chosen = log.do(SetIntention("web", "db", "allow"))
    assert len(chosen) == 36
    rows = log.replayed().evaluate(Intentions()).rows()
    assert [row.id for _, row in rows] == [chosen]


def test_setting_the_same_again_changes_nothing(log):
    log.do(SetIntention("web", "db", "allow", meta={"b": "1", "a": "2"}), at_ms=5)
    log.do(SetIntention("web", "db", "allow", meta={"a": "2", "b": "1"}), at_ms=9)
    assert log.last.touched == ()
    assert log.ask(Intentions())["web", "db"].updated_at_ms == 5


@pytest.mark.parametrize(
    ("source", "destination", "action", "text"),
    [
        ("", "db", "allow", "^SourceName must be set"),
        ("web", "", "allow", "^DestinationName must be set"),
        ("we*", "db", "allow", "^SourceName: wildcard"),
        ("web", "d*", "allow", "^DestinationName: wildcard"),
        ("web", "db", "zork", "^Action must be set to 'allow' or 'deny'"),
    ],
)
def test_a_wrong_intention_is_refused(log, source, destination, action, text):
    with pytest.raises(BadRequest, match=text):
        log.do(SetIntention(source, destination, action))


def test_those_for_a_destination_include_the_ones_for_any(log):
    for source, destination in (("web", "db"), ("*", "db"), ("web", "*"), ("*", "*"), ("web", "api")):
        log.do(SetIntention(source, destination, "allow"))
    assert list(log.ask(IntentionsFor("db"))) == [("*", "*"), ("*", "db"), ("web", "*"), ("web", "db")]
    assert list(log.ask(IntentionsFor("*"))) == [("*", "*"), ("web", "*")]
    assert IntentionsFor("db").row(log.store.view(), ("web", "api")) is None
    assert log.store.evaluate(IntentionsFor("db")).granules == ("intention:*", "intention:db")


def test_a_deletion_leaves_its_index(log):
    log.do(SetIntention("web", "db", "allow"))
    assert log.do(DeleteIntention("web", "db")) is True
    assert log.ask(Intentions()) == {}
    assert log.index_of(IntentionsFor("db")) == log.index_of(Intentions()) == log.store.index
    log.do(DeleteIntention("web", "db"))
    assert log.last.touched == ()
