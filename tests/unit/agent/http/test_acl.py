from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "list"),
        ("PUT", "bootstrap"),
        ("GET", "tokens"),
        ("GET", "token/self"),
        ("PUT", "token/4d0c/clone"),
        ("GET", "role/name/x"),
        ("POST", "login"),
        ("PUT", "policy"),
        ("DELETE", "auth-method/x"),
    ],
)
async def test_every_acl_route_says_that_acls_are_off(api, method, path):
    answer = await api.call(method, f"/v1/acl/{path}")
    assert (answer.status, answer.text) == (401, "ACL support disabled")


async def test_what_consul_has_not_is_not_there_either(api):
    assert (await api.get("/v1/acl/nonsense")).status == 404
    assert (await api.call("GET", "/v1/acl/bootstrap")).status == 405
