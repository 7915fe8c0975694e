"""Golden entries: bytes that are on disks for ever.

A test run never changes them; with ROSTRA_RECORD_GOLDEN=1 it adds those that are missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rostra.server.state import ca, catalog, cluster, intention, kv, operator, session
from rostra.server.state.commands import COMMAND_VOCABULARY, COMMANDS
from rostra.server.state.entry import UnknownEntry, decode_entry, encode_args, encode_entry
from rostra.server.state.store import Store
from rostra.wire.errors import BadRequest

GOLDEN = Path(__file__).parents[3] / "golden"
CLUSTER = "c0ffee00-0000-4000-8000-000000000000"
NODE_ID = "aaaaaaaa-0000-4000-8000-000000000001"
ROOT = {
    "id": "aa:bb",
    "name": "Rostra CA Root Cert",
    "serial": 7,
    "signing_key_id": "cc:dd",
    "trust_domain": f"{CLUSTER}.consul",
    "not_before_ms": 1_700_000_000_000,
    "not_after_ms": 2_000_000_000_000,
    "cert_pem": "CERT",
    "intermediates_pem": (),
}
#: In an order in which each can be applied.
SAMPLES = {
    command.kind: command
    for command in (
        cluster.Bootstrap(CLUSTER, ((NODE_ID, "s1", "10.0.0.1", "ab" * 32),), "dc1", "CERT", "KEY", 1_700_000_000_000),
        cluster.BindNode("c1", "cd" * 32, "client", "10.0.0.2", NODE_ID, "1.0.0", 8311, 8310),
        cluster.SetMemberStatus("c1", "failed", "cd" * 32),
        cluster.SetVoter("s1", True),
        cluster.NodeReports((("c1", "1.0.0", ("anchor",)),)),
        catalog.Register(
            "n1",
            "10.0.0.2",
            NODE_ID,
            "dc1",
            {"lan": "10.0.0.2"},
            {"rack": "7"},
            False,
            {"id": "web-1", "name": "web", "port": 80, "tags": ("v1",), "meta": {"a": "b"}, "weight_passing": 2},
            ({"id": "serfHealth", "name": "Serf Health Status", "status": "passing"},),
        ),
        session.CreateSession("5e55-1", "n1", "lock", 1000, "delete", 10_000, ("serfHealth",), ()),
        session.RenewSessions(("5e55-1",)),
        kv.SetKey("app/k", b"\x00value", 42, 0, "5e55-1", None),
        session.ExpireSession("5e55-1", 1),
        session.DestroySession("5e55-1"),
        kv.DeleteKey("app/k", 3),
        kv.DeleteTree("app/"),
        intention.SetIntention("web", "db", "allow", "why", {"a": "b"}, NODE_ID),
        intention.DeleteIntention("web", "db"),
        ca.SetRoot(ROOT, "KEY", ""),
        ca.DropRoot("ee:ff"),
        ca.SetCaConfig({"leaf_cert_ttl_ms": 259_200_000}, 0),
        ca.NextSerial(16),
        catalog.Deregister("n1", "web-1", None),
        cluster.ForgetNode("c1"),
        cluster.StateHash(10_000, (1 << 64) - 1),
        cluster.ReapTombstones("kv", 5),
        operator.SetAutopilot(False, 300, 100, 3, 5_000, True, 0),
    )
}


def encode(command):
    return encode_entry(
        command,
        cluster_id=CLUSTER,
        client=("client-1", 17, 9),
        at_ms=1_700_000_000_123,
        actor="token:anonymous",
        source="10.0.0.2:8500",
    )


def golden(kind: str) -> bytes:
    path = GOLDEN / f"entry-{kind}.bin"
    if not path.exists() and os.environ.get("ROSTRA_RECORD_GOLDEN"):
        path.write_bytes(encode(SAMPLES[kind]))
    return path.read_bytes()


@pytest.mark.parametrize("kind", [command.kind for command in COMMANDS])
def test_every_command_is_written_as_it_always_was(kind):
    assert encode(SAMPLES[kind]) == golden(kind)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("entry-*.bin")), ids=lambda path: path.stem)
def test_every_entry_ever_written_can_still_be_read(path):
    entry = decode_entry(path.read_bytes())
    assert entry[:7] == (CLUSTER, "client-1", 17, 9, 1_700_000_000_123, "token:anonymous", "10.0.0.2:8500")
    command = COMMAND_VOCABULARY.decode(entry.kind, entry.args)
    if entry.kind in SAMPLES:
        assert command == SAMPLES[entry.kind]


def test_a_log_of_one_entry_of_each_kind_applies():
    store = Store()
    results = {}
    for sequence, (kind, command) in enumerate(SAMPLES.items()):
        data = encode_entry(command, cluster_id=CLUSTER, client=("c", sequence, sequence))
        results[kind] = store.apply(data).result
    assert {kind: result for kind, result in results.items() if result[0] != "ok"} == {}


def test_fields_that_hold_their_default_take_no_room():
    entry = decode_entry(encode_entry(kv.SetKey("a", b"1"), cluster_id=CLUSTER))
    assert entry.args == {"key": "a", "value": b"1"}


@pytest.mark.parametrize("client", [("c", 1, 2), ("c", -1, -1), ("c", "1", 0), (None, 1, 1), ("c", 1 << 63, 0)])
def test_a_client_that_is_not_named_properly_never_reaches_the_log(client):
    with pytest.raises(BadRequest):
        encode_args("kv.set", {}, cluster_id=CLUSTER, client=client, at_ms=0, actor="", source="")


@pytest.mark.parametrize("size", range(0, 40, 3))
def test_a_damaged_entry_is_unknown(size):
    with pytest.raises(UnknownEntry):
        decode_entry(encode(kv.SetKey("a", b"1"))[:size])
