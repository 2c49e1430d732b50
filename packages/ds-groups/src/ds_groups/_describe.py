"""Render the groups of a topology as a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._grid import AxisName, RankGrid

_SHOWN_RANKS = 8


def describe(grid: RankGrid, axes: Sequence[AxisName], order: str, max_groups: int) -> str:
    """The table that `RankGrid.describe` returns."""
    axes = axes or grid.axes_in_use()
    width = max([4, *(len(grid.axis(axis).name) for axis in axes)])
    lines = [f"world size {grid.world_size}, order {order}"]
    lines.append(f"{'axis':<{width}}  size  groups  ranks")
    for axis in axes:
        size = grid.size(axis)
        count = len(grid.span) // size
        shown = [members(group) for group in islice(grid.groups(axis), max_groups)]
        more = ["..."] if count > max_groups else []
        lines.append(f"{grid.axis(axis).name:<{width}}  {size:>4}  {count:>6}  {' | '.join([*shown, *more])}")
    return "\n".join(lines)


def members(group: tuple[int, ...]) -> str:
    """The ranks of a group, shortened where there are many."""
    if len(group) <= _SHOWN_RANKS:
        return " ".join(map(str, group))
    return f"{' '.join(map(str, group[:3]))} ... {group[-1]}"
