"""What is kept of many operations of one kind, in bounded memory.

[Note: window] Counts, sums, minima, maxima and percentiles are of all operations. Of single latencies only the last
ones are kept, the *window*; averages are taken over it without its lowest and highest tenth, so that a slow first
operation (which makes a communicator) does not spoil them.

[Note: unknown latency] Where nobody saw an operation end, its latency is ``None``. It is counted, with its bytes, and
takes no part in latencies and bandwidths. The window keeps its place, since `_straggler.analyze` compares by place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_logging._comms.bandwidth import bandwidth, convert_size, rule_of
from ds_logging._comms.histogram import Histogram
from ds_logging._comms.rank_sets import RankSets, read_rank_sets

PERCENTILES = (50, 90, 99)


class OpKey(NamedTuple):
    """What operations are told apart by."""

    record_name: str
    raw_name: str  # chooses the formula
    msg_size: int  # bytes; rounded up to a power of two where a record has too many sizes
    group_size: int
    group: str | None = None  # the process group's name, where it is known
    ranks: tuple[int, ...] | None = None  # the group's global ranks, where they are known
    dtype: str = ""


@dataclass(slots=True)
class OpStats:
    """The operations of one key. Times in milliseconds."""

    key: OpKey
    recent: deque[float | None]
    count: int = 0
    total_bytes: int = 0
    timed_bytes: int = 0  # of the operations whose latency is known
    latencies: Histogram = field(default_factory=Histogram)

    def add(self, latency: float | None, size: int) -> None:
        """Count one operation."""
        self.count += 1
        self.total_bytes += size
        self.recent.append(latency)
        if latency is not None:
            self.timed_bytes += size
            self.latencies.add(latency)

    def copy(self) -> OpStats:
        """Return a snapshot."""
        recent = deque(self.recent, self.recent.maxlen)
        return OpStats(self.key, recent, self.count, self.total_bytes, self.timed_bytes, self.latencies.copy())

    def known(self) -> list[float]:
        """Return the latencies of the window that are known."""
        return [latency for latency in self.recent if latency is not None]

    def bandwidth(self, latency: float) -> tuple[float, float]:
        """Return both bandwidths in Gbit/s if one timed operation of mean size takes ``latency``."""
        size = self.timed_bytes / (self.latencies.count or 1)
        return bandwidth(rule_of(self.key.raw_name), size, latency, self.key.group_size)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, of JSON's types only."""
        return {
            "key": list(self.key),
            "recent": list(self.recent),
            "count": self.count,
            "total_bytes": self.total_bytes,
            "timed_bytes": self.timed_bytes,
            "latencies": self.latencies.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpStats:
        """Return the statistics that `to_json` wrote."""
        key = OpKey(*data["key"])
        key = key._replace(ranks=None if key.ranks is None else tuple(key.ranks))
        sums = (data["count"], data["total_bytes"], data["timed_bytes"], Histogram.from_json(data["latencies"]))
        return cls(key, deque(data["recent"]), *sums)


def pack(snapshot: Iterable[OpStats]) -> dict[str, Any]:
    """Return what `unpack` reads, of JSON's types only. The ranks of a group are written once, not once a key."""
    sets = RankSets()
    rows = [
        {**stats.to_json(), "key": [*stats.key._replace(ranks=None)], "ranks": sets.number(stats.key.ranks)}
        for stats in snapshot
    ]
    return {"ranks": sets.to_json(), "rows": rows}


def unpack(packed: Mapping[str, Any]) -> list[OpStats]:
    """Return the statistics that `pack` wrote."""
    sets = read_rank_sets(packed["ranks"])
    found = [OpStats.from_json(row) for row in packed["rows"]]
    for stats, row in zip(found, packed["rows"], strict=True):
        stats.key = stats.key._replace(ranks=sets[row["ranks"]])
    return found


def merge(snapshots: Iterable[Iterable[OpStats]]) -> list[OpStats]:
    """Join the statistics of several ranks by key. A collective counts once on every rank of its group."""
    merged: dict[OpKey, OpStats] = {}
    for snapshot in snapshots:
        for stats in snapshot:
            whole = merged.setdefault(stats.key, OpStats(stats.key, deque()))
            whole.recent.extend(stats.recent)
            whole.count += stats.count
            whole.total_bytes += stats.total_bytes
            whole.timed_bytes += stats.timed_bytes
            whole.latencies.merge(stats.latencies)
    return list(merged.values())


def trimmed_mean(values: Sequence[float], fraction: float = 0.1) -> float:
    """Return the mean without the lowest and the highest ``fraction`` of the values; 0.0 of none.

    >>> trimmed_mean([1, 2, 3, 4, 5, 6, 7, 8, 9, 1000])
    5.5
    """
    cut = int(len(values) * fraction)
    kept = sorted(values)[cut : len(values) - cut]
    return math.fsum(kept) / len(kept) if kept else 0.0


def summarize(group: Sequence[OpStats]) -> dict[str, Any]:
    """Return what is known of operations of one record and one message size, over one or more groups and dtypes.

    Latencies and bandwidths are ``None`` where no latency is known; a bus bandwidth is NaN where there is no formula.
    """
    latencies = Histogram()
    for stats in group:
        latencies.merge(stats.latencies)
    size = group[0].key.msg_size
    return {
        "count": sum(stats.count for stats in group),
        "timed_count": latencies.count,
        "total_bytes": sum(stats.total_bytes for stats in group),
        "total_latency_ms": latencies.total if latencies.count else None,
        **_averages(group),
        "min_latency_ms": latencies.minimum if latencies.count else None,
        "max_latency_ms": latencies.maximum if latencies.count else None,
        **{f"p{percent}_latency_ms": latencies.percentile(percent) for percent in PERCENTILES},
        "dtype": ", ".join(sorted({stats.key.dtype for stats in group if stats.key.dtype})),
        "msg_size_bytes": size,
        "msg_size_str": convert_size(size),
    }


def _averages(group: Sequence[OpStats]) -> dict[str, float | None]:
    # The window of a key whose last operations all ended unseen is empty: the mean of all stands in for it then.
    timed = [stats for stats in group if stats.latencies.count]
    if not timed:
        return {"avg_latency_ms": None, "tput_avg_gbps": None, "busbw_avg_gbps": None}
    means = [
        trimmed_mean(known) if (known := stats.known()) else stats.latencies.total / stats.latencies.count
        for stats in timed
    ]
    times = [stats.latencies.count * mean for stats, mean in zip(timed, means, strict=True)]
    rates = [stats.bandwidth(mean) for stats, mean in zip(timed, means, strict=True)]
    time = math.fsum(times)

    def overall(which: int) -> float:  # bytes over time, of all together
        return math.fsum(rate[which] * t for rate, t in zip(rates, times, strict=True)) / time if time else 0.0

    return {
        "avg_latency_ms": time / sum(stats.latencies.count for stats in timed),
        "tput_avg_gbps": overall(0),
        "busbw_avg_gbps": overall(1),
    }


def by_record(snapshot: Iterable[OpStats]) -> dict[str, dict[int, list[OpStats]]]:
    """Sort statistics by record name (as first seen) and message size (ascending)."""
    found: dict[str, dict[int, list[OpStats]]] = {}
    for stats in snapshot:
        found.setdefault(stats.key.record_name, {}).setdefault(stats.key.msg_size, []).append(stats)
    return {name: dict(sorted(sizes.items())) for name, sizes in found.items()}


def summarize_all(snapshot: Iterable[OpStats]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {record name: {message size: what `summarize` says, and "by_group_size" and "by_group"}}.

    "by_group" is a list, with "group", "group_size" and "ranks" added to what `summarize` says.
    """
    return {
        name: {
            size: {**summarize(group), "by_group_size": _by_group_size(group), "by_group": _by_group(group)}
            for size, group in sizes.items()
        }
        for name, sizes in by_record(snapshot).items()
    }


def _by_group_size(group: Sequence[OpStats]) -> dict[int, dict[str, Any]]:
    sizes = sorted({stats.key.group_size for stats in group})
    return {n: summarize([stats for stats in group if stats.key.group_size == n]) for n in sizes}


def _by_group(group: Sequence[OpStats]) -> list[dict[str, Any]]:
    parts: dict[tuple[int, str, tuple[int, ...], str], list[OpStats]] = {}
    for stats in group:
        key = stats.key
        parts.setdefault((key.group_size, key.group or "", key.ranks or (), key.dtype), []).append(stats)
    return [
        {
            "group": name or None,
            "group_size": n,
            "ranks": list(ranks) or None,
            **summarize(parts[n, name, ranks, dtype]),
        }
        for n, name, ranks, dtype in sorted(parts)
    ]
