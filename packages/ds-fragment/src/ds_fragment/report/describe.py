"""Who holds what: in words, as a table, and as a picture. Nothing is communicated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_fragment.engines import held_by
from ds_fragment.engines.model import own_parameters
from ds_fragment.engines.versions import known_engine
from ds_fragment.layout import Fragment
from ds_fragment.record import registry
from ds_fragment.sharding import Sharding

_COLUMNS = ("parameter", "shape", "engine", "dtype", "master", "ranks", "this rank holds")


@dataclass(frozen=True)
class Description:
    """How one parameter is held.

    Attributes:
        name: the parameter's, where known.
        shape: of the whole parameter.
        engine: which adapter reads it.
        dtype: of the value that is read.
        master: ``"fp32"`` for a true master, ``"upcast"`` where only a low-precision value exists.
        ranks: the global ranks that hold pieces; empty where every rank holds the whole.
        fragments: what each of those ranks holds, in the same order; None for nothing.
        layout_shape: what the fragments are boxes of.
        holds: this rank's piece in words.
    """

    name: str
    shape: tuple[int, ...]
    engine: str
    dtype: torch.dtype
    master: str
    ranks: tuple[int, ...]
    fragments: tuple[Fragment | None, ...]
    layout_shape: tuple[int, ...]
    holds: str

    def __str__(self) -> str:
        cells = dict(zip(_COLUMNS, _cells(self), strict=True))
        return "\n".join(f"{key}: {value}" for key, value in cells.items())


@dataclass(frozen=True)
class ModelDescription(Sequence[Description]):
    """The descriptions of a model's parameters; as text, a table."""

    parameters: tuple[Description, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.parameters[index]

    def __len__(self) -> int:
        return len(self.parameters)

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_cells(parameter) for parameter in self.parameters)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def describe(target: torch.Tensor | nn.Module) -> Description | ModelDescription:
    """Say how a parameter, or each parameter of a model, is held. No communication.

    Args:
        target: a parameter, or a module.

    Returns:
        A `Description`, or a sequence of them that prints as a table.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(target, nn.Module):
        return ModelDescription(tuple(_describe(param, name) for name, param in own_parameters(target)))
    return _describe(target, None)


@known_engine()
def _describe(param: torch.Tensor, name: str | None) -> Description:
    adapter, param = held_by(param)
    sharding = adapter.sharding(param, "value")
    layout = sharding.layout
    return Description(
        name=registry.name_of(param) if name is None else name,
        shape=tuple(sharding.shape),
        engine=adapter.name,
        dtype=sharding.dtype,
        master=adapter.master(param),
        ranks=sharding.global_ranks(),
        fragments=layout.fragments,
        layout_shape=layout.shape,
        holds=_holds(sharding),
    )


def _holds(sharding: Sharding) -> str:
    if sharding.alone:
        return "all"
    fragment = sharding.layout.fragments[sharding.rank]
    if fragment is None:
        return "nothing"
    spans = [f"{o}:{o + s}" for o, s in zip(fragment.offset, fragment.size, strict=True)]
    kind = "elements" if len(sharding.layout.shape) == 1 and len(sharding.shape) != 1 else ""
    return f"{kind}[{', '.join(spans)}]"


def _cells(parameter: Description) -> tuple[str, ...]:
    ranks = ", ".join(map(str, parameter.ranks[:8])) + (", ..." if len(parameter.ranks) > 8 else "")
    return (
        parameter.name,
        str(tuple(parameter.shape)),
        parameter.engine,
        str(parameter.dtype).removeprefix("torch."),
        parameter.master,
        ranks or "each",
        parameter.holds,
    )


def plot_partition(model: nn.Module, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw which rank holds which part of which parameter. No communication; one rank's call is enough.

    One row a parameter, its height by the number of elements; along the row the flattened parameter, or its first
    dimension from left to right and its second from top to bottom where the layout is over those. Needs matplotlib.

    Args:
        model: the sharded model.
        path: where to write the picture; the ending says the format.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    described = describe(model)
    assert isinstance(described, ModelDescription)
    ranks = sorted({rank for parameter in described for rank in parameter.ranks} or {0})
    palette = colormaps["tab10" if len(ranks) <= 10 else "tab20"]
    colours = dict(zip(ranks, (palette(i % palette.N) for i in range(len(ranks))), strict=True))
    heights = [1.0 + 2.0 * (torch.Size(p.shape).numel() / _largest(described)) ** 0.5 for p in described]
    inches = min(0.17 * sum(heights), max(9.0, 0.12 * len(heights)))  # at least room for a small label in each row
    figure = Figure(figsize=(10, 1.6 + inches), layout="constrained")
    axes = figure.add_subplot()
    top = 0.0
    for parameter, height in zip(described, heights, strict=True):
        if not parameter.ranks:
            axes.add_patch(Rectangle((0, top), 1, height * 0.9, facecolor="0.85"))
        for rank, fragment in zip(parameter.ranks, parameter.fragments, strict=False):
            if fragment is not None:
                left, width, upper, part = _rectangle(parameter.layout_shape, fragment)
                corner = (left, top + upper * height * 0.9)
                axes.add_patch(
                    Rectangle(corner, width, part * height * 0.9, facecolor=colours[rank], edgecolor="white", lw=0.3)
                )
        top += height
    centres = [sum(heights[:i]) + height * 0.45 for i, height in enumerate(heights)]
    labels = [f"{parameter.name}  {tuple(parameter.shape)}" for parameter in described]
    axes.set(xlim=(0, 1), ylim=(top, 0), xlabel="part of the parameter", title=title or "Which rank holds what")
    axes.set_yticks(centres, labels, fontsize=6 if len(labels) < 40 else 5)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[:].set_visible(False)
    handles = [Patch(facecolor=colours[rank], label=f"rank {rank}") for rank in ranks]
    if any(not parameter.ranks for parameter in described):
        handles.append(Patch(facecolor="0.85", label="every rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))
    figure.savefig(path, dpi=150)


def _largest(described: ModelDescription) -> int:
    return max((torch.Size(parameter.shape).numel() for parameter in described), default=1) or 1


def _rectangle(shape: tuple[int, ...], fragment: Fragment) -> tuple[float, float, float, float]:
    """Left, width, top and height of a fragment in a unit square."""
    if not shape:
        return 0.0, 1.0, 0.0, 1.0
    left, width = fragment.offset[0] / shape[0], fragment.size[0] / shape[0]
    if len(shape) == 1:
        return left, width, 0.0, 1.0
    return left, width, fragment.offset[1] / shape[1], fragment.size[1] / shape[1]
