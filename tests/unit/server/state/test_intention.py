from __future__ import annotations

import pytest

from rostra.server.state.intention import DeleteIntention, Intentions, IntentionsFor, SetIntention
from rostra.wire.errors import BadRequest, Conflict


def test_an_intention_is_created_and_changed_under_one_id(log):
    first = log.do(SetIntention("web", "db", "allow", id="chosen"), at_ms=5)
    assert first == "chosen"
    created = log.store.index
    assert log.do(SetIntention("web", "db", "deny"), at_ms=9) == "chosen"
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


@pytest.mark.parametrize(("source", "destination"), [("web", "DB"), ("Web", "db"), ("WEB", "Db")])
def test_names_that_differ_by_case_are_the_same_intention(log, source, destination):
    log.do(SetIntention("web", "DB", "deny", id="x"))
    before = log.ask(Intentions())
    with pytest.raises(Conflict, match="duplicate intention found: DENY default/web => default/DB "):
        log.do(SetIntention(source, destination, "allow", id="y"))
    assert log.ask(Intentions()) == before
    log.do(SetIntention(source, destination, "allow"))
    assert [(*key, row.action, row.id) for key, row in log.ask(Intentions()).items()] == [
        (source, destination, "allow", "x")
    ]


def test_a_destination_is_found_in_any_spelling(log):
    log.do(SetIntention("web", "DB", "deny"))
    index = log.index_of(IntentionsFor("db"))
    assert list(log.ask(IntentionsFor("dB"))) == [("web", "DB")]
    log.do(SetIntention("api", "Db", "deny"))
    assert log.index_of(IntentionsFor("db")) > index


def test_an_update_by_id_moves_the_intention_and_never_takes_the_place_of_another(log):
    created = log.do(SetIntention("u1", "ud", "deny", id="x")) and log.store.index
    log.do(SetIntention("u2", "ud", "allow", id="y"))
    for name in ("u2", "U2"):
        with pytest.raises(Conflict, match="duplicate intention found: ALLOW default/u2 => default/ud "):
            log.do(SetIntention(name, "ud", "deny", id="x"))
    assert {row.id: row.action for row in log.ask(Intentions()).values()} == {"x": "deny", "y": "allow"}
    log.do(SetIntention("u3", "ud", "deny", id="x"))
    log.do(SetIntention("U3", "UD", "deny", id="x"))
    assert list(log.ask(Intentions())) == [("U3", "UD"), ("u2", "ud")]
    assert log.ask(Intentions())["U3", "UD"].create_index == created


def test_intentions_that_an_older_version_kept_apart_are_all_found_and_replaced_by_one(log, reloaded):
    """What its snapshot holds: rows and the index of a destination, each as they were spelled."""
    log.do(SetIntention("web", "DB", "deny", id="x"))
    table, granules = log.store.tables.intentions, log.store.tables.granules
    table.put(("web", "db"), table.rows["web", "DB"]._replace(destination="db", action="allow", id="y"))
    index = granules.rows.pop("intention:db")
    granules.put("intention:DB", index)
    log.store = reloaded(log.store)
    assert list(log.ask(IntentionsFor("db"))) == [("web", "DB"), ("web", "db")]
    assert log.index_of(IntentionsFor("db")) == index
    log.do(SetIntention("web", "db", "deny"))
    assert list(log.ask(Intentions())) == [("web", "db")]
