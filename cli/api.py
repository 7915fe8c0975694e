"""The CLI's way to the agent: one small HTTP client on http.client (aiohttp costs 150 ms to import).

`client_for(flags)` settles address, token and TLS from flags and environment; every failure is a `Failed` with one line
that says what was asked, of whom, and what to do. ROSTRA_HTTP_ADDR and ROSTRA_HTTP_TOKEN win over Consul's names.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from rostra.cli.errors import Failed

_DEFAULT_ADDRESS = "127.0.0.1:8500"
_TIMEOUT_S = 70.0

Query = Mapping[str, str | int | Sequence[str] | None]


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()


class ApiError(Failed):
    """The agent answered, and said no."""

    def __init__(self, code: int, text: str) -> None:
        hint = ""
        if code == 403 and ("Permission denied" in text or "ACL" in text):  # else a token would not help
            hint = "; give a token with -token or CONSUL_HTTP_TOKEN"
        super().__init__(f"Unexpected response code: {code} ({text}){hint}")
        self.code, self.text = code, text


class Client:
    """Requests to one agent; query parameters that every request needs are added here."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        datacenter: str = "",
        stale: bool = False,
        tls: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self._token = token
        self._always: dict[str, str] = {}
        if datacenter:
            self._always["dc"] = datacenter
        if stale:
            self._always["stale"] = ""
        self._tls = tls or {}

    def get(self, path: str, query: Query | None = None) -> Any:
        """The decoded JSON of an answer. Raises ApiError unless it is 200."""
        return self._decoded(self.request("GET", path, query))

    def get_with_headers(self, path: str, query: Query | None = None) -> tuple[Any, Mapping[str, str]]:
        """As `get`, and the answer's headers."""
        answer = self.request("GET", path, query)
        return self._decoded(answer), answer.headers

    def find(self, path: str, query: Query | None = None) -> Any | None:
        """Like get, but None where the agent answers 404."""
        answer = self.request("GET", path, query)
        return None if answer.status == 404 else self._decoded(answer)

    def put(self, path: str, body: Any = None, query: Query | None = None, *, method: str = "PUT") -> Answer:
        """Sends bytes as they are and anything else as JSON. Raises ApiError unless the answer is 2xx."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        answer = self.request(method, path, query, data)
        if answer.status // 100 != 2:
            raise ApiError(answer.status, answer.text)
        return answer

    def post(self, path: str, query: Query | None = None) -> Any:
        """The decoded JSON that a POST without a body is answered with. Raises ApiError unless it is 200."""
        return self._decoded(self.request("POST", path, query, b""))

    def request(self, method: str, path: str, query: Query | None = None, body: bytes | None = None) -> Answer:
        pairs = [(k, v) for k, v in {**(query or {}), **self._always}.items() if v is not None]
        url = path + (f"?{urlencode(pairs, doseq=True)}" if pairs else "")
        headers = {"Connection": "close", "User-Agent": "rostra-cli"}
        if self._token:
            headers["X-Consul-Token"] = self._token
        connection = self._connection()
        try:
            connection.request(method, url, body, headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        except (OSError, HTTPException, ValueError) as e:
            raise Failed(self._unreachable(e)) from e
        finally:
            connection.close()

    def _decoded(self, answer: Answer) -> Any:
        if answer.status != 200:
            raise ApiError(answer.status, answer.text)
        try:
            return json.loads(answer.body)
        except ValueError:
            raise Failed(f"{self.address} does not answer like an agent: no JSON ({answer.text[:60]!r})") from None

    def _connection(self) -> HTTPConnection:
        scheme, _, rest = self.address.partition("://")
        if scheme == "unix":
            return _UnixConnection(rest)
        host, port = _host_port(rest, 443 if scheme == "https" else 80)
        if scheme == "https":
            return _tls_connection(host, port, self._tls)
        return HTTPConnection(host, port, timeout=_TIMEOUT_S)

    def _unreachable(self, error: Exception) -> str:
        where = f"the agent at {self.address}"
        scheme, _, rest = self.address.partition("://")
        if scheme == "http" and _host_port(rest, 0)[1] == 0 and isinstance(error, OSError):
            return f"cannot reach {where}, port 80: {_reason(error)}; agents use 8500, give the address with its port"
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return (
                f"cannot reach {where}: {_reason(error)}. Is it running? Start one with 'rostra agent -dev', "
                "or name another with -http-addr or CONSUL_HTTP_ADDR"
            )
        if isinstance(error, TimeoutError):
            return f"{where} did not answer in time; give another with -http-addr or CONSUL_HTTP_ADDR"
        if isinstance(error, socket.gaierror):
            return f"cannot find {where}: unknown host name; see -http-addr and CONSUL_HTTP_ADDR"
        if "SSL" in type(error).__name__:
            return f"no TLS with {where}: {_reason(error)}; see -ca-file, -client-cert and the scheme of the address"
        return f"cannot talk to {where}: {_reason(error)}"


def path(*parts: str) -> str:
    """A path under /v1 with each part escaped, slashes in it too."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def key_path(key: str) -> str:
    """The path of a KV key: its slashes stay, and bytes that are not UTF-8 pass through."""
    return "/v1/kv/" + quote(os.fsencode(key), safe="/~")


