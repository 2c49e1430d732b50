"""Groups of a bound topology really work: reductions in each equal sums over rank lists from enumeration."""

from __future__ import annotations

import contextlib
import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, RankGrid, StaleGroupsError, TopologyError, deepspeed, megatron, torchtitan
from ds_groups._pool import GroupPool
from ds_groups.errors import NotInitializedError
from ranks import run_ranks

PLANS = {
    1: [({}, ["dp", "tp", "ep"])],
    2: [({"tp": 2}, ["tp", "dp", "tp_dp"])],
    3: [({"ep": 3}, ["dp", "ep", "edp"])],
    4: [
        ({"tp": 2, "ep": 4}, ["tp", "dp", "ep", "edp", "tp_dp"]),
        ({"tp": 2, "pp": 2, "order": "pp-tp-cp-dp"}, ["tp", "pp", "tp_pp"]),
        ({"ep": 2, "data_before_expert": True, "dp_shard": 2}, ["ep", "edp", "dp_shard", "dp_replicate"]),
    ],
    8: [({"tp": 2, "cp": 2, "pp": 2, "ep": 2}, ["tp", "cp", "dp", "pp", "dp_cp", "tp_pp", "ep", "edp", "ep_pp"])],
}


def reduce_in_groups(rank):
    return [reduce_in(rank, options, axes) for options, axes in PLANS[dist.get_world_size()]]


def reduce_in(rank, options, axes):
    world = dist.get_world_size()
    bound = ParallelTopology(world, **options).bind(timeout=20)
    sums = {}
    for axis in axes:
        group = bound.group(axis)
        value = torch.tensor([10**rank])
        dist.all_reduce(value, group=group)
        sums[axis] = value.item()
        assert dist.get_process_group_ranks(group) == list(bound.ranks(axis))
        assert (dist.get_rank(group), dist.get_world_size(group)) == (bound.index(axis), bound.size(axis))
        assert bound.group(axis) is group
    dist.barrier()
    bound.close()
    return sums


@pytest.mark.parametrize("world", PLANS)
def test_every_group_reduces_over_its_ranks(world):
    answers = run_ranks(reduce_in_groups, world)
    for number, (options, axes) in enumerate(PLANS[world]):
        topology = ParallelTopology(world, **options)  # its tables are held against an oracle in test_topology.py
        for axis in axes:
            for group in topology.groups(axis):
                assert {answers[rank][number][axis] for rank in group} == {sum(10**rank for rank in group)}


GRIDS = [
    RankGrid({"a": 2, "b": 2}, span=(3, 1, 0, 2)).view(x=4),
    RankGrid({"a": 2, "b": 2}, ranks_per_node=2).view(over=("b", "a"), x=2, y=2),
    megatron(4, tp=2, ep=2, etp=1),
    torchtitan(4, dp_replicate=2, ep=2),
    deepspeed(4, tp=2, ep=2, hpz=2, experts="lane_by_lane"),
]


def reduce_along_everything(rank):
    """Along every axis of every grid, and every pair that can be joined: the sum, and each member's place."""
    found = []
    for grid in GRIDS:
        with grid.bind(timeout=20) as bound:
            sums = {}
            for axis in [*grid.names, *itertools.permutations(grid.names, 2)]:
                with contextlib.suppress(TopologyError):  # joined digits that overlap
                    value = torch.zeros(4, dtype=torch.int64)
                    value[rank] = bound.index(axis) + 1
                    dist.all_reduce(value, group=bound.group(axis))
                    sums[axis] = value.tolist()
            dist.barrier()
            found.append(sums)
    return found


def test_every_axis_of_every_view():
    answers = run_ranks(reduce_along_everything, 4)
    for number, grid in enumerate(GRIDS):
        assert set(answers[0][number]) >= set(grid.names)
        for rank, sums in enumerate(answers):
            for axis, places in sums[number].items():
                group = grid.ranks(axis, rank)  # held against an oracle in test_grid.py
                assert places == [group.index(other) + 1 if other in group else 0 for other in range(4)], (grid, axis)


def count_groups(rank):
    made = []
    before = set(dist.distributed_c10d._world.pg_map)
    bound = ParallelTopology(dist.get_world_size(), tp=2, ep=2).bind()
    assert len(bound) == 0
    made.append(len(set(dist.distributed_c10d._world.pg_map) - before))
    for axis in ("tp", "tp", "dp", "ep", "edp", "tp_dp"):
        bound.group(axis)
    assert bound.group("ep") is bound.group("tp")  # the same ranks
    assert bound.group("edp") is bound.group("dp")
    assert bound.group("tp_dp") is dist.group.WORLD
    made.append(len(set(dist.distributed_c10d._world.pg_map) - before))
    bound.close()
    made.append(len(set(dist.distributed_c10d._world.pg_map) - before))
    return made


def test_only_own_groups_are_made_and_equal_ones_are_shared():
    assert run_ranks(count_groups, 4) == [[0, 2, 0]] * 4


