"""Log lines of the proxy, in the agent's format: `2026-01-01T00:00:00.000Z [INFO]  proxy: message: key=value`.

The proxy starts often and stays small, so it imports neither structlog nor logging. Events that a stranger can cause (a
denied connection, garbage on the public port) go through `limited`: at most one line a second per event and subject,
with the number of those left out. So nobody can fill a disk from outside.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

LEVELS = {"trace": 0, "debug": 1, "info": 2, "warn": 3, "warning": 3, "error": 4, "err": 4}
_LABELS = ("[TRACE]", "[DEBUG]", "[INFO] ", "[WARN] ", "[ERROR]")
_SUBJECTS_MAX = 1024
_REPEAT_S = 1.0


class Log:
    """Writes whole lines to one stream; `level` is the lowest that is written. Safe to call from any thread."""

    __slots__ = ("_level", "_said", "_stream")

    def __init__(self, level: str = "info", stream: TextIO | None = None) -> None:
        self._level = LEVELS[level.lower()]
        self._stream = stream
        self._said: dict[tuple[str, str], list[float]] = {}

    def debug(self, message: str, **fields: Any) -> None:
        self._write(1, message, fields)

    def info(self, message: str, **fields: Any) -> None:
        self._write(2, message, fields)

    def warn(self, message: str, **fields: Any) -> None:
        self._write(3, message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._write(4, message, fields)

    def limited(self, level: str, message: str, subject: str, **fields: Any) -> None:
        """Like the others, at most once a second for this message and subject; `suppressed` counts the rest."""
        rank = LEVELS[level]
        if rank < self._level:
            return
        now = time.monotonic()
        seen = self._said.get((message, subject))
        if seen is not None and now < seen[0]:
            seen[1] += 1
            return
        if seen is None and len(self._said) >= _SUBJECTS_MAX:
            self._said.clear()
        self._said[(message, subject)] = [now + _REPEAT_S, 0]
        if seen is not None and seen[1]:
            fields["suppressed"] = int(seen[1])
        self._write(rank, message, fields)

    def _write(self, rank: int, message: str, fields: dict[str, Any]) -> None:
        if rank < self._level:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        line = f"{stamp}.{int(now * 1000) % 1000:03d}Z {_LABELS[rank]} proxy: {message}"
        if fields:
            line += ": " + " ".join(f"{k.replace('_', '-')}={_quoted(v)}" for k, v in fields.items())
        try:
            stream = self._stream or sys.stderr
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # whoever read our log is gone; traffic is more important


def _quoted(value: Any) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=' for c in text):
        return text
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else repr(character)[1:-1]
