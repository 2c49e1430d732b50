"""The tables that `CommsLogger.log_all` logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SUMMARY = (
    "Comm. Op",
    "Message Size",
    "Group",
    "Count",
    "Total (ms)",
    "Avg (ms)",
    "Min (ms)",
    "Max (ms)",
    "algbw (Gbps)",
    "busbw (Gbps)",
)
_TIMES = ("total_latency_ms", "avg_latency_ms", "min_latency_ms", "max_latency_ms")
_RATES = ("tput_avg_gbps", "busbw_avg_gbps")

_STRAGGLER = (
    "Comm. Op",
    "Message Size",
    "Compared",
    "Comm. total (ms)",
    "Waited total (ms)",
    "Comm. avg (ms)",
    "Waited avg (ms)",
    "Last to arrive",
    "Missing ranks",
)
_WAITS = ("total_comm_lat_ms", "total_straggler_ms", "avg_comm_lat_ms", "avg_straggler_ms")


def summary_table(summary: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a row for every operation, message size and group size."""
    rows: list[tuple[object, ...]] = []
    for name, sizes in summary.items():
        for entry in sizes.values():
            for group_size, part in entry["by_group_size"].items():
                times = [f"{part[key]:.3f}" for key in _TIMES]
                rates = ["-" if part[key] != part[key] else f"{part[key]:.2f}" for key in _RATES]  # NaN: no formula
                rows.append((name, entry["msg_size_str"], group_size, part["count"], *times, *rates))
    return _table(_SUMMARY, rows)


def straggler_table(analysis: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a row for every operation and message size that any rank had."""
    rows: list[tuple[object, ...]] = []
    for name, sizes in analysis.items():
        for entry in sizes.values():
            times = [f"{entry[key]:.3f}" for key in _WAITS]
            last = "-" if entry["last_to_arrive"] is None else f"rank {entry['last_to_arrive']}"
            missing = ", ".join(str(rank) for rank in entry["missing_ranks"]) or "-"
            rows.append((name, entry["msg_size_str"], entry["ops_compared"], *times, last, missing))
    return _table(_STRAGGLER, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
