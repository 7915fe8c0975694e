"""What servers take from agents, known at both ends: a server checks it, an agent refuses what would not be taken.

The log is for ever, and every server has to live with what is in it. Called by `server/endpoint.py` for what comes in,
and by `agent/bounds.py` and `agent/config/rules.py` for what is accepted from users.
"""

from __future__ import annotations

import math
import re
from typing import Any

from rostra.wire.errors import BadRequest, TooLarge
from rostra.wire.frames import ANSWER_FRAME_BYTES_MAX

#: What a command or query of an agent may be.
NAME_CHARS_MAX, TEXT_CHARS_MAX, ITEMS_MAX, DEPTH_MAX = 16 << 10, 128 << 10, 16 << 10, 32
#: A service with all its checks is one row of an answer, and a row is never cut; so are the checks of a node.
INSTANCE_BYTES_MAX = ANSWER_FRAME_BYTES_MAX // 4
DATACENTER_CHARS_MAX = 64
NODE_NAME_RULE = "1 to 64 letters, digits, '-', '_' or '.'"

_NODE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PLAIN = frozenset((type(None), bool, int, float))


def is_node_name(name: str) -> bool:
    """Whether a node may be called so: the name stands in certificates, in DNS and in paths."""
    return _NODE_NAME.fullmatch(name) is not None


def check_arguments(args: Any, items_max: int = ITEMS_MAX) -> None:
    """Bounds for what agents put into the log and ask for. Raises BadRequest or TooLarge.

    Nesting is what matters most: a map that recursion cannot follow would stop every server that applies it, for ever.
    """
    if type(args) is not dict:
        raise BadRequest("the fields must be a map")
    deeper: list[Any] = []
    for value in args.values():
        kind = type(value)
        if kind is str:
            if len(value) > NAME_CHARS_MAX:
                raise TooLarge(f"a field of {len(value)} characters; at most {NAME_CHARS_MAX} are allowed")
        elif kind is dict or kind is tuple:
            deeper.append(value)
        elif kind not in _PLAIN and kind is not bytes:
            raise BadRequest(f"a field is of type {kind.__name__}")
    depth, count = 0, 0
    while deeper:
        depth += 1
        if depth > DEPTH_MAX:
            raise TooLarge(f"maps and lists are nested more than {DEPTH_MAX} deep")
        level, deeper = deeper, []
        for holder in level:
            count += len(holder)
            if count > items_max:
                raise TooLarge(f"more than {items_max} items in maps and lists")
            for value in (*holder, *holder.values()) if type(holder) is dict else holder:
                kind = type(value)
                if kind is str:
                    if len(value) > TEXT_CHARS_MAX:
                        raise TooLarge(f"a text of {len(value)} characters; at most {TEXT_CHARS_MAX} are allowed")
                elif kind is dict or kind is tuple:
                    deeper.append(value)
                elif kind is float:
                    if not math.isfinite(value):
                        raise BadRequest("a number is not finite")
                elif kind not in _PLAIN:
                    raise BadRequest(f"a value is of type {kind.__name__}")
