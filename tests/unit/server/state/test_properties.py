"""Properties over random histories: a naive model of keys, locks and sessions, and what tracked reads promise."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rostra.server.state import capture
from rostra.server.state.catalog import Deregister, Nodes, NodeServices, Register, ServiceNames
from rostra.server.state.cluster import BindNode, Members, ReapTombstones, SetMemberStatus
from rostra.server.state.entry import encode_entry
from rostra.server.state.granules import granule_hash
from rostra.server.state.health import Checks, ConnectInstances, NodeChecks, ServiceInstances
from rostra.server.state.intention import DeleteIntention, Intentions, IntentionsFor, SetIntention
from rostra.server.state.kv import DeleteKey, DeleteTree, GetKey, KeyNames, ListKeys, SetKey
from rostra.server.state.session import (
    CreateSession,
    DestroySession,
    ExpireSession,
    NodeSessions,
    RenewSessions,
    SessionInfo,
    Sessions,
)

KEYS = ("a", "a/", "a/b", "a/b/c", "a/bc", "ab", "b/x")
PREFIXES = ("", "a", "a/", "a/b", "a/b/", "z")
SESSIONS = ("s1", "s2", "s3")
NODES = ("n1", "N1", "n2")
SERVICES = ("web", "WEB", "db")
IDS = ("", "aaaaaaaa-0000-0000-0000-000000000001", "aaaaaaaa-0000-0000-0000-000000000002")

keys, sessions, nodes = st.sampled_from(KEYS), st.sampled_from(SESSIONS), st.sampled_from(NODES)
values = st.sampled_from((b"", b"1", b"2"))
small = st.integers(0, 14)
statuses = st.sampled_from(("passing", "warning", "critical", ""))
check_ids = st.sampled_from(("serfHealth", "c1", "C1", "c2"))
service_ids = st.sampled_from(("", "i1", "I1", "i2"))

kv_commands = st.one_of(
    st.builds(SetKey, keys, values, st.sampled_from((0, 1))),
    st.builds(SetKey, keys, values, cas=small),
    st.builds(SetKey, keys, values, acquire=sessions),
    st.builds(SetKey, keys, values, release=sessions),
    st.builds(DeleteKey, keys),
    st.builds(DeleteKey, keys, small),
    st.builds(DeleteTree, st.sampled_from(PREFIXES)),
    st.builds(
        CreateSession,
        sessions,
        nodes,
        behavior=st.sampled_from(("release", "delete")),
        node_checks=st.sampled_from(((), ("c1",), ("C1",))),
    ),
    st.builds(DestroySession, sessions),
    st.builds(ExpireSession, sessions, small),
    st.builds(RenewSessions, st.tuples(sessions)),
    st.builds(
        lambda n, c, s: Register(n, "1.1.1.1", checks=({"id": c, "status": s},)),
        nodes,
        st.sampled_from(("c1", "C1")),
        statuses,
    ),
    st.builds(Deregister, nodes),
    st.builds(Deregister, nodes, check_id=st.sampled_from(("c1", "C1"))),
)


def _service(service_id, name, tags, port, mesh):
    service = {"id": service_id, "name": name, "tags": tags, "port": port}
    if mesh == "proxy":
        service |= {"kind": "connect-proxy", "port": 9, "proxy": {"destination_service_name": "web"}}
    return {**service, "native": mesh == "native"}


services = st.builds(
    _service,
    service_ids,
    st.sampled_from(SERVICES),
    st.sampled_from(((), ("a",), ("b", "a"))),
    st.sampled_from((0, 80)),
    st.sampled_from(("", "", "native", "proxy")),
)
checks = st.builds(
    lambda i, s, o: {"id": i, "status": s, "service_id": o},
    check_ids,
    statuses,
    st.sampled_from(("", "", "i1", "I1", "web")),
)
catalog_commands = st.one_of(
    st.builds(
        Register,
        nodes,
        st.sampled_from(("1.1.1.1", "1.1.1.2")),
        st.sampled_from(IDS),
        service=st.none() | services,
        checks=st.lists(checks, max_size=2).map(tuple),
    ),
    st.builds(Deregister, nodes),
    st.builds(Deregister, nodes, service_id=st.sampled_from(("i1", "I1", "i2", "web"))),
    st.builds(Deregister, nodes, check_id=check_ids),
)
names = st.sampled_from(("web", "db", "DB", "*"))
other_commands = st.one_of(
    st.builds(SetIntention, names, names, st.sampled_from(("allow", "deny")), id=st.sampled_from(("", "x", "y"))),
    st.builds(DeleteIntention, names, names),
    st.builds(BindNode, nodes, st.sampled_from(("k1", "k2")), st.just("client"), st.just("1.1.1.1")),
    st.builds(SetMemberStatus, nodes, st.sampled_from(("alive", "failed"))),
    st.builds(ReapTombstones, st.sampled_from(("kv", "services", "nodes", "sessions", "intentions")), small),
)
all_commands = st.one_of(kv_commands, catalog_commands, catalog_commands, other_commands)

QUERIES = (
    *map(GetKey, KEYS),
    *map(ListKeys, PREFIXES),
    KeyNames("a/"),
    Nodes(),
    ServiceNames(),
    Checks(),
    *(query(name) for query in (NodeServices, NodeChecks, NodeSessions) for name in NODES),
    *(query(name) for query in (ServiceInstances, ConnectInstances) for name in SERVICES),
    Sessions(),
    *map(SessionInfo, SESSIONS),
    Intentions(),
    *map(IntentionsFor, ("web", "db", "DB", "*")),
    Members(),
)


#: What histories begin with, so that short ones get somewhere.
PRELUDE = [
    Register("n1", "1.1.1.1", checks=({"id": "c1", "status": "passing"},)),
    CreateSession("s1", "n1", behavior="delete", node_checks=("c1",)),
    CreateSession("s2", "n1", node_checks=()),
    SetKey("a/b", b"1", acquire="s1"),
    SetKey("a/bc", b"1", acquire="s2"),
]
FURNITURE = [
    *PRELUDE,
    Register("n1", "1.1.1.1", service=_service("i1", "web", ("a",), 80, "native"), checks=({"id": "c2"},)),
    Register("n2", "1.1.1.2", service=_service("i1", "db", ("a",), 80, "proxy")),
]


def histories(commands, prelude):
    return st.lists(commands, min_size=1, max_size=25).map(lambda drawn: prelude + drawn)


# -- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Keys, locks and sessions, written as the documentation tells it and without any index structure."""

    keys: dict = field(default_factory=dict)  # key -> [value, flags, lock index, session, modify index]
    sessions: dict = field(default_factory=dict)  # id -> (node, checks, behavior)
    seen: dict = field(default_factory=dict)
    nodes: dict = field(default_factory=dict)  # folded name -> {check id: status}

    def end(self, gone, index):
        for name in [s for s in self.sessions if gone(s, *self.sessions[s])]:
            behavior = self.sessions.pop(name)[2]
            for key in [k for k, row in self.keys.items() if row[3] == name]:
                if behavior == "delete":
                    del self.keys[key]
                else:
                    self.keys[key][3:] = ["", index]

    def apply(self, command, index):
        match command:
            case SetKey(key, value, flags, cas, acquire, release):
                old = self.keys.get(key)
                if cas is not None and cas != (old[4] if old else 0):
                    return False
                lock, holder = (old[2], old[3]) if old else (0, "")
                if acquire:
                    if acquire not in self.sessions:
                        return "refused"
                    if holder not in ("", acquire):
                        return False
                    lock, holder = lock + (holder == ""), acquire
                if release:
                    if holder != release:
                        return False
                    holder = ""
                if old is None or old[:4] != [value, flags, lock, holder]:
                    self.keys[key] = [value, flags, lock, holder, index]
                return True
            case DeleteKey(key, cas):
                if key in self.keys and cas is not None and cas != self.keys[key][4]:
                    return False
                self.keys.pop(key, None)
                return True
            case DeleteTree(prefix):
                self.keys = {k: v for k, v in self.keys.items() if not k.startswith(prefix)}
                return True
            case CreateSession(name, node, behavior=behavior, node_checks=needed):
                checks = self.nodes.get(node.lower())
                if name in self.sessions or checks is None:
                    return "refused"
                if any(checks.get(c.lower(), "critical") == "critical" for c in needed):
                    return "refused"
                self.sessions[name] = (node.lower(), [c.lower() for c in needed], behavior)
                self.seen[name] = index
                return name
            case DestroySession(name):
                self.end(lambda s, *_: s == name, index)
                return True
            case ExpireSession(name, seen):
                if name not in self.sessions or self.seen[name] > seen:
                    return False
                self.end(lambda s, *_: s == name, index)
                return True
            case RenewSessions(ids):
                self.seen.update({name: index for name in ids if name in self.sessions})
                return None
            case Register(node, checks=(check,)):
                known = self.nodes.setdefault(node.lower(), {})
                check_id = check["id"].lower()
                known[check_id] = status = check["status"] or known.get(check_id, "critical")
                if status == "critical":
                    self.end(lambda _, n, needed, __: n == node.lower() and check_id in needed, index)
                return True
            case Deregister(node, check_id=None):
                if self.nodes.pop(node.lower(), None) is not None:
                    self.end(lambda _, n, *__: n == node.lower(), index)
                return True
            case Deregister(node, check_id=check_id):
                if self.nodes.get(node.lower(), {}).pop(str(check_id).lower(), None):
                    self.end(lambda _, n, needed, __: n == node.lower() and str(check_id).lower() in needed, index)
                return True
        raise AssertionError(command)


