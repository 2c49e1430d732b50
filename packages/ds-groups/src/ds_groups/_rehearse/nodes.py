"""How the groups along an axis lie on nodes: counts over all groups, exact, at any size of the world.

[Note: patterns] The groups of an axis are one set of offsets, moved. Which ranks of a group share a node depends only
on the place of the first one inside its node. So one group for each place is counted, times how often it occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from ds_groups._digits import Factor, complement, offsets

if TYPE_CHECKING:
    from ds_groups._grid import AxisName, RankGrid


class Spread(NamedTuple):
    """Counts over all groups of an axis.

    Attributes:
        groups: how many there are.
        size: ranks of each.
        fewest_nodes: nodes of the group that is on fewest.
        most_nodes: nodes of the group that is on most.
        most_on_node: the most ranks that one group has on one node.
        hops: hops between nodes, in rings that visit the ranks node by node.
        pairs: ordered pairs of ranks on different nodes.
        sends: ranks whose next one in the group is on another node.
    """

    groups: int
    size: int
    fewest_nodes: int
    most_nodes: int
    most_on_node: int
    hops: int
    pairs: int
    sends: int


def spread(grid: RankGrid, axis: AxisName, ranks_per_node: int) -> Spread:
    """Count how the groups along ``axis`` lie on nodes: rank ``r`` is on node ``r // ranks_per_node``."""
    found, span = grid.axis(axis), grid.span
    if found.factors is None or not isinstance(span, range):
        return _count(((group, 1) for group in grid.groups(axis)), ranks_per_node)
    return _spread(found.factors, len(span), span.start, span.step, ranks_per_node)


@lru_cache(maxsize=4096)
def _spread(factors: tuple[Factor, ...], count: int, first: int, step: int, ranks_per_node: int) -> Spread:
    rest = complement(sorted(factors, key=lambda factor: factor.stride), count)
    moves = [offset * step for offset in offsets(factors)]
    places = _places([Factor(size, stride * step) for size, stride in rest], first, ranks_per_node)
    return _count((([place + move for move in moves], times) for place, times in places.items()), ranks_per_node)


def _places(factors: Sequence[Factor], first: int, ranks_per_node: int) -> Counter[int]:
    """How often each place inside a node begins a group: ``first`` plus all sums of multiples, modulo a node."""
    found = Counter({first % ranks_per_node: 1})
    for size, stride in factors:
        period = ranks_per_node // gcd(stride, ranks_per_node)
        whole, rest = divmod(size, period)
        moved: Counter[int] = Counter()
        for place, times in found.items():
            for step in range(min(size, period)):
                moved[(place + step * stride) % ranks_per_node] += times * (whole + (step < rest))
        found = moved
    return found


def _count(groups: Iterable[tuple[Sequence[int], int]], ranks_per_node: int) -> Spread:
    """Add up groups, each with the number of times that it occurs."""
    number = size = hops = pairs = sends = most_on_node = 0
    spans: set[int] = set()
    for ranks, times in groups:
        nodes = [rank // ranks_per_node for rank in ranks]
        on_node = Counter(nodes)
        size = len(ranks)
        number += times
        spans.add(len(on_node))
        most_on_node = max(most_on_node, *on_node.values())
        hops += times * (len(on_node) if len(on_node) > 1 else 0)
        pairs += times * (size * size - sum(here * here for here in on_node.values()))
        sends += times * sum(before != after for before, after in pairwise(nodes))
    return Spread(number, size, min(spans), max(spans), most_on_node, hops, pairs, sends)
