"""`ParallelTopology` against an oracle that enumerates coordinates and compares them: no arithmetic on ranks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from math import prod

import pytest
from ds_groups import ParallelTopology, TopologyWarning, megatron
from ds_groups._launchers import LAUNCHERS
from ds_groups.errors import DivisibilityError, RankRangeError, TopologyError

AXES = ("tp", "cp", "dp", "pp")
DENSE = [*AXES, *("_".join(pair) for n in (2, 3, 4) for pair in itertools.combinations(AXES, n))]
ORDERS = ["-".join(order) for order in itertools.permutations(AXES)]
FOLDS = ["-".join(fold) for n in (1, 2, 3, 4) for fold in itertools.combinations(AXES, n)]


def factorisations(number, parts):
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in factorisations(number // first, parts - 1):
                yield (first, *rest)


def divisors(number):
    return [value for value in range(1, number + 1) if number % value == 0]


class Oracle:
    """Coordinates by enumeration: the last named axis of the order is the outermost loop."""

    def __init__(self, sizes, order, ep=1, ep_axes="tp-cp-dp", before=False):
        names = order.split("-")
        loops = itertools.product(*(range(sizes[axis]) for axis in reversed(names)))
        self.at = [dict(zip(reversed(names), place, strict=True)) for place in loops]
        count: dict[tuple, int] = {}
        folded = ep_axes.split("-")
        edp = prod(sizes[axis] for axis in folded) // ep
        cut = list(itertools.product(range(ep), range(edp)))
        if not before:  # ep turns faster: the outer loop is edp
            cut = [(e, d) for d, e in itertools.product(range(edp), range(ep))]
        self.outside = [axis for axis in AXES if axis not in folded]
        for place in self.at:
            key = tuple(place[axis] for axis in self.outside)
            place["ep"], place["edp"] = cut[count.get(key, 0)]
            count[key] = count.get(key, 0) + 1

    def groups(self, axis):
        parts = axis.split("_")
        fixed = [*self.outside, "ep", "edp"] if {"ep", "edp"} & set(parts) else AXES
        fixed = [name for name in fixed if name not in parts]
        found: dict[tuple, list[int]] = {}
        for rank, place in enumerate(self.at):
            found.setdefault(tuple(place[name] for name in fixed), []).append(rank)
        return sorted(tuple(group) for group in found.values())


@pytest.mark.parametrize("world", range(1, 65))
def test_every_factorisation(world):
    """All sizes of every world; the orders, the folded axes and both expert orders take turns."""
    turn = itertools.count(world)
    for values in factorisations(world, 4):
        sizes = dict(zip(AXES, values, strict=True))
        for ep in divisors(prod(values[:3])):
            step = next(turn)
            order, before = ORDERS[step % len(ORDERS)], step % 2 == 0
            folds = [fold for fold in FOLDS if prod(sizes[axis] for axis in fold.split("-")) % ep == 0]
            fold = folds[step % len(folds)]
            topology = ParallelTopology(world, **sizes, ep=ep, order=order, ep_axes=fold, data_before_expert=before)
            oracle = Oracle(sizes, order, ep, fold, before)
            for axis in ("ep", "edp") if ep > 1 else (*AXES, DENSE[step % len(DENSE)]):
                assert list(topology.groups(axis)) == oracle.groups(axis), (topology, axis)
            rank = step % world
            assert topology.coordinates(rank).items() >= oracle.at[rank].items(), topology
            assert topology.rank_at(**{axis: oracle.at[rank][axis] for axis in AXES}) == rank
            beside = {axis: oracle.at[rank][axis] for axis in ("ep", "edp", *oracle.outside)}
            assert topology.rank_at(**beside, **({} if "tp" in oracle.outside else {"etp": 0})) == rank
            assert topology.rank_at(**topology.coordinates(rank)) == rank


@pytest.mark.parametrize("world", [1, 4, 6])
def test_every_option_of_small_worlds(world):
    for values, order, fold in itertools.product(factorisations(world, 4), ORDERS[::13], FOLDS):
        sizes = dict(zip(AXES, values, strict=True))
        for ep, before in itertools.product(divisors(prod(sizes[axis] for axis in fold.split("-"))), (False, True)):
            topology = ParallelTopology(world, **sizes, ep=ep, order=order, ep_axes=fold, data_before_expert=before)
            oracle = Oracle(sizes, order, ep, fold, before)
            beside = [axis for axis in AXES if axis not in fold.split("-")]
            mixed = [f"{expert}_{name}" for expert in ("ep", "edp") for name in beside]
            for axis in ("ep", "edp", "ep_edp", *mixed):
                assert list(topology.groups(axis)) == oracle.groups(axis), (topology, axis)


@pytest.mark.parametrize("axis", [*DENSE, "ep", "edp", "dp_shard", "dp_replicate", "dp_shard_cp", "ep_pp"])
@pytest.mark.parametrize("before", [False, True])
def test_properties_of_groups(axis, before):
    sizes = {"tp": 2, "cp": 2, "pp": 2, "dp_shard": 3, "ep": 4}
    topology = ParallelTopology(48, **sizes, data_before_expert=before, order="cp-tp-pp-dp")
    assert list(topology.groups(axis)) == list(topology.table(axis))
    assert [topology.group_of(axis, rank) for rank in range(48)] == [
        next(number for number, group in enumerate(topology.table(axis)) if rank in group) for rank in range(48)
    ]
    groups = list(topology.groups(axis))
    assert sorted(rank for group in groups for rank in group) == list(range(48))  # a partition
    assert {len(group) for group in groups} == {topology.size(axis)}
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert group == tuple(sorted(group))
        assert all(topology.ranks(axis, rank) == group for rank in group)


def test_coordinates_are_unique_and_are_positions():
    topology = ParallelTopology(48, tp=2, cp=2, pp=2, ep=4, ep_axes="cp-dp", dp_shard=3)
    seen = {tuple(topology.coordinates(rank).items()) for rank in range(48)}
    assert len(seen) == 48
    for rank in range(48):
        for axis, coordinate in topology.coordinates(rank).items():
            assert topology.ranks(axis, rank)[coordinate] == rank


def test_hybrid_sharding_cuts_the_data_ranks():
    topology = ParallelTopology(16, tp=2, dp_shard=4)
    assert list(topology.groups("dp_shard")) == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert topology.ranks("dp_replicate", 3) == (3, 11)
    assert topology.ranks("dp_shard_dp_replicate", 3) == topology.ranks("dp", 3)


def test_groups_are_lazy_and_one_group_costs_its_size():
    topology = ParallelTopology(1 << 40, tp=8, ep=64)
    assert topology.ranks("tp", (1 << 40) - 1) == tuple(range((1 << 40) - 8, 1 << 40))
    assert topology.ranks("ep", 70) == tuple(range(64, 128))
    assert topology.size("dp") == 1 << 37
    assert next(topology.groups("tp")) == tuple(range(8))


def test_data_size_is_inferred_and_kept():
    assert ParallelTopology(64, tp=2, pp=4).dp == 8
    assert ParallelTopology(64, tp=2, pp=4, dp=8) == ParallelTopology(64, tp=2, pp=4)
    assert hash(ParallelTopology(8, tp=2)) == hash(ParallelTopology(8, tp=2))
    with pytest.raises(AttributeError):
        ParallelTopology(8).tp = 2


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"ep": 3}, DivisibilityError, "expert size 3 must divide tp * cp * dp = 1 * 1 * 8 = 8; sizes that do: 1, 2"),
        ({"tp": 2, "ep": 8, "ep_axes": "dp"}, DivisibilityError, "expert size 8 must divide dp = 4; sizes that do: 1"),
        ({"tp": 3}, DivisibilityError, "world size 8 must be a multiple of tp * cp * pp = 3 * 1 * 1 = 3"),
        ({"tp": 16}, DivisibilityError, "world size 8 must be a multiple of tp * cp * pp = 16 * 1 * 1 = 16"),
        ({"tp": 2, "dp": 3}, DivisibilityError, "tp * cp * dp * pp = 2 * 1 * 3 * 1 = 6 must equal world size 8"),
        ({"dp_shard": 3}, DivisibilityError, "dp_shard size 3 must divide dp = 8"),
        ({"tp": 0}, TopologyError, "tp must be a positive integer, got 0"),
        ({"dp": -2}, TopologyError, "dp must be a positive integer, got -2"),
        ({"pp": 2.0}, TopologyError, "pp must be a positive integer, got 2.0"),
        ({"ep": True}, TopologyError, "ep must be a positive integer, got True"),
        ({"order": "tp-dp"}, TopologyError, "order='tp-dp' leaves out cp, pp"),
        ({"order": "tp-cp-dp-xp"}, TopologyError, "order='tp-cp-dp-xp' must join distinct axes of tp, cp, dp, pp"),
        ({"order": "tp-tp-dp-pp"}, TopologyError, "must join distinct axes"),
        ({"ep_axes": ""}, TopologyError, "ep_axes='' must join distinct axes"),
    ],
)
def test_refused_sizes(sizes, error, message):
    with pytest.raises(error) as caught:
        ParallelTopology(8, **sizes)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_refused_questions():
    topology = ParallelTopology(8, tp=2, ep=2)
    for rank in (-1, 8, "0"):
        with pytest.raises(RankRangeError, match=r"rank .* is outside the world: 0\.\.7"):
            topology.ranks("tp", rank)
    with pytest.raises(TopologyError, match="'sp' is not known"):
        topology.groups("sp")
    with pytest.raises(TopologyError, match="mixes ep with tp: etp, ep, edp factor the ranks of tp, cp, dp_shard anew"):
        topology.size("tp_ep")
    with pytest.raises(RankRangeError, match=r"tp coordinate 2 is outside 0\.\.1"):
        topology.rank_at(tp=2)


@pytest.mark.parametrize("launcher", [launcher for launcher in LAUNCHERS if launcher.size], ids=lambda one: one.name)
def test_the_launcher_says_how_many_ranks_there_are(launcher, monkeypatch):
    for other in LAUNCHERS:
        monkeypatch.delenv(other.rank, raising=False)
    with pytest.raises(TopologyError, match="world_size was left out"):
        ParallelTopology(tp=2)
    monkeypatch.setenv(launcher.rank, "3")
    monkeypatch.setenv(launcher.size, "12")
    assert ParallelTopology(tp=2) == ParallelTopology(12, tp=2)
    assert megatron(tp=3).dp == 4


def test_replace_computes_again_what_was_left_out():
    topology = ParallelTopology(16, tp=2, ep=4)
    for change in (topology.replace, lambda **sizes: dataclasses.replace(topology, **sizes)):
        assert change(tp=4) == ParallelTopology(16, tp=4, ep=4)
        assert change(world_size=64, pp=2) == ParallelTopology(64, tp=2, pp=2, ep=4)
        assert change(dp_replicate=2).dp_shard == 4
        with pytest.raises(DivisibilityError, match="tp \\* cp \\* dp \\* pp = 4 \\* 1 \\* 8 \\* 1 = 32 must equal"):
            change(tp=4, dp=8)
    given = ParallelTopology(16, tp=2, dp=topology.dp)  # the number, not that it was computed
    with pytest.raises(DivisibilityError, match="leave dp out"):
        given.replace(tp=4)
    same = pickle.loads(pickle.dumps(topology))
    assert same == topology
    assert same.replace(tp=4).dp == 4
    assert copy.deepcopy(topology).replace(tp=4).dp == 4


def test_hybrid_sharding_by_either_half():
    assert ParallelTopology(16, tp=2, dp_replicate=2) == ParallelTopology(16, tp=2, dp_shard=4)
    assert ParallelTopology(16, dp_replicate=2, dp_shard=4, tp=2).dp == 8
    for sizes in ({"dp_replicate": 3}, {"dp_replicate": 2, "dp_shard": 3}, {"dp": 8, "dp_replicate": 3, "tp": 2}):
        with pytest.raises(DivisibilityError):
            ParallelTopology(16, **sizes)


def test_experts_stay_in_a_replica_or_say_so():
    topology = ParallelTopology(16, dp_replicate=2, ep=4)
    assert topology.ranks("ep", 9) == (8, 9, 10, 11)
    assert topology.ranks("edp", 9) == (9, 13)
    assert topology.ranks(("edp", "dp_replicate"), 9) == (1, 5, 9, 13)
    with pytest.warns(TopologyWarning, match="expert groups cross the 8 replicas"):
        across = ParallelTopology(16, dp_replicate=8, ep=4)
    assert across == ParallelTopology(16, dp_replicate=8, ep=4, ep_axes="tp-cp-dp")
    with pytest.raises(DivisibilityError, match="expert size 3 must divide"):
        ParallelTopology(16, dp_replicate=2, ep=3)


def test_tensor_parallel_experts():
    topology = ParallelTopology(16, tp=4, ep=4, etp=2)
    assert topology.ranks("etp", 5) == (4, 5)
    assert topology.ranks("ep", 5) == (1, 3, 5, 7)
    assert topology.ranks("edp", 5) == (5, 13)
    assert ParallelTopology(16, tp=4, ep=2, ep_axes="dp").etp == 4
    with pytest.raises(TopologyError, match="etp=2 must be tp=4 where ep_axes='dp' leaves tp out"):
        ParallelTopology(16, tp=4, etp=2, ep_axes="dp")
    with pytest.raises(DivisibilityError, match=r"expert size etp \* ep = 2 \* 3 = 6 must divide tp \* cp \* dp"):
        ParallelTopology(16, tp=4, etp=2, ep=3)
    with pytest.raises(TopologyError, match="places ep already"):
        ParallelTopology(16, order="tp-cp-ep-dp-pp", data_before_expert=True)
