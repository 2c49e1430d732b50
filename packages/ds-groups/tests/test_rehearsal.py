"""What a layout will make: figures against the groups themselves."""

from __future__ import annotations

import json

import pytest
from ds_groups import ParallelTopology, RankGrid, deepspeed, megatron
from ds_groups._rehearse.nccl_memory import nccl_memory


def test_figures_of_every_axis():
    topology = megatron(64, tp=4, pp=2, ep=4, ranks_per_node=8)
    found = {axis.axis: axis for axis in topology.rehearse().axes}
    assert tuple(found) == topology.axes_in_use()
    for name, axis in found.items():
        groups = topology.table(name)
        nodes = [len({rank // 8 for rank in group}) for group in groups]
        assert (axis.size, axis.groups) == (len(groups[0]), len(groups))
        assert axis.first_groups == groups[:4]
        assert axis.nodes == (min(nodes), max(nodes))
        assert axis.inside_node == (max(nodes) == 1)
    assert (found["ep"].pattern, found["pp"].pattern, found["tp"].pattern) == ("all-to-all", "pipeline", "ring")


def test_communicators_are_distinct_rank_sets():
    topology = megatron(64, tp=4, pp=2, ep=4, ranks_per_node=8)
    sets = {
        frozenset(group) for name in ("tp", "cp", "dp", "pp", "etp", "ep", "edp") for group in topology.groups(name)
    }
    sets = {group for group in sets if len(group) > 1} | {frozenset(range(64))}
    found = topology.rehearse()
    assert found.communicators == len(sets)
    assert found.communicators_per_rank == sum(5 in group for group in sets)


def test_an_axis_of_all_ranks_shares_their_communicator():
    found = ParallelTopology(16, ranks_per_node=8).rehearse()
    assert (found.communicators_per_rank, found.communicators) == (1, 1)
    assert found.nccl_bytes == nccl_memory(16, 8)
    assert RankGrid({"ep": 8}, ranks_per_node=8).rehearse().nccl_bytes == nccl_memory(8, 8, "all-to-all")


def test_axes_with_the_same_groups_appear_once():
    found = ParallelTopology(16, tp=2, ranks_per_node=8).rehearse("dp", "dp_shard", "tp", "tp_dp")
    assert [axis.axis for axis in found.axes] == ["dp", "tp", "tp_dp"]
    assert found.communicators_per_rank == 3


def test_traffic():
    topology = ParallelTopology(16, tp=2, ranks_per_node=8)
    found = topology.rehearse(traffic={"dp": 3e9, "tp_dp": (1e9, "all-to-all")})
    left = {axis.axis: axis.bytes_leaving for axis in found.axes}
    assert left == {"tp": 0, "dp": 3e9 * 2 / 8, "tp_dp": pytest.approx(1e9 * 8 / 15)}
    assert found.bytes_leaving == pytest.approx(sum(left.values()))
    assert "for each of its ranks: 1.28 GB" in str(found)


def test_ulysses_groups_are_all_to_all():
    assert {axis.axis: axis.pattern for axis in deepspeed(16, sp=4).rehearse().axes}["cp"] == "all-to-all"


def test_without_the_size_of_a_node_nothing_is_made_up():
    found = ParallelTopology(16, tp=2, ep=2).rehearse()
    assert found.nccl_bytes is None
    assert {axis.nodes for axis in found.axes} == {axis.nccl_bytes for axis in found.axes} == {None}
    assert "say how many ranks a node has" in str(found)
    assert "GiB" not in str(found)


def test_json_and_lines_of_a_large_world():
    found = megatron(131072, tp=8, pp=16, ep=8, ranks_per_node=8).rehearse()
    assert len(str(found).splitlines()) <= 20
    data = json.loads(json.dumps(found.as_dict()))
    assert list(data) == [
        *("layout", "order", "nodes", "axes", "communicators_per_rank", "communicators"),
        *("nccl_bytes", "nccl_assumptions", "default_traffic", "bytes_leaving"),
    ]
    assert list(data["axes"][0]) == [
        *("axis", "size", "groups", "first_groups", "nodes", "inside_node"),
        *("pattern", "bytes_sent", "bytes_leaving", "nccl_bytes"),
    ]
    assert (data["nodes"], data["communicators_per_rank"]) == (16384, 6)


def test_one_rank():
    found = ParallelTopology(1, ranks_per_node=8).rehearse()
    assert (found.axes, found.communicators, found.nccl_bytes) == ((), 1, 0)
    assert str(found)
