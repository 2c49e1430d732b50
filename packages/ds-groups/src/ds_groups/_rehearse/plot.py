"""The groups along axes as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_groups.errors import MissingDependencyError, TopologyError

from .nodes import spread
from .show import group_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ds_groups._grid import AxisName, RankGrid

_ROW = 16  # ranks in a column where the size of a node is not known
# Seven of Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/).
_PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_SHADES = (0.0, 0.4, 0.65)  # how much white: groups of one colour that are near each other differ
_ABSENT = (1.0, 1.0, 1.0)


def draw(
    grid: RankGrid,
    axes: Sequence[AxisName] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    max_nodes: int = 128,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """What `RankGrid.plot` draws."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plot() needs matplotlib: pip install matplotlib") from error
    names = [axes] if isinstance(axes, str) else list(axes or grid.axes_in_use())
    if not names or max_nodes < 1:
        raise TopologyError(f"axes={axes!r}, max_nodes={max_nodes}: there is nothing to draw")
    per_node = grid.ranks_per_node or _ROW
    nodes = min(-(-grid.world_size // per_node), max_nodes)
    figure = Figure(figsize=figsize or _size(len(names), nodes, per_node), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        _draw(panel, grid, name, nodes, per_node)
    panels[-1].set_xticks(range(0, nodes, 1 << max(0, (nodes - 1).bit_length() - 3)))
    left_out = -(-grid.world_size // per_node) - nodes
    more = f"; {left_out} more to the right are not drawn" if left_out else ""
    what = "node" if grid.ranks_per_node else "column"
    panels[-1].set_xlabel(what)
    figure.suptitle(f"{grid.world_size} ranks, {per_node} a {what}{more}. Outlined: the group of rank {grid.span[0]}")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _size(panels: int, nodes: int, per_node: int) -> tuple[float, float]:
    """Inches: as wide as a page, a panel as high as its cells are legible."""
    width = 12.0
    return width, 0.8 + panels * (0.6 + min(max(per_node * width / max(nodes, 1), 0.8), 2.0))


def _draw(panel: Axes, grid: RankGrid, name: AxisName, nodes: int, per_node: int) -> None:
    numbers = group_numbers(grid, name, range(nodes * per_node))
    cells = [[_color(numbers.get(node * per_node + place)) for node in range(nodes)] for place in range(per_node)]
    panel.imshow(cells, aspect="auto", interpolation="nearest")
    for node in range(1, nodes):
        panel.axvline(node - 0.5, color="white", linewidth=0.5)
    own = numbers.get(grid.span[0])
    _outline(panel, {rank for rank, number in numbers.items() if number == own}, per_node)
    panel.set_title(_title(grid, name), loc="left", fontsize=10)
    panel.set_ylabel("rank in node" if grid.ranks_per_node else "rank")
    panel.set_yticks(sorted({0, per_node // 2, per_node - 1}))
    panel.tick_params(labelsize=8)


def _outline(panel: Axes, ranks: set[int], per_node: int) -> None:
    """A black line around the cells of these ranks."""
    for rank in ranks:
        x, y = divmod(rank, per_node)
        sides = {(x - 1, y): ((-1, -1), (-1, 1)), (x + 1, y): ((1, -1), (1, 1))}
        sides |= {(x, y - 1): ((-1, -1), (1, -1)), (x, y + 1): ((-1, 1), (1, 1))}
        for (column, row), ends in sides.items():
            if not 0 <= row < per_node or column * per_node + row not in ranks:
                xs, ys = zip(*((x + right / 2, y + down / 2) for right, down in ends), strict=True)
                panel.plot(
                    xs,
                    ys,
                    color="black",
                    linewidth=1.6 if per_node <= _ROW else 0.8,
                    solid_capstyle="projecting",
                    clip_on=False,
                )


def _title(grid: RankGrid, name: AxisName) -> str:
    axis = grid.axis(name)
    groups = len(grid.span) // axis.size
    text = f"{axis.name}: {groups} group{'s' if groups > 1 else ''} of {axis.size}"
    if grid.ranks_per_node is None:
        return text
    found = spread(grid, name, grid.ranks_per_node)
    if found.most_nodes == 1:
        return f"{text}, inside a node"
    fewest = "" if found.fewest_nodes == found.most_nodes else f"{found.fewest_nodes} to "
    return f"{text}, on {fewest}{found.most_nodes} nodes each"


def _color(number: int | None) -> tuple[float, float, float]:
    if number is None:
        return _ABSENT
    white = _SHADES[number // len(_PALETTE) % len(_SHADES)]
    red, green, blue = (part / 255 * (1 - white) + white for part in _PALETTE[number % len(_PALETTE)])
    return red, green, blue
