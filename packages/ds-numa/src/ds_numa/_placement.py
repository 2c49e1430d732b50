"""Deal out cores to ranks: equally, or next to their GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ds_numa._shares import equal_cuts
from ds_numa.topology import Topology


@dataclass(frozen=True)
class Core:
    """What is dealt out as one: the CPUs of a physical core, and its node (None if no node lists it)."""

    cpus: tuple[int, ...]
    node: int | None


def place_equally(topology: Topology, cores: Sequence[Core], ranks: int) -> list[list[Core]]:
    """Equal shares, in an order of the nodes that puts near ones next to each other."""
    blocks = _by_node(topology, cores)
    row = [core for block in blocks.values() for core in block]
    return _cut(row, equal_cuts([len(block) for block in blocks.values()], ranks))


def place_by_gpu(topology: Topology, cores: Sequence[Core], homes: Sequence[int | None]) -> list[list[Core]] | None:
    """Each rank on its home node, that is its GPU's; cores of nodes where no rank lives go to the nearest ranks.

    Args:
        topology: for the distances.
        cores: what to deal out.
        homes: by rank; None where it is unknown. A home without usable cores counts as the nearest node that has some.

    Returns:
        A share for every rank, or None where no home is known or a node has fewer cores than ranks.
    """
    blocks = _by_node(topology, cores)
    known = {node.id for node in topology.nodes}
    if all(home is None or home not in known for home in homes):
        return None
    tenants: dict[int | None, list[int]] = {node: [] for node in blocks}
    strangers = []
    for rank, home in enumerate(homes):
        if home is None or home not in known:
            strangers.append(rank)
        else:
            tenants[_nearest(topology, home, blocks)].append(rank)
    for rank in strangers:
        roomiest = max(blocks, key=lambda node: len(blocks[node]) / (len(tenants[node]) + 1))
        tenants[roomiest].append(rank)
    if any(len(blocks[node]) < len(ranks) for node, ranks in tenants.items()):
        return None
    shares: dict[int, list[Core]] = {}
    for node, ranks in tenants.items():
        if ranks:
            cuts = equal_cuts([len(blocks[node])], len(ranks))
            shares.update(zip(sorted(ranks), _cut(blocks[node], cuts), strict=True))
    lived_in = [node for node, ranks in tenants.items() if ranks]
    for node, block in blocks.items():
        if node not in lived_in:
            reach = min(_distance(topology, node, other) for other in lived_in)
            near = [rank for other in lived_in if _distance(topology, node, other) == reach for rank in tenants[other]]
            near.sort(key=lambda rank: (len(shares[rank]), rank))
            for rank, extra in zip(near, _cut(block, equal_cuts([len(block)], len(near))), strict=True):
                shares[rank] = shares[rank] + extra
    return [shares[rank] for rank in range(len(homes))]


def _by_node(topology: Topology, cores: Sequence[Core]) -> dict[int | None, list[Core]]:
    """Cores by node; each node is followed by the nearest one that has not come yet."""
    left = {core.node for core in cores}
    order = [min(left, key=lambda node: -1 if node is None else node)]
    while rest := left.difference(order):
        order.append(min(rest, key=lambda node: (_distance(topology, order[-1], node), -1 if node is None else node)))
    return {node: [core for core in cores if core.node == node] for node in order}


def _nearest(topology: Topology, home: int, nodes: Iterable[int | None]) -> int | None:
    return min(nodes, key=lambda node: _distance(topology, home, node))


def _distance(topology: Topology, a: int | None, b: int | None) -> int:
    return 1000 if a is None or b is None else topology.distance(a, b)  # far from everything: no node lists it


def _cut(row: Sequence[Core], cuts: Sequence[int]) -> list[list[Core]]:
    return [list(row[start:end]) for start, end in pairwise(cuts)]
