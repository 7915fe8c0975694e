"""Who this node is, and what proves that it may enrol: the cluster secret, the node key, certificates, trust anchors.

Every node makes its own P-256 key at first start and never shares it; its hash is the identity that servers remember.
The cluster secret (`encrypt`) proves only *may enrol*: HKDF(secret) yields an Ed25519 enrolment CA, the same on every
holder, and nothing else is derived from it. The first leader makes a random cluster CA; `install_certificate` takes the
certificate that it issued. Called by the composition roots; knows no sockets. `cryptography` is imported inside the
functions that need it, so that `rostra keygen` does not pay for it.

    <data_dir>/format            which version of the directory this is
    <data_dir>/node-id           UUID
    <data_dir>/tls/node.key      PKCS#8, 0600
    <data_dir>/tls/trust.json    anchors of the cluster and whether the enrolment CA is still one
    <data_dir>/tls/issued.pem    certificate issued by the cluster CA, when there is one
    <data_dir>/tls/node.pem, anchors.pem   what TLS uses; made anew from the above at each start
    <data_dir>/tls/lived.json    that a server has run with this key, see server/lived.py
"""

from __future__ import annotations

import base64
import binascii
import datetime
import fcntl
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rostra.runtime import log as _log
from rostra.wire.bounds import NODE_NAME_RULE, is_node_name
from rostra.wire.errors import BadRequest, Conflict, Internal

if TYPE_CHECKING:
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

log = _log.get("identity")

SECRET_BYTES = (16, 24, 32)
#: One in use and one that is coming or going.
SECRETS_MAX = 2
#: The version of the data directory that this program writes.
FORMAT = 1
#: Of each directory at a start; a node may have registered thousands of services.
ENTRIES_LOOKED_AT = 200
NODE_URI = "rostra://node/"

_HKDF_INFO = b"rostra enrolment CA v1"
# Dates of what every holder of the secret can issue for itself protect nothing, and a machine whose clock is wrong at
# boot must be able to enrol. RFC 5280 §4.1.2.5: the latter means "no well-defined expiration date".
_BEGINNING = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_OF_TIME = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


# -- the cluster secret ----------------------------------------------------------------------------------------------


class Secret:
    """The bytes of a cluster secret. Prints as `***`."""

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


def generate_secret() -> str:
    """A new cluster secret as `rostra keygen` prints it: 32 random bytes in base64."""
    return base64.b64encode(os.urandom(32)).decode()


def parse_secret(text: str) -> Secret:
    """The secret in one value of `encrypt`. Raises BadRequest for anything that a person could have thought up."""
    text = text.strip()
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"encrypt: not base64; {_HOW_TO}") from None
    if len(raw) not in SECRET_BYTES:
        raise BadRequest(f"encrypt: {len(raw)} bytes, but must be 16, 24 or 32; {_HOW_TO}")
    if _is_thought_up(text, raw):
        raise BadRequest(f"encrypt: looks like text or a pattern, not like random bytes; {_HOW_TO}")
    return Secret(raw)


def parse_secrets(encrypt: str | Sequence[str] | None) -> tuple[Secret, ...]:
    """The secrets of the configuration: none, one, or two while the secret is changed (the first one is used)."""
    texts = [encrypt] if isinstance(encrypt, str) else list(encrypt or ())
    secrets = tuple(dict.fromkeys(parse_secret(t) for t in texts if t.strip()))
    if len(secrets) > SECRETS_MAX:
        raise BadRequest(f"encrypt: {len(secrets)} secrets, at most {SECRETS_MAX} are accepted (the old and the new)")
    return secrets


_HOW_TO = "make one with `rostra keygen`"


@functools.cache
def _warn_guessable() -> None:
    log.warn("encrypt looks like text or a pattern, not like random bytes: whoever guesses it may enrol")


def _is_guessable(raw: bytes) -> bool:
    """Few different bytes, or printable ones only. Fewer than one random secret in a million is like that."""
    return len(set(raw)) * 2 <= len(raw) or all(0x20 <= b < 0x7F for b in raw)


