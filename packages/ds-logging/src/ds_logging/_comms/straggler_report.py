"""Who waited how long for whom, operation by operation, from the operations that all ranks recorded.

An operation is compared if every rank of its group recorded it with a latency; see [Note: straggler] in ``_straggler``.
No clocks of different ranks are compared: the last to arrive is the one with the shortest latency.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ds_logging._comms.operation import Operation
from ds_logging._straggler import POINT_TO_POINT, ROOTED

WORST = 10  # sequences that a group's report names


@dataclass(frozen=True, slots=True)
class Wait:
    """One operation, and for whom the others waited in it.

    Attributes:
        kind: of the operation.
        sequence: its number in the group, or between sender and receiver.
        step: the training step, where one was set.
        last: the rank that arrived last.
        waited_ms: milliseconds that the others waited, all together.
        ranks: that took part: all of the group, or sender and receiver.
    """

    kind: str
    sequence: int
    step: int | None
    last: int
    waited_ms: float
    ranks: tuple[int, ...]


@dataclass(slots=True)
class GroupReport:
    """Waiting inside one process group. Times in milliseconds.

    Attributes:
        group: its name.
        ranks: its global ranks.
        compared: number of operations that were compared; of point-to-point operations a pair is one.
        incomplete: that some rank did not record, or not with a latency.
        mismatched: that the ranks recorded as different kinds.
        rooted: broadcasts, reduces, gathers and scatters, in which not everybody waits: not compared.
        waited_ms: how long each rank waited.
        waited_for: {rank: {the last one: how long}}.
        times_last: in how many operations others waited for a rank.
        worst: the operations with most waiting, the worst first.
    """

    group: str
    ranks: tuple[int, ...]
    compared: int = 0
    incomplete: int = 0
    mismatched: int = 0
    rooted: int = 0
    waited_ms: dict[int, float] = field(default_factory=dict)
    waited_for: dict[int, dict[int, float]] = field(default_factory=dict)
    times_last: dict[int, int] = field(default_factory=dict)
    worst: list[Wait] = field(default_factory=list)


def straggler_report(operations: Mapping[int, Iterable[Operation]]) -> list[GroupReport]:
    """Return a report for every group whose ranks are known, that with most waiting first.

    Args:
        operations: what each rank recorded, by rank. Operations without a group's ranks or a sequence number are left
            out.
    """
    sides: dict[tuple[str, tuple[int, ...]], dict[tuple[object, ...], dict[int, Operation]]] = {}
    for rank, recorded in operations.items():
        for op in recorded:
            place = _place(rank, op)
            if place is not None and op.ranks is not None:
                sides.setdefault((op.group, op.ranks), {}).setdefault(place, {})[rank] = op
    reports = [_report(group, ranks, places) for (group, ranks), places in sides.items()]
    return sorted(reports, key=lambda report: -sum(report.waited_ms.values()))


def _place(rank: int, op: Operation) -> tuple[object, ...] | None:
    """Return what an operation has in common with itself on the other ranks; ``None`` where that is not known."""
    if op.sequence is None or op.ranks is None or op.kind == "batch_isend_irecv":
        return None
    if op.kind not in POINT_TO_POINT:
        return (op.sequence,)
    if op.peer is None:
        return None
    sender, receiver = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return (op.sequence, sender, receiver)


def _report(
    group: str, ranks: tuple[int, ...], places: Mapping[tuple[object, ...], Mapping[int, Operation]]
) -> GroupReport:
    report = GroupReport(group, ranks, waited_ms=dict.fromkeys(ranks, 0.0), times_last=dict.fromkeys(ranks, 0))
    waits: list[Wait] = []
    for place, by_rank in places.items():
        paired = len(place) > 1
        members = tuple(rank for rank in place[1:] if isinstance(rank, int)) if paired else ranks
        latencies = {rank: op.latency_ms for rank, op in by_rank.items() if op.latency_ms is not None}
        kinds = {op.kind for op in by_rank.values()}
        if len(kinds) > 1 and not paired:
            report.mismatched += 1
        elif kinds & set(ROOTED):
            report.rooted += 1
        elif set(latencies) != set(members):
            report.incomplete += 1
        else:
            report.compared += 1
            last = min(members, key=lambda rank: (latencies[rank], rank))
            waited = {rank: latency - latencies[last] for rank, latency in latencies.items() if rank != last}
            for rank, time in waited.items():
                report.waited_ms[rank] += time
                if time:
                    to = report.waited_for.setdefault(rank, {})
                    to[last] = to.get(last, 0.0) + time
            if any(waited.values()):
                report.times_last[last] += 1
                op = by_rank[last]
                sequence = op.sequence if op.sequence is not None else 0
                waits.append(Wait(op.kind, sequence, op.step, last, sum(waited.values()), members))
    report.worst = heapq.nlargest(WORST, waits, key=lambda wait: wait.waited_ms)
    return report
