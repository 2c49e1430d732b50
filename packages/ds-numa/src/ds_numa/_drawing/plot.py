"""A machine, and which rank sits where, as a picture: boxes in boxes, a square for each core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_numa._drawing.draw import KINDS, PALETTE, SYMBOLS
from ds_numa._ranges import format_ranges
from ds_numa.errors import MissingDependencyError, NumaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ds_numa.plan import Plan
    from ds_numa.topology import Node, Topology

_FREE, _IDLE, _DENIED = "#DDE3EA", "#FFFFFF", "#666666"
_PAD, _TITLE, _LETTER = 0.3, 0.9, 0.42  # in widths of a core
_ROW = 16  # cores side by side in a cache
_INCHES = 0.22  # width of a core


@dataclass
class _Box:
    """A rectangle with a title and either children or, as a leaf, a colour and a text. Sizes in widths of a core."""

    title: str = ""
    children: list[_Box] = field(default_factory=list)
    columns: float = 40.0  # children are wrapped to a new line behind this width
    color: str | None = None
    text: str = ""
    width: float = 1.0
    height: float = 1.0
    gap: float = _PAD
    new_line: bool = False
    places: list[tuple[float, float]] = field(default_factory=list)

    def arrange(self) -> None:
        """Give every child its place, left to right, and this box the size that holds them."""
        if not self.children:
            return
        x, y, line, right = self.gap, self.gap + (_TITLE if self.title else 0.0), 0.0, 0.0
        for child in self.children:
            child.arrange()
            if x > self.gap and (child.new_line or x + child.width > self.columns):
                x, y, line = self.gap, y + line + self.gap, 0.0
            self.places.append((x, y))
            x += child.width + self.gap
            line, right = max(line, child.height), max(right, x)
        self.width = max(right, _LETTER * len(self.title) + 2 * self.gap)
        self.height = y + line + self.gap


def plot(machine: Topology, plan: Plan | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
    """What `Topology.plot` draws."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a picture needs matplotlib: pip install ds-numa[plot]") from error
    if path is not None:
        _check_ending(path)
    root = _machine_box(machine, plan)
    root.arrange()
    figure = Figure(figsize=(root.width * _INCHES, root.height * _INCHES))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, root.width)
    axes.set_ylim(root.height, 0)
    axes.set_axis_off()
    _paint(axes, root, 0.0, 0.0, 0)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _check_ending(path: str | os.PathLike[str]) -> None:
    """Raise `NumaError` unless a file's ending names a format that matplotlib writes."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    ending = os.path.splitext(os.fspath(path))[1]
    if ending[1:].lower() not in known:
        raise NumaError(f"path = {os.fspath(path)!r} ends in {ending!r}: end it in one of {', '.join(known)}")


def _machine_box(machine: Topology, plan: Plan | None) -> _Box:
    parts = [_count(len(machine.cores), "core"), _count(sum(map(len, machine.cores)), "CPU")]
    parts += [_count(len(plan), "rank")] if plan else []
    given = {cpu for binding in plan.bindings for cpu in binding.cpus} if plan else set()
    denied = [core for core in machine.cores if set(core).isdisjoint(machine.allowed)]
    idle = [core for core in machine.cores if core not in denied and given.isdisjoint(core)] if plan else []
    parts += ["white: idle"] if idle else []
    parts += ["grey: not allowed"] if denied else []
    root = _Box(", ".join(parts), columns=80.0)
    sockets: list[tuple[str, set[int]]] = [(f"socket {i}", set(cpus)) for i, cpus in enumerate(machine.sockets)]
    everything = {cpu for core in machine.cores for cpu in core}
    rest = everything.difference(*(cpus for _, cpus in sockets))
    drawn: set[int] = set()  # nodes whose devices are there: a node may lie in several sockets
    for name, cpus in [*sockets, ("", rest)]:
        nodes = [node for node in machine.nodes if not cpus.isdisjoint(node.cpus)]
        boxes = []
        for node in nodes:
            boxes.append(_node_box(machine, node, cpus, plan, devices=node.id not in drawn))
            drawn.add(node.id)
        root.children += [_Box(name, boxes, columns=38.0)] if name and boxes else boxes
    for node in machine.nodes:
        if not node.cpus:
            title = f"node {node.id}: {KINDS[node.kind]}{_size(node)}"
            inside = _device_boxes(machine, node.id, plan)
            root.children.append(_Box(title, inside) if inside else _label(title, _FREE))
    stray = _device_boxes(machine, None, plan)
    if stray:
        root.children.append(_Box("node unknown", stray))
    return root


def _node_box(machine: Topology, node: Node, socket: set[int], plan: Plan | None, *, devices: bool) -> _Box:
    mine = socket.intersection(node.cpus)
    box = _Box(f"node {node.id}{_size(node)}" if machine.numa else "", columns=36.0)
    groups = [mine.intersection(cache) for cache in machine.l3] + [mine.difference(*machine.l3)]
    for cpus in groups:
        cores = [core for core in machine.cores if not cpus.isdisjoint(core)]
        if cores:
            cells = [_core_box(machine, core, plan) for core in cores]
            lines = -(-len(cells) // _ROW)
            box.children.append(_Box("", cells, columns=-(-len(cells) // lines) * 1.1 + 0.15, gap=0.1))
    if devices:
        found = _device_boxes(machine, node.id, plan)
        for first in found[:1]:
            first.new_line = True
        box.children += found
    return box


def _core_box(machine: Topology, core: Sequence[int], plan: Plan | None) -> _Box:
    if set(core).isdisjoint(machine.allowed):
        return _Box(color=_DENIED)
    if plan is None:
        return _Box(color=_FREE)
    ranks = [binding.local_rank for binding in plan.bindings if not set(core).isdisjoint(binding.cpus)]
    if not ranks:
        return _Box(color=_IDLE)
    if len(ranks) > 1:
        return _Box(color=_FREE, text="*")
    return _Box(color=_color(ranks[0]), text=SYMBOLS[ranks[0]] if ranks[0] < len(SYMBOLS) else "+")


def _device_boxes(machine: Topology, node: int | None, plan: Plan | None) -> list[_Box]:
    boxes = []
    for index, gpu in enumerate(machine.gpus):
        if gpu.node == node:
            users = [binding.local_rank for binding in plan.bindings if binding.gpu == gpu.pci] if plan else []
            text = f"GPU {index}" + (f": rank {format_ranges(users)}" if users else "")
            color = _color(users[0]) if len(users) == 1 else _FREE if gpu.usable else _DENIED
            boxes.append(_label(text, color))
    for nic in machine.nics:
        if nic.node == node:
            boxes.append(_label("/".join(nic.names) or nic.pci, _IDLE))
    return boxes


def _label(text: str, color: str) -> _Box:
    return _Box(color=color, text=text, width=_LETTER * len(text) + 0.6, height=1.2)


def _paint(axes: Axes, box: _Box, x: float, y: float, depth: int) -> None:
    from matplotlib.patches import Rectangle

    face = box.color or ("#FFFFFF", "#F4F6F8", "#E9EEF3", "#FFFFFF")[min(depth, 3)]
    edge = "#B0B8C0" if depth else face
    axes.add_patch(Rectangle((x, y), box.width, box.height, facecolor=face, edgecolor=edge, linewidth=0.5))
    if box.title:
        axes.text(x + _PAD, y + _TITLE * 0.65, box.title, fontsize=8, va="center", ha="left")
    if box.text:
        middle = (x + box.width / 2, y + box.height / 2)
        axes.text(*middle, box.text, fontsize=6.5, va="center", ha="center", clip_on=True)
    for child, (left, top) in zip(box.children, box.places, strict=True):
        _paint(axes, child, x + left, y + top, depth + 1)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _color(rank: int) -> str:
    return PALETTE[rank % len(PALETTE)]


def _size(node: Node) -> str:
    return "" if node.memory_bytes is None else f", {node.memory_bytes / 2**30:.1f} GiB"