def _is_thought_up(text: str, raw: bytes) -> bool:
    """A passphrase or a mere pattern: so are fewer than one in a million random secrets."""
    if len(set(raw)) * 4 <= len(raw):
        return True
    if len({(b - a) % 256 for a, b in itertools.pairwise(raw)}) <= 2 and not raw.isascii():
        return True
    if len({(b - a) % 256 for a, b in itertools.pairwise(raw)}) == 1:  # 00 01 02 03 …
        return True
    if all(0x20 <= b < 0x7F or b in b"\r\n\t" for b in raw) and b" " in raw:  # base64 of a passphrase
        return True
    # A passphrase of 32 letters or digits is by chance valid base64 (24 bytes, no padding).
    return not text.endswith("=") and (text == text.lower() or text == text.upper())


def local_secret_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where this user's key for clusters on loopback lies."""
    env = os.environ if environ is None else environ
    state = env.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # the specification: a relative one is to be ignored
        home = env.get("HOME") or os.path.expanduser("~")
        state = os.path.join(home, ".local", "state")
    return Path(state) / "rostra" / "local.key"


def local_secret(path: Path) -> Secret:
    """The random secret in `path`, made there when absent. Raises BadRequest if others could have read or made it."""
    for _ in range(3):
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), encoding="ascii") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                    raise BadRequest(f"{path}: must be a file of this user with mode 0600; remove it to get a new one")
                return parse_secret(file.read())
        except FileNotFoundError:
            try:
                _write_once(path, (generate_secret() + "\n").encode())
            except OSError as e:
                raise BadRequest(
                    f"{path}: the key of this user's clusters on loopback cannot be made: {e.strerror}; set `encrypt`,"
                    f" or XDG_STATE_HOME to a directory of user {os.geteuid()}"
                ) from None
        except UnicodeDecodeError:
            raise BadRequest(f"{path}: damaged; remove it to get a new one") from None
        except OSError as e:
            raise BadRequest(f"{path}: {e.strerror}") from None
    raise Internal(f"{path}: vanishes as soon as it is made")


def resolve_secrets(
    encrypt: str | Sequence[str] | None,
    addresses: Sequence[str],
    *,
    local_key: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Secret, ...]:
    """The secrets to enrol with. Without `encrypt` this user's own on this machine, if every address is loopback.

    `addresses`: all that this node binds, advertises or joins. `local_key`: another file than the user's, for -dev.
    """
    if secrets := parse_secrets(encrypt):
        if any(_is_guessable(s.value) for s in secrets):
            # Clusters that come from Consul may have such a key, and it works there: a warning, not a refusal.
            _warn_guessable()
        return secrets
    for address in addresses:
        if not is_loopback(address):
            raise BadRequest(
                f"no cluster secret, and {address} can be reached from other machines: run `rostra keygen` once"
                " and set the result as `encrypt` on every node"
            )
    return (local_secret(local_key or local_secret_path(environ)),)


def is_loopback(address: str) -> bool:
    """True for an address of this machine only; `host:port` and `[v6]:port` are understood. Names: only localhost."""
    host = address.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


# -- the data directory ----------------------------------------------------------------------------------------------


class UnusableData(Conflict):
    """No start is possible from this data directory: a person has to look at it (exit status 78)."""


class NewerFormat(UnusableData):
    """The directory was written by a newer version. Nothing in it was touched."""


