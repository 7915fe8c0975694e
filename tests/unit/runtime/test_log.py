"""Log lines: Consul's shape, one line per event, no secrets, and no flood."""

import io
import json
import logging
import subprocess
import sys

import pytest

from rostra.runtime import log


@pytest.fixture
def lines():
    stream = io.StringIO()

    def configure(level="info", **more):
        log.configure(level, stream=stream, **more)
        return stream

    yield configure
    log.configure("info")
    logging.getLogger().handlers[:] = []


def test_a_line_has_time_level_part_event_and_fields(lines):
    stream = lines()
    log.get("agent.sync", node="web-1").info("session expired", session="ab", tries=3)
    when, rest = stream.getvalue().split(" ", 1)
    assert len(when) == len("2026-01-01T00:00:00.000Z")
    assert rest == "[INFO]  agent.sync: session expired: node=web-1 session=ab tries=3\n"


def test_json_lines_have_consuls_names(lines):
    stream = lines(as_json=True)
    log.get("agent").err("gone", peer={"token": "t", "name": "x"})
    line = json.loads(stream.getvalue())
    assert line.pop("@timestamp").endswith("Z")
    assert line == {
        "@level": "error",
        "@message": "gone",
        "@module": "agent",
        "peer": {"token": "***", "name": "x"},
    }


@pytest.mark.parametrize(
    ("level", "shown"), [("trace", 5), ("debug", 4), ("info", 3), ("warn", 2), ("err", 1), ("WARNING", 2), ("error", 1)]
)
def test_levels_below_the_set_one_are_silent(lines, level, shown):
    stream = lines(level)
    part = log.get("x")
    for write in (part.trace, part.debug, part.info, part.warn, part.err):
        write("event")
    assert stream.getvalue().count("\n") == shown


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_is_bounded_whatever_is_told_and_whatever_is_raised(lines, as_json):
    def fall(n):
        return [fall(n + 1) for _ in (1,)]

    stream = lines(as_json=as_json)
    try:
        fall(0)
    except RecursionError:
        log.get("x").err("failed", exc_info=True, body="y" * 100_000, rows=list(range(100_000)))
    text = stream.getvalue()
    assert len(text) < 30_000
    assert "RecursionError" in text
    assert "characters" in text


def test_an_unknown_level_is_refused_with_the_list():
    with pytest.raises(ValueError, match="trace, debug, info, warn, err"):
        log.parse_level("loud")


@pytest.mark.parametrize(
    "name", ["secret", "token", "encrypt", "key_pem", "SecretID", "acl_token", "private_key_pem", "secret-id", "TOKEN"]
)
def test_fields_named_like_secrets_are_hidden(lines, name):
    stream = lines()
    log.get("x").info("event", **{name: "hunter2", "deep": {"list": [{name: "hunter2"}]}})
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count("***") == 2


def test_private_keys_are_hidden_under_any_name(lines):
    stream = lines()
    pem = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n"
    log.get("x").info("event", blob=pem, raw=pem.encode(), many=[pem])
    assert "MHcCAQEE" not in stream.getvalue()


def test_other_fields_are_shown(lines):
    stream = lines()
    log.get("x").info("event", token_accessor="a1", tokens=2, key="web", empty_token="")
    assert "token_accessor=a1 tokens=2 key=web empty_token=" in stream.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_from_outside_makes_a_second_line(lines, as_json):
    stream = lines(as_json=as_json)
    log.get("x").info("from\noutside", peer="a\nb", raw=b"\n\xff", other=ValueError("c\nd"), esc="\x1b[31m")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_an_exception_brings_its_traceback(lines):
    stream = lines()
    try:
        raise LookupError("where")
    except LookupError as e:
        log.get("x").err("failed", exc_info=e)
    assert "LookupError: where" in stream.getvalue()


def test_warnings_of_other_libraries_come_in_the_same_shape(lines):
    stream = lines()
    logging.getLogger("asyncio").warning("slow %s", "callback")
    logging.getLogger("asyncio").info("not this")
    assert stream.getvalue().endswith("[WARN]  asyncio: slow callback\n")


def test_a_closed_stderr_stops_nobody(lines):
    lines().close()
    log.get("x").info("event")


def test_a_flood_becomes_one_line_per_interval_and_key(lines):
    stream = lines()
    now = [0.0]
    limited = log.RateLimited(log.get("x"), 10, now=lambda: now[0])
    written = [limited.warn("rejected", key="a", n=i) for i in range(50)]
    assert written == [True] + [False] * 49
    assert limited.warn("rejected", key="b")
    now[0] = 10.0
    assert limited.warn("rejected", key="a")
    assert stream.getvalue().count("\n") == 3
    assert stream.getvalue().endswith("held_back=49\n")


def test_a_flood_of_different_keys_takes_bounded_memory(lines):
    lines()
    limited = log.RateLimited(log.get("x"), 10)
    for i in range(5000):
        limited.info("rejected", key=str(i))
    assert len(limited._last) <= limited.KEYS_MAX


def test_structlog_is_imported_with_the_first_line_only():
    code = (
        "import sys; from rostra.runtime import log; log.configure('info'); log.get('x').debug('no');"
        "sys.exit('structlog' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
