"""What strangers and enrolled attackers send to a port that speaks TLS and frames, on plain sockets.

Each attack opens a connection, misbehaves, and says how long the other side put up with it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import pickle
import random
import socket
import ssl
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rostra.runtime.enrolment_ca import NODE_URI, enrolment_authority
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from rostra.server.endpoint import HELLO_BYTES_MAX
from rostra.wire.frames import RPC_FRAME_BYTES_MAX, frame, pack, unpack
from rostra.wire.rpc import hello

PATIENCE_S = 20.0


@dataclass
class Target:
    host: str
    port: int
    friend: NodeIdentity  # has the secret of the cluster: an agent, no server
    stranger: NodeIdentity  # has another secret
    member: NodeIdentity  # a server's, stolen
    impostor: NodeIdentity  # as `friend`, with a certificate for its own key that bears the member's name and id
    expired: Path  # key and certificate, issued as `friend`'s is, but for yesterday

    @classmethod
    def of(cls, host: str, port: int, directory: Path, secret: str, member: NodeIdentity) -> Target:
        """Makes the other identities in `directory`."""
        own, others = parse_secrets(secret), parse_secrets(base64.b64encode(os.urandom(32)).decode())
        return cls(
            host,
            port,
            NodeIdentity.open(directory / "friend", "friend", own),
            NodeIdentity.open(directory / "stranger", "stranger", others),
            member,
            NodeIdentity.open(directory / "impostor", member.node_name, own, node_id=member.node_id),
            expired_certificate(directory / "expired.pem", secret),
        )


@dataclass
class Outcome:
    closed_after_s: float
    received: list[Any] = field(default_factory=list)


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def expired_certificate(path: Path, secret: str) -> Path:
    """What a holder of the secret may issue to himself, with dates that have passed."""
    authority, authority_key = enrolment_authority(parse_secrets(secret)[0])
    key, node = ec.generate_private_key(ec.SECP256R1()), x509.UniformResourceIdentifier(NODE_URI + str(uuid.uuid4()))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(authority.subject)
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "late")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now - datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([node]), critical=False)
        .sign(authority_key, None)
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def stock_raft(message: Any) -> bytes:
    """A message as pysyncobj's own transport frames it."""
    data = zlib.compress(pickle.dumps(message, protocol=2), 3)
    return struct.pack("i", len(data)) + data


def client_hello() -> bytes:
    """The first flight of a TLS client that shows no certificate."""
    context = ssl.create_default_context()
    out = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def until_closed(sock: socket.socket, began: float) -> Outcome:
    """Read what comes until the other side has closed."""
    sock.settimeout(PATIENCE_S)
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except TimeoutError:
        raise AssertionError(f"still open after {PATIENCE_S:g} s") from None
    except (OSError, ssl.SSLError):
        pass
    outcome = Outcome(time.monotonic() - began)
    with contextlib.suppress(ValueError):
        while len(data) >= 4:
            length = int.from_bytes(data[:4], "big")
            outcome.received.append(unpack(data[4 : 4 + length]))
            data = data[4 + length :]
    return outcome


def raw(target: Target, data: bytes) -> Outcome:
    with socket.create_connection((target.host, target.port), timeout=PATIENCE_S) as sock:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            sock.sendall(data)
        return until_closed(sock, began)


def one_way_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def with_expired(target: Target) -> ssl.SSLContext:
    context = one_way_context()
    context.load_cert_chain(target.expired)
    return context


def with_certificate_of(identity: NodeIdentity) -> ssl.SSLContext:
    """Shows this node's certificate and trusts everyone."""
    context = one_way_context()
    context.load_cert_chain(identity.cert_path, identity.key_path)
    return context


def over_tls(target: Target, context: ssl.SSLContext, data: bytes, *more: bytes, pause_s: float = 0.0) -> Outcome:
    with socket.create_connection((target.host, target.port), timeout=PATIENCE_S) as plain:
        began = time.monotonic()
        try:
            sock = context.wrap_socket(plain, server_hostname="x")
        except (OSError, ssl.SSLError):
            return Outcome(time.monotonic() - began)
        with sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                for part in more:
                    time.sleep(pause_s)
                    sock.sendall(part)
            return until_closed(sock, began)


def greeting(target: Target, protocol: str, **about: Any) -> bytes:
    friend = target.friend
    said = {"name": friend.node_name, "node_id": friend.node_id, "address": target.host, **about}
    return frame(hello(protocol, **said))


