"""The tables that `CommsLogger.log_all` logs: at most one screen, however many kinds of operations there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds_logging._comms.bandwidth import convert_size

MAX_LINES = 30
MAX_WIDTH = 120

_SUMMARY = (
    *("Comm. Op", "Size", "Group", "Count", "Total ms", "Avg ms", "p50 ms", "p99 ms", "Max ms"),
    *("alg Gbps", "bus Gbps"),
)
_TIMES = ("total_latency_ms", "avg_latency_ms", "p50_latency_ms", "p99_latency_ms", "max_latency_ms")
_RATES = ("tput_avg_gbps", "busbw_avg_gbps")

_STRAGGLER = (
    *("Comm. Op", "Size", "Compared", "Comm. ms", "Avg", "Waited ms", "Avg", "Last to arrive", "Missing ranks"),
)
_WAITS = ("total_comm_lat_ms", "avg_comm_lat_ms", "total_straggler_ms", "avg_straggler_ms")


def summary_table(summary: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a row for every operation, size, group and dtype, those first that took most time, then most bytes.

    Unknown latencies, and bandwidths without a formula, are "-".
    """
    parts = [(name, part) for name, sizes in summary.items() for entry in sizes.values() for part in entry["by_group"]]
    parts.sort(key=lambda row: (row[1]["total_latency_ms"] or 0.0, row[1]["total_bytes"]), reverse=True)
    shown, hidden = _split(parts)
    rows = [
        (
            f"{name} {part['dtype']}".rstrip(),
            part["msg_size_str"],
            f"{part['group']} ({part['group_size']})" if part["group"] else str(part["group_size"]),
            _count(part["count"]),
            *(_number(part[key]) for key in _TIMES),
            *(_number(part[key], 2) for key in _RATES),
        )
        for name, part in shown
    ]
    table = _table(_SUMMARY, rows, texts=(0, 2))
    if hidden:
        count, size = (sum(part[key] for _, part in hidden) for key in ("count", "total_bytes"))
        table += _more(len(hidden), f"{count:,} operations, {convert_size(size)}")
    return table


def straggler_table(analysis: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a row for every operation and message size that any rank had, those first that waited longest."""
    entries = [(name, entry) for name, sizes in analysis.items() for entry in sizes.values()]
    entries.sort(key=lambda row: (row[1]["total_straggler_ms"], row[1]["total_comm_lat_ms"]), reverse=True)
    shown, hidden = _split(entries)
    rows = [
        (
            name,
            entry["msg_size_str"],
            _count(entry["ops_compared"]),
            *(_number(entry[key]) for key in _WAITS),
            "-" if entry["last_to_arrive"] is None else f"rank {entry['last_to_arrive']}",
            format_ranks(entry["missing_ranks"]) or "-",
        )
        for name, entry in shown
    ]
    table = _table(_STRAGGLER, rows, texts=(0, 8))
    if hidden:
        waited = sum(entry["total_straggler_ms"] for _, entry in hidden)
        table += _more(
            len(hidden), f"{sum(entry['count'] for _, entry in hidden):,} operations, {waited:.3f} ms waited"
        )
    return table


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as people write them.

    >>> format_ranks([0, 1, 2, 3, 7, 9, 10])
    '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def _split(rows: Sequence[tuple[str, Any]]) -> tuple[Sequence[tuple[str, Any]], Sequence[tuple[str, Any]]]:
    fits = MAX_LINES - 1 if len(rows) <= MAX_LINES - 1 else MAX_LINES - 2  # the head, and the line about the rest
    return rows[:fits], rows[fits:]


def _more(kinds: int, what: str) -> str:
    return f"\n... and {kinds:,} more: {what}; to_jsonl writes all"


def _count(value: int) -> str:
    return str(value) if value < 10**8 else f"{value:.2e}"


def _number(value: float | None, digits: int = 3) -> str:
    """Return at most 8 characters."""
    if value is None or value != value:  # NaN: no formula
        return "-"
    if value >= 1e8:
        return f"{value:.2e}"
    return f"{value:.{digits}f}" if value < 1e4 else f"{value:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    """Lay out cells; the columns ``texts`` give way where the lines are too long."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    while sum(widths) + 2 * (len(widths) - 1) > MAX_WIDTH:
        widths[max(texts, key=widths.__getitem__)] -= 1
    return "\n".join(
        "  ".join(_clip(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def _clip(text: str, width: int) -> str:
    if len(text) <= width:
        return text.ljust(width)
    tail = (width - 3) // 2  # the end of a name with its dtype tells as much as its beginning
    return f"{text[: width - 3 - tail]}...{text[-tail:]}" if tail else text[:width]
