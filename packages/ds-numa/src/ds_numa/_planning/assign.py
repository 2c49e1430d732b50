"""The cores of each rank, by the mode of the plan, and what a reader should know about the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ds_numa._planning.devices import find_seats
from ds_numa._planning.layout import Core, Layout
from ds_numa._planning.modes import place_exclusive, place_whole
from ds_numa._planning.placement import place_by_device, place_equally
from ds_numa._ranges import format_ranges
from ds_numa._words import listed
from ds_numa.topology import Topology

Mode = Literal["auto", "node", "socket", "l3", "cores", "exclusive"]


def assign(
    topology: Topology, layout: Layout, mode: Mode, addresses: Sequence[str | None], notes: list[str]
) -> list[list[Core]]:
    """The cores of each rank.

    Args:
        topology: the machine.
        layout: the cores to deal out.
        mode: see `plan_binding`.
        addresses: by rank, the PCI address of its GPU, or None.
        notes: where to say what is out of the ordinary.

    Raises:
        NotEnoughCoresError: under ``exclusive``, a node has fewer cores than GPUs.
    """
    node_of = {gpu.pci: _node_of_device(layout, gpu.node) for gpu in topology.gpus}
    device_nodes = [None if pci is None else node_of[pci] for pci in addresses]
    homes = [None if node is None else layout.home(node) for node in device_nodes]
    lost = [rank for rank, pci in enumerate(addresses) if pci is not None and device_nodes[rank] is None]
    if lost:
        notes.append(
            f"the machine does not say on which node the GPU of {listed('rank', lost)} hangs: "
            "placed as if it had none, so its cores may be far from it"
        )
    _say_moved(layout, device_nodes, homes, notes)
    shares = _follow(topology, layout, mode, addresses, homes, notes)
    if shares is None:
        shares = place_equally(layout, layout.row, homes)
    _say_across(layout, device_nodes, shares, notes)
    return shares


def _follow(
    topology: Topology,
    layout: Layout,
    mode: Mode,
    addresses: Sequence[str | None],
    homes: Sequence[int | None],
    notes: list[str],
) -> list[list[Core]] | None:
    """The shares of a mode that looks at the ranks' homes; None where all cores are dealt out equally."""
    if mode in ("l3", "exclusive"):
        pcis, seat_of = find_seats(topology, addresses)
        node_of = {gpu.pci: _node_of_device(layout, gpu.node) for gpu in topology.gpus}
        seats = [None if node is None else layout.home(node) for node in (node_of[pci] for pci in pcis)]
        if mode == "exclusive":
            return place_exclusive(layout, homes, seats, seat_of)
        if not topology.l3:
            notes.append("the machine does not name its last-level caches: a node counts as one")
        return place_whole(layout, mode, homes, seats, seat_of)
    if mode in ("node", "socket"):
        if mode == "socket" and not topology.sockets:
            notes.append("the machine does not name its sockets: nodes nearer to each other than 20 count as one")
        return place_whole(layout, mode, homes)
    if mode == "auto" and any(home is not None for home in homes):
        shares = place_by_device(layout, homes)
        if shares is None:
            notes.append(
                "the sockets of the GPUs have too few allowed cores for their ranks: "
                "cores are dealt out equally instead"
            )
        else:
            _say_idle(layout, shares, notes)
        return shares
    return None


def _node_of_device(layout: Layout, node: int | None) -> int | None:
    """The node that a device hangs on: the only one of a machine that has one, None where it is unknown."""
    with_cpus = [other for other in layout.domain if other is not None]
    if len(with_cpus) == 1 and not layout.knows(node):
        return with_cpus[0]
    return node if layout.knows(node) else None


def _say_moved(
    layout: Layout, device_nodes: Sequence[int | None], homes: Sequence[int | None], notes: list[str]
) -> None:
    moved: dict[tuple[int, int | None], list[int]] = {}
    for rank, (node, home) in enumerate(zip(device_nodes, homes, strict=True)):
        if node is not None and node != home and not layout.shares_cpus(node, home):
            moved.setdefault((node, home), []).append(rank)
    for (node, home), ranks in moved.items():
        notes.append(
            f"the GPU of {listed('rank', ranks)} hangs on node {node}, which has no usable cores: "
            f"node {'?' if home is None else home} is the nearest that has some"
        )


def _say_across(
    layout: Layout, device_nodes: Sequence[int | None], shares: Sequence[Sequence[Core]], notes: list[str]
) -> None:
    across = []
    for rank, (node, share) in enumerate(zip(device_nodes, shares, strict=True)):
        reached = {layout.domain.get(other) for other in {core.node for core in share}}
        if node is not None and reached != {layout.domain_of(node)}:
            across.append(rank)
    if across:
        notes.append(f"{listed('rank', across)} got CPUs on another socket than the GPU")


def _say_idle(layout: Layout, shares: Sequence[Sequence[Core]], notes: list[str]) -> None:
    dealt = {core.cpus for share in shares for core in share}
    idle = [cpu for core in layout.row if core.cpus not in dealt for cpu in core.cpus]
    if idle:
        notes.append(
            f"CPUs {format_ranges(idle)} stay idle: they are on another socket than the ranks' GPUs "
            "(mode='cores' uses them)"
        )