def bombs(bytes_max: int) -> dict[str, bytes]:
    """Small messages that want to become large ones, each at most so long."""
    n = bytes_max - 16
    return {
        "nested": b"\x91" * n,
        "nested maps": b"\x81\xa0" * (n // 2),
        "that claims 4 billion elements": b"\xdd\xff\xff\xff\xff" + b"\xc0" * 10,
        "that claims 4 billion pairs": b"\xdf\xff\xff\xff\xff\xa0",
        "that claims 4 GiB": b"\xc6\xff\xff\xff\xffx",
        "of many empty maps": b"\xdd" + n.to_bytes(4, "big") + b"\x80" * n,
        "of an extension type": b"\xc7\x08\xff" + b"\0" * 8,
    }


def strangers(mark: Path) -> dict[str, Callable[[Target], Outcome]]:
    """Attacks of those who do not have the secret, for every port that speaks TLS. `mark`: must never come to be."""
    noise = random.Random(1).randbytes
    tls_like = b"\x16\x03\x01\x40\x00" + noise(1 << 20)
    return {
        "a stock pysyncobj handshake": lambda t: raw(t, stock_raft(f"{t.host}:4321")),
        "a pickle": lambda t: raw(t, pickle.dumps(Bomb(mark))),
        "a pickle as pysyncobj frames it": lambda t: raw(t, stock_raft(Bomb(mark))),
        "1 MiB of random bytes": lambda t: raw(t, noise(1 << 20)),
        "1 MiB of random bytes that begin like TLS": lambda t: raw(t, tls_like),
        "HTTP": lambda t: raw(t, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        "TLS without a certificate": lambda t: over_tls(t, one_way_context(), greeting(t, "rpc")),
        "an expired certificate": lambda t: over_tls(t, with_expired(t), greeting(t, "rpc")),
        "a certificate of another CA": lambda t: over_tls(t, with_certificate_of(t.stranger), greeting(t, "rpc")),
        "no bytes": lambda t: raw(t, b""),
        "half a TLS hello": lambda t: raw(t, client_hello()[:100]),
        "a TLS hello and silence": lambda t: raw(t, client_hello()),
    }


def _as_friend(*frames: Callable[[Target], bytes]) -> Callable[[Target], Outcome]:
    """With the friend's certificate, one after the other."""
    return lambda t: over_tls(t, t.friend.client_context(), *(f(t) for f in frames), pause_s=0.3)


def insiders() -> dict[str, Callable[[Target], Outcome]]:
    """Attacks on the RPC port of those who have the secret, and so a certificate, but are no servers."""
    noise, attack = random.Random(2).randbytes, _as_friend
    return {
        "an agent in a Raft handshake": attack(lambda t: greeting(t, "raft", role="server")),
        "an agent that says it is a server": attack(lambda t: greeting(t, "peer", role="server")),
        "another node's name": attack(lambda t: greeting(t, "rpc", name="s1")),
        "an unknown protocol": attack(lambda t: greeting(t, "telnet")),
        "no hello": attack(lambda t: b""),
        "half a hello": attack(lambda t: greeting(t, "rpc")[:20]),
        "a hello that is none": attack(lambda t: frame(pack([1, 2, 3]))),
        "a pickle for a hello": attack(lambda t: frame(pickle.dumps({"rostra": 1}))),
        "an oversized first frame": attack(lambda t: b"\x7f\xff\xff\xff" + noise(1 << 16)),
        "a good hello, then garbage": attack(lambda t: greeting(t, "rpc"), lambda t: noise(1 << 16)),
        "a good hello, then an oversized frame": attack(
            lambda t: greeting(t, "rpc"), lambda t: b"\x00\x10\x00\x01" + noise(1 << 16)
        ),
        "a good hello, then a frame that is no request": attack(
            lambda t: greeting(t, "rpc"), lambda t: frame(pack({"kind": "elect me"}))
        ),
        "a Raft message on an agent's connection": attack(
            lambda t: greeting(t, "rpc"), lambda t: frame(pack([5, "cluster", 99, 1, 1]))
        ),
    }


def impostors() -> dict[str, Callable[[Target], Outcome]]:
    """Attacks on the RPC port of those who say that they are another server: with their own key, with a stolen one."""

    def own_key(protocol: str) -> Callable[[Target], Outcome]:
        def go(t: Target) -> Outcome:
            hello = greeting(t, protocol, name=t.impostor.node_name, node_id=t.impostor.node_id, role="server")
            return over_tls(t, with_certificate_of(t.impostor), hello)

        return go

    def stolen(protocol: str) -> Callable[[Target], Outcome]:
        return lambda t: over_tls(t, with_certificate_of(t.member), greeting(t, protocol, role="server"))

    protocols = ("raft", "peer", "rpc")
    return {
        **{f"a server's name and id with another key ({p})": own_key(p) for p in protocols},
        **{f"a server's certificate in another's name ({p})": stolen(p) for p in protocols},
    }


def bombers(pause_s: float = 0.3) -> dict[str, Callable[[Target], Outcome]]:
    """Attacks on the RPC port with msgpack that wants to become large, and with a pickle."""

    def hello(payload: bytes) -> Callable[[Target], Outcome]:
        return lambda t: over_tls(t, t.friend.client_context(), frame(payload))

    def request(payload: bytes) -> Callable[[Target], Outcome]:
        return lambda t: over_tls(t, t.friend.client_context(), greeting(t, "rpc"), frame(payload), pause_s=pause_s)

    return {
        **{f"a hello {what}": hello(bomb) for what, bomb in bombs(HELLO_BYTES_MAX).items()},
        **{f"a request {what}": request(bomb) for what, bomb in bombs(RPC_FRAME_BYTES_MAX).items()},
        "a pickle for a request": request(pickle.dumps({"kind": "elect me"})),
    }


@contextlib.contextmanager
def idle(target: Target, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """That many connections on which nothing more is said."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.create_connection((target.host, target.port), timeout=PATIENCE_S)
            held.append(sock)
            if data:
                sock.sendall(data)
        yield held
    finally:
        for sock in held:
            sock.close()
