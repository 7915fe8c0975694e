"""What the configuration says about whole requests: paths that are blocked, who may write, headers for every answer.

`http_config.block_endpoints`, `allow_write_http_from` and `response_headers` of Consul's configuration. Asked by
`app.py` before a handler runs; knows no resource.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from rostra.agent.http.errors import HttpError

READS = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """`writes_from` empty: from everywhere. A unix socket's mode says who may use it, so it is never refused here."""

    def __init__(
        self,
        block: Sequence[str] = (),
        writes_from: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._block = tuple(block)
        self._networks = tuple(ipaddress.ip_network(n, strict=False) for n in writes_from)
        self.headers = dict(headers or {})

    def check(self, method: str, path: str, remote: str) -> None:
        """Raises HttpError 403 with the setting that refuses the request."""
        if self._block and path.startswith(self._block):
            raise HttpError(403, "Endpoint is blocked by agent configuration (http_config.block_endpoints)")
        if self._networks and method not in READS and remote:
            address = ipaddress.ip_address(remote)
            address = getattr(address, "ipv4_mapped", None) or address
            if not any(address in network for network in self._networks):
                raise HttpError(403, f"Writes from {remote} are not allowed (http_config.allow_write_http_from)")
