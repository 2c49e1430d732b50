"""Draw which modules an engine gathers for, on two ranks, without and with leaves: docs/_static/leaves.png.

    python tools/draw_leaves.py

The model is that of docs/guides/leaves.md, and the order is what a rehearsal recorded.
"""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import torch
from ds_z3leaf import rehearse
from ds_z3leaf._rehearse.calls import reduce_call
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._rehearse.passes import record
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
SAME, PARTED, LEAF = "#d9e2ec", "#f4a6a0", "#9fc5e8"


def gathers(index: ModuleIndex, batches: list[Any], leaves: set[int]) -> list[list[str]]:
    """The names of the modules gathered for, in order, for each batch."""
    recording = record(index, batches, None, backward=False, repeats=1, meta=False)
    calls = [reduce_call(each.forward, leaves, index) for each in recording.passes]
    return [[index.names[number] for number in call.gathers] for call in calls]


def draw(axes: Axes, title: str, rows: list[list[str]], leaves: set[str]) -> None:
    """One box for each all-gather, a row for each rank."""
    parted = next((at for at, pair in enumerate(zip(*rows, strict=False)) if len(set(pair)) > 1), max(map(len, rows)))
    for row, names in enumerate(rows):
        for at, name in enumerate(names):
            colour = PARTED if at >= parted else LEAF if name in leaves else SAME
            axes.add_patch(Rectangle((at + 0.04, -row - 0.4), 0.92, 0.8, facecolor=colour, edgecolor="0.4"))
            axes.text(
                at + 0.5, -row, name.replace("layers.", "layer ").replace(".", "\n"), ha="center", va="center", size=8
            )
        axes.text(-0.15, -row, f"rank {row}", ha="right", va="center", size=9)
    if parted < max(map(len, rows)):
        axes.annotate("waits for ever", (parted + 0.5, 0.42), (parted + 0.5, 0.6), ha="center", size=9, color="#a33")
    axes.set(xlim=(-1.0, 10.1), ylim=(-1.5, 0.9))
    axes.set_title(title, loc="left", size=10)
    axes.axis("off")


def main() -> None:
    """Run the guide's model and draw."""
    guide = (ROOT / "docs" / "guides" / "leaves.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    linecache.cache["guide.py"] = (len(blocks[0]), None, blocks[0].splitlines(keepends=True), "guide.py")  # for inspect
    exec(compile(blocks[0], "guide.py", "exec"), names)
    model, width = names["model"], names["WIDTH"]
    torch.manual_seed(1)
    picture = {"x": torch.randn(2, width), "picture": torch.randn(2, width)}
    batches = [{"x": torch.randn(2, width)}, picture]
    plan = rehearse(model, batches)
    index = ModuleIndex(model)
    leaves = {index.number[id(leaf.module)] for leaf in plan.leaves}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    draw(upper, "All-gathers of one forward without leaves", gathers(index, batches, set()), set())
    leaf_names = {leaf.name for leaf in plan.leaves}
    draw(lower, "The same with the leaves of the rehearsal (blue)", gathers(index, batches, leaves), leaf_names)
    figure.savefig(ROOT / "docs" / "_static" / "leaves.png", dpi=130)


if __name__ == "__main__":
    main()
