"""One communication operation as this rank saw it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Operation:
    """One operation of one process group, seen from one rank.

    ``(group, sequence)`` names the same collective on every rank: torch names a group alike on all its ranks, and every
    rank of a group counts its collectives. Of a point-to-point operation ``sequence`` counts those from the same sender
    to the same receiver in the group.

    Attributes:
        kind: its canonical name, see ``_bandwidth.canonical_name``, for example ``"all_reduce"``.
        group: the process group's name, with its description where it has one, for example ``"2:tp"``.
        ranks: the group's global ranks, in order of group rank; ``None`` where they are not known.
        sequence: see above; ``None`` where nothing counted it.
        nbytes: bytes of what this rank passes in (of what it receives, for ``recv``).
        dtype: of the elements, for example ``"float32"``; "" for an operation without tensors.
        started_ns: ``time.time_ns()`` when it was issued.
        latency_ms: from issue to completion on the host clock, or the device's own time where the backend measures it;
            ``None`` while in flight, and where the end was not observed.
        completed: whether it is known to be over.
        name: what it is counted under; the kind unless `CommsLogger.timed` or ``append`` gave it another one.
        peer: global rank of the other side of a point-to-point operation; ``None`` of a collective or for any source.
        step: the training step at the time, see `set_step`.
        thread: identifier of the issuing thread; 0 where it is not known.
        group_size: number of ranks of the group; ``None`` where it is not known.
    """

    kind: str
    group: str
    ranks: tuple[int, ...] | None
    sequence: int | None
    nbytes: int
    dtype: str
    started_ns: int
    latency_ms: float | None
    completed: bool
    name: str
    peer: int | None = None
    step: int | None = None
    thread: int = 0
    group_size: int | None = None