def calls_to_pytorch(rank, everyone):
    calls = []
    if everyone:
        from ds_groups import _c10d

        _c10d._MAKE = None  # a PyTorch without the lower level
        _c10d._can_make.cache_clear()
    new_group = dist.new_group
    dist.new_group = lambda ranks, **options: calls.append(ranks) or new_group(ranks, **options)
    bound = ParallelTopology(dist.get_world_size(), tp=2, ep=2).bind()
    bound.create("dp", "ep", "tp")
    value = torch.tensor([1])
    dist.all_reduce(value, group=bound.group("ep"))
    assert value.item() == 2
    assert bound.group("ep") is bound.group("tp")
    bound.close()
    return bound.mode, calls


def test_members_mode_never_asks_others():
    assert run_ranks(calls_to_pytorch, 4, False) == [("members", [])] * 4


def test_everyone_mode_makes_all_groups_in_one_order():
    expected = [[0, 2], [1, 3], [0, 1], [2, 3]], [[0, 1], [2, 3], [0, 2], [1, 3]]
    answers = run_ranks(calls_to_pytorch, 4, True)
    assert {mode for mode, _ in answers} == {"everyone"}
    assert all(calls == answers[0][1] for _, calls in answers)
    assert answers[0][1] in expected


def asked_in_different_orders(rank):
    bound = ParallelTopology(4, tp=2).bind(timeout=20)
    bound.create(*(("tp", "dp") if rank % 2 else ("dp", "tp")))
    names = [dist.get_process_group_ranks(bound.group(axis)) for axis in ("tp", "dp")]
    bound.close()
    return names


def test_create_has_one_order():
    assert run_ranks(asked_in_different_orders, 4)[3] == [[2, 3], [1, 3]]


def split_mode(rank):
    """On NCCL bound to a device every rank makes its own group at once; sharing must be decided alike everywhere."""
    bound = ParallelTopology(4, tp=2, ep=2).bind()
    bound._pool.mode = "split"
    groups = [bound.group(axis) for axis in ("tp", "dp", "ep", "edp")]
    assert groups[2] is groups[0]
    assert groups[3] is groups[1]
    value = torch.tensor([rank])
    dist.all_reduce(value, group=groups[1])
    bound.close()
    return value.item()


def test_split_mode_shares_whole_axes():
    assert run_ranks(split_mode, 4) == [2, 4, 2, 4]


def stale_and_closed(rank):
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=timedelta(seconds=20))
    group = bound.group("tp")
    lonely = bound.group("dp")
    dist.destroy_process_group(lonely)
    messages = []
    for axis in ("dp",):
        with pytest.raises(StaleGroupsError) as caught:
            bound.group(axis)
        messages.append(str(caught.value))
    dist.barrier(group=group)
    bound.close()
    bound.close()
    with pytest.raises(StaleGroupsError) as caught:
        bound.group("tp")
    messages.append(str(caught.value))
    with ParallelTopology(2, tp=2).bind() as again:
        dist.barrier(group=again.group("tp"))
    assert "closed" in repr(again)
    return messages


def test_destroyed_and_closed_groups_are_noticed():
    first, second = run_ranks(stale_and_closed, 2)[0]
    assert "dp group was destroyed by somebody else" in first
    assert "this topology was closed; call bind() again" in second


def wrong_world(rank):
    with pytest.raises(TopologyError, match="world_size=4 of the topology is not the 2 ranks of the process group"):
        ParallelTopology(4).bind()
    return True


def test_world_size_must_be_that_of_the_process_group():
    assert run_ranks(wrong_world, 2) == [True, True]


def test_bind_needs_a_process_group():
    with pytest.raises(NotInitializedError, match=r"call torch\.distributed\.init_process_group"):
        ParallelTopology(1).bind()
    with pytest.raises(NotInitializedError):
        GroupPool()


def debug_detail(rank):
    bound = ParallelTopology(2, tp=2, ep=2).bind(timeout=20)
    value = torch.tensor([rank + 1])
    dist.all_reduce(value, group=bound.group("tp"))
    bound.close()
    return value.item()


def test_torch_distributed_debug():
    assert run_ranks(debug_detail, 2, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}) == [3, 3]


def missing_member(rank):
    bound = ParallelTopology(2, tp=2).bind(timeout=1)
    if rank == 1:
        return None
    with pytest.raises(RuntimeError) as caught:
        bound.group("tp")
    return type(caught.value).__name__, str(caught.value)


def test_a_member_that_does_not_come_is_an_error():
    name, message = run_ranks(missing_member, 2)[0]
    assert name == "GroupCreationError"
    assert "rank 0 could not make the tp group of ranks [0, 1]" in message
    assert "every rank of the group must ask for it" in message


def found_by_name(rank):
    """PyTorch's compiled collectives find groups by name; test_mesh.py runs some."""
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20)
    group = bound.group("tp")
    found = dist.distributed_c10d._resolve_process_group(group.group_name)
    return dist.get_process_group_ranks(found), group.group_desc


def test_groups_are_registered_by_name():
    assert run_ranks(found_by_name, 2) == [([0, 1], "tp")] * 2


def test_axis_spellings_share_one_group():
    spellings = ["_".join(parts) for parts in itertools.permutations(["cp", "dp"])]
    topology = ParallelTopology(8, cp=2, tp=2)
    assert len({topology.ranks(axis, 5) for axis in spellings}) == 1
