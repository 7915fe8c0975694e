"""Log lines to stderr in the shape of Consul's: levels trace, debug, info, warn, err; text or one JSON object a line.

A module asks once for `log = get("agent.sync")` and logs a constant event with its data in fields. `configure` is
called by the composition roots. structlog is imported here only, and only when the first line is really written:
programs that log nothing do not pay for it. Fields that are named like secrets, and anything that looks like a private
key, are printed as `***`. Pure code does not log.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO

LEVELS: dict[str, int] = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "err": 40}
#: What Consul's `-log-level` also takes.
_ALIASES = {"warning": "warn", "error": "err"}
_TAGS = {"trace": "[TRACE]", "debug": "[DEBUG]", "info": "[INFO] ", "warn": "[WARN] ", "err": "[ERROR]"}
_JSON_NAMES = {"warn": "warn", "err": "error"}

#: Of one field, and of a traceback.
VALUE_CHARS_MAX, TRACE_CHARS_MAX = 4096, 8192

_SECRET_NAMES = ("secret", "secretid", "token", "encrypt", "key_pem", "password", "authorization")
#: Names that end like a secret's but hold what a person needs to see.
_PUBLIC_NAMES = frozenset({"token_accessor", "accessor", "token_name"})
_HIDDEN = "***"

_threshold = LEVELS["info"]
_bound: Any = None  # structlog's logger once the first line was written
_json = False
_stream: TextIO | None = None  # None: whatever sys.stderr is when the line is written


def parse_level(name: str) -> str:
    """The level that the operator means. Raises ValueError with the list of levels."""
    level = _ALIASES.get(name.lower(), name.lower())
    if level not in LEVELS:
        raise ValueError(f"log level {name!r} is not one of {', '.join(LEVELS)}")
    return level


def configure(level: str = "info", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Set level and format for the whole process; may be called again at a reload."""
    global _threshold, _json, _stream, _bound
    _threshold = LEVELS[parse_level(level)]
    _json = as_json
    _stream = stream
    _bound = None
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(logging.WARNING)


def get(name: str, **fields: Any) -> Log:
    """The logger of a part of the program, `fields` on each of its lines."""
    return Log(name, fields)


class Log:
    """Writes events of one part. Cheap to make and, below the level, cheap to call."""

    __slots__ = ("_fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self._fields = dict(fields or {})

    def bind(self, **fields: Any) -> Log:
        """The same logger with more fields on each line."""
        return Log(self.name, {**self._fields, **fields})

    def trace(self, event: str, **fields: Any) -> None:
        if _threshold <= 5:
            self.write("trace", event, fields)

    def debug(self, event: str, **fields: Any) -> None:
        if _threshold <= 10:
            self.write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        if _threshold <= 20:
            self.write("info", event, fields)

    def warn(self, event: str, **fields: Any) -> None:
        if _threshold <= 30:
            self.write("warn", event, fields)

    def err(self, event: str, **fields: Any) -> None:
        """`exc_info=True` or an exception adds its traceback."""
        self.write("err", event, fields)

    def write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        if LEVELS[level] < _threshold:
            return
        global _bound
        if _bound is None:
            _bound = _structlog()
        try:
            _bound.emit(level, self.name, event, {**self._fields, **fields})
        except (OSError, ValueError):  # a closed or full stderr must not take the program down
            pass


class RateLimited:
    """Lets one line per `interval_s` through for each key, and says on the next how many it held back.

    For events that a stranger can cause as often as he likes: rejected handshakes, bad frames, unreachable peers.
    """

    KEYS_MAX = 256

    def __init__(self, log: Log, interval_s: float = 10.0, *, now: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._interval_s = interval_s
        self._now = now
        self._last: OrderedDict[str, list[float]] = OrderedDict()  # key -> [time of its last line, held back since]

    def info(self, event: str, *, key: str = "", **fields: Any) -> bool:
        return self.write("info", event, key, fields)

    def warn(self, event: str, *, key: str = "", **fields: Any) -> bool:
        """True when the line was written."""
        return self.write("warn", event, key, fields)

    def err(self, event: str, *, key: str = "", **fields: Any) -> bool:
        return self.write("err", event, key, fields)

    def write(self, level: str, event: str, key: str, fields: dict[str, Any]) -> bool:
        name = f"{event}\0{key}"
        now = self._now()
        last = self._last.get(name)
        if last is not None and now - last[0] < self._interval_s:
            last[1] += 1
            return False
        if last is not None and last[1]:
            fields["held_back"] = int(last[1])
        self._last[name] = [now, 0]
        self._last.move_to_end(name)
        if len(self._last) > self.KEYS_MAX:
            self._last.popitem(last=False)
        self._log.write(level, event, fields)
        return True


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: by the field's name, or because it is a private key."""
    if name and _is_secret(name):
        return _HIDDEN if value not in ("", None, b"") else value
    if isinstance(value, str):
        return _HIDDEN if "PRIVATE KEY-----" in value else value
    if isinstance(value, (bytes, bytearray)):
        return _HIDDEN if b"PRIVATE KEY-----" in value else value
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v) for v in value]
    return value


