"""Who this node is: its key, its certificates and trust anchors.

Every node makes its own P-256 key at first start and never shares it; its hash is the identity that servers remember.
Until the cluster has issued a certificate, the enrolment CA of the cluster's secret (`enrolment_ca.py`) vouches for it.
The first leader makes a random cluster CA; `install_certificate` takes the certificate that it issued. Called by the
composition roots; knows no sockets. `cryptography` is imported inside the functions that need it.

    <data_dir>/node-id           UUID
    <data_dir>/tls/node.key      PKCS#8, 0600
    <data_dir>/tls/trust.json    anchors of the cluster and whether the enrolment CA is still one
    <data_dir>/tls/issued.pem    certificate issued by the cluster CA, when there is one
    <data_dir>/tls/node.pem, anchors.pem   what TLS uses; made anew from the above at each start
    <data_dir>/tls/lived.json    that a server has run with this key, see server/lived.py
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rostra.runtime import log as _log
from rostra.runtime.data_directory import UnusableData
from rostra.runtime.enrolment_ca import (
    NODE_URI,
    cross_certify,
    enrolment_authority,
    issue_enrolment,
    key_hash_of,
    pem,
    pem_to_der,
    split_pem,
)
from rostra.runtime.files import exclusive, write_durably, write_if_changed
from rostra.runtime.secret import Secret, parse_secret, resolve_secrets
from rostra.wire.bounds import NODE_NAME_RULE, is_node_name
from rostra.wire.errors import BadRequest

if TYPE_CHECKING:
    import ssl

    from cryptography.hazmat.primitives.asymmetric import ec

    from rostra.runtime.enrolment_ca import Authority

log = _log.get("identity")


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
            with exclusive(directory):
                known = tuple(parse_secret(s) if isinstance(s, str) else s for s in secrets)
                if not known and bind and not has_certificate(root):
                    known = resolve_secrets(None, [bind])
                key = _node_key(directory / "node.key")
                identity = cls(directory, _node_id(root / "node-id", node_id, key), node_name, key_hash_of(key), known)
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
        with exclusive(self._directory):
            key = _node_key(self.key_path)
            if problem := self._problem_with(pem_chain, anchors_pem, key_hash_of(key)):
                raise BadRequest(f"certificate from the cluster CA: {problem}")
            trust = {"format": 1, "anchors_pem": split_pem(anchors_pem), "enrolment": trust_enrolment}
            write_durably(self._directory / "issued.pem", pem_chain.encode())
            write_durably(self._directory / "trust.json", json.dumps(trust, indent=1).encode() + b"\n")
            self._refresh(key)

    def reload(self) -> None:
        """Take over what another process of this node has installed since (agent and core share the directory)."""
        with exclusive(self._directory):
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
            chain = pem(issue_enrolment(enrolment[0], key, self.node_id, self.node_name))
        anchors = "".join([*cluster_pem, *(pem(cert) for cert, _ in enrolment)])
        write_if_changed(self.anchors_path, anchors.encode())
        write_if_changed(self.cert_path, chain.encode())
        # Not whether the files changed: the other process of this node may have written them first.
        if (anchors, chain) != (self._anchors_pem, self._chain_pem):
            self._anchors_pem, self._chain_pem = anchors, chain
            self.version += 1
        self.renew_at = renew_at  # last: others may look while a thread is in here

    def _issued_chain(self, cluster_pem: list[str], enrolment: list[Authority]) -> tuple[str, float]:
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
        return chain + "".join(pem(cross_certify(e, anchor)) for anchor in cluster_pem for e in enrolment), _renew_at(
            chain
        )

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
        if key_hash_of(certificate) != key_hash:
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
    return key_hash_of(_load_key(path, data))


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
        return str(uuid.UUID(uri.removeprefix(NODE_URI))) if key_hash_of(certificate) == key_hash_of(key) else ""
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
