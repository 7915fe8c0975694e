"""Who proves to be a server is heard by one that does not know it; nobody else is."""

from __future__ import annotations

from typing import Any

import pytest

from rostra.server.introduction import introduce, introduced
from rostra.server.membership import Membership, ServerInfo
from rostra.wire.errors import BadRequest

KEY, CLUSTER = "the key of the CA", "c1"
LIST = Membership(CLUSTER, "dc1", tuple(ServerInfo(n, n, n, 8300, f"key-{n}", "dc1") for n in ("b", "c", "d")))


def heard(said: Any, key_hash: str = "key-d", *, me: str = "key-b", ca_key_pem: str = KEY, **more: str) -> Any:
    return introduced(said, key_hash, me=me, cluster_id=more.get("cluster_id", CLUSTER), ca_key_pem=ca_key_pem)


def test_a_server_that_shows_its_list_and_proves_itself_is_heard() -> None:
    assert heard(introduce(LIST, "key-d", KEY)) == LIST


def test_a_proof_is_of_no_use_to_another_key_or_cluster_and_none_without_the_key() -> None:
    said = introduce(LIST, "key-d", KEY)
    assert heard(said, "key-c") is None
    assert heard(said, cluster_id="c2") is None
    assert heard(introduce(LIST, "key-d", "a guess")) is None
    for proof in (None, 7, "", b"x", "é", "0" * 64):
        assert heard({**said, "proof": proof}) is None
    assert heard({"membership": said["membership"]}) is None


def test_a_list_without_either_of_the_two_tells_nothing() -> None:
    assert heard(introduce(LIST, "key-d", KEY), me="key-a") is None
    assert heard(introduce(LIST, "key-x", KEY), "key-x") is None


def test_a_list_that_is_none_is_refused() -> None:
    with pytest.raises(BadRequest):
        heard({**introduce(LIST, "key-d", KEY), "membership": 7})
