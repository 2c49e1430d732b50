"""Deal out cores so that no two ranks share one: equally, or next to the ranks' devices. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from ds_numa._planning.layout import Core, Layout
from ds_numa._planning.shares import equal_cuts


def place_equally(layout: Layout, row: Sequence[Core], homes: Sequence[int | None]) -> list[list[Core]]:
    """Equal shares of a row of cores; of those, each rank gets one as near to its home node as possible.

    Args:
        layout: for the distances.
        row: what to deal out, in the order of ``layout.row``.
        homes: by rank; None where a rank has none.
    """
    parts = deal(layout, row, len(homes))
    if all(home is None for home in homes):
        return parts
    mixes = [Counter([core.node for core in part]) for part in parts]

    def cost(rank: int, part: int) -> float:
        """The mean distance of a part's cores from the rank's home."""
        home, mix = homes[rank], mixes[part]
        if home is None:
            return 0
        return sum(layout.distance(home, node) * number for node, number in mix.items()) / len(parts[part])

    places = {node: i for i, node in enumerate(layout.by_node)}
    taken = [0] * len(homes)  # the part of each rank
    by_home = sorted(range(len(homes)), key=lambda rank: (places.get(homes[rank], len(places)), rank))
    for part, rank in enumerate(by_home):
        taken[rank] = part
    better = True
    while better:  # each swap lowers the sum of the costs, so this ends
        better = False
        for a in range(len(homes)):
            for b in range(a):
                now = cost(a, taken[a]) + cost(b, taken[b])
                if cost(a, taken[b]) + cost(b, taken[a]) < now - 1e-9:
                    taken[a], taken[b] = taken[b], taken[a]
                    better = True
    return [parts[part] for part in taken]


def place_by_device(layout: Layout, homes: Sequence[int | None]) -> list[list[Core]] | None:
    """Each rank on its home node; no rank leaves the socket domain of its home.

    Cores of other nodes of the domain go to the ranks nearest to them. Cores of domains where no rank lives are not
    dealt out.

    Args:
        layout: the cores.
        homes: by rank, nodes with cores; a rank with None settles where there is the most room.

    Returns:
        A share for every rank, or None where a domain has fewer cores than ranks.
    """
    tenants: dict[int | None, list[int]] = {node: [] for node in layout.by_node}
    for rank, home in enumerate(homes):
        if home is not None:
            tenants[home].append(rank)
    for rank, home in enumerate(homes):
        if home is None:
            room = {node: len(block) / (len(tenants[node]) + 1) for node, block in layout.by_node.items()}
            tenants[max(room, key=lambda node: room[node])].append(rank)
    shares: dict[int, list[Core]] = {}
    for domain in dict.fromkeys(layout.domain.get(node) for node in layout.by_node):
        nodes = [node for node in layout.by_node if layout.domain.get(node) == domain]
        there = sorted(rank for node in nodes for rank in tenants[node])
        row = [core for node in nodes for core in layout.by_node[node]]
        if len(row) < len(there):
            return None
        if any(len(layout.by_node[node]) < len(tenants[node]) for node in nodes):
            home_of = {rank: node for node in nodes for rank in tenants[node]}
            shares.update(zip(there, place_equally(layout, row, [home_of[rank] for rank in there]), strict=True))
        elif there:
            _settle(layout, {node: sorted(tenants[node]) for node in nodes}, shares)
    return [shares[rank] for rank in range(len(homes))]


def deal(layout: Layout, row: Sequence[Core], ranks: int) -> list[list[Core]]:
    """Shares of a row that differ by at most one core.

    As many cuts as possible fall on the edge of a socket, then of a node, then of a cache. Where there are several
    kinds of core (P cores, E cores), the shares differ by at most one core of each kind and lie apart in the row.
    """
    kinds = sorted({core.kind for core in row})
    if len(kinds) < 2:
        weights = {}
        if len(row) % ranks:
            weights = {i: ranks ** layout.level(*pair) for i, pair in enumerate(pairwise(row), 1)}
        return [list(row[start:end]) for start, end in pairwise(equal_cuts(len(row), ranks, weights))]
    shares: list[list[Core]] = [[] for _ in range(ranks)]
    first = 0  # who gets the first core of a remainder: the one after who got the last, so that the sums are equal too
    for kind in kinds:
        cores = [core for core in row if core.kind == kind]
        each, larger = divmod(len(cores), ranks)
        start = 0
        for rank, share in enumerate(shares):
            end = start + each + ((rank - first) % ranks < larger)
            share += cores[start:end]
            start = end
        first += larger
    return shares


def _settle(layout: Layout, tenants: dict[int | None, list[int]], shares: dict[int, list[Core]]) -> None:
    """Deal out the cores of one domain: those of the ranks' own nodes, then the others to the nearest ranks."""
    lived_in = [node for node, ranks in tenants.items() if ranks]
    for node in lived_in:
        shares.update(zip(tenants[node], deal(layout, layout.by_node[node], len(tenants[node])), strict=True))
    leftover: dict[tuple[int | None, ...], list[Core]] = {}  # by the lived-in nodes that are nearest
    for node in tenants:
        if node not in lived_in:
            reach = min(layout.distance(node, other) for other in lived_in)
            near = tuple(other for other in lived_in if layout.distance(node, other) == reach)
            leftover.setdefault(near, []).extend(layout.by_node[node])
    for near, row in leftover.items():
        ranks = [rank for node in near for rank in tenants[node]]
        ranks.sort(key=lambda rank: (len(shares[rank]), rank))
        parts = sorted(deal(layout, row, len(ranks)), key=len, reverse=True)  # the largest to who has the least
        for rank, part in zip(ranks, parts, strict=True):
            shares[rank] = shares[rank] + part
