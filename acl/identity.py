"""SPIFFE identities: the names that stand in the mesh's certificates, parsed strictly and formatted in one way only.

    spiffe://<trust domain>/ns/<namespace>/dc/<datacenter>/svc/<service>
    spiffe://<trust domain>/agent/client/dc/<datacenter>/id/<node>
    spiffe://<trust domain>                                            the CA itself

A certificate is trusted for what `parse` returns, so a URI that could be read in two ways is no identity at all. It has
no query, fragment, user, port or dot segment, and only the percent-encoding that formatting gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

URI_BYTES_MAX = 2048
PART_CHARS_MAX = 253

_SCHEME = "spiffe://"
_TRUST_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,253}[a-z0-9])?")
#: What a URI's path may carry as it is; the same set that Consul's certificates leave unescaped.
_UNESCAPED = "$&+=:@~"


class BadIdentity(ValueError):
    """Not an identity of the mesh; the message says why."""


@dataclass(frozen=True, slots=True)
class ServiceIdentity:
    trust_domain: str
    datacenter: str
    service: str
    namespace: str = "default"

    @property
    def uri(self) -> str:
        return _uri(self.trust_domain, "ns", self.namespace, "dc", self.datacenter, "svc", self.service)


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    trust_domain: str
    datacenter: str
    node: str

    @property
    def uri(self) -> str:
        return _uri(self.trust_domain, "agent", "client", "dc", self.datacenter, "id", self.node)


@dataclass(frozen=True, slots=True)
class AuthorityIdentity:
    trust_domain: str

    @property
    def uri(self) -> str:
        return _uri(self.trust_domain)


Identity = ServiceIdentity | AgentIdentity | AuthorityIdentity


def parse(uri: str) -> Identity:
    """The identity that `uri` names. Raises BadIdentity."""
    if len(uri) > URI_BYTES_MAX:
        raise BadIdentity(f"longer than {URI_BYTES_MAX} bytes")
    if not uri.isascii() or not uri.startswith(_SCHEME):
        raise BadIdentity("not a spiffe:// URI")
    trust_domain, *segments = uri[len(_SCHEME) :].split("/")
    try:
        parts = [unquote(segment, errors="strict") for segment in segments]
    except UnicodeDecodeError:
        raise BadIdentity("percent-encoding is not UTF-8") from None
    identity: Identity
    match parts:
        case []:
            identity = AuthorityIdentity(trust_domain)
        case ["ns", namespace, "dc", datacenter, "svc", service]:
            identity = ServiceIdentity(trust_domain, datacenter, service, namespace)
        case ["agent", "client", "dc", datacenter, "id", node]:
            identity = AgentIdentity(trust_domain, datacenter, node)
        case _:
            raise BadIdentity("neither a service nor an agent of the mesh")
    # One spelling per identity: what formatting would not have written (?, #, user@, %2f, %77) was not written by a CA.
    if identity.uri != uri:
        raise BadIdentity("not in canonical form")
    return identity


def _uri(trust_domain: str, *parts: str) -> str:
    if not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise BadIdentity(f"bad trust domain {trust_domain[:64]!r}")
    for part in parts:
        if not part or part in (".", "..") or len(part) > PART_CHARS_MAX:
            raise BadIdentity("a part is empty, a dot segment or too long")
        if "/" in part or not part.isprintable():
            raise BadIdentity(f"bad character in {part[:64]!r}")
    uri = _SCHEME + "/".join([trust_domain, *(quote(part, safe=_UNESCAPED) for part in parts)])
    if len(uri) > URI_BYTES_MAX:
        raise BadIdentity(f"longer than {URI_BYTES_MAX} bytes")
    return uri
