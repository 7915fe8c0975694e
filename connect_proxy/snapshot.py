"""ProxySnapshot: everything that one proxy needs to know, as one immutable value that checks itself.

The agent builds it from the catalog, the intentions and the CA and serves it as JSON; the proxy (and Envoy's resources)
are derived from it and from nothing else. A snapshot that exists is consistent and bounded: whoever holds one need not
check again. Names of the JSON keys are a contract with agents of other versions; unknown keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

DOCUMENT_BYTES_MAX: Final = 8 << 20
NAME_CHARS_MAX: Final = 255
URI_CHARS_MAX: Final = 2048
PEM_CHARS_MAX: Final = 64 << 10
ROOTS_MAX: Final = 64
INTENTIONS_MAX: Final = 16384
UPSTREAMS_MAX: Final = 256
ENDPOINTS_MAX: Final = 4096
CONNECT_TIMEOUT_MS_MAX: Final = 600_000


class SnapshotError(ValueError):
    """The snapshot cannot be used; the message names the field and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address. Port 0 means 'any free port' where it is bound, and 'there is none' where it is dialled."""

    host: str
    port: int

    def __post_init__(self) -> None:
        _check_name("Address", self.host)
        _check_int("Port", self.port, 0, 65535)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """The certificate that proves who this proxy speaks for. Its key is never printed."""

    cert_pem: str
    key_pem: str = field(repr=False)
    serial_number: str = ""
    valid_after_ms: int = 0
    valid_before_ms: int = 0

    def __post_init__(self) -> None:
        _check_text("Leaf.CertPEM", self.cert_pem, PEM_CHARS_MAX)
        _check_text("Leaf.KeyPEM", self.key_pem, PEM_CHARS_MAX)
        _check_text("Leaf.SerialNumber", self.serial_number, NAME_CHARS_MAX, empty_ok=True)
        _check_int("Leaf.ValidAfterMs", self.valid_after_ms, 0, 1 << 53)
        _check_int("Leaf.ValidBeforeMs", self.valid_before_ms, 0, 1 << 53)


@dataclass(frozen=True, slots=True)
class Rule:
    """One intention whose destination is this service or '*'; acl/intention.py says which of those that fit decides.

    `destination` is "" where an agent of version 0.1 says nothing of it.
    """

    source: str
    action: str
    precedence: int = 0
    id: str = ""
    destination: str = ""

    def __post_init__(self) -> None:
        _check_name("Intentions.Source", self.source)
        _check_text("Intentions.Destination", self.destination, NAME_CHARS_MAX, empty_ok=True)
        if self.action not in ("allow", "deny"):
            raise SnapshotError(f'Intentions.Action must be "allow" or "deny", not {self.action!r}')
        _check_int("Intentions.Precedence", self.precedence, 0, 9)
        _check_text("Intentions.ID", self.id, NAME_CHARS_MAX, empty_ok=True)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Another proxy's public listener. Weight 0 is used only when every other endpoint is out."""

    address: str
    port: int
    weight: int = 1

    def __post_init__(self) -> None:
        _check_name("Endpoints.Address", self.address)
        _check_int("Endpoints.Port", self.port, 1, 65535)
        _check_int("Endpoints.Weight", self.weight, 0, 65535)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A service that the application reaches through a listener of this proxy."""

    name: str
    bind: Address
    datacenter: str
    identity: str
    endpoints: tuple[Endpoint, ...] = ()
    connect_timeout_ms: int = 5000

    def __post_init__(self) -> None:
        _check_name("Upstreams.Name", self.name)
        _check_text("Upstreams.Datacenter", self.datacenter, NAME_CHARS_MAX, empty_ok=True)
        _check_text("Upstreams.Identity", self.identity, URI_CHARS_MAX)
        if not self.identity.startswith("spiffe://"):
            raise SnapshotError(f"Upstreams.Identity of {self.name!r} must begin with spiffe://")
        _check_count(f"Upstreams.Endpoints of {self.name!r}", self.endpoints, ENDPOINTS_MAX)
        _check_int("Upstreams.ConnectTimeoutMs", self.connect_timeout_ms, 1, CONNECT_TIMEOUT_MS_MAX)

    @property
    def key(self) -> tuple[str, str, Address]:
        """What stays the same while the upstream's endpoints come and go."""
        return (self.name, self.datacenter, self.bind)


