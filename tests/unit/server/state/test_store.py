from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgpack
import pytest

from rostra.server.state import capture, clients
from rostra.server.state import store as module
from rostra.server.state.capture import Loader
from rostra.server.state.catalog import Deregister, Nodes
from rostra.server.state.commands import COMMANDS
from rostra.server.state.entry import UnknownEntry, encode_args, encode_entry
from rostra.server.state.granules import granule_hash
from rostra.server.state.health import Checks, ServiceInstances
from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, KeyNames, ListKeys, SetKey
from rostra.server.state.session import CreateSession, DestroySession, Sessions
from rostra.server.state.store import Store
from rostra.wire.codec import Vocabulary
from rostra.wire.errors import BadRequest, Conflict, Internal


@dataclass(frozen=True, slots=True)
class Explode:
    """Changes much, then fails in the way that it is told."""

    kind: ClassVar[str] = "test.explode"
    how: str

    def apply(self, tx):
        tx.put(tx.tables.kv, "new", tx.tables.kv.rows["a/old"]._replace(key="new"))
        SetKey("a/old", b"changed", acquire="s").apply(tx)
        SetKey("dead", b"risen").apply(tx)
        DeleteKey("a/locked").apply(tx)
        Deregister("n1").apply(tx)
        tx.effect("boom")
        raise {"refused": Conflict("no"), "bug": ZeroDivisionError("oops"), "memory": MemoryError(), "io": OSError()}[
            self.how
        ]


@pytest.fixture
def explosive(log, founding):
    """A log with a bit of everything, whose store knows Explode."""
    exploding = type(log)(Store(Vocabulary([*COMMANDS, Explode])))
    exploding.do(founding)
    exploding.register("n1", "web", {"id": "c", "service_id": "web", "status": "passing"})
    exploding.do(CreateSession("s", "n1", node_checks=("c",)))
    exploding.do(SetKey("a/old", b""))
    exploding.do(SetKey("a/locked", b"", acquire="s"))
    exploding.do(SetKey("dead", b""))
    exploding.do(DeleteKey("dead"))
    return exploding


def derived(store):
    """Everything that is derived from rows, in a form that can be compared."""
    out: dict[str, Any] = {}
    for name, value in vars(store.tables).items():
        if name == "kv_names":
            out[name] = list(value)
        elif name == "service_names":
            out[name] = {n: (s.count, s.tags, s.row) for n, s in value.items()}
        elif hasattr(value, "rows"):
            out[name] = (value.rows, value.order)
        elif name != "all":
            out[name] = value
    return out


QUERIES = (ListKeys(""), ListKeys("a/"), GetKey("dead"), Nodes(), Checks(), Sessions(), ServiceInstances("web"))


@pytest.mark.parametrize("how", ["refused", "bug"])
def test_a_command_that_fails_leaves_nothing_behind(explosive, reloaded, how):
    before = derived(reloaded(explosive.store))
    answers = [(q, explosive.ask(q), explosive.index_of(q)) for q in QUERIES]
    index = explosive.store.index
    with pytest.raises(Conflict if how == "refused" else Internal):
        explosive.do(Explode(how))
    assert explosive.store.index == index + 1
    assert (explosive.last.touched, explosive.last.effects) == ((), ())
    assert [(q, explosive.ask(q), explosive.index_of(q)) for q in QUERIES] == answers
    assert derived(explosive.store) == before
    assert explosive.store.hash() == reloaded(explosive.store).hash()


def test_an_unexpected_exception_becomes_a_result_and_is_counted(explosive):
    for _ in range(2):
        assert explosive.apply(Explode("bug")).result == ("err", "internal", "internal error in test.explode")
    assert explosive.store.internal_errors == {"test.explode: ZeroDivisionError: oops": 2}


@pytest.mark.parametrize(("how", "error"), [("memory", MemoryError), ("io", OSError)])
def test_what_the_machine_could_not_do_stops_the_process(explosive, how, error):
    with pytest.raises(error):
        explosive.apply(Explode(how))


def entry(kind, args, cluster_id):
    return encode_args(kind, args, cluster_id=cluster_id, client=("", 0, 0), at_ms=0, actor="", source="")


def test_entries_of_a_newer_version_stop_the_process(log):
    cluster = log.store.cluster_id
    for data in (
        entry("kv.teleport", {}, cluster),
        entry("kv.set", {"key": "a", "value": b"", "ttl": 5}, cluster),
        b"\x91\x02",
        b"\xc1",
        b"\x01",
        b"\x92\x01\xa0",
    ):
        with pytest.raises(UnknownEntry):
            log.store.apply(data)
    assert log.ask(KeyNames("")) == {}


