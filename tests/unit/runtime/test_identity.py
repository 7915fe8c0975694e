"""The cluster secret, the data directory, and what a node keeps on disk about itself."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
from cryptography import x509

from rostra.runtime.data_directory import DataDirectory, UnusableData
from rostra.runtime.enrolment_ca import enrolment_authority, split_pem
from rostra.runtime.files import write_durably
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import (
    Secret,
    generate_secret,
    local_secret,
    local_secret_path,
    parse_secret,
    parse_secrets,
    resolve_secrets,
)
from rostra.server.ca.issue import create_cluster_ca, sign_node
from rostra.wire.errors import BadRequest, Conflict

FIXED = Secret(bytes.fromhex("a3f1c2d94e5b60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f7"))


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def cluster_certificate(node: NodeIdentity, *, ago_s: int = 0, ttl_s: int = 3600, key: Path | None = None, **changed):
    """(chain, anchors) as a leader would send them."""
    ca_cert, ca_key = create_cluster_ca(time.time_ns() // 1_000_000)
    public = x509.load_pem_x509_certificate((key or node.cert_path).read_bytes()).public_key()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    about = {"node_id": node.node_id, "name": node.node_name, "role": "client", **changed}
    now_ms = time.time_ns() // 1_000_000 - ago_s * 1000
    return sign_node(ca_cert, ca_key, der, now_ms=now_ms, ttl_s=ttl_s, serial=7, **about), ca_cert


# -- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24, 32])
def test_random_secrets_of_the_three_sizes_are_accepted(size):
    for _ in range(200):
        raw = os.urandom(size)
        assert parse_secret(b64(raw)).value == raw


def test_keygen_makes_a_secret_that_is_accepted():
    text = generate_secret()
    assert len(parse_secret(text).value) == 32
    assert generate_secret() != text


def _bytes(count: int) -> bytes:
    """Bytes that look random, and are the same in every process that collects these tests."""
    return hashlib.shake_256(b"a secret of the tests").digest(count)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("correct horse battery staple", "not base64"),
        ("hunter2", "not base64"),
        ("", "0 bytes"),
        (b64(b"short"), "5 bytes"),
        (b64(_bytes(31)), "31 bytes"),
        (_bytes(32).hex(), "48 bytes"),
        (b64(b"correct horse battery staple 123"), "looks like text"),
        (b64(bytes(32)), "looks like text or a pattern"),
        (b64(bytes(range(32))), "pattern"),
        (b64(b"\xff" + bytes(range(0, 250, 8))[:31]), "pattern"),
        (b64(_bytes(8) * 4), "pattern"),
        ("correcthorsebatterystaplecorrect", "looks like text"),
        ("12345678901234567890123456789012", "looks like text"),
    ],
)
def test_what_a_person_could_think_up_is_refused_and_keygen_named(text, why):
    with pytest.raises(BadRequest) as e:
        parse_secret(text)
    assert why in e.value.message
    assert "rostra keygen" in e.value.message
    assert not text or text not in e.value.message


def test_two_secrets_are_accepted_during_a_change_and_three_are_not():
    a, b, c = generate_secret(), generate_secret(), generate_secret()
    assert [s.value for s in parse_secrets([a, b])] == [parse_secret(a).value, parse_secret(b).value]
    assert parse_secrets([a, a]) == (parse_secret(a),)
    assert parse_secrets("") == parse_secrets(None) == ()
    with pytest.raises(BadRequest):
        parse_secrets([a, b, c])


def test_a_secret_does_not_print():
    assert f"{FIXED} {FIXED!r} {[FIXED]}" == "*** *** [***]"


def test_the_enrolment_ca_is_byte_identical_on_every_holder():
    """Golden: a change of these bytes would part a cluster whose nodes run different versions."""
    from cryptography.hazmat.primitives.serialization import Encoding

    der = enrolment_authority(FIXED)[0].public_bytes(Encoding.DER)
    assert der == enrolment_authority(Secret(FIXED.value))[0].public_bytes(Encoding.DER)
    assert hashlib.sha256(der).hexdigest() == "934a19fcc87b4a30f5b92012627d6c4f10a8de3525b6169909acb107f2bb25a0"


def test_identity_is_imported_without_cryptography():
    code = (
        "import sys; from rostra.runtime.secret import generate_secret; generate_secret();"
        "sys.exit(any(m.startswith('cryptography') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- without a secret ------------------------------------------------------------------------------------------------


def test_without_a_secret_processes_of_one_user_on_loopback_share_a_random_key(tmp_path):
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    first = resolve_secrets(None, ["127.0.0.1", "[::1]:8301", "localhost"], environ=env)
    assert first == resolve_secrets([], ["127.0.0.9"], environ=env)
    path = tmp_path / "state" / "rostra" / "local.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["local.key"]


@pytest.mark.parametrize("address", ["0.0.0.0", "10.1.2.3:8301", "::", "db.example.com", "127.evil.example"])
def test_without_a_secret_an_address_that_others_reach_is_refused(address, tmp_path):
    with pytest.raises(BadRequest, match="rostra keygen") as e:
        resolve_secrets(None, ["127.0.0.1", address], local_key=tmp_path / "k")
    assert address in e.value.message
    assert "encrypt" in e.value.message
    assert not (tmp_path / "k").exists()


def test_the_local_key_is_the_same_for_all_that_start_at_once(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(local_secret(tmp_path / "k"))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_local_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "k"
    local_secret(path)
    path.chmod(0o640)
    with pytest.raises(BadRequest, match="0600"):
        local_secret(path)


def test_a_local_key_that_is_a_link_is_refused(tmp_path):
    local_secret(tmp_path / "real")
    (tmp_path / "k").symlink_to(tmp_path / "real")
    with pytest.raises(BadRequest):
        local_secret(tmp_path / "k")


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/rostra/local.key"),
        ({"HOME": "/h"}, "/h/.local/state/rostra/local.key"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/rostra/local.key"),
    ],
)
def test_the_local_key_lies_in_the_users_state_directory(environ, path):
    assert str(local_secret_path(environ)) == path


# -- the data directory ----------------------------------------------------------------------------------------------


def test_a_data_directory_has_one_holder_and_names_it(tmp_path):
    with DataDirectory.lock(tmp_path / "a" / "data"):
        with pytest.raises(Conflict, match=f"is in use by process {os.getpid()}"):
            DataDirectory.lock(tmp_path / "a" / "data")
        DataDirectory.lock(tmp_path / "a" / "data", "agent.lock").release()
    DataDirectory.lock(tmp_path / "a" / "data").release()
    assert (tmp_path / "a" / "data").stat().st_mode & 0o777 == 0o700


def test_the_lock_ends_with_the_process(tmp_path):
    code = (
        "import sys, os; from rostra.runtime.data_directory import DataDirectory;"
        "d = DataDirectory.lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Conflict, match=f"process {child.pid}"):
            DataDirectory.lock(tmp_path)
        child.kill()
    DataDirectory.lock(tmp_path).release()


def test_a_directory_of_a_newer_version_is_refused_and_not_touched(tmp_path):
    (tmp_path / "format").write_text('{"format": 99}')
    with pytest.raises(Conflict, match="format 99 of a newer Rostra"):
        DataDirectory.lock(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["format"]


def test_a_damaged_format_file_is_refused(tmp_path):
    (tmp_path / "format").write_text("{}")
    with pytest.raises(UnusableData, match="damaged; restore it, or write"):
        DataDirectory.lock(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadRequest, match="is not a directory"):
            DataDirectory.lock(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_unwritable_directory_is_refused_with_the_user_in_the_message(tmp_path):
    code = (
        "import os, sys\n"
        "from rostra.runtime.data_directory import DataDirectory\n"
        "from rostra.wire.errors import BadRequest\n"
        "os.setuid(65534)\n"
        "try: DataDirectory.lock('/etc')\n"
        "except BadRequest as e: sys.exit('not writable by user 65534' not in e.message)\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- the node --------------------------------------------------------------------------------------------------------


def test_a_node_makes_its_key_and_id_once_and_keeps_them(tmp_path):
    first = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    again = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    assert str(uuid.UUID(first.node_id)) == first.node_id == again.node_id
    assert first.key_hash == again.key_hash
    assert len(first.key_hash) == 64
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "tls").iterdir()}
    assert set(modes) == {"node.key", "node.pem", "anchors.pem"}
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700


def test_the_enrolment_certificate_names_the_node(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    certificate = x509.load_pem_x509_certificate(node.cert_path.read_bytes())
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.UniformResourceIdentifier) == [f"rostra://node/{node.node_id}"]
    assert certificate.subject.rfc4514_string() == "CN=web-1"
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {u._name for u in usages} == {"serverAuth", "clientAuth"}
    run = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", node.anchors_path, node.cert_path], capture_output=True
    )
    assert run.returncode == 0, run.stderr


def test_the_certificate_is_issued_again_when_name_or_secret_changes_and_only_then(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    before = node.cert_path.read_bytes()
    inode = node.cert_path.stat().st_ino
    assert NodeIdentity.open(tmp_path, "web-1", [FIXED]).cert_path.stat().st_ino == inode
    renamed = NodeIdentity.open(tmp_path, "web-2", [FIXED])
    assert renamed.cert_path.read_bytes() != before
    other = NodeIdentity.open(tmp_path, "web-2", [Secret(os.urandom(32)), FIXED])
    assert len(split_pem(other.anchors_pem)) == 2
    assert other.key_hash == node.key_hash


def test_a_configured_node_id_is_kept(tmp_path):
    wanted = str(uuid.uuid4())
    assert NodeIdentity.open(tmp_path, "web-1", [FIXED], node_id=wanted.upper()).node_id == wanted
    assert NodeIdentity.open(tmp_path, "web-1", [FIXED]).node_id == wanted
    with pytest.raises(BadRequest, match="not a UUID"):
        NodeIdentity.open(tmp_path, "web-1", [FIXED], node_id="seven")


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b", "é"])
def test_a_bad_node_name_is_refused(tmp_path, name):
    with pytest.raises(BadRequest):
        NodeIdentity.open(tmp_path, name, [FIXED])


def test_a_key_that_others_could_read_is_refused(tmp_path):
    NodeIdentity.open(tmp_path, "web-1", [FIXED]).key_path.chmod(0o644)
    with pytest.raises(BadRequest, match="0644"):
        NodeIdentity.open(tmp_path, "web-1", [FIXED])


def test_agent_and_core_that_open_a_new_directory_at_once_get_the_same_identity(tmp_path):
    code = (
        "import sys; from rostra.runtime.identity import *;"
        "n = NodeIdentity.open(sys.argv[1], 'n', [Secret(bytes.fromhex(sys.argv[2]))]); print(n.node_id, n.key_hash)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), FIXED.value.hex()]
    children = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({c.communicate()[0] for c in children}) == 1


def test_without_secret_and_without_a_certificate_of_the_cluster_it_does_not_open(tmp_path):
    with pytest.raises(BadRequest, match="encrypt"):
        NodeIdentity.open(tmp_path, "web-1")
    with pytest.raises(BadRequest, match="keygen"):
        NodeIdentity.open(tmp_path, "web-1", bind="0.0.0.0")


def test_an_installed_certificate_is_presented_also_after_a_restart(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    version, anchors = node.version, node.anchor_hashes
    chain, cluster_ca = cluster_certificate(node)
    node.install_certificate(chain, cluster_ca)
    assert node.version > version
    assert node.is_enrolled
    assert set(anchors) < set(node.anchor_hashes)
    again = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    assert again.is_enrolled
    assert again.cert_path.read_text().startswith(chain)


def test_an_enrolling_node_that_does_not_know_the_cluster_ca_can_verify_the_chain(tmp_path):
    node = NodeIdentity.open(tmp_path / "a", "web-1", [FIXED])
    node.install_certificate(*cluster_certificate(node))
    new = NodeIdentity.open(tmp_path / "b", "web-2", [FIXED])
    argv: list[str | Path] = ["openssl", "verify", "-CAfile", new.anchors_path, "-untrusted"]
    run = subprocess.run([*argv, node.cert_path, node.cert_path], capture_output=True)
    assert run.returncode == 0, run.stderr


def test_dropping_the_enrolment_anchor_leaves_only_the_cluster_ca(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    chain, cluster_ca = cluster_certificate(node)
    node.install_certificate(chain, cluster_ca, trust_enrolment=False)
    assert node.anchors_pem == cluster_ca
    assert split_pem(node.cert_path.read_text()) == split_pem(chain)
    assert NodeIdentity.open(tmp_path, "web-1").anchors_pem == cluster_ca


def test_certificates_that_are_not_for_this_node_are_refused(tmp_path):
    node = NodeIdentity.open(tmp_path / "a", "web-1", [FIXED])
    other = NodeIdentity.open(tmp_path / "b", "web-1", [FIXED])
    before = node.cert_path.read_bytes()
    for make, why in [
        (lambda: cluster_certificate(node, key=other.cert_path), "another key"),
        (lambda: cluster_certificate(node, node_id=other.node_id), "another node id"),
        (lambda: cluster_certificate(node, name="db-1"), "not for the node name"),
        (lambda: cluster_certificate(node, ago_s=7200, ttl_s=60), "expired"),
        (lambda: (cluster_certificate(node)[0], cluster_certificate(node)[1]), "not issued by"),
        (lambda: ("nonsense", cluster_certificate(node)[1]), "cannot be read"),
    ]:
        with pytest.raises(BadRequest, match=why):
            node.install_certificate(*make())
    assert node.cert_path.read_bytes() == before
    assert not (tmp_path / "a" / "tls" / "issued.pem").exists()


def test_a_certificate_is_due_after_two_thirds_of_its_life(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    assert (node.is_enrolled, node.renew_at) == (False, 0.0)
    node.install_certificate(*cluster_certificate(node, ttl_s=3600))
    assert node.is_enrolled
    assert node.renew_at == pytest.approx(time.time() + 3600 * 2 / 3, abs=60)


def test_a_certificate_that_is_not_valid_yet_is_not_installed(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    with pytest.raises(BadRequest, match="compare the clocks"):
        node.install_certificate(*cluster_certificate(node, ago_s=-600))
    assert not node.is_enrolled


def test_the_other_process_of_a_node_takes_over_what_the_first_installed(tmp_path):
    core, agent = (NodeIdentity.open(tmp_path, "web-1", [FIXED]) for _ in range(2))
    chain, cluster_ca = cluster_certificate(core)
    core.install_certificate(chain, cluster_ca)
    version = agent.version
    agent.reload()
    assert agent.is_enrolled
    assert agent.anchors_pem == core.anchors_pem
    assert agent.version == version + 1
    agent.reload()
    assert agent.version == version + 1


def test_an_expired_certificate_of_the_cluster_falls_back_to_enrolment(tmp_path):
    node = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    chain, cluster_ca = cluster_certificate(node, ago_s=7200, ttl_s=60)
    (tmp_path / "tls" / "issued.pem").write_text(chain)
    (tmp_path / "tls" / "trust.json").write_text(
        json.dumps({"format": 1, "anchors_pem": [cluster_ca], "enrolment": True})
    )
    again = NodeIdentity.open(tmp_path, "web-1", [FIXED])
    assert not again.is_enrolled
    assert len(split_pem(again.anchors_pem)) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_durably(path, b"old")

    def broken(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("part", ["tls/node.key", "server", "tls", "node-id"])
def test_what_another_user_made_in_a_data_directory_is_named_with_its_mending(part):
    me = 65534
    with tempfile.TemporaryDirectory() as name:  # pytest's are closed to others
        root = Path(name)
        (root / "server").mkdir()
        (root / "tls").mkdir()
        for file in ("format", "node-id", "agent.lock", "tls/node.key"):
            (root / file).write_bytes(b'{"format": 1}' if file == "format" else b"x")
        for path in (root, *root.rglob("*")):
            os.chown(path, me, me)
        os.chown(root / part, 0, 0)
        os.seteuid(me)
        try:
            with pytest.raises(BadRequest) as refusal:
                DataDirectory.lock(root, "agent.lock")
        finally:
            os.seteuid(0)
    assert refusal.value.message == (
        f"data directory {root}: {root / part} belongs to user 0, not to {me} who starts this:"
        f" `chown -R {me} {root}`, or start it as that user"
    )


def test_a_lost_node_id_is_taken_from_the_certificate_of_the_same_key(tmp_path, capsys):
    secret = Secret(os.urandom(32))
    first = NodeIdentity.open(tmp_path, "c1", [secret])
    ca_cert, ca_key = create_cluster_ca(int(time.time() * 1000))
    issued = sign_node(
        ca_cert,
        ca_key,
        first.public_key,
        node_id=first.node_id,
        name="c1",
        role="client",
        now_ms=int(time.time() * 1000),
        serial=7,
    )
    first.install_certificate(issued, ca_cert)
    (tmp_path / "node-id").unlink()
    again = NodeIdentity.open(tmp_path, "c1", [secret])
    assert again.node_id == first.node_id
    assert again.is_enrolled
    assert "the file node-id was lost: taken from this node's certificate" in capsys.readouterr().err
    (tmp_path / "node-id").unlink()
    (tmp_path / "tls" / "node.key").unlink()  # another key: the certificate says nothing of it
    assert NodeIdentity.open(tmp_path, "c1", [secret]).node_id != first.node_id
