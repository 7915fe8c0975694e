"""Granules: the names of what an answer depends on, and of what a command touched.

    kv:<key>  kvdir:<directory>  service:<name>  connect:<destination>  node:<name>  session:<id>
    intention:<destination>  config:<kind>/<name>
    table:nodes  table:service-names  table:service-addresses  table:checks  table:sessions  table:intentions
    table:ca  table:cluster  table:autopilot

Names of nodes and services do not differ by case, so their granules are in lower case. Agents see only the 64-bit hash.
"""

from __future__ import annotations

import functools
from hashlib import blake2b

#: Directories of a key that are told apart, the root included. A deeper prefix shares the granule of its 16th level.
LEVELS_MAX = 16

#: The floor that an absent granule of this family has. `table:` granules never become absent.
FLOOR_OF = {
    "kv": "kv",
    "kvdir": "kv",
    "service": "services",
    "connect": "services",
    "node": "nodes",
    "session": "sessions",
    "intention": "intentions",
    "config": "config",
}
FLOORS = ("kv", "services", "nodes", "sessions", "intentions", "config")


@functools.lru_cache(maxsize=65536)
def granule_hash(granule: str) -> int:
    """The 64 bits by which servers and agents name a granule to each other."""
    return int.from_bytes(blake2b(granule.encode(), digest_size=8).digest(), "big")


def directories(key: str) -> list[str]:
    """The directories that contain `key`: "a/b/c" lies in "", "a/" and "a/b/"."""
    found = [""]
    at = key.find("/") + 1
    while at and len(found) < LEVELS_MAX:
        found.append(key[:at])
        at = key.find("/", at) + 1
    return found


def parent_directories(key: str) -> tuple[str, ...]:
    """As `directories`, remembered by the directory in which the key lies."""
    parent = key[: key.rfind("/") + 1]
    found = _remembered.get(parent)
    if found is None:
        found = tuple(directories(parent))
        if len(parent) <= _REMEMBERED_CHARS_MAX:
            if len(_remembered) >= _REMEMBERED_MAX:
                _remembered.clear()
            _remembered[parent] = found
    return found


_REMEMBERED_MAX, _REMEMBERED_CHARS_MAX = 16384, 256
_remembered: dict[str, tuple[str, ...]] = {}


def directory_of(prefix: str) -> str:
    """The smallest directory that contains every key under `prefix` and has a granule of its own."""
    directory = prefix[: prefix.rfind("/") + 1]
    if directory.count("/") < LEVELS_MAX:
        return directory
    return directories(directory)[-1]


def after_prefix(prefix: str) -> str | None:
    """The first string after all that begin with `prefix`; None when there is no such string."""
    stem = prefix.rstrip("\U0010ffff")
    return stem[:-1] + chr(ord(stem[-1]) + 1) if stem else None
