"""Where to go: the policy of an upstream's listener.

A connection of the application gets an endpoint from the balancer. An endpoint that cannot be reached, fails its
handshake or turns out to be someone else rests, and the next is tried, a few times. The peer is right only if its
verified certificate says the identity that the snapshot names for this upstream, in whatever case. Nothing here does
IO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rostra.connect_proxy.balance import Balancer, Target
from rostra.connect_proxy.session import Dial, Refusal
from rostra.connect_proxy.snapshot import Upstream
from rostra.connect_proxy.tls import PeerCertificate

ATTEMPTS_MAX: Final = 4


class Outbound:
    """One upstream with its balancer; it outlives snapshots as long as name, datacenter and listener stay."""

    __slots__ = ("balancer", "identity", "server_name", "upstream")

    def __init__(self, upstream: Upstream, trust_domain: str, random: Callable[[], float]) -> None:
        self.balancer = Balancer(upstream.endpoints, random)
        self.update(upstream, trust_domain)

    def update(self, upstream: Upstream, trust_domain: str) -> None:
        """Takes the upstream's new endpoints, identity and timeout; connections that are open stay."""
        self.upstream = upstream
        self.identity = _comparable(upstream.identity)
        self.server_name = _server_name(upstream, trust_domain)
        self.balancer.update(upstream.endpoints)


class OutboundPolicy:
    """`session.Policy` of one connection of the application. `failed_at(host, port, reason)` logs and counts."""

    __slots__ = ("_failed_at", "_now", "_tried", "outbound", "target_in_use")
    dials_first = True

    def __init__(
        self, outbound: Outbound, now: Callable[[], float], failed_at: Callable[[Outbound, str, int, str], None]
    ) -> None:
        self.outbound = outbound
        self._now = now
        self._failed_at = failed_at
        self._tried: list[Target] = []
        self.target_in_use: Target | None = None

    def admit(self, certificate: PeerCertificate) -> Refusal | None:
        return None if _comparable(certificate.uri) == self.outbound.identity else Refusal("wrong_identity")

    def target(self) -> Dial | None:
        if len(self._tried) >= ATTEMPTS_MAX:
            return None
        target = self.outbound.balancer.pick(self._now(), self._tried)
        if target is None:
            return None
        self._tried.append(target)
        self.target_in_use = target
        endpoint = target.endpoint
        return Dial(endpoint.address, endpoint.port, self.outbound.upstream.connect_timeout_ms / 1000)

    def failed(self, reason: str) -> None:
        target = self.target_in_use
        if target is None:
            return
        self.release()
        self.outbound.balancer.failed(target, self._now())
        self._failed_at(self.outbound, target.endpoint.address, target.endpoint.port, reason)

    def succeeded(self) -> None:
        if self.target_in_use is not None:
            self.outbound.balancer.succeeded(self.target_in_use)

    def release(self) -> None:
        """The connection to the endpoint is closed. Harmless when there is none."""
        if self.target_in_use is not None:
            self.outbound.balancer.released(self.target_in_use)
            self.target_in_use = None


def _comparable(uri: str) -> str:
    """SPIFFE compares the trust domain without regard to case; services of the catalog do not differ by case either."""
    scheme, _, rest = uri.partition("://")
    domain, slash, path = rest.partition("/")
    before, mark, service = path.rpartition("/svc/")
    return f"{scheme.lower()}://{domain.lower()}{slash}{before}{mark}{service.lower() if mark else service}"


def _server_name(upstream: Upstream, trust_domain: str) -> str:
    """The name that Consul's proxies put into SNI, so that a gateway or Envoy can route by it; "" if it cannot be."""
    name = f"{upstream.name}.default.{upstream.datacenter or 'dc1'}.internal.{trust_domain}".lower()
    labels = name.split(".")
    fits = len(name) <= 253 and all(0 < len(label) <= 63 for label in labels)
    return name if fits and name.isascii() and name.replace(".", "").replace("-", "").isalnum() else ""