def test_arguments_of_a_wrong_type_are_refused(log):
    applied = log.store.apply(entry("kv.set", {"key": 7, "value": b""}, log.store.cluster_id))
    assert applied.result == ("err", "bad_request", "kv.set: field 'key' must be a string, not int")


def test_an_entry_of_another_cluster_is_refused(log):
    applied = log.store.apply(encode_entry(SetKey("a", b""), cluster_id="other"))
    assert applied.result[:2] == ("err", "conflict")
    assert applied.index == log.store.index
    assert log.ask(KeyNames("")) == {}


def test_before_the_bootstrap_only_the_bootstrap_is_accepted(founding):
    store = Store()
    for cluster_id in ("", "some"):
        refused = store.apply(encode_entry(SetKey("a", b""), cluster_id=cluster_id))
        assert refused.result[:2] == ("err", "conflict")
    wrong = store.apply(encode_entry(founding, cluster_id="some"))
    assert wrong.result[:2] == ("err", "bad_request")
    assert store.apply(encode_entry(founding, cluster_id=founding.cluster_id)).result == ("ok", True)


def results(store):
    """The sequences whose results are kept, by client in the order of last use."""
    return {client_id: sorted(client.results) for client_id, client in store.clients.rows.items()}


# -- exactly once -------------------------------------------------------------------------------------------------


def test_an_entry_that_comes_twice_is_applied_once_and_gives_the_same_result(log):
    first = log.apply(SetKey("a", b"1", cas=0), client=("c", 1, 1))
    index = log.store.index
    again = log.apply(SetKey("a", b"1", cas=0), client=("c", 1, 1))
    assert again.result == first.result == ("ok", True)
    assert (again.touched, again.effects, again.index, log.store.index) == ((), (), index, index)


def test_a_refusal_is_repeated_too(log):
    first = log.apply(SetKey("a", b"", acquire="s"), client=("c", 1, 1))
    log.register("n1")
    log.do(CreateSession("s", "n1", node_checks=()))
    again = log.apply(SetKey("a", b"", acquire="s"), client=("c", 1, 1))
    assert again.result == first.result == ("err", "bad_request", 'invalid session "s"')
    assert log.ask(GetKey("a")) == {}


def test_clients_do_not_share_sequences(log):
    assert log.do(SetKey("a", b"1", cas=0), client=("c1", 1, 1)) is True
    assert log.do(SetKey("a", b"2", cas=0), client=("c2", 1, 1)) is False


def test_sequences_may_arrive_in_any_order(log):
    log.apply(SetKey("a", b"3"), client=("c", 3, 1))
    log.apply(SetKey("a", b"1"), client=("c", 1, 1))
    assert log.ask(GetKey("a"))["a"].value == b"1"
    log.apply(SetKey("a", b"3"), client=("c", 3, 1))
    assert log.ask(GetKey("a"))["a"].value == b"1"


def test_results_are_forgotten_once_the_client_has_them(log):
    for sequence in range(1, 100):
        log.apply(SetKey("a", b"%d" % sequence), client=("c", sequence, max(1, sequence - 4)))
    assert results(log.store) == {"c": list(range(95, 100))}
    late = log.apply(SetKey("a", b"late"), client=("c", 7, 7))
    assert late.result[:2] == ("err", "conflict")
    assert log.ask(GetKey("a"))["a"].value == b"99"


def test_a_client_that_never_acknowledges_is_refused_and_can_go_on_after_it_does(log, monkeypatch):
    monkeypatch.setattr(clients, "OUTSTANDING_MAX", 10)
    for sequence in range(10):
        log.do(SetKey("a", b"%d" % sequence), client=("c", sequence, 0))
    with pytest.raises(BadRequest, match="more than 10 writes"):
        log.do(SetKey("a", b"x"), client=("c", 10, 0))
    assert results(log.store) == {"c": list(range(10))}
    log.do(SetKey("a", b"x"), client=("c", 10, 10))
    assert results(log.store) == {"c": [10]}


def test_a_client_may_go_far_ahead_at_once(log):
    for sequence in range(3):
        log.do(SetKey("a", b"%d" % sequence), client=("c", sequence, 0))
    log.do(SetKey("a", b"x"), client=("c", 1 << 62, (1 << 62) - 5))
    assert results(log.store) == {"c": [1 << 62]}


def test_the_client_that_wrote_least_recently_is_forgotten_first(log, reloaded, monkeypatch):
    monkeypatch.setattr(clients, "CLIENTS_MAX", 3)
    for client in ("c1", "c2", "c3", "c1"):
        log.apply(SetKey("a", client.encode()), client=(client, log.store.index, 0))
    copy = reloaded(log.store)
    for store in (log.store, copy):
        for client in ("c4", "c5"):
            store.apply(encode_entry(SetKey("a", b""), cluster_id=store.cluster_id, client=(client, 1, 1)))
        assert list(results(store)) == ["c1", "c4", "c5"]
    assert copy.hash() == log.store.hash()