@dataclass(frozen=True, slots=True)
class ProxySnapshot:
    """All that a proxy needs. `public` is None for a proxy that only reaches out; `local` None: no application."""

    proxy_id: str
    service: str
    trust_domain: str
    datacenter: str
    leaf: Leaf
    roots: tuple[str, ...]
    public: Address | None = None
    local: Address | None = None
    default_allow: bool = False
    intentions: tuple[Rule, ...] = ()
    upstreams: tuple[Upstream, ...] = ()

    def __post_init__(self) -> None:
        _check_name("ProxyID", self.proxy_id)
        _check_name("Service", self.service)
        _check_name("TrustDomain", self.trust_domain)
        _check_text("Datacenter", self.datacenter, NAME_CHARS_MAX, empty_ok=True)
        _check_count("Roots", self.roots, ROOTS_MAX)
        if not self.roots:
            raise SnapshotError("Roots is empty: no peer could be trusted")
        for pem in self.roots:
            _check_text("Roots", pem, PEM_CHARS_MAX)
        if type(self.default_allow) is not bool:
            raise SnapshotError("DefaultAllow must be true or false")
        _check_count("Intentions", self.intentions, INTENTIONS_MAX)
        _check_count("Upstreams", self.upstreams, UPSTREAMS_MAX)
        taken: dict[Address, str] = {}
        if self.public and self.public.port:
            taken[self.public] = "the public listener"
        for upstream in self.upstreams:
            other = taken.get(upstream.bind)
            if other and upstream.bind.port:
                raise SnapshotError(f"upstream {upstream.name!r} and {other} both bind {upstream.bind}")
            taken[upstream.bind] = f"upstream {upstream.name!r}"

    @classmethod
    def from_json(cls, document: bytes | str | dict[str, Any]) -> ProxySnapshot:
        """The checked snapshot in `document`; SnapshotError says which field is wrong."""
        if isinstance(document, dict):
            return _snapshot(document)
        if len(document) > DOCUMENT_BYTES_MAX:
            raise SnapshotError(f"the snapshot is larger than {DOCUMENT_BYTES_MAX} bytes")
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise SnapshotError("not a JSON object")
        return _snapshot(value)

    def to_json(self) -> bytes:
        """The document that `from_json` reads. It holds the private key."""
        return json.dumps(self.to_dict(), separators=(",", ":")).encode()

    def to_dict(self) -> dict[str, Any]:
        return {
            "ProxyID": self.proxy_id,
            "Service": self.service,
            "TrustDomain": self.trust_domain,
            "Datacenter": self.datacenter,
            "Public": _address_dict(self.public),
            "Local": _address_dict(self.local),
            "Leaf": {
                "CertPEM": self.leaf.cert_pem,
                "KeyPEM": self.leaf.key_pem,
                "SerialNumber": self.leaf.serial_number,
                "ValidAfterMs": self.leaf.valid_after_ms,
                "ValidBeforeMs": self.leaf.valid_before_ms,
            },
            "Roots": list(self.roots),
            "DefaultAllow": self.default_allow,
            "Intentions": [
                {
                    "Source": r.source,
                    "Destination": r.destination,
                    "Action": r.action,
                    "Precedence": r.precedence,
                    "ID": r.id,
                }
                for r in self.intentions
            ],
            "Upstreams": [
                {
                    "Name": u.name,
                    "BindAddress": u.bind.host,
                    "BindPort": u.bind.port,
                    "Datacenter": u.datacenter,
                    "ConnectTimeoutMs": u.connect_timeout_ms,
                    "Identity": u.identity,
                    "Endpoints": [{"Address": e.address, "Port": e.port, "Weight": e.weight} for e in u.endpoints],
                }
                for u in self.upstreams
            ],
        }


