from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.wire.durations import MILLISECOND, SECOND, format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("10s", 10 * SECOND),
        ("60000ms", 60 * SECOND),
        ("4.5s", 4500 * MILLISECOND),
        ("1h2m3s", 3723 * SECOND),
        (".5m", 30 * SECOND),
        ("1.s", SECOND),
        ("0", 0),
        ("-10s", -10 * SECOND),
        ("1us", 1000),
        ("1µs", 1000),
        ("1h30m", 5400 * SECOND),
        ("250ms", 250 * MILLISECOND),
        ("2h3m4s", 7384 * SECOND),
    ],
)
def test_durations_are_read_as_go_reads_them(text, ns):
    assert parse_duration(text) == ns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", 'time: invalid duration "abc"'),
        ("", 'time: invalid duration ""'),
        ("10", 'time: missing unit in duration "10"'),
        ("5 s", 'time: unknown unit " s" in duration "5 s"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("s", 'time: invalid duration "s"'),
        ("1h-3m", 'time: unknown unit "h-" in duration "1h-3m"'),
        ("1x", 'time: unknown unit "x" in duration "1x"'),
        ("99999999999h", 'time: invalid duration "99999999999h"'),
    ],
)
def test_a_wrong_duration_is_refused_in_go_s_words(text, message):
    with pytest.raises(ValueError, match=message):
        parse_duration(text)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (SECOND, "1s"),
        (90 * SECOND, "1m30s"),
        (86400 * SECOND, "24h0m0s"),
        (1_500_000, "1.5ms"),
        (-SECOND, "-1s"),
    ],
)
def test_durations_are_written_as_go_writes_them(ns, text):
    assert format_duration(ns) == text


@given(st.integers(-(2**62), 2**62))
def test_what_is_written_is_read_back(ns):
    assert parse_duration(format_duration(ns)) == ns
