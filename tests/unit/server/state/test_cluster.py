from __future__ import annotations

from dataclasses import replace

import pytest

from rostra.server.state.cluster import (
    BindNode,
    ForgetNode,
    Members,
    NodeReports,
    ReapTombstones,
    SetMemberStatus,
    SetVoter,
)
from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, ListKeys, SetKey
from rostra.server.state.session import CreateSession, DestroySession, SessionInfo
from rostra.server.state.store import Store
from rostra.wire.errors import BadRequest, Conflict, NotFound


def member(log, name):
    return log.ask(Members()).get(name)


def test_bootstrap_founds_the_cluster_with_voting_servers(log):
    assert log.store.cluster_id
    row = member(log, "s1")
    assert (row.role, row.voter, row.key_hash, row.status) == ("server", True, "key-1", "alive")
    assert log.store.secret("cluster-ca") == "CA KEY"
    assert "CA KEY" not in repr(log.ask(Members()))


def test_a_second_bootstrap_of_the_same_cluster_does_nothing(log, founding):
    assert log.do(founding) is False
    assert log.last.touched == ()


def test_a_bootstrap_of_another_cluster_is_refused(log, founding):
    with pytest.raises(Conflict, match="already"):
        log.do(replace(founding, cluster_id="other"))


def test_a_name_is_bound_to_the_first_key_that_shows_it(log):
    assert log.do(BindNode("c1", "k1", "client", "10.0.0.9", node_id="id")) is True
    assert log.do(BindNode("c1", "k1", "client", "10.0.0.10")) is True
    assert member(log, "c1")[:6] == ("c1", "id", "client", "10.0.0.10", "k1", "alive")
    with pytest.raises(Conflict, match="choose another node name, or run `rostra force-leave c1`"):
        log.do(BindNode("c1", "k2", "client", "10.0.0.11"))
    assert member(log, "c1").key_hash == "k1"


@pytest.mark.parametrize("status", ["failed", "left"])
def test_the_name_of_a_node_that_failed_or_left_is_free(log, status):
    log.do(BindNode("c1", "k1", "client", "10.0.0.9"))
    log.do(SetMemberStatus("c1", status))
    log.do(BindNode("c1", "k2", "client", "10.0.0.11"))
    assert member(log, "c1")[4:6] == ("k2", "alive")


def test_the_name_of_a_voting_server_is_not_free_even_when_it_failed(log):
    log.do(SetMemberStatus("s1", "failed"))
    with pytest.raises(Conflict, match="voting server"):
        log.do(BindNode("s1", "thief", "server", "10.0.0.66"))
    with pytest.raises(Conflict, match="voting server"):
        log.do(ForgetNode("s1"))
    log.do(SetVoter("s1", False))
    log.do(ForgetNode("s1"))
    assert member(log, "s1") is None


def test_the_same_key_coming_back_makes_a_member_alive(log):
    log.do(SetMemberStatus("s1", "failed"))
    log.do(BindNode("s1", "key-1", "client", "10.0.0.1"))
    assert (member(log, "s1").status, member(log, "s1").role) == ("alive", "server")


def test_a_status_for_another_key_does_nothing(log):
    assert log.do(SetMemberStatus("s1", "failed", key_hash="former")) is False
    assert member(log, "s1").status == "alive"
    with pytest.raises(NotFound):
        log.do(SetMemberStatus("ghost", "failed"))
    with pytest.raises(BadRequest):
        log.do(SetMemberStatus("s1", "sleepy"))


def test_a_client_cannot_vote(log):
    log.do(BindNode("c1", "k1", "client", "10.0.0.9"))
    with pytest.raises(Conflict, match="client"):
        log.do(SetVoter("c1", True))


def test_a_report_that_says_nothing_new_moves_no_index(log):
    log.do(NodeReports((("s1", "1.0", ("anchor",)), ("ghost", "1.0", ()))))
    assert (member(log, "s1").version, member(log, "s1").anchors) == ("1.0", ("anchor",))
    log.do(NodeReports((("s1", "1.0", ("anchor",)),)))
    assert log.last.touched == ()


