from __future__ import annotations

import pytest

from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, KeyNames, ListKeys, SetKey
from rostra.server.state.session import CreateSession
from rostra.server.state.tables import EXACT_PREFIX_KEYS_MAX
from rostra.wire.errors import BadRequest


@pytest.fixture
def locks(log):
    """A log with two sessions, s1 and s2."""
    log.register("n1")
    for name in ("s1", "s2"):
        log.do(CreateSession(name, "n1", node_checks=()))
    return log


def row(log, key):
    return log.ask(GetKey(key)).get(key)


def test_a_write_creates_and_then_updates(log):
    assert log.do(SetKey("a", b"1")) is True
    created = log.last.index
    assert log.do(SetKey("a", b"2", flags=7)) is True
    assert row(log, "a") == ("a", b"2", 7, 0, "", created, log.last.index)


def test_writing_what_is_there_already_moves_no_index(log):
    log.do(SetKey("a", b"1", flags=3))
    before = log.index_of(GetKey("a"))
    assert log.do(SetKey("a", b"1", flags=3)) is True
    assert log.last.touched == ()
    assert log.index_of(GetKey("a")) == before < log.store.index


def test_cas_zero_only_creates(log):
    assert log.do(SetKey("a", b"1", cas=0)) is True
    assert log.do(SetKey("a", b"2", cas=0)) is False
    assert row(log, "a").value == b"1"


def test_cas_writes_only_over_the_named_version(log):
    log.do(SetKey("a", b"1"))
    version = row(log, "a").modify_index
    assert log.do(SetKey("a", b"2", cas=version)) is True
    assert log.do(SetKey("a", b"3", cas=version)) is False
    assert log.do(SetKey("other", b"3", cas=version)) is False
    assert row(log, "a").value == b"2"


@pytest.mark.parametrize(("cas", "deleted"), [(None, True), ("present", True), (0, False), (1, False)])
def test_delete_with_cas_deletes_only_the_named_version(log, cas, deleted):
    log.do(SetKey("a", b"1"))
    cas = row(log, "a").modify_index if cas == "present" else cas
    assert log.do(DeleteKey("a", cas=cas)) is deleted
    assert (row(log, "a") is None) is deleted


def test_deleting_what_is_not_there_succeeds(log):
    assert log.do(DeleteKey("a")) is True
    assert log.do(DeleteKey("a", cas=5)) is True
    assert log.last.touched == ()


def test_delete_tree_deletes_by_prefix_and_nothing_else(log):
    for key in ("a", "a/b", "a/b/c", "ab", "b"):
        log.do(SetKey(key, b""))
    assert log.do(DeleteTree("a/")) is True
    assert list(log.ask(KeyNames(""))) == ["a", "ab", "b"]
    log.do(DeleteTree(""))
    assert log.ask(KeyNames("")) == {}


@pytest.mark.parametrize("flags", [-1, 1 << 64])
def test_flags_are_64_bits_unsigned(log, flags):
    if flags < 0:
        with pytest.raises(BadRequest, match="flags"):
            log.do(SetKey("a", b"", flags=flags))
    log.do(SetKey("a", b"", flags=(1 << 64) - 1))
    assert row(log, "a").flags == (1 << 64) - 1


def test_a_key_needs_a_name(log):
    with pytest.raises(BadRequest, match="Missing key name"):
        log.do(SetKey("", b""))


def test_lock_index_counts_new_holds_only(locks):
    assert locks.do(SetKey("l", b"1", acquire="s1")) is True
    assert locks.do(SetKey("l", b"2", acquire="s1")) is True
    assert row(locks, "l")[1:5] == (b"2", 0, 1, "s1")
    assert locks.do(SetKey("l", b"3", release="s1")) is True
    assert row(locks, "l")[1:5] == (b"3", 0, 1, "")
    assert locks.do(SetKey("l", b"4", acquire="s2")) is True
    assert row(locks, "l")[1:5] == (b"4", 0, 2, "s2")


def test_a_held_lock_refuses_another_session(locks):
    locks.do(SetKey("l", b"1", acquire="s1"))
    assert locks.do(SetKey("l", b"2", acquire="s2")) is False
    assert locks.do(SetKey("l", b"2", release="s2")) is False
    assert row(locks, "l").value == b"1"


def test_release_of_a_key_that_is_not_held_does_nothing(locks):
    locks.do(SetKey("l", b"1"))
    assert locks.do(SetKey("l", b"2", release="s1")) is False
    assert locks.do(SetKey("new", b"2", release="s1")) is False
    assert row(locks, "l").value == b"1"
    assert row(locks, "new") is None