class DataDirectory:
    """A data directory that this process holds the lock of. Released by `release`, `with`, or the process's end."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def lock(cls, path: str | os.PathLike[str], holder: str = "lock") -> DataDirectory:
        """Take `path` for this process; make it when absent.

        `holder`: the lock's file name. The core and the agent of one host share a directory and lock different files.
        Raises Conflict when another process holds it, BadRequest when it cannot be used.
        """
        directory = Path(path)
        _check_format(directory)  # before anything is touched
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise BadRequest(f"data directory {directory}: is not a directory") from None
        except OSError as e:
            raise BadRequest(f"data directory {directory}: cannot be made: {e.strerror}") from None
        try:
            fd = os.open(directory / holder, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except NotADirectoryError:
            raise BadRequest(f"data directory {directory}: is not a directory") from None
        except OSError as e:
            raise BadRequest(f"data directory {directory}: not writable by user {os.geteuid()}: {e.strerror}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise Conflict(f"data directory {directory} is in use by process {pid}") from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            _check_format(directory)  # again: another may have upgraded it before we had the lock
            try:
                if not (directory / "format").exists():
                    write_durably(directory / "format", json.dumps({"format": FORMAT}).encode() + b"\n")
            except OSError as e:
                raise BadRequest(f"data directory {directory}: {e.strerror}") from None
            _check_access(directory)
        except BaseException:
            os.close(fd)
            raise
        return cls(directory, fd)

    def release(self) -> None:
        """Let others have it. The lock's file stays: removing it would let two processes hold two of them."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _check_format(directory: Path) -> None:
    try:
        found = json.loads((directory / "format").read_bytes())["format"]
        newer = int(found) > FORMAT
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        raise BadRequest(f"data directory {directory}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UnusableData(
            f'{directory / "format"}: damaged; restore it, or write {{"format": {FORMAT}}} into it if this version'
            " wrote the directory"
        ) from None
    if newer:
        raise NewerFormat(
            f"data directory {directory} has format {found} of a newer Rostra; this one knows up to {FORMAT}."
            " Nothing was changed"
        )


def _check_access(directory: Path) -> None:
    """Tells of files of somebody else and of a file system that is read-only now, before they are in the way."""
    for path in (directory, *_entries(directory, 2)):
        wanted = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
        if os.access(path, wanted, effective_ids=True) or not os.path.lexists(path):
            continue
        me, about = os.geteuid(), path.lstat()
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise BadRequest(f"data directory {directory}: {path} is on a read-only file system")
        if about.st_uid != me:
            raise BadRequest(
                f"data directory {directory}: {path} belongs to user {about.st_uid}, not to {me} who starts this:"
                f" `chown -R {me} {directory}`, or start it as that user"
            )
        raise BadRequest(
            f"data directory {directory}: {path} has mode {stat.S_IMODE(about.st_mode):04o}, user {me} has to read and"
            " write it"
        )


def _entries(directory: Path, depth: int) -> Iterator[Path]:
    """Some of each directory, in no order: where one was made by another user, so were others."""
    try:
        found = [Path(entry.path) for entry in islice(os.scandir(directory), ENTRIES_LOOKED_AT)]
    except OSError:
        return
    for path in found:
        yield path
        if depth > 1 and path.is_dir() and not path.is_symlink():
            yield from _entries(path, depth - 1)


# -- the node --------------------------------------------------------------------------------------------------------


