"""What a layout will make, without making it: groups, communicators, memory, bytes between nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

from ds_groups._describe import members

from .nccl_memory import ASSUMPTIONS, MIB, nccl_memory
from .nodes import Spread, spread
from .traffic import Load, Pattern, Traffic, default_pattern, format_bytes, leaving, parse_traffic

if TYPE_CHECKING:
    from ds_groups._grid import AxisName, RankGrid

_UNIT = 10**9
_SHOWN_GROUPS = 2
_KEPT_GROUPS = 4


@dataclass(frozen=True)
class AxisFigures:
    """One axis of a layout. What needs the size of a node is None where it is not known.

    Attributes:
        axis: its name.
        size: ranks of a group.
        groups: how many there are.
        first_groups: the ranks of the first ones.
        nodes: nodes of the group that is on fewest, and of the one that is on most.
        inside_node: whether every group stays in a node.
        pattern: of the traffic.
        bytes_sent: that one rank sends along the axis; 0 where the traffic leaves the axis out.
        bytes_leaving: those of them that leave a node, on average over the ranks.
        nccl_bytes: estimated GPU memory of the communicator, on each rank.
    """

    axis: str
    size: int
    groups: int
    first_groups: tuple[tuple[int, ...], ...]
    nodes: tuple[int, int] | None
    inside_node: bool | None
    pattern: Pattern
    bytes_sent: float
    bytes_leaving: float | None
    nccl_bytes: int | None


@dataclass(frozen=True)
class Rehearsal:
    """What `RankGrid.rehearse` returns: ``print`` it, or take ``as_dict()`` for JSON.

    Attributes:
        grid: the layout.
        axes: figures by axis; axes that have the same groups appear once.
        default_traffic: whether the traffic is the unit, 1 GB along every axis.
        communicators_per_rank: distinct rank sets that a rank is in, that of all ranks included.
        communicators: those of the whole job.
        nccl_bytes: estimated GPU memory of a rank's communicators; None where the size of a node is not known.
        bytes_leaving: bytes that leave a node for each of its ranks; None likewise, and with the default traffic.
    """

    grid: RankGrid
    axes: tuple[AxisFigures, ...]
    default_traffic: bool
    communicators_per_rank: int
    communicators: int
    nccl_bytes: int | None
    bytes_leaving: float | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; the guide of process groups says what the keys mean."""
        return {
            "layout": self.grid.as_dict(),
            "order": _order(self.grid),
            "nodes": _count_nodes(self.grid),
            "axes": [asdict(axis) for axis in self.axes],
            "communicators_per_rank": self.communicators_per_rank,
            "communicators": self.communicators,
            "nccl_bytes": self.nccl_bytes,
            "nccl_assumptions": ASSUMPTIONS,
            "default_traffic": self.default_traffic,
            "bytes_leaving": self.bytes_leaving,
        }

    def __str__(self) -> str:
        grid = self.grid
        nodes = _count_nodes(grid)
        where = "nodes of unknown size" if nodes is None else f"{nodes} nodes of {grid.ranks_per_node}"
        ranks = f"{len(grid.span)} of {grid.world_size}" if len(grid.span) < grid.world_size else f"{grid.world_size}"
        lines = [f"{ranks} ranks, order {_order(grid)}, {where}", *self._table()]
        lines.append(
            f"communicators: {self.communicators_per_rank} a rank (that of all ranks included), "
            f"{self.communicators} in the job"
        )
        if self.nccl_bytes is None:
            return "\n".join([*lines, "say how many ranks a node has for NCCL memory and bytes between nodes"])
        lines.append(f"NCCL memory a rank: about {self.nccl_bytes / 2**30:.1f} GiB if all are used; an estimate:")
        lines += [f"  {part}" for part in ASSUMPTIONS.split("; ")]
        if self.bytes_leaving is None:
            lines.append("bytes that leave a node, for each GB that a rank sends along the axis: column 'leaves node'")
        else:
            lines.append(f"bytes that leave a node, for each of its ranks: {format_bytes(self.bytes_leaving)}")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows = [("axis", "size", "groups", "nodes", "NCCL MiB", "traffic", "leaves node", "ranks")]
        for axis in self.axes:
            nodes = "?" if axis.nodes is None else "-".join(map(str, dict.fromkeys(axis.nodes)))
            memory = "?" if axis.nccl_bytes is None else str(axis.nccl_bytes // MIB)
            left = "?" if axis.bytes_leaving is None else format_bytes(axis.bytes_leaving) if axis.bytes_sent else "-"
            shown = [members(group) for group in axis.first_groups[:_SHOWN_GROUPS]]
            ranks = " | ".join([*shown, *(["..."] if axis.groups > len(shown) else [])])
            rows.append((axis.axis, str(axis.size), str(axis.groups), nodes, memory, axis.pattern, left, ranks))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left_aligned = (0, 5, 7)
        return [
            "  ".join(
                cell.ljust(width) if place in left_aligned else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]


def rehearse(
    grid: RankGrid, axes: Sequence[AxisName] = (), traffic: Mapping[AxisName, Traffic] | None = None
) -> Rehearsal:
    """What `RankGrid.rehearse` returns."""
    loads = {grid.axis(load.axis).key: load for load in parse_traffic(grid, traffic or {})}
    names: dict[str, AxisName] = {}
    for name in (*(axes or grid.axes_in_use()), *(traffic or {})):
        names.setdefault(grid.axis(name).key, name)
    nodes, count, world = grid.ranks_per_node, len(grid.span), grid.world_size
    figures = []
    for key, name in names.items():
        load = loads.get(key) or Load(name, default_pattern(grid, name), Fraction(0 if traffic else _UNIT))
        figures.append(_figures(grid, name, load, None if nodes is None else spread(grid, name, nodes)))
    made = [axis for axis in figures if 1 < axis.size < world]
    memory = left = None
    if nodes is not None:
        whole = [axis.nccl_bytes or 0 for axis in figures if axis.size == world]
        memory = max([nccl_memory(world, min(nodes, world)), *whole]) + sum(axis.nccl_bytes or 0 for axis in made)
        left = sum(axis.bytes_leaving or 0 for axis in figures) if traffic else None
    return Rehearsal(
        grid=grid,
        axes=tuple(figures),
        default_traffic=not traffic,
        communicators_per_rank=1 + len(made),
        communicators=1 + sum(count // axis.size for axis in made),
        nccl_bytes=memory,
        bytes_leaving=left,
    )


def _figures(grid: RankGrid, name: AxisName, load: Load, found: Spread | None) -> AxisFigures:
    axis = grid.axis(name)
    return AxisFigures(
        axis=axis.name,
        size=axis.size,
        groups=len(grid.span) // axis.size,
        first_groups=tuple(islice(axis.groups(), _KEPT_GROUPS)),
        nodes=None if found is None else (found.fewest_nodes, found.most_nodes),
        inside_node=None if found is None else found.most_nodes == 1,
        pattern=load.pattern,
        bytes_sent=float(load.bytes),
        bytes_leaving=None if found is None else float(leaving(load, found, axis.name).leaving),
        nccl_bytes=None if found is None else nccl_memory(axis.size, found.most_on_node, load.pattern),
    )


def _count_nodes(grid: RankGrid) -> int | None:
    return None if grid.ranks_per_node is None else -(-grid.world_size // grid.ranks_per_node)


def _order(grid: RankGrid) -> str:
    return getattr(grid, "order", "-".join(digit.name for digit in grid.digits))
