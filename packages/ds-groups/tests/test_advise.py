"""Which order of the axes sends least between nodes, against a simulation that sends every message."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from ds_groups import ParallelTopology, TopologyError, TopologyWarning, deepspeed, megatron, torchtitan


def simulate(topology, traffic, per_node):
    """Bytes that leave a node for each rank: every message of every group, one after the other."""
    left = 0.0
    for axis, (amount, pattern) in traffic.items():
        for group in topology.table(axis):
            n = len(group)
            if pattern == "ring":
                ring = sorted(group, key=lambda rank: rank // per_node)
                messages = [(ring[i], ring[(i + 1) % n], amount) for i in range(n)]
            elif pattern == "all-to-all":
                messages = [(a, b, amount / (n - 1)) for a, b in itertools.permutations(group, 2)]
            else:
                messages = [(group[i], group[i + 1], amount) for i in range(n - 1)]
            left += sum(size for source, target, size in messages if source // per_node != target // per_node)
    return left / len(topology.span)


CASES = [
    ParallelTopology(64, tp=4, pp=2, ep=4, ranks_per_node=8),
    ParallelTopology(48, tp=2, cp=3, dp_replicate=2, ep=2, etp=2, ranks_per_node=4),
    ParallelTopology(32, tp=2, ep=4, dp_replicate=2, span=range(16, 32), ranks_per_node=8),
    megatron(64, tp=4, pp=2, ep=4, ranks_per_node=8),
    megatron(64, tp=2, cp=2, pp=2, ep=2, etp=1, ranks_per_node=8),
    torchtitan(64, dp_replicate=2, tp=2, cp=2, ep=4, ranks_per_node=4),
    deepspeed(32, tp=2, sp=2, ep=4, experts="lane_by_lane", ranks_per_node=8),
]
TRAFFIC = {
    "tp": (4e9, "ring"),
    "dp": (1e9, "ring"),
    "ep": (7e8, "all-to-all"),
    "edp": (3e8, "ring"),
    "pp": (1e8, "pipeline"),
}


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_every_order_is_that_of_the_simulation(topology):
    advice = topology.advise(TRAFFIC)
    per_node = topology.ranks_per_node
    assert advice.present.bytes_per_rank == pytest.approx(simulate(topology, TRAFFIC, per_node))
    assert len({one.order for one in advice.orders}) == len(advice.orders) > 1
    for one in advice.orders:
        again = topology.replace(order=one.order, ranks_per_node=None)
        assert one.bytes_per_rank == pytest.approx(simulate(again, TRAFFIC, per_node)), one.order
    found = [one.bytes_per_rank for one in advice.orders]
    assert found == sorted(found)


def test_every_order_is_tried():
    advice = ParallelTopology(64, tp=2, cp=2, pp=2, ranks_per_node=8).advise({"tp": 1e9})
    assert {one.order for one in advice.orders} == {
        "-".join(order) for order in itertools.permutations(("tp", "cp", "dp", "pp"))
    }


def test_axes_of_one_rank_stay_where_they_are():
    advice = ParallelTopology(16, tp=2, ranks_per_node=8).advise({"tp": 1e9})
    assert {one.order for one in advice.orders} == {"tp-cp-dp-pp", "dp-cp-tp-pp"}


def test_the_halves_of_dp_move_apart():
    topology = ParallelTopology(64, tp=2, dp_replicate=2, ranks_per_node=4)
    advice = topology.advise({"dp_replicate": 9e9, "dp_shard": 1e9, "tp": 1})
    assert len(advice.orders) == math.factorial(3)
    assert advice.best[0].order.replace("cp-", "").startswith("dp_replicate-dp_shard")
    assert "dp_replicate" in str(advice)


def test_orders_that_megatron_refuses_are_left_out():
    topology = megatron(64, tp=2, cp=2, pp=2, ep=2, etp=1, ranks_per_node=8)
    found = {one.order for one in topology.advise({"tp": 1e9}).orders}
    names = ("tp", "cp", "ep", "dp", "pp")
    accepted = set()
    for order in itertools.permutations(names):
        try:
            megatron(64, tp=2, cp=2, pp=2, ep=2, etp=1, order="-".join(order))
        except TopologyError:
            continue
        accepted.add("-".join(order))
    assert found == accepted
    assert len(found) < math.factorial(5)


def test_views_of_all_ranks_follow_the_order():
    topology = deepspeed(16, tp=2, hpz=4, ranks_per_node=4)
    advice = topology.advise({"hpz": 1e9, "tp": 0})
    assert {one.bytes_per_rank for one in advice.orders} == {0.0}  # hpZ groups are neighbours in every order


def test_the_best_is_said_and_the_arithmetic_adds_up():
    with pytest.warns(TopologyWarning, match="tp=8 leaves a node"):
        topology = ParallelTopology(64, tp=8, order="dp-cp-tp-pp", ranks_per_node=8)
    advice = topology.advise({"tp": 4e9, "dp": 1e9})
    text = str(advice)
    assert "present order: dp-cp-tp-pp, 4 GB" in text
    assert "tp    8     ring     4 GB       64 of 64 hops  4 GB" in text
    assert "best of 2 orders, 75 % less: tp-cp-dp-pp, 1 GB" in text
    assert "worst: dp-cp-tp-pp, 4 GB" in text
    assert [one.order for one in advice.best] == ["tp-cp-dp-pp"]
    for axis in advice.present.axes:
        assert axis.leaving == axis.link_bytes * axis.crossing / 64
    json.dumps(advice.as_dict())


def test_the_present_order_is_first_among_equals():
    topology = ParallelTopology(16, tp=2, pp=2, order="dp-cp-pp-tp", ranks_per_node=16)
    advice = topology.advise({"tp": 1e9})
    assert advice.present == advice.best[0]
    assert len(advice.best) == len(advice.orders)
    assert "none of the 6 orders is better; 5 are as good" in str(advice)


def test_axes_without_bytes_are_named():
    topology = megatron(64, tp=2, pp=2, ep=4, ranks_per_node=8)
    advice = topology.advise({"tp": 1e9, "ep": 1e9})
    assert advice.without_traffic == ("dp", "pp", "etp", "edp")
    assert "counted as 0, because no bytes were given: dp, pp, etp, edp" in str(advice)
    assert topology.advise({"tp_dp_pp": 1, "ep": 1, ("etp", "edp"): 1}).without_traffic == ()


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        ({}, "names no axis"),
        ({"tp": -1}, "0 or more"),
        ({"tp": float("nan")}, "0 or more"),
        ({"tp": True}, "0 or more"),
        ({"tp": "1"}, "0 or more"),
        ({"tp": (1e9, "tree")}, "'ring', 'all-to-all', 'pipeline'"),
        ({"tp": (1e9,)}, "must be bytes"),
        ({"xp": 1e9}, "'xp' is not known"),
    ],
)
def test_traffic_that_means_nothing(traffic, message):
    with pytest.raises(TopologyError, match=message):
        ParallelTopology(16, tp=2, ranks_per_node=8).advise(traffic)


def test_nodes_have_to_be_known():
    with pytest.raises(TopologyError, match="ranks_per_node, such as 8"):
        ParallelTopology(16, tp=2).advise({"tp": 1e9})
