"""What a rank is doing, as it tells the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_logging._comms.operation import Operation
from ds_logging._comms.operations_json import read_operations, write_operations

_KEPT = 8  # operations of a group that a state names, beside those in flight
_KEPT_IN_FLIGHT = 32


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank is doing.

    Attributes:
        operations: those in flight, and the last ones of each group.
        now_ns: the rank's ``time.time_ns()``, on the same clock as the operations' ``started_ns``.
        error: why the rank cannot say; ``None`` where it can.
    """

    operations: tuple[Operation, ...]
    now_ns: int
    error: str | None = None

    def in_flight(self) -> list[Operation]:
        """Return the operations that are not over, the oldest first."""
        return sorted((op for op in self.operations if not op.completed), key=lambda op: op.started_ns)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, of JSON's types only."""
        return {**write_operations(self.operations), "now_ns": self.now_ns, "error": self.error}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankState:
        """Return the state that `to_json` wrote."""
        return cls(tuple(read_operations(data)), data["now_ns"], data["error"])


def state_of(operations: Iterable[Operation], now_ns: int) -> RankState:
    """Return the state of a rank that did these operations, oldest first: those in flight, and each group's last."""
    kept: list[Operation] = []
    in_flight: dict[str, int] = {}
    seen: dict[tuple[str, str, int | None], int] = {}
    everything = list(operations)
    for op in everything:  # the oldest in flight are those that hold up the others
        if not op.completed and in_flight.setdefault(op.group, 0) < _KEPT_IN_FLIGHT:
            in_flight[op.group] += 1
            kept.append(op)
    chosen = {id(op) for op in kept}
    for op in reversed(everything):
        channel = (op.group, op.kind if op.kind in ("send", "recv") else "", op.peer)
        seen[channel] = seen.get(channel, 0) + 1
        if seen[channel] <= _KEPT and id(op) not in chosen:
            kept.append(op)
    return RankState(tuple(sorted(kept, key=lambda op: op.started_ns)), now_ns)
