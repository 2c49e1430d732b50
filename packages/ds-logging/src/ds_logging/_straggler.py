"""Who waits for whom: each operation's latency compared over the ranks.

[Note: straggler] In a collective everybody waits for the last to arrive, so that one has the shortest latency. The
shortest latency over the ranks is the communication itself; what a rank has above it is time it waited. In a rooted
operation (broadcast, reduce, gather, scatter) not everybody waits, so nobody is called the last of one.

[Note: comparable] Operations are compared only inside a group whose ranks are known: from the process group, or because
the group has as many ranks as the job. Two groups of two ranks are otherwise not told apart. Operations of a key are
matched by their place in the sequence: the i-th on one rank belongs with the i-th on every other. The sends of one rank
belong with the receives of the other; `analyze` knows who they are in a group of two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ds_logging._comms.bandwidth import canonical_name, convert_size
from ds_logging._comms.exchange import decode, encode, gather_bytes
from ds_logging._comms.op_stats import OpKey, OpStats, trimmed_mean
from ds_logging._comms.rank_sets import RankSets, read_rank_sets

# How many operations there were, and the last latencies in ms (``None``: unknown).
Report = Mapping[OpKey, tuple[int, Sequence["float | None"]]]
Row = tuple[int, Sequence["float | None"]]

POINT_TO_POINT = ("send", "recv")
ROOTED = ("broadcast", "reduce", "gather", "scatter")


def exchange(snapshot: Iterable[OpStats]) -> tuple[int, list[Report]]:
    """Return the own rank and what every rank knows.

    All ranks must call it. It makes one `gather_bytes`, whatever the keys are, and does not communicate without a
    process group.
    """
    everyone = [_unpack(decode(data)) for data in gather_bytes(encode(_pack(snapshot)))]
    dist: Any = sys.modules.get("torch.distributed")
    return (0 if len(everyone) == 1 else dist.get_rank()), everyone


def _pack(snapshot: Iterable[OpStats]) -> dict[str, Any]:
    sets = RankSets()
    rows = [
        [*stats.key._replace(ranks=None), sets.number(stats.key.ranks), stats.count, [*stats.recent]]
        for stats in snapshot
    ]
    return {"ranks": sets.to_json(), "rows": rows}


def _unpack(packed: Mapping[str, Any]) -> Report:
    sets = read_rank_sets(packed["ranks"])
    return {OpKey(*key)._replace(ranks=sets[which]): (count, row) for *key, which, count, row in packed["rows"]}


class Match(NamedTuple):
    """What the same operations have in common on all ranks that take part."""

    kind: str
    name: str
    ranks: tuple[int, ...]  # that take part; sender and receiver of a point-to-point operation
    group: str | None
    msg_size: int
    dtype: str


def analyze(rank: int, everyone: Sequence[Report]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {record name: {message size: how long this rank communicated and waited}} over the union of all keys.

    ``last_to_arrive`` is the rank for which the others waited longest, in the operations that this rank takes part in.
    Pure arithmetic; every rank computes its own from what `exchange` returned.
    """
    matched: dict[Match, dict[tuple[int, OpKey], Row]] = {}
    entries: dict[str, dict[int, dict[OpKey, set[int]]]] = {}  # which ranks have the key
    for r, report in enumerate(everyone):
        for key, row in report.items():
            entries.setdefault(key.record_name, {}).setdefault(key.msg_size, {}).setdefault(key, set()).add(r)
            match = _match(r, key, len(everyone))
            if match is not None:
                matched.setdefault(match, {})[r, key] = row
    compared = {match: _latencies(rows) for match, rows in matched.items()}
    of_entry: dict[tuple[str, int], dict[Match, None]] = {}
    for match, rows in matched.items():
        for _, key in rows:
            of_entry.setdefault((key.record_name, key.msg_size), {})[match] = None

    def entry(name: str, size: int) -> dict[str, Any]:
        keys = entries[name][size]
        own = {key: everyone[rank][key] for key in keys if key in everyone[rank]}
        shortest: list[float] = []
        waited: list[float] = []
        caused: dict[int, float] = {}  # how long others waited for a rank
        missing: set[int] = set()
        for key, present in keys.items():
            if canonical_name(key.raw_name) not in POINT_TO_POINT or len(_members(key, len(everyone)) or ()) != 2:
                missing |= set(_members(key, len(everyone)) or ()) - present
        for match in of_entry.get((name, size), ()):
            latencies = compared[match]
            present = {r for r, _ in matched[match]}
            missing |= set(match.ranks) - present
            if rank in match.ranks and not set(match.ranks) - present and match.kind not in ROOTED:
                _blame(latencies, caused)
            if any(r == rank and key in keys for r, key in matched[match]) and rank in latencies:
                lowest = [min(step) for step in zip(*latencies.values(), strict=True)]
                shortest += lowest
                waited += [mine - low for mine, low in zip(latencies[rank], lowest, strict=True)]
        return {
            "count": sum(count for count, _ in own.values()),
            "ops_compared": len(shortest),
            "total_comm_lat_ms": math.fsum(shortest),
            "total_straggler_ms": math.fsum(waited),
            "avg_comm_lat_ms": trimmed_mean(shortest),
            "avg_straggler_ms": trimmed_mean(waited),
            "last_to_arrive": max(caused, key=lambda r: caused[r]) if any(caused.values()) else None,
            "missing_ranks": sorted(missing),
            "msg_size_bytes": size,
            "msg_size_str": convert_size(size),
        }

    return {name: {size: entry(name, size) for size in sorted(entries[name])} for name in entries}


