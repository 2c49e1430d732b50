"""Who waits for whom: each operation's latency compared over the ranks.

[Note: straggler] In a collective everybody waits for the last to arrive, so that one has the shortest latency. The
shortest latency over the ranks is the communication itself; what a rank has above it is time it waited. Operations are
matched by their place in the sequence: the i-th of a key on one rank belongs with the i-th on every other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds_logging._bandwidth import convert_size
from ds_logging._op_stats import OpKey, OpStats, trimmed_mean

Report = Mapping[OpKey, tuple[int, list[float]]]  # how many operations there were, and the last latencies, ms


def exchange(snapshot: Iterable[OpStats]) -> tuple[int, list[Report]]:
    """Return the own rank and what every rank knows.

    All ranks must call it. It makes one ``all_gather_object``, whatever the keys are; none without a process group.
    """
    mine = {stats.key: (stats.count, list(stats.recent)) for stats in snapshot}
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 0, [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return dist.get_rank(), everyone


def analyze(rank: int, everyone: Sequence[Report]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {record name: {message size: how long this rank communicated and waited}} over the union of all keys.

    Pure arithmetic; every rank computes its own from what `exchange` returned.
    """
    keys = dict.fromkeys(key for report in everyone for key in report)
    groups: dict[str, dict[int, list[OpKey]]] = {}
    for key in keys:
        groups.setdefault(key.record_name, {}).setdefault(key.msg_size, []).append(key)
    return {
        name: {size: _compare(rank, everyone, groups[name][size]) for size in sorted(groups[name])} for name in groups
    }


def _compare(rank: int, everyone: Sequence[Report], keys: Sequence[OpKey]) -> dict[str, Any]:
    shortest: list[float] = []
    waited: list[float] = []
    waits: dict[int, float] = {}  # by rank, over the compared operations
    present = [r for r, report in enumerate(everyone) if any(key in report for key in keys)]
    for key in keys:
        aligned = _align({r: report[key] for r, report in enumerate(everyone) if key in report})
        lowest = [min(step) for step in zip(*aligned.values(), strict=True)]
        for r, latencies in aligned.items():
            waits[r] = waits.get(r, 0.0) + math.fsum(latencies) - math.fsum(lowest)
        if rank in aligned:
            shortest += lowest
            waited += [own - low for own, low in zip(aligned[rank], lowest, strict=True)]
    own_reports = [everyone[rank][key] for key in keys if key in everyone[rank]]
    return {
        "count": sum(count for count, _ in own_reports),
        "ops_compared": len(shortest),
        "total_comm_lat_ms": math.fsum(shortest),
        "total_straggler_ms": math.fsum(waited),
        "avg_comm_lat_ms": trimmed_mean(shortest),
        "avg_straggler_ms": trimmed_mean(waited),
        "last_to_arrive": min(waits, key=lambda r: waits[r]) if any(waits.values()) else None,
        "missing_ranks": [r for r in range(len(everyone)) if r not in present],
        "msg_size_bytes": keys[0].msg_size,
        "msg_size_str": convert_size(keys[0].msg_size),
    }


def _align(reports: Mapping[int, tuple[int, list[float]]]) -> dict[int, list[float]]:
    """Cut every rank's last latencies to the operations that all of them still have."""
    start = max(count - len(recent) for count, recent in reports.values())
    stop = max(start, min(count for count, _ in reports.values()))
    return {
        r: recent[start - (count - len(recent)) : stop - (count - len(recent))]
        for r, (count, recent) in reports.items()
    }