@settings(deadline=None, max_examples=300)
@given(histories(kv_commands, PRELUDE))
def test_keys_sessions_and_locks_do_what_the_naive_model_does(make_log, commands):
    log, model = make_log(), Model()
    for command in commands:
        index = log.store.index + 1
        result = log.apply(command).result
        expected = model.apply(command, index)
        assert (result[1] if result[0] == "ok" else "refused") == expected, command
        shown = {
            k: [r.value, r.flags, r.lock_index, r.session, r.modify_index] for k, r in log.ask(ListKeys("")).items()
        }
        assert shown == model.keys
        assert list(shown) == sorted(shown)
        assert set(log.ask(Sessions())) == set(model.sessions)
        for key, row in shown.items():
            assert not row[3] or row[3] in model.sessions, f"{key} is locked by a session that is gone"


@settings(deadline=None, max_examples=200)
@given(histories(all_commands, FURNITURE))
def test_tracked_reads_keep_their_promises(make_log, commands):
    log = make_log()
    seen = {query: log.store.evaluate(query) for query in QUERIES}
    answers = {query: dict(evaluation.rows()) for query, evaluation in seen.items()}
    for command in commands:
        start = log.store.index
        applied = log.apply(command)
        hashes = log.store.touched_since(start)
        assert hashes == {granule_hash(granule) for granule, _ in applied.touched}
        for query in QUERIES:
            before, evaluation = seen[query], log.store.evaluate(query)
            rows = dict(evaluation.rows())
            assert list(rows) == sorted(rows)
            assert evaluation.index >= before.index, "indexes never fall"
            assert evaluation.granules == before.granules
            touches = [(granule, key) for granule, key in applied.touched if granule in before.granules]
            if rows != answers[query]:
                assert touches, f"{query} changed without a touch by {command}"
                assert evaluation.index == log.store.index > before.index, "the index moves when rows change"
            elif not touches and not isinstance(command, ReapTombstones):
                assert evaluation.index == before.index
            patched = dict(answers[query])
            view = log.store.view()
            for _, key in touches:
                assert key is not None
                row = query.row(view, key)
                patched.pop(key, None)
                if row is not None:
                    patched[key] = row
            assert patched == rows, "evaluating the touched rows again is enough"
            seen[query], answers[query] = evaluation, rows


