"""What is kept of many operations of one kind, in bounded memory.

[Note: window] Counts, sums, minima and maxima are of all operations. Of single latencies only the last ones are kept,
the *window*; averages are taken over it without its lowest and highest tenth, so that a slow first operation (which
makes a communicator) does not spoil them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_logging._bandwidth import RULES, bandwidth, convert_size


class OpKey(NamedTuple):
    """What operations are told apart by."""

    record_name: str
    raw_name: str  # chooses the formula
    msg_size: int  # bytes; rounded up to a power of two where a record has too many sizes
    group_size: int


@dataclass(slots=True)
class OpStats:
    """The operations of one key. Times in milliseconds."""

    key: OpKey
    recent: deque[float]
    count: int = 0
    total_bytes: int = 0
    total_latency: float = 0.0
    min_latency: float = field(default=math.inf)
    max_latency: float = 0.0

    def add(self, latency: float, size: int) -> None:
        """Count one operation."""
        self.count += 1
        self.total_bytes += size
        self.total_latency += latency
        self.min_latency = min(self.min_latency, latency)
        self.max_latency = max(self.max_latency, latency)
        self.recent.append(latency)

    def copy(self) -> OpStats:
        """Return a snapshot."""
        sums = (self.count, self.total_bytes, self.total_latency, self.min_latency, self.max_latency)
        return OpStats(self.key, deque(self.recent, self.recent.maxlen), *sums)

    def bandwidth(self, latency: float) -> tuple[float, float]:
        """Return both bandwidths in Gbit/s if one operation of mean size takes ``latency``."""
        return bandwidth(RULES.get(self.key.raw_name), self.total_bytes / self.count, latency, self.key.group_size)


def trimmed_mean(values: Sequence[float], fraction: float = 0.1) -> float:
    """Return the mean without the lowest and the highest ``fraction`` of the values; 0.0 of none.

    >>> trimmed_mean([1, 2, 3, 4, 5, 6, 7, 8, 9, 1000])
    5.5
    """
    cut = int(len(values) * fraction)
    kept = sorted(values)[cut : len(values) - cut]
    return math.fsum(kept) / len(kept) if kept else 0.0


def summarize(group: Sequence[OpStats]) -> dict[str, Any]:
    """Return what is known of operations of one record and one message size, over one or more group sizes."""
    count = sum(stats.count for stats in group)
    means = [trimmed_mean(stats.recent) for stats in group]
    times = [stats.count * mean for stats, mean in zip(group, means, strict=True)]
    rates = [stats.bandwidth(mean) for stats, mean in zip(group, means, strict=True)]
    time = math.fsum(times)

    def overall(which: int) -> float:  # bytes over time, of all together
        return math.fsum(rate[which] * t for rate, t in zip(rates, times, strict=True)) / time if time else 0.0

    size = group[0].key.msg_size
    return {
        "count": count,
        "total_latency_ms": math.fsum(stats.total_latency for stats in group),
        "avg_latency_ms": time / count,
        "min_latency_ms": min(stats.min_latency for stats in group),
        "max_latency_ms": max(stats.max_latency for stats in group),
        "tput_avg_gbps": overall(0),
        "busbw_avg_gbps": overall(1),
        "msg_size_bytes": size,
        "msg_size_str": convert_size(size),
    }


def by_record(snapshot: Iterable[OpStats]) -> dict[str, dict[int, list[OpStats]]]:
    """Sort statistics by record name (as first seen) and message size (ascending)."""
    found: dict[str, dict[int, list[OpStats]]] = {}
    for stats in snapshot:
        found.setdefault(stats.key.record_name, {}).setdefault(stats.key.msg_size, []).append(stats)
    return {name: dict(sorted(sizes.items())) for name, sizes in found.items()}


def summarize_all(snapshot: Iterable[OpStats]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {record name: {message size: what `summarize` says, and "by_group_size"}}."""
    return {
        name: {size: {**summarize(group), "by_group_size": _by_group_size(group)} for size, group in sizes.items()}
        for name, sizes in by_record(snapshot).items()
    }


def _by_group_size(group: Sequence[OpStats]) -> dict[int, dict[str, Any]]:
    sizes = sorted({stats.key.group_size for stats in group})
    return {n: summarize([stats for stats in group if stats.key.group_size == n]) for n in sizes}
