"""Reads torch's own record of collectives, the flight recorder.

torch keeps the last operations of the process in a ring (``TORCH_FR_BUFFER_SIZE`` entries, 2,000 by default), whoever
issued them: Python, the DDP reducer in C++, compiled code. There is one ring for NCCL and one for the other backends;
which of them this torch has is looked up, never assumed. Reading a full ring takes tens of milliseconds of the GIL.
Source: torch/csrc/distributed/c10d/FlightRecorder.hpp, versions 2.0 to 2.10 of its format.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

DumpFunction = Callable[[bool, bool, bool], bytes]  # with the collectives, with stack traces, only active ones
DUMPS = ("_dump_fr_trace", "_dump_nccl_trace")

_BYTES = {
    "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Int": 4, "Long": 8, "Half": 2, "BFloat16": 2, "Float": 4, "Double": 8,
    "ComplexHalf": 4, "ComplexFloat": 8, "ComplexDouble": 16, "UInt16": 2, "UInt32": 4, "UInt64": 8, "QInt8": 1,
    "QUInt8": 1, "QInt32": 4,
}  # fmt: skip
_NAMES = {
    "Byte": "uint8", "Char": "int8", "Bool": "bool", "Short": "int16", "Int": "int32", "Long": "int64",
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "ComplexHalf": "complex32",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip


@dataclass(slots=True)
class Entry:
    """One entry of the ring.

    Attributes:
        record_id: its place in all that this ring ever recorded, from 0.
        group: name and description of the process group.
        operation: as torch calls it, for example ``"nccl:all_reduce"``.
        sequence: its collective sequence number in the group, or its number among point-to-point operations.
        launch: numbers that it shares with the "coalesced" entry of the group of calls that it was launched with.
        is_p2p: whether it is a point-to-point operation.
        nbytes: bytes of its inputs; of its outputs where it has no input.
        dtype: of these, in torch's spelling, for example ``"float32"``.
        created_ns: ``time.time_ns()`` when it was issued.
        duration_ms: what the device took, where the backend measured it.
        over: whether torch knows that it has ended.
        retired: whether torch has put it aside; before that it has no duration.
    """

    record_id: int
    group: tuple[str, str]
    operation: str
    sequence: int
    launch: tuple[int, int]
    is_p2p: bool
    nbytes: int
    dtype: str
    created_ns: int
    duration_ms: float | None
    over: bool
    retired: bool


class Ring:
    """One ring of torch, read piece by piece."""

    def __init__(self, dump: DumpFunction) -> None:
        self._dump = dump
        self._next_id = 0
        self._open: dict[int, Entry] = {}  # returned before, and not retired then
        self.lost = 0
        """Entries that the ring dropped before they were read."""

    def read(self) -> list[Entry]:
        """Return what was recorded since the last call, oldest first, and bring up to date what is not retired."""
        found: list[Entry] = []
        raw = self._entries()
        if raw and raw[0]["record_id"] > self._next_id:
            self.lost += raw[0]["record_id"] - self._next_id
        still_open: dict[int, Entry] = {}
        for described in raw:
            number = described["record_id"]
            if number >= self._next_id:
                entry = _parse(described)
                found.append(entry)
            elif number in self._open:
                entry = self._open.pop(number)
                entry.over, entry.retired = _is_over(described), bool(described["retired"])
                entry.duration_ms = _duration(described)
            else:
                continue
            if not entry.retired:
                still_open[number] = entry
        for dropped in self._open.values():  # overwritten in the ring: nobody will say how it ended
            dropped.over = dropped.retired = True
        self._open = still_open
        if raw:
            self._next_id = raw[-1]["record_id"] + 1
        return found

    def skip(self) -> None:
        """Take everything recorded so far as read."""
        self.read()
        self._open.clear()
        self.lost = 0

    def enqueued(self) -> int:
        """Return about how many operations were ever recorded. It takes microseconds."""
        status = pickle.loads(self._dump(False, False, False)).get("pg_status", {})
        return sum(int(group.get("last_enqueued_collective", 0)) for group in status.values())

    def _entries(self) -> list[dict[str, Any]]:
        trace = pickle.loads(self._dump(True, False, False))
        return sorted(trace.get("entries", ()), key=lambda entry: int(entry["record_id"]))


def rings(c10d: Any) -> list[Ring]:
    """Return torch's rings: one for each function that ``torch._C._distributed_c10d`` has and that answers."""
    return [Ring(dump) for dump in (getattr(c10d, name, None) for name in DUMPS) if dump is not None and _answers(dump)]


def _answers(dump: DumpFunction) -> bool:
    try:
        return isinstance(pickle.loads(dump(False, False, False)), dict)
    except Exception:  # whatever this torch says: it has no such ring
        return False


def _parse(described: dict[str, Any]) -> Entry:
    operation: str = described["profiling_name"]
    # A rank's share: what it passes in; of a scatter, where only one rank passes in anything, what it gets.
    of_output = not described["input_sizes"] or ("scatter" in operation and "reduce" not in operation)
    side = "output" if of_output else "input"
    dtypes = described.get(f"{side}_dtypes") or []
    name, description = described["process_group"]
    return Entry(
        record_id=described["record_id"],
        group=(name, description),
        operation=operation,
        sequence=described["p2p_seq_id"] if described["is_p2p"] else described["collective_seq_id"],
        launch=(described["collective_seq_id"], described["p2p_seq_id"]),
        is_p2p=bool(described["is_p2p"]),
        nbytes=_nbytes(described[f"{side}_sizes"], dtypes),
        dtype=_NAMES.get(dtypes[0], dtypes[0].lower()) if dtypes else "",
        created_ns=described["time_created_ns"],
        duration_ms=_duration(described),
        over=_is_over(described),
        retired=bool(described["retired"]),
    )


def _is_over(described: dict[str, Any]) -> bool:
    return bool(described["retired"]) or described["state"] == "completed"


def _duration(described: dict[str, Any]) -> float | None:
    duration = described.get("duration_ms")
    return None if duration is None else float(duration)


def _nbytes(sizes: Iterable[Iterable[int]], dtypes: list[str]) -> int:
    if not dtypes:
        return 0
    # torch 2.6 names one dtype for a list of tensors; sizes are one tuple a tensor.
    return sum(math.prod(size) * _BYTES.get(dtypes[min(index, len(dtypes) - 1)], 1) for index, size in enumerate(sizes))
