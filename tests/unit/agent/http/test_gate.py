"""What the configuration forbids for whole requests."""

from __future__ import annotations

import pytest

from rostra.agent.http.errors import HttpError
from rostra.agent.http.gate import Gate


def test_a_blocked_path_is_refused_with_the_setting_that_does_it() -> None:
    gate = Gate(block=("/v1/agent/metrics", "/v1/kv/secret/"))
    gate.check("GET", "/v1/kv/public", "10.0.0.1")
    for path in ("/v1/agent/metrics", "/v1/kv/secret/x"):
        with pytest.raises(HttpError, match="block_endpoints") as refused:
            gate.check("GET", path, "10.0.0.1")
        assert refused.value.status == 403


@pytest.mark.parametrize("remote", ["127.0.0.1", "10.3.2.1", "::ffff:10.0.0.9", ""])
def test_writes_from_named_networks_and_from_unix_sockets_pass(remote: str) -> None:
    assert Gate(writes_from=("127.0.0.0/8", "10.0.0.0/8")).check("PUT", "/v1/kv/a", remote) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_writes_from_elsewhere_are_refused_and_reads_are_not(method: str) -> None:
    gate = Gate(writes_from=("127.0.0.0/8",))
    gate.check("GET", "/v1/kv/a", "192.0.2.1")
    with pytest.raises(HttpError, match=r"Writes from 192\.0\.2\.1 are not allowed"):
        gate.check(method, "/v1/kv/a", "192.0.2.1")
