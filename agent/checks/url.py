"""The URL of an HTTP check, read as Go's client reads it: what Consul's agents could ask, ours can ask too.

Brackets around an IPv4 address are taken, ports are numbers, a relative Location is of the place that sent it. No URL
is shown with its password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}")
_AUTHORITY = re.compile(r"(//)([^/?#]*)")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Url:
    scheme: str
    user: str | None
    password: str
    host: str
    port: int
    #: host and port as they were written, for the Host header
    place: str
    #: path and query as they are sent
    target: str
    origin: str


def masked(text: str) -> str:
    """`text` with `***` for the password of the URL in it; of one that cannot be read too."""

    def mask(found: re.Match[str]) -> str:
        info, at, place = found[2].rpartition("@")
        return found[1] + _masked_info(info) + at + place

    whole = _AUTHORITY.search(text)
    if whole is not None and "@" not in whole[2] and "@" in text[whole.end() :]:
        _, colon, port = whole[2].rpartition(":")
        if colon and not port.isdigit():  # a password with a slash in it
            begin, _, end = text.rpartition("@")
            return f"{begin[: whole.start(2)]}{_masked_info(begin[whole.start(2) :])}@{end}"
    return _AUTHORITY.sub(mask, text, count=1)


def _masked_info(info: str) -> str:
    user, colon, _ = info.partition(":")
    return f"{user}:***" if colon else info


def parse(url: str) -> Url:
    """Raises ValueError with a reason in the words of Go's parser and client."""
    if _CONTROL.search(url):
        raise _unreadable(url, "net/url: invalid control character in URL")
    rest = url.partition("#")[0]
    scheme = _SCHEME.match(rest)
    if scheme is None and ":" in rest.partition("/")[0]:
        raise _unreadable(url, "first path segment in URL cannot contain colon")
    name = scheme[1].lower() if scheme else ""
    rest = rest[scheme.end() :] if scheme else rest
    authority = _AUTHORITY.match(rest)
    if authority is not None:
        rest = rest[authority.end() :]
    info, at, place = (authority[2] if authority else "").rpartition("@")
    for part in (info, rest.partition("?")[0]):
        if bad := _BAD_ESCAPE.search(part):
            raise _unreadable(url, f'invalid URL escape "{bad[0]}"')
    host, port = _host_and_port(url, place)
    if name not in _PORTS:
        raise ValueError(f'unsupported protocol scheme "{name}"')
    if not host:
        raise ValueError("http: no Host in request URL")
    if port and int(port) > 65535:
        raise ValueError(f"dial tcp: address {port}: invalid port")
    user, _, password = info.partition(":")
    if not rest.startswith("/"):
        rest = "/" + rest
    return Url(
        scheme=name,
        user=unquote(user) if at else None,
        password=unquote(password),
        host=host,
        port=int(port) if port else _PORTS[name],
        place=place,
        target="".join(c if "!" <= c <= "~" else quote(c) for c in rest),
        origin=f"{name}://{info}{at}{place}",
    )


def _host_and_port(url: str, place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        if not bracket:
            raise _unreadable(url, "missing ']' in host")
        host = host.replace("%25", "%")
    else:
        host, colon, port = place.rpartition(":")
        host, port = (host, colon + port) if colon else (port, "")
    if port and not re.fullmatch(r":[0-9]*", port):
        raise _unreadable(url, f'invalid port "{port}" after host')
    return host, port[1:]


def _unreadable(url: str, reason: str) -> ValueError:
    return ValueError(f'parse "{masked(url)}": {reason}')


def joined(base: Url, location: str) -> str:
    """The URL that a Location of an answer from `base` means."""
    if _SCHEME.match(location):
        return location
    if location.startswith("//"):
        return f"{base.scheme}:{location}"
    return base.origin + urljoin(base.target, location)