class NodeIdentity:
    """This node's id, key, certificate and trust anchors. `version` grows when what TLS must use has changed."""

    def __init__(self, directory: Path, node_id: str, node_name: str, key_hash: str, secrets: tuple[Secret, ...]):
        self.node_id = node_id
        self.node_name = node_name
        #: Hex SHA-256 of the node key's SubjectPublicKeyInfo: what others know this node by.
        self.key_hash = key_hash
        self.key_path = directory / "node.key"
        #: The chain that TLS presents.
        self.cert_path = directory / "node.pem"
        self.anchors_path = directory / "anchors.pem"
        self.version = 0
        self._directory = directory
        self._secrets = secrets
        self._anchors_pem = self._chain_pem = ""
        #: When the certificate of the cluster CA should be replaced, in seconds since 1970; 0 while there is none.
        self.renew_at = 0.0
        self._server_context: ssl.SSLContext | None = None
        self._client_context: ssl.SSLContext | None = None

    @classmethod
    def open(
        cls,
        data_dir: str | os.PathLike[str],
        node_name: str,
        secrets: Sequence[Secret | str] = (),
        *,
        node_id: str = "",
        bind: str = "",
    ) -> NodeIdentity:
        """The identity in `data_dir`, made at first use. Agent and core may open it at the same time.

        `node_id`: the configured one, if any; replaces the one on disk. `bind`: the address that this node listens on;
        without secrets it must be loopback, unless the cluster CA issued a certificate before. Raises BadRequest.
        """
        if not is_node_name(node_name):
            raise BadRequest(f"node name {node_name!r}: {NODE_NAME_RULE}")
        root = Path(data_dir)
        directory = root / "tls"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _exclusive(directory):
                known = tuple(parse_secret(s) if isinstance(s, str) else s for s in secrets)
                if not known and bind and not has_certificate(root):
                    known = resolve_secrets(None, [bind])
                key = _node_key(directory / "node.key")
                identity = cls(directory, _node_id(root / "node-id", node_id, key), node_name, _key_hash(key), known)
                identity._refresh(key)
        except OSError as e:
            raise BadRequest(f"{e.filename or directory}: {e.strerror}") from None
        return identity

    @property
    def anchors_pem(self) -> str:
        """The certificates that peers may stand under."""
        return self._anchors_pem

    @property
    def anchor_hashes(self) -> tuple[str, ...]:
        """Hex SHA-256 of each anchor, sorted: what this node reports, so that a leader knows whom a change reached."""
        return tuple(sorted(hashlib.sha256(der).hexdigest() for der in pem_to_der(self._anchors_pem)))

    @property
    def is_enrolled(self) -> bool:
        """True when the presented certificate was issued by the cluster CA."""
        return self.renew_at > 0

    @property
    def public_key(self) -> bytes:
        """The node's public key as DER, for the server that issues a certificate to itself."""
        from cryptography.hazmat.primitives import serialization

        return (
            _node_key(self.key_path)
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def server_context(self) -> ssl.SSLContext:
        """The context for listeners; the same one at each call, it follows `version` by itself."""
        if self._server_context is None:
            from rostra.runtime import tls

            self._server_context = tls.server_context(self)
        return self._server_context

    def client_context(self) -> ssl.SSLContext:
        """The context for connecting to other nodes; the same one at each call."""
        if self._client_context is None:
            from rostra.runtime import tls

            self._client_context = tls.client_context(self)
        return self._client_context

    def install_certificate(self, pem_chain: str, anchors_pem: str, *, trust_enrolment: bool = True) -> None:
        """Use the certificate that the cluster CA issued, and trust `anchors_pem` from now on, durably.

        `trust_enrolment=False` also ends the trust in everyone who knows the secret: only when every node has a
        certificate of the cluster CA. Raises BadRequest when the certificate is not for this node.
        """
        with _exclusive(self._directory):
            key = _node_key(self.key_path)
            if problem := self._problem_with(pem_chain, anchors_pem, _key_hash(key)):
                raise BadRequest(f"certificate from the cluster CA: {problem}")
            trust = {"format": 1, "anchors_pem": split_pem(anchors_pem), "enrolment": trust_enrolment}
            write_durably(self._directory / "issued.pem", pem_chain.encode())
            write_durably(self._directory / "trust.json", json.dumps(trust, indent=1).encode() + b"\n")
            self._refresh(key)

    def reload(self) -> None:
        """Take over what another process of this node has installed since (agent and core share the directory)."""
        with _exclusive(self._directory):
            self._refresh(_node_key(self.key_path))

    def _refresh(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Work out chain and anchors from what is on disk, write them where TLS reads them."""
        trust = _read_trust(self._directory / "trust.json")
        enrolment = [enrolment_authority(s) for s in self._secrets] if trust["enrolment"] else []
        cluster_pem: list[str] = trust["anchors_pem"]
        chain, renew_at = self._issued_chain(cluster_pem, enrolment)
        if not chain:
            if not enrolment:
                raise BadRequest(
                    f"node {self.node_name} has no valid certificate of the cluster and no secret to enrol with:"
                    " set `encrypt` to the cluster's"
                )
            chain = _pem(_issue_enrolment(enrolment[0], key, self.node_id, self.node_name))
        anchors = "".join([*cluster_pem, *(_pem(cert) for cert, _ in enrolment)])
        write_if_changed(self.anchors_path, anchors.encode())
        write_if_changed(self.cert_path, chain.encode())
        # Not whether the files changed: the other process of this node may have written them first.
        if (anchors, chain) != (self._anchors_pem, self._chain_pem):
            self._anchors_pem, self._chain_pem = anchors, chain
            self.version += 1
        self.renew_at = renew_at  # last: others may look while a thread is in here

    def _issued_chain(self, cluster_pem: list[str], enrolment: list[_Authority]) -> tuple[str, float]:
        """What to present of the cluster CA's, and when it should be renewed; ("", 0) where there is nothing of use."""
        try:
            chain = (self._directory / "issued.pem").read_text("ascii")
        except FileNotFoundError:
            return "", 0.0
        problem = self._problem_with(chain, "".join(cluster_pem), self.key_hash)
        if problem:
            log.warn("certificate of the cluster CA not used", reason=problem)
            return "", 0.0
        # A node that is only now enrolling knows the secret but not the cluster CA. So the chain goes on with the
        # cluster CA as certified by the enrolment CA, which every holder of the secret can do. A peer that knows the
        # cluster CA itself stops there (trusted first).
        return chain + "".join(_pem(_cross_certify(e, pem)) for pem in cluster_pem for e in enrolment), _renew_at(chain)

    def _problem_with(self, chain_pem: str, anchors_pem: str, key_hash: str) -> str:
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        try:
            certificate = x509.load_pem_x509_certificate(chain_pem.encode())
            anchors = x509.load_pem_x509_certificates(anchors_pem.encode())
            uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        except (ValueError, x509.ExtensionNotFound) as e:
            return f"cannot be read: {e}"
        if _key_hash(certificate) != key_hash:
            return "is for another key"
        if uris.value.get_values_for_type(x509.UniformResourceIdentifier) != [NODE_URI + self.node_id]:
            return "is for another node id"
        if [n.value for n in names] != [self.node_name]:
            return f"is not for the node name {self.node_name}"
        now = datetime.datetime.now(datetime.UTC)
        if now < certificate.not_valid_before_utc:
            return f"is valid from {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ} only: compare the clocks"
        if now > certificate.not_valid_after_utc:
            return f"expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        for anchor in anchors:
            try:
                certificate.verify_directly_issued_by(anchor)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return ""
        return "was not issued by one of the given anchors"


def _renew_at(chain_pem: str) -> float:
    """After two thirds of its life: what goes wrong then has a third of it to be mended."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(chain_pem.encode())
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return begin + (end - begin) * 2 / 3


def read_node_id(data_dir: str | os.PathLike[str]) -> str:
    """The node id in `data_dir`, "" before the first start."""
    try:
        return (Path(data_dir) / "node-id").read_text("ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as e:
        raise BadRequest(f"{Path(data_dir) / 'node-id'}: cannot be read: {e}") from None


def read_key_hash(data_dir: str | os.PathLike[str]) -> str:
    """What others know this node by, "" before the first start. Raises BadRequest for a key that cannot be used."""
    path = Path(data_dir) / "tls" / "node.key"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as e:
        raise BadRequest(f"{path}: {e.strerror}") from None
    return _key_hash(_load_key(path, data))


def has_certificate(data_dir: str | os.PathLike[str]) -> bool:
    """Whether the cluster CA has issued a certificate to this node: then it needs no secret any more."""
    return (Path(data_dir) / "tls" / "issued.pem").exists()


def _node_id(path: Path, configured: str, key: ec.EllipticCurvePrivateKey) -> str:
    try:
        node_id = str(uuid.UUID(configured)) if configured else str(uuid.UUID(path.read_text("ascii").strip()))
    except FileNotFoundError:
        node_id = _certified_id(path.parent / "tls" / "issued.pem", key)
        if node_id:
            log.warn("the file node-id was lost: taken from this node's certificate", node_id=node_id)
        else:
            node_id = str(uuid.uuid4())
    except ValueError:
        raise BadRequest(f"{'node_id' if configured else path}: is not a UUID") from None
    write_if_changed(path, node_id.encode() + b"\n", mode=0o644)
    return node_id


def _certified_id(path: Path, key: ec.EllipticCurvePrivateKey) -> str:
    """The node id that the cluster CA has certified for `key`, "" where it has not."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return str(uuid.UUID(uri.removeprefix(NODE_URI))) if _key_hash(certificate) == _key_hash(key) else ""
    except (OSError, ValueError, x509.ExtensionNotFound):
        return ""


def _node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(path, data)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise BadRequest(f"{path}: mode is {mode:04o}, others could have read the node's key; it must be 0600")
    return _load_key(path, data)


def _load_key(path: Path, data: bytes) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(data, None)
    except ValueError:
        raise BadRequest(f"{path}: damaged; restore it, or remove it to make this a node with another key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadRequest(f"{path}: is not a P-256 key")
    return key


def _key_hash(holder: ec.EllipticCurvePrivateKey | x509.Certificate) -> str:
    from cryptography.hazmat.primitives import serialization

    der = holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _read_trust(path: Path) -> dict[str, Any]:
    try:
        trust = json.loads(path.read_bytes())
        if trust["format"] != 1:
            raise BadRequest(f"{path}: format {trust['format']} is of a newer Rostra")
        return {"anchors_pem": [str(p) for p in trust["anchors_pem"]], "enrolment": bool(trust["enrolment"])}
    except FileNotFoundError:
        return {"anchors_pem": [], "enrolment": True}
    except (ValueError, KeyError, TypeError):
        raise UnusableData(
            f"{path}: damaged; restore it, or remove it and start with `encrypt`, so that this node enrols again"
        ) from None


# -- the enrolment CA ------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Authority = tuple[x509.Certificate, ed25519.Ed25519PrivateKey]


def enrolment_authority(secret: Secret) -> _Authority:
    """The enrolment CA of a secret, byte for byte the same on every holder (Ed25519 signatures are deterministic)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    seed = HKDF(hashes.SHA256(), 32, salt=None, info=_HKDF_INFO).derive(secret.value)
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    public = key.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    name = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Rostra enrolment CA {identifier.digest.hex()[:8]}")]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_BEGINNING)
        .not_valid_after(_END_OF_TIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, None)
    )
    return certificate, key


def _issue_enrolment(
    authority: _Authority, key: ec.EllipticCurvePrivateKey, node_id: str, node_name: str
) -> x509.Certificate:
    """The certificate that this node issues to itself; always the same for the same input."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, node_name)])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(NODE_URI + node_id)])
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return _sign(
        authority,
        _serial(_key_hash(key), node_id, node_name),
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False),
    )


def _cross_certify(authority: _Authority, anchor_pem: str) -> x509.Certificate:
    """The CA in `anchor_pem` with its own name and key, but certified by `authority`."""
    from cryptography import x509

    anchor = x509.load_pem_x509_certificate(anchor_pem.encode())
    identifier = anchor.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return _sign(
        authority,
        _serial("cross", anchor_pem),
        x509.CertificateBuilder()
        .subject_name(anchor.subject)
        .public_key(anchor.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False),
    )


def _sign(authority: _Authority, serial: int, builder: x509.CertificateBuilder) -> x509.Certificate:
    from cryptography import x509

    issuer, key = authority
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        builder.issuer_name(issuer.subject)
        .serial_number(serial)
        .not_valid_before(_BEGINNING)
        .not_valid_after(_END_OF_TIME)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, None)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _serial(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:16], "big") | 1


