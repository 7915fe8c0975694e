"""Kinds of values: how each is read from a file or body and from a flag, and how two of them combine.

A kind raises TypeError for a value of another type and ValueError, with a text, for one that is wrong; the reader says
where. Settings (`config/settings.py`), fields of definitions (`DEFINED`) and of bodies (`definition_fields.py`,
`http/fields.py`) have one each. Pure, and of the standard library only.
"""

from __future__ import annotations

import binascii
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from rostra.agent.schema import Type
from rostra.wire.durations import SECOND, parse_duration


class Secret:
    """A value that prints as *** wherever it ends up; `reveal()` is the only way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***" if self._value else ""

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, _memo: object) -> Secret:
        return self

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled: send reveal() to whom it is for")


_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
LOG_LEVELS = ("trace", "debug", "info", "warn", "error")
_LOG_LEVEL_ALIASES = {"err": "error", "warning": "warn"}
ANY_ADDRESS = ("0.0.0.0", "::")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text) / SECOND
    except ValueError:
        raise ValueError(f'invalid duration "{text}": write it like "30s", "5m" or "1h30m"') from None


class Kind(NamedTuple):
    """How a value is read from a file (`read`) and from a flag (`parse`), and how two of them combine."""

    expects: str
    read: Callable[[Any], Any]
    parse: Callable[[str], Any]
    combine: Callable[[Any, Any], Any] | None = None  # None: the later one replaces the earlier one
    is_switch: bool = False


def _only(*types: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in types:
            raise TypeError
        return value

    return read


def _integer(value: Any) -> int:
    if type(value) is float and value.is_integer():  # 80.0 and 1e2 of a program that knows floats only
        return int(value)
    return cast(int, _only(int)(value))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise TypeError from None


def _switch(text: str) -> bool:
    if text not in _BOOLEANS:
        raise TypeError
    return _BOOLEANS[text]


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str | None) for v in value):
        raise TypeError
    return tuple(v or "" for v in value)


def _text_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str | None) for v in value.values()):
        raise TypeError
    return {k: v or "" for k, v in value.items()}


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return dict(value)


def _duration(value: Any) -> float:
    seconds = _seconds(cast(str, _only(str)(value)))
    if seconds < 0:
        raise ValueError("a duration cannot be negative")
    return seconds


def _port(value: Any) -> int:
    port = _integer(value)
    if not -1 <= port <= 65535:
        raise ValueError(f"invalid port {port}: 1 to 65535, or -1 to switch it off")
    return port


def _log_level(value: Any) -> str:
    level = str(_only(str)(value)).lower()
    level = _LOG_LEVEL_ALIASES.get(level, level)
    if level not in LOG_LEVELS:
        raise ValueError(f'invalid log level "{value}": one of {", ".join(LOG_LEVELS)}')
    return level


def is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, UnicodeError, ValueError):
            continue
        return True
    return False


def _address(value: Any) -> str:
    text = str(_only(str)(value)).strip()
    _refuse_template(text)
    text = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if " " in text:
        raise ValueError("cannot contain multiple addresses; use addresses.http and addresses.dns to listen on several")
    if text and not is_address(text):
        raise ValueError(f"invalid ip address: {text}")
    return text


def _addresses(value: Any) -> tuple[str, ...]:
    """Consul's space-separated list of addresses to listen on; a unix socket is written unix:///path."""
    text = str(_only(str)(value))
    _refuse_template(text)
    found = tuple(a[1:-1] if a.startswith("[") and a.endswith("]") else a for a in text.split())
    for address in found:
        if not (address.startswith("unix://") or is_address(address)):
            raise ValueError(f"invalid ip address: {address}")
    return found


def _refuse_template(text: str) -> None:
    if "{{" in text:
        raise ValueError(
            "go-sockaddr templates are not supported: give the address itself, "
            "or bind to 0.0.0.0 and one of this host's addresses is advertised"
        )


def _joins(value: Any) -> tuple[str, ...]:
    addresses = tuple(filter(None, _texts(value)))
    for address in addresses:
        if "=" in address:
            raise ValueError(f'cloud auto-join is not supported: "{address}"; give addresses or host names')
        _refuse_template(address)
    return addresses


def _secret_key(value: Any) -> Secret:
    """The cluster secret, or the new and the old one with a comma between; nothing of it may appear in the message."""
    text = str(_only(str)(value))
    secrets = text.split(",") if text else []
    if len(secrets) > 2:
        raise ValueError("more than two keys: during a change it is the new one, a comma, and the old one")
    for secret in secrets:
        try:
            raw = binascii.a2b_base64(secret.strip().encode("ascii"), strict_mode=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) not in (16, 24, 32):
            raise ValueError(
                'not a key: it must be 32 random bytes (or 16 or 24) in base64, such as "rostra keygen" prints'
            )
    return Secret(text)


def _meta_pair(text: str) -> dict[str, str]:
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise ValueError(f'"{text}" must have the form key:value')
    return {key: value}


def one_of(*choices: str) -> Kind:
    def read(value: Any) -> str:
        if _only(str)(value) not in choices:
            raise ValueError(f'"{value}" must be one of {", ".join(choices)}')
        return str(value)

    return Kind("a string", read, read)


def between(low: int, high: int) -> Kind:
    def read(value: Any) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(f"cannot be {number}; it must be between {low} and {high}")
        return number

    return Kind("a whole number", read, lambda text: read(_whole(text)))


def _durations(value: Any) -> dict[str, float]:
    return {key: _seconds(text) if text else 0.0 for key, text in _text_map(value).items()}


def _append(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*old, *new)


def update(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {**old, **new}


TEXT = Kind("a string", _only(str), str)
WHOLE = Kind("a whole number", _integer, _whole)
SWITCH = Kind("true or false", _only(bool), _switch, is_switch=True)
DURATION = Kind('a duration in quotes, such as "30s"', _duration, _duration)
PORT = Kind("a port number", _port, lambda text: _port(_whole(text)))
LOG_LEVEL = Kind("a string", _log_level, _log_level)
ADDRESS = Kind("a string", _address, _address)
ADDRESSES = Kind("a string of addresses with spaces between them", _addresses, _addresses)
SECRET_KEY = Kind("a string", _secret_key, _secret_key)
TEXTS = Kind("a list of strings", _texts, lambda text: (text,), _append)
JOINS = Kind("a list of strings", _joins, lambda text: _joins([text]), _append)
TEXT_MAP = Kind("a map of strings", _text_map, _meta_pair, update)
DURATIONS = Kind("a map of durations in quotes", _durations, str, update)
MAP = Kind("a map", _map, str, update)


def _keep_list(value: Any) -> list[str]:
    return list(_texts(value))


def _headers(value: Any) -> dict[str, list[str]]:
    return {key: [v] if isinstance(v, str) else _keep_list(v or []) for key, v in _only(dict)(value).items()}


def _duration_text(value: Any) -> str:
    _duration(value)
    return str(value)


#: The fields of definitions. They are handed on as they are written, so that an agent that is asked reads them itself.
DEFINED = {
    Type.TEXT: TEXT,
    Type.NAMESPACE: TEXT,
    Type.WHOLE: WHOLE,
    Type.SWITCH: SWITCH,
    Type.DURATION: Kind('a duration in quotes, such as "10s"', _duration_text, str),
    Type.TEXTS: Kind("a list of strings", _keep_list, str),
    Type.MAP: MAP,
    Type.TEXT_MAP: TEXT_MAP,
    Type.HEADER: Kind("a map of lists of strings", _headers, str),
    Type.STATUS: one_of("passing", "warning", "critical"),
}