def _snapshot(value: dict[str, Any]) -> ProxySnapshot:
    leaf = _get(value, "Leaf", dict)
    return ProxySnapshot(
        proxy_id=_get(value, "ProxyID", str),
        service=_get(value, "Service", str),
        trust_domain=_get(value, "TrustDomain", str),
        datacenter=_get(value, "Datacenter", str, ""),
        leaf=Leaf(
            cert_pem=_get(leaf, "CertPEM", str),
            key_pem=_get(leaf, "KeyPEM", str),
            serial_number=_get(leaf, "SerialNumber", str, ""),
            valid_after_ms=_get(leaf, "ValidAfterMs", int, 0),
            valid_before_ms=_get(leaf, "ValidBeforeMs", int, 0),
        ),
        roots=tuple(_each(value, "Roots", str, ROOTS_MAX)),
        public=_address(value, "Public"),
        local=_address(value, "Local"),
        default_allow=_get(value, "DefaultAllow", bool, False),
        intentions=tuple(_rule(item) for item in _each(value, "Intentions", dict, INTENTIONS_MAX)),
        upstreams=tuple(_upstream(item) for item in _each(value, "Upstreams", dict, UPSTREAMS_MAX)),
    )


def _rule(item: dict[str, Any]) -> Rule:
    return Rule(
        source=_get(item, "Source", str),
        action=_get(item, "Action", str),
        precedence=_get(item, "Precedence", int, 0),
        id=_get(item, "ID", str, ""),
        destination=_get(item, "Destination", str, ""),
    )


def _upstream(item: dict[str, Any]) -> Upstream:
    return Upstream(
        name=_get(item, "Name", str),
        bind=Address(_get(item, "BindAddress", str, "") or "127.0.0.1", _get(item, "BindPort", int)),
        datacenter=_get(item, "Datacenter", str, ""),
        identity=_get(item, "Identity", str),
        endpoints=tuple(_endpoint(e) for e in _each(item, "Endpoints", dict, ENDPOINTS_MAX)),
        connect_timeout_ms=_get(item, "ConnectTimeoutMs", int, 0) or 5000,
    )


def _endpoint(item: dict[str, Any]) -> Endpoint:
    return Endpoint(
        address=_get(item, "Address", str), port=_get(item, "Port", int), weight=_get(item, "Weight", int, 1)
    )


def _address(value: dict[str, Any], key: str) -> Address | None:
    item = _get(value, key, dict, None)
    if not item:
        return None
    return Address(_get(item, "Address", str, "") or "127.0.0.1", _get(item, "Port", int))


def _address_dict(address: Address | None) -> dict[str, Any] | None:
    return {"Address": address.host, "Port": address.port} if address else None


_MISSING: Final = object()


def _get(value: dict[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    item = value.get(key)
    if item is None:
        if default is _MISSING:
            raise SnapshotError(f"{key} is missing")
        return default
    if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
        raise SnapshotError(f"{key} must be of type {kind.__name__}, not {type(item).__name__}")
    return item


def _each(value: dict[str, Any], key: str, kind: type, count_max: int) -> list[Any]:
    items: list[Any] = _get(value, key, list, [])
    _check_count(key, items, count_max)
    for item in items:
        if not isinstance(item, kind):
            raise SnapshotError(f"{key} must hold values of type {kind.__name__}, not {type(item).__name__}")
    return items


def _check_name(what: str, text: str) -> None:
    _check_text(what, text, NAME_CHARS_MAX)
    if not text.isprintable():
        raise SnapshotError(f"{what} holds unprintable characters")


def _check_text(what: str, text: str, chars_max: int, *, empty_ok: bool = False) -> None:
    _check_type(what, text, str)
    if not text and not empty_ok:
        raise SnapshotError(f"{what} is empty")
    if len(text) > chars_max:
        raise SnapshotError(f"{what} has {len(text)} characters; the limit is {chars_max}")


def _check_int(what: str, number: int, low: int, high: int) -> None:
    _check_type(what, number, int)
    if not low <= number <= high:
        raise SnapshotError(f"{what} is {number}; it must be {low} to {high}")


def _check_count(what: str, items: tuple[Any, ...] | list[Any], count_max: int) -> None:
    if len(items) > count_max:
        raise SnapshotError(f"{what} has {len(items)} entries; the limit is {count_max}")


def _check_type(what: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise SnapshotError(f"{what} must be of type {kind.__name__}, not {type(value).__name__}")


#: What turns a host name of a snapshot into an address; `source` calls it, never the proxy's loop.
Resolve = Callable[[str], str]
