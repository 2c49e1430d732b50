"""Presets against the tables of the frameworks, computed here from their definitions by enumerating coordinates."""

from __future__ import annotations

import itertools

import pytest
from ds_groups import TopologyError, TopologyWarning, deepspeed, megatron, torchtitan

WORLDS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 27, 30, 32, 36, 48, 64)
ORDERS = ["-".join(order) for order in itertools.permutations(("tp", "cp", "ep", "dp", "pp"))]


def factorisations(number, parts):
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def divisors(number):
    return [value for value in range(1, number + 1) if number % value == 0]


def tables(order, sizes):
    """A function from names to the groups along them; ``order`` has the fastest name first."""
    slowest_first = list(reversed(order))
    places = list(itertools.product(*(range(sizes[name]) for name in slowest_first)))

    def along(*names):
        fixed = [index for index, name in enumerate(slowest_first) if name not in names]
        found: dict[tuple, list[int]] = {}
        for rank, place in enumerate(places):
            found.setdefault(tuple(place[index] for index in fixed), []).append(rank)
        return sorted(tuple(group) for group in found.values())

    return along


@pytest.mark.parametrize("world", WORLDS)
def test_megatron(world):
    """Every size of tp, cp, pp, etp and ep; the orders take turns."""
    refused = made = 0
    turn = itertools.count(7 * world)
    for tp, cp, pp, dp in factorisations(world, 4):
        for etp in divisors(tp * cp * dp):
            for ep in divisors(tp * cp * dp // etp):
                names = ORDERS[next(turn) % len(ORDERS)].split("-")
                edp = tp * cp * dp // etp // ep
                dense = tables(names, {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": 1})
                expert = tables(names, {"tp": etp, "cp": 1, "pp": pp, "dp": edp, "ep": ep})
                sizes = {"tp": tp, "cp": cp, "pp": pp, "etp": etp, "ep": ep, "order": "-".join(names)}
                if dense("pp") != expert("pp"):
                    refused += 1
                    with pytest.raises(TopologyError, match="put pp last"):
                        megatron(world, **sizes)
                    continue
                made += 1
                topology = megatron(world, **sizes)
                axes = [
                    ("tp",),
                    ("cp",),
                    ("dp",),
                    ("pp",),
                    ("dp", "cp"),
                    ("tp", "pp"),
                    ("tp", "cp"),
                    ("tp", "dp", "cp"),
                ]
                for axis in [axes[made % len(axes)], axes[(made + 3) % len(axes)]]:
                    assert list(topology.table(axis)) == dense(*axis), (topology, axis)
                assert list(topology.table("mp")) == dense("tp", "pp")
                theirs = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp"}
                axes = [("etp",), ("ep",), ("edp",), ("etp", "ep"), ("etp", "ep", "pp"), ("ep", "edp")]
                for axis in axes:
                    assert list(topology.table(axis)) == expert(*(theirs[name] for name in axis)), (topology, axis)
    assert made > refused


def test_megatron_defaults():
    topology = megatron(16, tp=2, pp=2, ep=2)
    assert topology.etp == 2  # Megatron's: experts are as tensor parallel as the rest
    assert topology.axes_in_use() == ("tp", "dp", "pp", "ep", "edp")
    assert megatron(16, tp=2, etp=1, ep=16).table("ep") == (tuple(range(16)),)
    with pytest.raises(TopologyError, match=r"expert size etp \* ep = 2 \* 3 = 6 must divide tp \* cp \* dp"):
        megatron(16, tp=2, ep=3)


@pytest.mark.parametrize("world", WORLDS)
def test_torchtitan(world):
    for tp, cp, dp_shard, dp_replicate, pp in factorisations(world, 5):
        sizes = {"tp": tp, "cp": cp, "dp_shard": dp_shard, "dp_replicate": dp_replicate, "pp": pp}
        region = tp * cp * dp_shard
        dense = tables(("tp", "cp", "dp_shard", "dp_replicate", "pp"), sizes)
        for ep in divisors(region):
            for etp in {1, tp} if region // ep % tp == 0 else {1}:
                topology = torchtitan(world, **sizes, ep=ep, etp=etp)
                experts = {"etp": etp, "ep": ep, "efsdp": region // ep // etp, "dp_replicate": dp_replicate, "pp": pp}
                sparse = tables(tuple(experts), experts)
                for names in (("ep",), ("efsdp",), ("etp",), ("efsdp", "dp_replicate"), ("ep", "pp")):
                    assert list(topology.table(names)) == sparse(*names), (topology, names)
        for axis, names in {
            "batch": ("dp_shard", "dp_replicate"),
            "fsdp": ("dp_shard", "cp"),
            "loss": ("dp_shard", "dp_replicate", "cp"),
            "dp_replicate": ("dp_replicate",),
            "tp": ("tp",),
            "pp": ("pp",),
        }.items():
            assert list(topology.table(axis)) == dense(*names), (topology, axis)


def test_torchtitan_refuses_experts_across_replicas():
    with pytest.raises(TopologyError, match=r"expert size 4 must divide tp \* cp \* dp_shard = 1 \* 1 \* 2 = 2"):
        torchtitan(8, dp_replicate=4, ep=4)


def stage_tables(world, tp, pp, ep, *, layout, data_first):
    """DeepSpeed's expert and expert-data groups: a stage's ranks in some order, cut into neighbours or strides."""
    expert, data = [], []
    for stage in range(pp):
        ranks = list(range(stage * world // pp, (stage + 1) * world // pp))
        lanes = [ranks[lane::tp] for lane in range(tp)]
        rows = {"stage": [ranks], "lane": lanes, "lane_by_lane": [[*itertools.chain(*lanes)]]}[layout]
        for row in rows:
            count = len(row) // ep
            groups = [row[i::count] if data_first else row[i * ep : (i + 1) * ep] for i in range(count)]
            expert += [tuple(group) for group in groups]
            data += [tuple(replicas) for replicas in zip(*groups, strict=True)]
    return expert, data


@pytest.mark.parametrize("layout", ["stage", "lane", "lane_by_lane"])
@pytest.mark.parametrize("world", WORLDS)
def test_deepspeed(world, layout):
    for tp, sp, dp, pp in factorisations(world, 4):
        for ep in divisors(sp * dp * (1 if layout == "lane" else tp)):
            data_first = (ep + tp) % 2 == 0
            sizes = {"tp": tp, "sp": sp, "pp": pp, "ep": ep}
            topology = deepspeed(world, **sizes, experts=layout, data_before_expert=data_first)
            expert, data = stage_tables(world, tp, pp, ep, layout=layout, data_first=data_first)
            assert sorted(topology.table("ep")) == sorted(expert), topology
            assert sorted(topology.table("edp")) == sorted(data), topology
        dense = tables(("tp", "sp", "dp", "pp"), {"tp": tp, "sp": sp, "dp": dp, "pp": pp})
        for axis in (("tp",), ("sp",), ("dp",), ("pp",), ("sp", "dp")):
            assert list(topology.table(axis)) == dense(*axis)
        assert topology.table("seq_data") == topology.table(("sp", "dp"))
    for size in divisors(world):
        topology = deepspeed(world, hpz=size, ranks_per_node=size)
        rows = [tuple(range(start, start + size)) for start in range(0, world, size)]
        columns = [tuple(column) for column in zip(*rows, strict=True)]
        assert list(topology.table("hpz")) == list(topology.table("local")) == rows
        assert list(topology.table("hpz_replicate")) == list(topology.table("node")) == columns


def test_unknown_layout():
    with pytest.raises(TopologyError, match="experts='lanes' must be one of 'stage', 'lane', 'lane_by_lane'"):
        deepspeed(8, experts="lanes")


def test_presets_are_topologies():
    topology = megatron(32, tp=2, pp=2, ep=4, ranks_per_node=8)
    assert topology.replace(tp=4, etp=4).table("tp")[0] == (0, 1, 2, 3)
    assert topology.replace(world_size=64).dp == 16
    with pytest.warns(TopologyWarning, match="tp=4 leaves a node"):
        megatron(8, tp=4, ranks_per_node=2)
