"""Latencies counted in buckets of equal ratio, so that percentiles cost the same memory however many there are.

[Note: buckets] Bucket i holds what is at least ``RATIO ** i`` and less than ``RATIO ** (i + 1)``. A percentile is the
middle of its bucket, so it is off by at most half of a bucket's width, 2.5 %. Only buckets that hold something take
memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

RATIO = 1.05
_LOG_RATIO = math.log(RATIO)
_ZERO = -(10**6)  # the bucket of 0, which has no logarithm
_LOWEST = math.floor(math.log(1e-6) / _LOG_RATIO)  # a picosecond and less, given in milliseconds
_HIGHEST = math.floor(math.log(1e9) / _LOG_RATIO)  # eleven days and more


class Histogram:
    """How often which latency came. Count, sum, minimum and maximum are exact.

    >>> latencies = Histogram()
    >>> for milliseconds in (1.0, 2.0, 3.0, 1000.0):
    ...     latencies.add(milliseconds)
    >>> latencies.count, latencies.total, latencies.percentile(100)
    (4, 1006.0, 1000.0)
    """

    __slots__ = ("buckets", "count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = -math.inf

    def add(self, value: float) -> None:
        """Count one value, finite and 0 or more."""
        bucket = _ZERO if value <= 0 else min(max(math.floor(math.log(value) / _LOG_RATIO), _LOWEST), _HIGHEST)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += value
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` counted, too."""
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def copy(self) -> Histogram:
        """Return one that does not change with this one."""
        made = Histogram()
        made.merge(self)
        return made

    def percentile(self, percent: float) -> float | None:
        """Return the smallest value that ``percent`` of all values do not exceed, within 2.5 %; ``None`` of none."""
        if not self.count:
            return None
        rank = max(1, math.ceil(self.count * percent / 100))
        if rank == self.count:
            return self.maximum
        passed = 0
        for bucket in sorted(self.buckets):
            passed += self.buckets[bucket]
            if passed >= rank:
                break
        middle = 0.0 if bucket == _ZERO else math.exp((bucket + 0.5) * _LOG_RATIO)
        return min(max(middle, self.minimum), self.maximum)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, of JSON's types only."""
        return {
            "buckets": [[bucket, count] for bucket, count in sorted(self.buckets.items())],
            "total": self.total,
            "minimum": self.minimum if self.count else None,
            "maximum": self.maximum if self.count else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Histogram:
        """Return the histogram that `to_json` wrote."""
        made = cls()
        made.buckets = {int(bucket): int(count) for bucket, count in data["buckets"]}
        made.count = sum(made.buckets.values())
        made.total = float(data["total"])
        if made.count:
            made.minimum, made.maximum = float(data["minimum"]), float(data["maximum"])
        return made