def test_a_plain_write_ignores_the_lock_and_leaves_it_held(locks):
    locks.do(SetKey("l", b"1", acquire="s1"))
    assert locks.do(SetKey("l", b"2")) is True
    assert row(locks, "l")[1:5] == (b"2", 0, 1, "s1")


def test_a_plain_delete_ignores_the_lock(locks):
    locks.do(SetKey("l", b"1", acquire="s1"))
    assert locks.do(DeleteKey("l")) is True
    assert locks.do(SetKey("l", b"1", acquire="s2")) is True
    assert row(locks, "l").lock_index == 1


@pytest.mark.parametrize("session", ["", "gone"])
def test_acquiring_with_a_session_that_is_not_there_is_refused(log, session):
    with pytest.raises(BadRequest, match=f"^{'invalid session' if session else 'missing session'}"):
        log.do(SetKey("l", b"", acquire=session))


def test_a_prefix_lists_keys_in_order(log):
    for key in ("b", "a/z", "a", "a/b", "a0", "ä"):
        log.do(SetKey(key, b""))
    assert list(log.ask(ListKeys(""))) == ["a", "a/b", "a/z", "a0", "b", "ä"]
    assert list(log.ask(ListKeys("a/"))) == ["a/b", "a/z"]
    assert log.ask(KeyNames("a/")) == {"a/b": ("a/b",), "a/z": ("a/z",)}


def test_a_prefix_that_ends_in_the_last_code_point_still_ends(log):
    top = "\U0010ffff"
    for key in (f"a{top}", f"a{top}b", "b", top):
        log.do(SetKey(key, b""))
    assert list(log.ask(ListKeys(f"a{top}"))) == [f"a{top}", f"a{top}b"]
    assert list(log.ask(ListKeys(top))) == [top]


@pytest.mark.parametrize("prefix", ["", "a/", "a/k", "a/k1"])
def test_the_index_of_a_prefix_moves_only_with_what_lies_under_it(log, prefix):
    log.do(SetKey("a/k1", b""))
    before = log.index_of(ListKeys(prefix))
    log.do(SetKey("a/other" if prefix not in ("", "a/") else "zzz/x", b""))
    assert log.index_of(ListKeys(prefix)) == (log.store.index if prefix == "" else before)


@pytest.mark.parametrize("prefix", ["", "a/", "a/k", "a/k1"])
def test_deleting_the_newest_key_raises_the_index_of_its_prefixes(log, prefix):
    log.do(SetKey("a/k1", b""))
    before = log.index_of(ListKeys(prefix))
    log.do(DeleteKey("a/k1"))
    assert log.index_of(ListKeys(prefix)) == log.store.index > before


def test_a_prefix_of_very_many_keys_takes_the_index_of_its_directory(log):
    for i in range(EXACT_PREFIX_KEYS_MAX + 2):
        log.do(SetKey(f"d/key-{i}", b""))
    log.do(SetKey("d/other", b""))
    assert log.index_of(ListKeys("d/key-")) == log.store.index
    highest = log.index_of(ListKeys("d/key-"))
    for i in range(3):
        log.do(DeleteKey(f"d/key-{i}"))
        assert log.index_of(ListKeys("d/key-")) > highest
        highest = log.index_of(ListKeys("d/key-"))


def test_a_write_touches_its_key_and_every_directory_around_it(log):
    log.do(SetKey("a/b/c", b""))
    assert set(log.last.touched) == {(g, "a/b/c") for g in ("kv:a/b/c", "kvdir:", "kvdir:a/", "kvdir:a/b/")}


def test_a_deep_key_touches_sixteen_directories_and_a_deep_prefix_reads_one_of_them(log):
    key = "/".join("abcdefghijklmnopqrstuvwxyz")
    log.do(SetKey(key, b""))
    touched = log.touched()
    assert len([g for g in touched if g.startswith("kvdir:")]) == 16
    for depth in range(0, len(key), 2):
        assert set(log.store.evaluate(ListKeys(key[:depth])).granules) <= touched
        assert log.index_of(ListKeys(key[:depth])) == log.store.index


def test_a_touched_key_outside_of_the_prefix_has_no_row_in_its_answer(log):
    log.do(SetKey("a/x", b""))
    assert ListKeys("a/y").row(log.store.view(), "a/x") is None
    assert KeyNames("a/y").row(log.store.view(), "a/x") is None
    assert GetKey("a").row(log.store.view(), "a/x") is None
