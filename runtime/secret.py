"""The cluster secret (`encrypt`): how it is written, made, judged and found.

It proves that a node may enrol, and nothing else. `rostra keygen` prints one.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import itertools
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rostra.runtime import log as _log
from rostra.runtime.files import write_once
from rostra.wire.errors import BadRequest, Internal

if TYPE_CHECKING:
    pass


log = _log.get("identity")

SECRET_BYTES = (16, 24, 32)
#: One in use and one that is coming or going.
SECRETS_MAX = 2


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
                write_once(path, (generate_secret() + "\n").encode())
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
