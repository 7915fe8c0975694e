"""The agent's numbers: counters, gauges and histograms, rendered as Consul's JSON or as Prometheus text.

Everything in the agent counts here: `metrics.count("http.requests")`, `metrics.gauge("cache.bytes", lambda: n)`,
`metrics.observe("http.request", ms)`. Names are dotted words; labels are few and bounded by the caller. Calls cost a
dictionary look-up each and never raise.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

#: Upper bounds in milliseconds. A loop step has its limit at 2, hence the fine grain around it.
BUCKETS_MS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]


class Histogram:
    """Counts per bucket, with sum, sum of squares, least and greatest, all in milliseconds."""

    __slots__ = ("buckets", "count", "high", "low", "squares", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS_MS) + 1)
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        self.low = 0.0
        self.high = 0.0

    def add(self, ms: float) -> None:
        self.buckets[bisect_left(BUCKETS_MS, ms)] += 1
        self.low = ms if not self.count else min(self.low, ms)
        self.high = max(self.high, ms)
        self.count += 1
        self.total += ms
        self.squares += ms * ms

    @property
    def deviation(self) -> float:
        if self.count < 2:
            return 0.0
        variance = (self.squares - self.total * self.total / self.count) / (self.count - 1)
        return math.sqrt(max(0.0, variance))


class Metrics:
    def __init__(self, prefix: str = "consul") -> None:
        self._prefix = prefix
        self._counters: dict[Series, float] = {}
        self._gauges: dict[Series, float | Callable[[], float]] = {}
        self._histograms: dict[Series, Histogram] = {}

    def count(self, name: str, n: float = 1, labels: Mapping[str, str] | None = None) -> None:
        series = (name, _labels(labels) if labels else ())
        self._counters[series] = self._counters.get(series, 0) + n

    def gauge(self, name: str, value: float | Callable[[], float], labels: Mapping[str, str] | None = None) -> None:
        """Set a gauge, or the function that is asked for it when somebody looks."""
        self._gauges[name, _labels(labels)] = value

    def observe(self, name: str, ms: float, labels: Mapping[str, str] | None = None) -> None:
        self.histogram(name, labels).add(ms)

    def histogram(self, name: str, labels: Mapping[str, str] | None = None) -> Histogram:
        """The histogram of that name, made on first use: hot loops keep it and call `add`."""
        series = (name, _labels(labels))
        found = self._histograms.get(series)
        if found is None:
            found = self._histograms[series] = Histogram()
        return found

    def counter(self, name: str, labels: Mapping[str, str] | None = None) -> float:
        return self._counters.get((name, _labels(labels)), 0)

    # -- views ----------------------------------------------------------------------------------------------------

    def to_json(self, now: datetime | None = None) -> dict[str, Any]:
        """The object of `GET /v1/agent/metrics`. Counters and samples are totals since the start of the agent."""
        at = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M:%S +0000 UTC")
        return {
            "Timestamp": at,
            "Gauges": [
                {"Name": self._dotted(name), "Value": value, "Labels": dict(labels)}
                for (name, labels), value in sorted(self._read_gauges().items())
            ],
            "Points": [],
            "Counters": [
                {
                    "Name": self._dotted(name),
                    "Count": int(n),
                    "Rate": 0,
                    "Sum": n,
                    "Min": 1,
                    "Max": n,
                    "Mean": 1,
                    "Stddev": 0,
                    "Labels": dict(labels),
                }
                for (name, labels), n in sorted(self._counters.items())
            ],
            "Samples": [
                {
                    "Name": self._dotted(name),
                    "Count": h.count,
                    "Rate": 0,
                    "Sum": h.total,
                    "Min": h.low,
                    "Max": h.high,
                    "Mean": h.total / h.count if h.count else 0,
                    "Stddev": h.deviation,
                    "Labels": dict(labels),
                }
                for (name, labels), h in sorted(self._histograms.items())
            ],
        }

    def to_prometheus(self) -> str:
        """The text exposition format, version 0.0.4."""
        lines: list[str] = []
        families: dict[str, tuple[str, list[str]]] = {}
        for (name, labels), value in sorted(self._read_gauges().items()):
            metric = self._underscored(name)
            families.setdefault(metric, ("gauge", []))[1].append(f"{metric}{_braces(labels)} {_number(value)}")
        for (name, labels), n in sorted(self._counters.items()):
            metric = self._underscored(name)
            families.setdefault(metric, ("counter", []))[1].append(f"{metric}{_braces(labels)} {_number(n)}")
        for (name, labels), h in sorted(self._histograms.items()):
            metric = self._underscored(name)
            out = families.setdefault(metric, ("histogram", []))[1]
            seen = 0
            for bound, n in zip((*map(_number, BUCKETS_MS), "+Inf"), h.buckets):
                seen += n
                out.append(f"{metric}_bucket{_braces((*labels, ('le', bound)))} {seen}")
            out.append(f"{metric}_sum{_braces(labels)} {_number(h.total)}")
            out.append(f"{metric}_count{_braces(labels)} {h.count}")
        for metric, (kind, samples) in families.items():
            lines.append(f"# HELP {metric} {metric}")
            lines.append(f"# TYPE {metric} {kind}")
            lines.extend(samples)
        return "\n".join(lines) + "\n"

    def _read_gauges(self) -> dict[Series, float]:
        values: dict[Series, float] = {}
        for series, value in list(self._gauges.items()):
            if callable(value):
                try:
                    value = value()
                except Exception:  # noqa: S112 - one broken gauge must not hide all the others
                    continue
            values[series] = value
        return values

    def _dotted(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def _underscored(self, name: str) -> str:
        return re.sub(r"[^a-zA-Z0-9_:]", "_", f"{self._prefix}_{name}")


def _labels(labels: Mapping[str, str] | None) -> Labels:
    return tuple(sorted(labels.items())) if labels else ()


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{re.sub("[^a-zA-Z0-9_]", "_", k)}="{_escape(v)}"' for k, v in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