def _members(key: OpKey, world_size: int) -> tuple[int, ...] | None:
    # A process alone is compared with itself, whatever its operations say.
    return tuple(range(world_size)) if key.ranks is None and world_size in (1, key.group_size) else key.ranks


def _match(rank: int, key: OpKey, world_size: int) -> Match | None:
    """Return what an operation of ``rank`` has in common with others; ``None`` where nobody knows who took part."""
    members = _members(key, world_size)
    if members is None or rank not in members:
        return None
    kind = canonical_name(key.raw_name)
    if kind not in (*POINT_TO_POINT, "batch_isend_irecv") or len(members) == 1:
        return Match(key.raw_name if kind not in ROOTED else kind, key.record_name, members, *_size_of(key))
    if len(members) > 2:
        return None  # nobody said which two
    if kind == "batch_isend_irecv":
        return Match(kind, key.record_name, members, *_size_of(key))
    other = members[0] if rank == members[1] else members[1]
    # Counted as "send" here and as "recv" there, or under one name that somebody chose.
    name = "" if canonical_name(key.record_name) == kind else key.record_name
    return Match("point to point", name, (rank, other) if kind == "send" else (other, rank), *_size_of(key))


def _size_of(key: OpKey) -> tuple[str | None, int, str]:
    return key.group, key.msg_size, key.dtype


def _latencies(rows: Mapping[tuple[int, OpKey], Row]) -> dict[int, list[float]]:
    reports = {r: row for (r, _), row in rows.items()}
    # Two keys of one rank (send and isend): nobody knows how they interleave.
    return _align(reports) if len(reports) == len(rows) else {}


def _blame(latencies: Mapping[int, Sequence[float]], caused: dict[int, float]) -> None:
    for step in zip(*latencies.values(), strict=True):
        last = min(range(len(step)), key=step.__getitem__)
        r = list(latencies)[last]
        caused[r] = caused.get(r, 0.0) + math.fsum(latency - step[last] for latency in step)


def _align(reports: Mapping[int, Row]) -> dict[int, list[float]]:
    """Cut every rank's last latencies to the operations that all of them still have and whose latencies are known."""
    start = max(count - len(recent) for count, recent in reports.values())
    stop = max(start, min(count for count, _ in reports.values()))
    cut = {
        r: recent[start - (count - len(recent)) : stop - (count - len(recent))]
        for r, (count, recent) in reports.items()
    }
    known = [place for place in range(stop - start) if all(row[place] is not None for row in cut.values())]
    return {r: [row[place] for place in known] for r, row in cut.items()}  # type: ignore[misc]  # known: not None