def test_a_restored_server_repeats_results_as_well(log, reloaded):
    log.apply(SetKey("a", b"1", cas=0), client=("c", 1, 1))
    copy = reloaded(log.store)
    assert copy.apply(log.entries[-1]).result == ("ok", True)
    assert copy.hash() == log.store.hash()


# -- hash and snapshots -------------------------------------------------------------------------------------------


def fill(log):
    log.register("n1", {"name": "web", "meta": {"b": "1", "a": "2"}}, {"id": "c", "service_id": "web"})
    log.do(CreateSession("s", "n1", node_checks=()))
    log.do(SetKey("a/b", b"1", acquire="s"), client=("c", 5, 3))
    log.do(SetKey("gone", b"1"))
    log.do(DeleteKey("gone"))
    log.do(CreateSession("s2", "n1", node_checks=()))
    log.do(DestroySession("s2"))


def captured(store):
    """The chunks of a snapshot, without the steps of copying."""
    return [chunk for chunk in store.capture() if chunk is not None]


def test_a_snapshot_makes_the_same_store(log, reloaded):
    fill(log)
    copy = reloaded(log.store)
    assert copy.hash() == log.store.hash()
    assert (copy.index, copy.history) == (log.store.index, log.store.history)
    assert derived(copy) == derived(log.store)
    assert captured(copy) == captured(log.store)


def test_a_replayed_log_makes_the_same_store(log):
    fill(log)
    assert log.replayed().hash() == log.store.hash()
    assert log.replayed().history == log.store.history


def test_every_change_changes_the_hash(log):
    seen = {log.store.hash()}
    for command in (SetKey("a", b""), SetKey("a", b"1"), SetKey("a", b"1"), DeleteKey("a"), DeleteKey("a")):
        log.do(command)
        seen.add(log.store.hash())
    assert len(seen) == 6


def test_the_history_does_not_depend_on_how_entries_were_handed_over(log):
    fill(log)
    for i in range(500):
        log.do(SetKey(f"many/{i}", b"%d" % i))
    log.do(DeleteTree("many/"))
    together, in_parts = Store(), Store()
    together.apply_all(log.entries)
    for at in range(0, len(log.entries), 7):
        in_parts.apply_all(log.entries[at : at + 7])
    assert log.store.history == together.history == in_parts.history != 0


@pytest.mark.parametrize("other", [SetKey("a", b"2"), SetKey("b", b"1"), DeleteKey("a")])
def test_servers_that_applied_another_change_or_had_another_result_differ_in_their_history(make_log, other):
    one, two = make_log(), make_log()
    one.do(SetKey("a", b"1"))
    two.do(other)
    for log in (one, two):
        log.do(SetKey("a", b"same"))
        log.do(SetKey("b", b"same"))
    assert one.store.history != two.store.history


def test_what_was_proposed_here_is_applied_as_everywhere_else(log, reloaded):
    fill(log)
    copy = reloaded(log.store)
    commands: tuple[Any, ...] = (SetKey("k", b"1"), SetKey("k", b"2", acquire="nobody"), DeleteKey("k"))
    for sequence, command in enumerate(commands):
        client = ("c", 20 + sequence, 20)
        data = encode_entry(command, cluster_id=log.store.cluster_id, client=client, at_ms=7, actor="who")
        log.store.expect(data, log.store.cluster_id, client, 7, "who", command.kind, command)
        for _ in range(2):
            assert log.store.apply(data) == copy.apply(data)
    assert (log.store.hash(), log.store.history) == (copy.hash(), copy.history)


def test_a_snapshot_shows_the_moment_at_which_its_tables_were_copied(log, loaded):
    fill(log)
    expected = log.store.hash()
    chunks = log.store.capture()
    first = next(chunk for chunk in chunks if chunk is not None)
    log.do(SetKey("later", b""), client=("c", 6, 6))
    log.do(SetKey("a/b", b"changed"))
    log.do(Deregister("n1"))
    assert loaded([first, *chunks]).hash() == expected


def test_an_entry_applied_while_tables_are_copied_ends_the_snapshot(log):
    fill(log)
    chunks = log.store.capture()
    assert next(chunks) is None
    log.do(SetKey("later", b""))
    with pytest.raises(RuntimeError, match="applied while"):
        list(chunks)