def _is_secret(name: str) -> bool:
    lowered = name.lower().replace("-", "_")
    if lowered in _PUBLIC_NAMES:
        return False
    return any(lowered == s or lowered.startswith(s + "_") or lowered.endswith("_" + s) for s in _SECRET_NAMES)


# -- structlog, from the first line on -------------------------------------------------------------------------------


def _structlog() -> Any:
    import structlog
    from structlog.processors import TimeStamper, format_exc_info

    render = _render_json if _json else _render_text

    class Bound(structlog.BoundLoggerBase):
        def emit(self, level: str, name: str, event: str, fields: dict[str, Any]) -> None:
            self._proxy_to_logger("msg", event, **{**fields, "level": level, "logger": name})

    class Stream:
        def msg(self, line: str) -> None:
            stream = _stream or sys.stderr
            stream.write(line + "\n")  # one write, so that lines of several processes do not mix
            stream.flush()

    return structlog.wrap_logger(
        Stream(),
        processors=[
            structlog.contextvars.merge_contextvars,
            _redact_fields,
            TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
            format_exc_info,
            _bound_fields,
            render,
        ],
        wrapper_class=Bound,
        cache_logger_on_first_use=False,
    ).bind()


def _redact_fields(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {k: v if k in ("event", "level", "logger", "exc_info") else redact(v, k) for k, v in fields.items()}


def _bound_fields(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {k: _cut(v, TRACE_CHARS_MAX if k == "exception" else VALUE_CHARS_MAX) for k, v in fields.items()}


def _cut(value: Any, chars_max: int) -> Any:
    """`value`, or beginning and end of its text where that is longer: what strangers send gets into errors' texts."""
    if isinstance(value, (dict, list, tuple, bytes)):
        text = str(value) if len(str(value)) > chars_max else ""
    else:
        text = value if isinstance(value, str) else ""
    if len(text) <= chars_max:
        return value
    half = chars_max // 2
    return f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"


def _render_text(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> str:
    level, name, at = fields.pop("level"), fields.pop("logger"), fields.pop("timestamp")
    event, trace = fields.pop("event"), fields.pop("exception", None)
    line = f"{at[:23]}Z {_TAGS[level]} {name}: {_one_line(str(event))}"
    if fields:
        line += ": " + " ".join(f"{k}={_text(v)}" for k, v in fields.items())
    return f"{line}\n{trace}" if trace else line


def _render_json(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> str:
    level, name, at = fields.pop("level"), fields.pop("logger"), fields.pop("timestamp")
    head = {
        "@level": _JSON_NAMES.get(level, level),
        "@message": str(fields.pop("event")),
        "@module": name,
        "@timestamp": at[:23] + "Z",
    }
    return json.dumps({**head, **fields}, default=_plain, ensure_ascii=False)


def _text(value: Any) -> str:
    if isinstance(value, str):
        plain = value and value.isprintable() and not set(value) & set(' "=')
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return _one_line(_plain(value) if isinstance(value, bytes) else str(value))


def _one_line(text: str) -> str:
    """`text` without anything that could fake a second line or drive a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _plain(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


class _Foreign(logging.Handler):
    """Warnings of asyncio, aiohttp and others, in our format."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "err" if record.levelno >= logging.ERROR else "warn" if record.levelno >= logging.WARNING else "info"
        fields = {"exc_info": record.exc_info} if record.exc_info else {}
        Log(record.name).write(level, record.getMessage(), fields)