# -- PEM and files ---------------------------------------------------------------------------------------------------

_PEM_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----\n.*?\n-----END CERTIFICATE-----\n?", re.DOTALL)


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def split_pem(text: str) -> list[str]:
    """The certificates in `text`, each as PEM of its own."""
    return [block.rstrip("\n") + "\n" for block in _PEM_BLOCK.findall(text)]


def pem_to_der(text: str) -> list[bytes]:
    """The certificates in `text` as DER."""
    return [base64.b64decode("".join(block.splitlines()[1:-1])) for block in split_pem(text)]


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by a file of `mode` that is on the disk, whole, when this returns; or leave it as it was."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(name, path)
    except BaseException:
        _remove(name)
        raise
    sync_directory(path.parent)


def write_if_changed(path: Path, data: bytes, *, mode: int = 0o600) -> bool:
    """`write_durably` unless `path` holds `data` already. True when it was written."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    write_durably(path, data, mode=mode)
    return True


def sync_directory(path: Path) -> None:
    """Make names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_once(path: Path, data: bytes) -> None:
    """Make `path` with `data` and mode 0600 in one step; whoever comes second leaves the first one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.link(name, path)
    except FileExistsError:
        pass
    finally:
        _remove(name)
    sync_directory(path.parent)


def _remove(name: str) -> None:
    try:
        os.unlink(name)
    except OSError:
        pass


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time: the agent and the core of a host open the same identity at first start."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