def test_reaping_the_deletions_of_keys_lets_no_index_fall(log):
    log.do(SetKey("a/x", b""))
    log.do(SetKey("b", b""))
    log.do(DeleteKey("a/x"))
    queries = [GetKey("a/x"), GetKey("never"), GetKey("b"), *map(ListKeys, ("", "a/", "a/x", "b", "c"))]
    before = [log.index_of(q) for q in queries]
    assert log.do(ReapTombstones("kv", log.store.index)) == 0
    assert log.do(ReapTombstones("kv", log.store.index)) == 1
    assert log.index_of(GetKey("b")) == before[2]
    assert all(log.index_of(q) >= was for q, was in zip(queries, before))
    assert len(log.store.tables.tombstones.rows) == 0
    assert list(log.store.tables.kv_names) == ["b"]
    below = log.store.granule_index("kv:never")
    log.do(SetKey("a/x", b""))
    assert log.index_of(GetKey("a/x")) == log.store.index > below


def test_reaping_sessions_forgets_dead_ones_only(log):
    log.register("n1")
    for name in ("dead", "live"):
        log.do(CreateSession(name, "n1", node_checks=()))
    log.do(DestroySession("dead"))
    live = log.index_of(SessionInfo("live"))
    dead = log.index_of(SessionInfo("dead"))
    assert log.do(ReapTombstones("sessions", log.store.index + 1)) == 1
    assert log.index_of(SessionInfo("live")) == live
    assert log.index_of(SessionInfo("dead")) >= dead
    assert "session:dead" not in log.store.tables.granules.rows


def test_the_oldest_deletions_are_reaped_first_and_so_many_at_a_time(log):
    for i in range(10):
        log.do(SetKey(f"k{i}", b""))
        log.do(DeleteKey(f"k{i}"))
    log.do(SetKey("k1", b""))
    log.do(DeleteKey("k1"))  # the newest again
    tombstones = log.store.tables.tombstones.rows
    assert list(tombstones.values()) == sorted(tombstones.values())
    now = log.store.index + 1
    assert log.store.reapable(tombstones["k0"], 4) == 0
    assert log.store.reapable(tombstones["k0"] + 1, 4) == tombstones["k0"] + 1
    assert log.do(ReapTombstones("kv", log.store.reapable(now, 4))) == 4
    assert list(tombstones) == ["k5", "k6", "k7", "k8", "k9", "k1"]
    while below := log.store.reapable(now, 4):
        assert log.do(ReapTombstones("kv", below)) <= 4
    assert list(tombstones) == []


def test_a_tree_that_was_deleted_at_once_is_forgotten_at_once(log):
    for i in range(10):
        log.do(SetKey(f"t/{i}", b""))
    log.do(DeleteTree("t/"))
    assert log.do(ReapTombstones("kv", log.store.reapable(log.store.index + 1, 4))) == 10


def test_deletions_keep_their_order_in_a_snapshot(log, reloaded):
    for key in ("c", "a", "b"):
        log.do(SetKey(key, b""))
        log.do(DeleteKey(key))
    assert list(reloaded(log.store).tables.tombstones.rows) == ["c", "a", "b"]


def test_what_has_not_happened_cannot_be_reaped(log):
    with pytest.raises(BadRequest, match="not been reached"):
        log.do(ReapTombstones("kv", 1 << 40))
    with pytest.raises(BadRequest, match="none of"):
        log.do(ReapTombstones("zork", 1))


def test_the_state_hash_of_another_server_is_reported_when_it_differs(log, monkeypatch):
    monkeypatch.setattr("rostra.server.state.store.CHECKPOINT_ENTRIES", 8)
    assert log.store.checkpoint() is None
    while log.store.index < 8:
        log.do(SetKey("a", b"%d" % log.store.index))
    command = log.store.checkpoint()
    assert command.index == 8
    log.do(command)
    assert log.last.effects == ()
    log.do(replace(command, hash=command.hash ^ 1))
    assert log.effects("state-differs") == [(8, command.hash ^ 1, command.hash)]
    log.do(replace(command, hash=command.hash ^ (1 << 63)))
    assert log.last.effects == (), "a version whose rows have other fields has another hash"
    log.do(replace(command, hash=command.hash ^ 1, index=7))
    assert log.last.effects == ()


def test_an_empty_store_belongs_to_no_cluster():
    assert Store().cluster_id == ""
    assert Store().index == 1
