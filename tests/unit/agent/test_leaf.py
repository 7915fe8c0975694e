from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from rostra.agent.leaf import Leaf, Leaves, renewal_at_ms
from rostra.agent.results import Results
from rostra.runtime.wall import Wall
from rostra.wire.errors import BadRequest, Denied
from tests.support.local_servers import TRUST_DOMAIN, LocalServers
from tests.support.waiting import eventually


@asynccontextmanager
async def leaves(servers: LocalServers, **options: Any) -> AsyncIterator[Leaves]:
    results = Results(servers)
    held = Leaves(servers, results, datacenter="dc1", **options)
    try:
        yield held
    finally:
        await held.stop()
        await results.close()


def test_a_leaf_is_renewed_between_60_and_90_percent_of_its_life() -> None:
    leaf = Leaf("web", "", "", "", "", 1000, 2000, "", 1)
    assert renewal_at_ms(leaf, 0.0) == 1600
    assert renewal_at_ms(leaf, 0.5) == 1750
    assert renewal_at_ms(leaf, 0.999999) == 1899


async def test_a_leaf_has_the_key_that_was_signed_and_the_identity_of_its_service() -> None:
    async with leaves(LocalServers()) as held:
        leaf = await held.get("web")
    certificate = x509.load_pem_x509_certificate(leaf.cert_pem.encode())
    key = load_pem_private_key(leaf.key_pem.encode(), None)
    assert certificate.public_key() == key.public_key()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert leaf.uri == f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [leaf.uri]


async def test_all_who_ask_share_one_leaf_and_another_token_gets_its_own() -> None:
    servers = LocalServers()
    async with leaves(servers) as held:
        first = await asyncio.gather(*(held.get("web") for _ in range(20)))
        assert set(first) == {await held.get("web")}
        assert servers.signed == 1
        assert await held.get("web", token="other") != first[0]
        assert servers.signed == 2


async def test_a_leaf_is_renewed_while_somebody_follows_it() -> None:
    servers = LocalServers()
    set_by_s = 0.0
    wall = Wall(lambda: time.time() + set_by_s, look_s=0.01)
    async with leaves(servers, wall=wall, random=lambda: 0.0) as held:
        changes: list[None] = []
        stop = held.follow("web", lambda: changes.append(None))
        first = await held.get("web")
        set_by_s = (first.valid_before_ms - first.valid_after_ms) / 1000  # as after a suspension of days
        second = await held.wait("web", first.index, 5.0)
        assert second.index > first.index
        assert second.serial != first.serial
        assert len(changes) == 2
        stop()


async def test_a_leaf_that_begins_after_a_clock_that_was_set_back_is_renewed_once() -> None:
    servers = LocalServers()
    set_by_s = 0.0
    wall = Wall(lambda: time.time() + set_by_s, look_s=0.01)
    async with leaves(servers, wall=wall) as held:
        held.follow("web", lambda: None)
        first = await held.get("web")
        set_by_s = -86400.0
        second = await held.wait("web", first.index, 5.0)
        # The servers' clocks were not set: theirs begins later than now, too, and it is not asked for again and again.
        assert await held.wait("web", second.index, 0.1) is second
        assert servers.signed == 2


async def test_a_leaf_that_is_past_its_renewal_when_it_comes_is_not_asked_for_without_pause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers = LocalServers()
    async with leaves(servers, wall=Wall(lambda: time.time() + 30 * 86400)) as held:
        held.follow("web", lambda: None)
        first = await held.get("web")
        assert await held.wait("web", first.index, 0.2) is first
        assert servers.signed == 1
    assert "the clocks of this host and of the servers differ" in capsys.readouterr().err


async def test_a_defect_in_a_renewal_does_not_end_the_renewals() -> None:
    servers = LocalServers()
    set_by_s = 0.0
    wall = Wall(lambda: time.time() + set_by_s, look_s=0.01)
    async with leaves(servers, wall=wall) as held:
        held.follow("web", lambda: None)
        first = await held.get("web")
        servers.refuse["connect.sign"] = RuntimeError("can't start new thread")
        asked = servers.acts
        set_by_s = 0.95 * (first.valid_before_ms - first.valid_after_ms) / 1000
        await eventually(lambda: servers.acts > asked)
        servers.refuse.clear()
        set_by_s = 0.0
        assert (await held.wait("web", first.index, 5.0)).index > first.index


async def test_a_new_root_replaces_the_leaf_soon() -> None:
    servers = LocalServers()
    async with leaves(servers, root_change_spread_s=0.05) as held:
        held.follow("web", lambda: None)
        first = await held.get("web")
        servers.rotate_root()
        second = await held.wait("web", first.index, 5.0)
        assert second.root_id != first.root_id
        assert second.index > first.index


async def test_waiting_for_a_newer_leaf_ends_with_the_present_one() -> None:
    async with leaves(LocalServers()) as held:
        first = await held.get("web")
        assert await held.wait("web", first.index, 0.02) is first


async def test_a_refused_leaf_is_told_and_asked_for_again_next_time() -> None:
    servers = LocalServers()
    servers.refuse["connect.sign"] = Denied("service:write on web is needed")
    async with leaves(servers) as held:
        with pytest.raises(Denied, match="service:write"):
            await held.get("web")
        servers.refuse.clear()
        assert (await held.get("web")).service == "web"


async def test_a_failed_renewal_keeps_the_leaf_and_is_tried_again() -> None:
    servers = LocalServers()
    async with leaves(servers, root_change_spread_s=0.0) as held:
        held.follow("web", lambda: None)
        first = await held.get("web")
        servers.refuse["connect.sign"] = Denied("not now")
        servers.rotate_root()
        await eventually(lambda: held._root_id != first.root_id)
        assert await held.get("web") is first
        servers.refuse.clear()
        assert (await held.wait("web", first.index, 5.0)).root_id != first.root_id


async def test_a_name_that_no_certificate_can_have_is_refused() -> None:
    async with leaves(LocalServers()) as held:
        with pytest.raises(BadRequest, match="cannot have a leaf certificate"):
            await held.get("a/b")
