from __future__ import annotations


async def test_the_leader_and_the_peers_are_asked_of_the_servers(api):
    assert (await api.get("/v1/status/leader")).json == "127.0.0.1:8300"
    assert (await api.get("/v1/status/peers")).json == ["127.0.0.1:8300"]


async def test_no_leader_is_an_empty_string(api):
    api.servers.leader = ""
    assert (await api.get("/v1/status/leader")).json == ""


async def test_the_common_parameters_are_checked_here_too(api):
    assert (await api.get("/v1/status/leader?stale&consistent")).status == 400
    assert (await api.get("/v1/status/peers?dc=nope")).text == "No path to datacenter"