def client_for(flags: Mapping[str, Any]) -> Client:
    """The client that these flags and the environment ask for."""
    tls = {
        "ca_file": flags["ca-file"] or os.environ.get("CONSUL_CACERT", ""),
        "ca_path": flags["ca-path"] or os.environ.get("CONSUL_CAPATH", ""),
        "cert": flags["client-cert"] or os.environ.get("CONSUL_CLIENT_CERT", ""),
        "key": flags["client-key"] or os.environ.get("CONSUL_CLIENT_KEY", ""),
        "server_name": flags["tls-server-name"] or os.environ.get("CONSUL_TLS_SERVER_NAME", ""),
        "verify": os.environ.get("CONSUL_HTTP_SSL_VERIFY", "true"),
    }
    return Client(
        _address(flags["http-addr"] or _environment("HTTP_ADDR") or _DEFAULT_ADDRESS),
        token=_token(flags),
        datacenter=flags.get("datacenter") or "",
        stale=flags.get("stale", False),
        tls=tls,
    )


def _environment(name: str) -> str:
    return os.environ.get(f"ROSTRA_{name}") or os.environ.get(f"CONSUL_{name}") or ""


def _address(text: str) -> str:
    """`scheme://rest`; without a scheme it is http, or https where CONSUL_HTTP_SSL says so."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        is_tls = os.environ.get("CONSUL_HTTP_SSL", "").lower() in ("1", "t", "true")
        return f"{'https' if is_tls else 'http'}://{text.rstrip('/')}"
    if scheme not in ("http", "https", "unix"):
        raise Failed(f"{text}: the address of an agent is host:port, http://…, https://… or unix://PATH")
    return text if scheme == "unix" else f"{scheme}://{rest.rstrip('/')}"


def _token(flags: Mapping[str, Any]) -> str:
    if flags["token"]:
        return str(flags["token"])
    file = flags["token-file"]
    if not file and _environment("HTTP_TOKEN"):
        return _environment("HTTP_TOKEN")
    file = file or _environment("HTTP_TOKEN_FILE")
    if not file:
        return ""
    try:
        with open(file, encoding="utf-8") as f:
            return f.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise Failed(f"cannot read the token file {file}: {_reason(e)}") from e


def _host_port(text: str, default: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        return text.strip("[]"), default
    if not port.isdigit() or int(port) > 65535:
        raise Failed(f"{text}: {port!r} is no port; the address of an agent is host:port")
    return host.strip("[]"), int(port)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)[:1].lower() + str(text)[1:]


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _tls_connection(host: str, port: int, tls: Mapping[str, str]) -> HTTPConnection:
    import ssl
    from http.client import HTTPSConnection

    try:
        context = ssl.create_default_context(cafile=tls["ca_file"] or None, capath=tls["ca_path"] or None)
        if tls["cert"]:
            context.load_cert_chain(tls["cert"], tls["key"] or None)
    except (OSError, ssl.SSLError) as e:
        raise Failed(f"cannot use the certificates given: {_reason(e)}") from e
    if tls["verify"].lower() in ("0", "f", "false"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    name = tls["server_name"]
    if not name:
        return HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)

    class Named(HTTPSConnection):
        def connect(self) -> None:
            HTTPConnection.connect(self)
            self.sock = context.wrap_socket(self.sock, server_hostname=name)

    return Named(host, port, timeout=_TIMEOUT_S, context=context)
