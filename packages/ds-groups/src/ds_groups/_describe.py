"""Render the groups of a topology as a table."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._topology import ParallelTopology

_SHOWN_RANKS = 8


def describe(topology: ParallelTopology, axes: tuple[str, ...], max_groups: int) -> str:
    """The table that `ParallelTopology.describe` returns."""
    if not axes:
        single = ("tp", "cp", "dp", "pp", "ep", "edp")
        axes = tuple(axis for axis in single if topology.size(axis) > 1 and (axis != "edp" or topology.ep > 1))
    width = max([4, *map(len, axes)])
    lines = [f"world size {topology.world_size}, order {topology.order}"]
    lines.append(f"{'axis':<{width}}  size  groups  ranks")
    for axis in axes:
        size = topology.size(axis)
        count = topology.world_size // size
        shown = [_members(group) for group in islice(topology.groups(axis), max_groups)]
        more = ["..."] if count > max_groups else []
        lines.append(f"{axis:<{width}}  {size:>4}  {count:>6}  {' | '.join([*shown, *more])}")
    return "\n".join(lines)


def _members(group: tuple[int, ...]) -> str:
    if len(group) <= _SHOWN_RANKS:
        return " ".join(map(str, group))
    return f"{' '.join(map(str, group[:3]))} ... {group[-1]}"
