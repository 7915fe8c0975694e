"""`?pretty`: JSON written over several lines, piece by piece, so that a large body holds nobody up.

The tokens stay as they are; only what stands between them changes. Parsing would hold the interpreter for the length of
the body, whatever thread it is done on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Tokens of a piece: about a tenth of a millisecond.
TOKENS = 256

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|\{\s*\}|\[\s*\]|[{}\[\],:]|[^\s"{}\[\],:]+', re.DOTALL)
_EMPTY = {ord("{"): b"{}", ord("["): b"[]"}


def indented(body: bytes) -> Iterator[bytes]:
    """The pieces of a JSON text, indented by four spaces and ended by a newline, as Consul writes it."""
    depth = 0
    lines = [b"\n"]  # by depth
    out: list[bytes] = []
    for found in _TOKEN.finditer(body):
        token = found[0]
        first = token[0]
        if first in b"{[":
            if len(token) > 1:
                out.append(_EMPTY[first])
            else:
                depth += 1
                if depth == len(lines):
                    lines.append(b"\n" + b"    " * depth)
                out += (token, lines[depth])
        elif first in b"}]":
            depth -= 1
            out += (lines[depth], token)
        elif token == b",":
            out += (token, lines[depth])
        elif token == b":":
            out.append(b": ")
        else:
            out.append(token)
        if len(out) >= TOKENS:
            yield b"".join(out)
            out.clear()
    out.append(b"\n")
    yield b"".join(out)
