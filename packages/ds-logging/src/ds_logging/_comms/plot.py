"""A picture of bus bandwidth by message size."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ds_logging._comms.bandwidth import canonical_name, convert_size
from ds_logging._comms.op_stats import OpStats, summarize
from ds_logging.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LINES = 16  # more cannot be told apart


def plot_bandwidth(
    stats: Iterable[OpStats], path: str | os.PathLike[str] | None = None, *, title: str = "Communication"
) -> Figure:
    """Draw bus bandwidth (GB/s) by message size, a line for each operation of each group.

    The larger a marker, the more operations. Operations without a latency, a formula or bytes are left out; so are all
    but the `MAX_LINES` lines that took most time, and the legend says how many. No communication.

    Args:
        stats: of this rank, or of several (`merge`).
        path: where to save the figure, in the format that its name ends with; ``None`` saves nothing.
        title: above the figure.

    Returns:
        The figure, with one axes. It is not registered with ``pyplot``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MissingExtraError("plot_bandwidth needs matplotlib: pip install ds-logging[plot]") from error
    lines = _lines(stats)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines[:MAX_LINES]):
        sizes, rates, counts = zip(*points, strict=True)
        color = f"C{number % 10}"
        axes.plot(sizes, rates, "-" if number < 10 else "--", color=color, label=label, linewidth=1.5)
        axes.scatter(sizes, rates, s=[8 + 14 * math.log10(count) for count in counts], color=color, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: convert_size(size)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.set_xlabel("Message size")
    axes.set_ylabel("Bus bandwidth (GB/s)")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.25)
    if lines:
        more = len(lines) - MAX_LINES
        legend_title = "Group, operation" if more <= 0 else f"Group, operation\n({more} more not drawn)"
        axes.legend(title=legend_title, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    else:
        axes.text(0.5, 0.5, "no operation has a bus bandwidth", transform=axes.transAxes, ha="center")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _lines(stats: Iterable[OpStats]) -> list[tuple[str, list[tuple[int, float, int]]]]:
    """Return (label, [(bytes, GB/s, count), ...]) for each operation of each group, that first which took most time."""
    found: dict[str, dict[int, list[OpStats]]] = {}
    for one in stats:
        key = one.key
        group = f"{key.group} ({key.group_size})" if key.group else f"{key.group_size} ranks"
        found.setdefault(f"{group}, {canonical_name(key.raw_name)}", {}).setdefault(key.msg_size, []).append(one)
    lines: list[tuple[float, str, list[tuple[int, float, int]]]] = []
    for label, by_size in found.items():
        entries: list[dict[str, Any]] = [summarize(same) for _, same in sorted(by_size.items())]
        points = [
            (entry["msg_size_bytes"], entry["busbw_avg_gbps"] / 8, entry["timed_count"])
            for entry in entries
            if entry["msg_size_bytes"] and entry["busbw_avg_gbps"] and entry["busbw_avg_gbps"] > 0  # not NaN, not None
        ]
        if points:
            lines.append((sum(entry["total_latency_ms"] or 0.0 for entry in entries), label, points))
    return [(label, points) for _, label, points in sorted(lines, key=lambda line: (-line[0], line[1]))]