def test_chunks_and_steps_of_copying_are_bounded(log, loaded, monkeypatch):
    monkeypatch.setattr(capture, "COPY_ROWS", 400)
    for i in range(1000):
        log.do(SetKey(f"k{i:04}", b"x" * (100_000 if i < 5 else 1)), client=("c", i, 0))
    chunks = list(log.store.capture())
    assert chunks.count(None) >= 3
    decoded = [msgpack.unpackb(chunk, strict_map_key=False) for chunk in chunks if chunk is not None]
    sizes = [len(chunk[1]) for chunk in decoded if chunk[0] == "kv"]
    assert sum(sizes) == 1000
    assert max(sizes) == capture.CHUNK_ROWS
    assert sizes[0] == 2
    parts = [client for chunk in decoded if chunk[0] == "clients" for client in chunk[1]]
    assert [len(part[3]) // 2 for part in parts] == [256, 256, 256, 232]
    assert loaded(chunks).hash() == log.store.hash()


def test_a_snapshot_that_is_cut_off_or_of_a_newer_version_is_refused(log, loaded):
    fill(log)
    chunks = captured(log.store)
    with pytest.raises(ValueError, match="without an end"):
        loaded(chunks[:-1])
    with pytest.raises(ValueError, match="format"):
        loaded(chunks[1:])
    with pytest.raises(ValueError, match="newer version"):
        loaded([chunks[0], msgpack.packb(("wormholes", ())), chunks[-1]])
    with pytest.raises(ValueError, match="no msgpack"):
        loaded([b"\xc1"])
    with pytest.raises(ValueError, match="without an end"):
        Loader().finish()


def test_a_store_becomes_what_was_loaded_and_goes_on_from_there(log, make_log):
    fill(log)
    other = make_log()
    other.do(SetKey("other", b""))
    loader = Loader()
    for chunk in captured(log.store):
        loader.feed(chunk)
    loader.finish()
    other.store.adopt(loader)
    assert (other.store.hash(), other.store.history) == (log.store.hash(), log.store.history)
    assert other.store.cluster_id == log.store.cluster_id
    log.do(SetKey("a/b", b"next"), client=("c", 6, 5))
    assert other.store.apply(log.entries[-1]) == log.last
    assert (other.store.hash(), other.store.history) == (log.store.hash(), log.store.history)


# -- what others ask ----------------------------------------------------------------------------------------------


def test_barriers_learn_which_granules_were_touched(log):
    start = log.store.index
    assert log.store.touched_since(start) == frozenset()
    log.do(SetKey("a", b""))
    middle = log.store.index
    log.do(SetKey("b", b""))
    log.do(SetKey("b", b""))
    hashes = {name: granule_hash(name) for name in ("kv:a", "kv:b", "kvdir:")}
    assert log.store.touched_since(start) == frozenset(hashes.values())
    assert log.store.touched_since(middle) == {hashes["kv:b"], hashes["kvdir:"]}
    assert log.store.touched_since(log.store.index) == frozenset()


def test_barriers_from_another_time_have_to_forget_everything(log, reloaded, monkeypatch):
    assert log.store.touched_since(log.store.index + 1) is None
    assert reloaded(log.store).touched_since(log.store.index - 1) is None
    assert reloaded(log.store).touched_since(log.store.index) == frozenset()
    monkeypatch.setattr(module, "_RING_ENTRIES", 3)
    start = log.store.index
    for i in range(4):
        log.do(SetKey("a", b"%d" % i))
    assert log.store.touched_since(start) is None
    assert log.store.touched_since(start + 1) is not None


def test_a_long_answer_is_taken_in_steps(log):
    for i in range(10):
        log.do(SetKey(f"k{i}", b"old"))
    evaluation = log.store.evaluate(ListKeys("k"))
    assert evaluation.granules == ("kvdir:",)
    assert evaluation.index == log.store.index
    first = evaluation.step(4)
    log.do(SetKey("k5", b"new"))
    log.do(DeleteKey("k6"))
    rest = []
    while not evaluation.done:
        rest += evaluation.step(4)
    assert [key for key, _ in first + rest] == [f"k{i}" for i in range(10) if i != 6]
    assert dict(rest)["k5"].value == b"new"


def test_a_step_is_empty_only_at_the_end(log):
    for i in range(10):
        log.do(SetKey(f"k{i}", b""))
    evaluation = log.store.evaluate(ListKeys("k"))
    log.do(DeleteTree("k0"))
    log.do(DeleteTree("k1"))
    assert [key for key, _ in evaluation.step(2)] == ["k2", "k3"]
    log.do(DeleteTree(""))
    assert evaluation.step(2) == []
    assert evaluation.done


def test_a_touch_is_reported_once(log):
    log.register("n1", "web", {"id": "a"}, {"id": "b"})
    assert len(log.last.touched) == len(set(log.last.touched))
