"""The groups along an axis as a picture of characters."""

from __future__ import annotations

import importlib
import os
import shutil
import string
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

from ds_groups._describe import members
from ds_groups.errors import TopologyError

if TYPE_CHECKING:
    from ds_groups._grid import AxisName, RankGrid

_ROW = 16  # ranks in a row where the size of a node is not known
_COLUMNS = 100  # of a file that is no terminal
_LEGEND = 6
# Dark text on Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB")


def show(grid: RankGrid, axis: AxisName, *, file: TextIO | None = None, max_nodes: int = 16) -> None:
    """What `RankGrid.show` prints."""
    if max_nodes < 1:
        raise TopologyError(f"max_nodes={max_nodes} must be 1 or more")
    out = sys.stdout if file is None else file
    console = _console(out)
    columns = shutil.get_terminal_size((_COLUMNS, 24)).columns if out.isatty() else _COLUMNS
    for line in _lines(grid, axis, max_nodes, columns):
        if console is None:
            out.write("".join(text for text, _ in line) + "\n")
        else:
            text = importlib.import_module("rich.text").Text()
            for part, group in line:
                text.append(part, "" if group is None else f"black on {PALETTE[group % len(PALETTE)]}")
            console.print(text, no_wrap=True, overflow="ignore", crop=False)


Line = list[tuple[str, "int | None"]]


def _lines(grid: RankGrid, axis: AxisName, max_nodes: int, columns: int) -> Iterator[Line]:
    """The picture: lines of texts, each with the group whose colour it has."""
    found = grid.axis(axis)
    groups = len(grid.span) // found.size
    per_node = grid.ranks_per_node
    per_row = per_node or _ROW
    rows = -(-grid.world_size // per_row)
    numbers = group_numbers(grid, axis, range(min(rows, max_nodes) * per_row))
    width = len(_label(groups - 1, groups))
    head = max(len(_head(grid, row)) for row in (0, min(rows, max_nodes) - 1))
    cells = max(1, (columns - head - 2) // (width + 1))

    yield [(f"{found.name}: {groups} groups of {found.size}", None)]
    for row in range(min(rows, max_nodes)):
        ranks = range(row * per_row, min((row + 1) * per_row, grid.world_size))
        for first in range(0, len(ranks), cells):
            line: Line = [(f"{_head(grid, row) if first == 0 else '':<{head}} ", None)]
            for rank in ranks[first : first + cells]:
                group = numbers.get(rank)
                line += [(" ", None), ("." * width if group is None else f"{_label(group, groups):>{width}}", group)]
            yield line
    if rows > max_nodes:
        yield [(f"... {rows - max_nodes} more {'rows' if per_node is None else 'nodes'}", None)]
    for number, ranks_of_group in enumerate(islice(found.groups(), _LEGEND)):
        label = f"{_label(number, groups):>{width}}"
        yield [(label, number), (f" = ranks {members(ranks_of_group)}", None)]
    if groups > _LEGEND:
        yield [(f"... {groups - _LEGEND} more groups", None)]


def group_numbers(grid: RankGrid, axis: AxisName, ranks: range) -> dict[int, int]:
    """Which group along ``axis`` holds each of ``ranks``; those that the grid leaves out are not in it."""
    found, numbers, left = grid.axis(axis), {}, sum(grid.holds(rank) for rank in ranks)
    for number, group in enumerate(found.groups()):
        if left == 0:
            break
        for rank in group:
            if rank in ranks:
                numbers[rank] = number
                left -= 1
    return numbers


def _head(grid: RankGrid, row: int) -> str:
    if grid.ranks_per_node is not None:
        return f"node {row}"
    return f"ranks {row * _ROW}.."


def _label(group: int, groups: int) -> str:
    return string.ascii_uppercase[group] if groups <= len(string.ascii_uppercase) else str(group)


def _console(file: TextIO) -> Any:
    """A rich console where the file is a terminal that wants colours, and rich is installed; else None."""
    if not file.isatty() or os.environ.get("NO_COLOR"):
        return None
    try:
        return importlib.import_module("rich.console").Console(file=file)
    except ImportError:
        return None