@settings(deadline=None, max_examples=150)
@given(histories(all_commands, FURNITURE), st.integers(0, 25), st.integers(1, 300))
def test_a_server_restored_from_a_snapshot_goes_on_like_the_others(make_log, loaded, commands, cut, chunk_rows):
    log = make_log()
    for sequence, command in enumerate(commands[:cut]):
        log.apply(command, client=(f"c{sequence % 3}", sequence, max(0, sequence - 5)))
    expected = (log.store.hash(), log.store.history)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(capture, "CHUNK_ROWS", chunk_rows)
        chunks = log.store.capture()
        taken = [next(chunk for chunk in chunks if chunk is not None)]
        before = len(log.entries)
        applied = [log.apply(command, client=("c0", 1000 + at, 0)) for at, command in enumerate(commands[cut:])]
        copy = loaded([*taken, *chunks])
    assert (copy.hash(), copy.history) == expected, "what came later does not show"
    for data, ours in zip(log.entries[before:], applied):
        assert copy.apply(data) == ours
    assert (copy.hash(), copy.history) == (log.store.hash(), log.store.history)
    for data in log.entries[1:]:  # repeated: results are remembered, or known to be forgotten, in the same way
        assert copy.apply(data) == log.store.apply(data)
    for query in QUERIES:
        ours, theirs = log.store.evaluate(query), copy.evaluate(query)
        assert (ours.index, ours.granules, ours.rows()) == (theirs.index, theirs.granules, theirs.rows())


@settings(deadline=None, max_examples=100)
@given(histories(all_commands, PRELUDE), st.data())
def test_repeated_entries_change_nothing_however_often_they_come(make_log, commands, data):
    once, often = make_log(), make_log()
    entries = [
        encode_entry(command, cluster_id=once.store.cluster_id, client=("c", sequence, 0))
        for sequence, command in enumerate(commands)
    ]
    results = [once.store.apply(entry).result for entry in entries]
    for at in range(len(entries)):
        assert often.store.apply(entries[at]).result == results[at]
        again = data.draw(st.integers(0, at))
        assert often.store.apply(entries[again]).result == results[again]
    assert (often.store.hash(), often.store.history) == (once.store.hash(), once.store.history)
