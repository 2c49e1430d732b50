"""Counts of nodes against every hop of every group."""

from __future__ import annotations

import itertools
import random

import pytest
from ds_groups import ParallelTopology, RankGrid, deepspeed, megatron, torchtitan
from ds_groups._rehearse.nodes import Spread, spread


def count_one_by_one(grid, axis, per_node):
    """The same counts, by walking every ring, pair and send."""
    nodes_of, on_node, hops, pairs, sends, groups = [], [], 0, 0, 0, 0
    for group in grid.table(axis):
        groups += 1
        where = {rank: rank // per_node for rank in group}
        nodes_of.append(len(set(where.values())))
        on_node += [list(where.values()).count(node) for node in where.values()]
        ring = sorted(group, key=where.__getitem__)
        hops += sum(where[ring[place]] != where[ring[(place + 1) % len(ring)]] for place in range(len(ring)))
        pairs += sum(where[a] != where[b] for a, b in itertools.permutations(group, 2))
        sends += sum(where[group[place]] != where[group[place + 1]] for place in range(len(group) - 1))
    return Spread(groups, grid.size(axis), min(nodes_of), max(nodes_of), max(on_node), hops, pairs, sends)


GRIDS = [
    ParallelTopology(48, tp=3, cp=2, pp=2, ep=2),
    ParallelTopology(64, tp=2, dp_replicate=4, pp=2, ep=4, order="dp_replicate-pp-tp-dp_shard-cp"),
    ParallelTopology(32, tp=2, dp_replicate=2, span=range(8, 32)),
    RankGrid({"tp": 2, "dp": 4}, span=range(3, 43, 5)),
    RankGrid({"tp": 2, "dp": 4}, span=range(40, 0, -5)),
    RankGrid({"tp": 2, "dp": 4}, span=(7, 3, 1, 0, 9, 11, 30, 2)),
    megatron(64, tp=2, cp=2, pp=2, ep=4),
    torchtitan(96, dp_replicate=2, tp=4, cp=2, ep=4, etp=2),
    deepspeed(48, tp=2, sp=2, ep=4, hpz=8, experts="lane_by_lane"),
    deepspeed(36, tp=3, ep=4, experts="lane_by_lane"),
    RankGrid({"tp": 6, "dp": 4}).view(ep=8, edp=3),
]


@pytest.mark.parametrize("per_node", [1, 3, 4, 8, 12, 100])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_counts_are_those_of_every_hop(grid, per_node):
    for axis in grid.names:
        assert spread(grid, axis, per_node) == count_one_by_one(grid, axis, per_node), axis


def test_random_grids():
    chosen = random.Random(0)
    for _ in range(60):
        names = ["a", "b", "c", "d"]
        grid = RankGrid({name: chosen.choice([1, 2, 3, 4, 5]) for name in names}, span=None)
        axis = tuple(chosen.sample(names, chosen.randint(1, 4)))
        per_node = chosen.randint(1, 20)
        assert spread(grid, axis, per_node) == count_one_by_one(grid, axis, per_node), (grid, axis, per_node)


def test_groups_that_are_no_moved_copies_are_counted_one_by_one():
    grid = RankGrid({"tp": 6, "dp": 4}).view(over=("dp", "tp"), ep=3, edp=8)
    assert grid.axis("ep").factors is None
    assert spread(grid, "ep", 4) == count_one_by_one(grid, "ep", 4)


def test_a_large_world_is_counted_without_its_groups(monkeypatch):
    topology = megatron(131072, tp=8, pp=16, ep=8)
    monkeypatch.setattr(type(topology.axis("dp")), "groups", None)
    found = spread(topology, "dp", 8)
    assert found == Spread(128, 1024, 1024, 1024, 1, 131072, 131072 * 1023, 128 * 1023)
