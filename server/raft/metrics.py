"""Histograms of durations, cheap enough for every sync and every commit."""

from __future__ import annotations

from bisect import bisect_left

#: Upper bounds in seconds; the last bucket has none.
BOUNDS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Durations:
    """How often something took how long."""

    __slots__ = ("buckets", "count", "max_s", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.count, self.sum_s, self.max_s = 0, 0.0, 0.0

    def note(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.count += 1
        self.sum_s += seconds
        self.max_s = max(self.max_s, seconds)

    def as_dict(self) -> dict[str, object]:
        """Counts per bucket (not cumulative), keyed by the upper bound."""
        names = [*(str(bound) for bound in BOUNDS_S), "inf"]
        return {
            "count": self.count,
            "sum_s": self.sum_s,
            "max_s": self.max_s,
            "buckets": dict(zip(names, self.buckets)),
        }
