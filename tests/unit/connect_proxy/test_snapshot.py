"""The snapshot: a document in, a checked value out, and back."""

from __future__ import annotations

import json

import pytest

from rostra.connect_proxy.snapshot import Address, ProxySnapshot, SnapshotError


def document() -> dict:
    return {
        "ProxyID": "web-sidecar-proxy",
        "Service": "web",
        "TrustDomain": "a.consul",
        "Datacenter": "dc1",
        "Public": {"Address": "10.0.0.1", "Port": 21000},
        "Local": {"Address": "127.0.0.1", "Port": 8080},
        "Leaf": {"CertPEM": "cert", "KeyPEM": "key", "SerialNumber": "01", "ValidAfterMs": 1, "ValidBeforeMs": 2},
        "Roots": ["root"],
        "DefaultAllow": True,
        "Intentions": [{"Source": "api", "Destination": "web", "Action": "deny", "Precedence": 9, "ID": "i1"}],
        "Upstreams": [
            {
                "Name": "db",
                "BindAddress": "127.0.0.1",
                "BindPort": 9001,
                "Datacenter": "dc1",
                "ConnectTimeoutMs": 1000,
                "Identity": "spiffe://a.consul/ns/default/dc/dc1/svc/db",
                "Endpoints": [{"Address": "10.0.0.2", "Port": 21000, "Weight": 3}],
            }
        ],
    }


def test_a_document_survives_the_way_in_and_out():
    snapshot = ProxySnapshot.from_json(json.dumps(document()))
    assert snapshot.public == Address("10.0.0.1", 21000)
    assert json.loads(snapshot.to_json()) == document()
    assert ProxySnapshot.from_json(snapshot.to_json()) == snapshot


def test_keys_of_newer_agents_are_ignored_and_optional_ones_may_be_missing():
    small = {
        k: v for k, v in document().items() if k not in ("Public", "Local", "Intentions", "Upstreams", "DefaultAllow")
    }
    snapshot = ProxySnapshot.from_json({**small, "Novelty": {"a": 1}})
    assert snapshot.public is None
    assert snapshot.default_allow is False


def test_an_intention_of_an_agent_of_version_0_1_names_no_destination():
    old = document()
    del old["Intentions"][0]["Destination"]
    (rule,) = ProxySnapshot.from_json(old).intentions
    assert (rule.source, rule.destination, rule.precedence) == ("api", "", 9)


def test_the_key_is_not_printed():
    loud = document()
    loud["Leaf"]["KeyPEM"] = "very-secret"
    assert "very-secret" not in repr(ProxySnapshot.from_json(loud))


def spoiled(path: str, value: object) -> dict:
    spoilt = document()
    *parents, last = path.split(".")
    place = spoilt
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    return spoilt


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("ProxyID", "", "ProxyID"),
        ("ProxyID", None, "ProxyID is missing"),
        ("Service", "a" * 300, "limit is 255"),
        ("Service", "a\nb", "unprintable"),
        ("Public.Port", 70000, "Port is 70000"),
        ("Public.Port", "21000", "Port must be of type int"),
        ("Public.Port", True, "Port must be of type int"),
        ("Roots", [], "no peer could be trusted"),
        ("Roots", [1], "Roots must hold values of type str"),
        ("Roots", ["x"] * 65, "65 entries"),
        ("Leaf.KeyPEM", "x" * 70000, "70000 characters"),
        ("DefaultAllow", "yes", "DefaultAllow must be of type bool"),
        ("Intentions.0.Action", "perhaps", "allow"),
        ("Intentions.0.Precedence", 12, "0 to 9"),
        ("Upstreams.0.Identity", "https://x", "spiffe://"),
        ("Upstreams.0.Endpoints", [{"Address": "a", "Port": 0}], "1 to 65535"),
        ("Upstreams.0.BindPort", 21000, "both bind"),
    ],
)
def test_a_wrong_field_is_named(path, value, told):
    bad = spoiled(path, value)
    if told == "both bind":
        bad["Public"]["Address"] = "127.0.0.1"
    with pytest.raises(SnapshotError, match=told):
        ProxySnapshot.from_json(json.dumps(bad))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"[" * 100_000, b" " * (9 << 20)])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(SnapshotError):
        ProxySnapshot.from_json(text)
