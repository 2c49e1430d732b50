"""Earlier groups that left ranks out make PyTorch's own local names differ; ours do not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, parallel_state as groups
from ranks import RankError, run_ranks


def after_asymmetric_groups(rank):
    dist.new_group([0, 1, 2])  # rank 3 is in one group less
    dist.new_group([0], use_local_synchronization=True)
    local_name = dist.distributed_c10d._hash_ranks_to_str([0, 1, 2, 3])
    bound = ParallelTopology(4, tp=2, pp=2).bind(timeout=20)
    sums = []
    for axis in ("tp", "pp", "tp_pp", "dp"):
        value = torch.tensor([rank])
        dist.all_reduce(value, group=bound.group(axis))
        sums.append(value.item())
    groups._create_expert_and_data_parallel(4)
    value = torch.tensor([rank])
    dist.all_reduce(value, group=groups._get_expert_parallel_group("ep_size_4"))
    return local_name, [*sums, value.item()]


def test_members_meet_under_one_name():
    answers = run_ranks(after_asymmetric_groups, 4, timeout=40)
    assert len({name for name, _ in answers}) > 1  # this is what PyTorch would have used
    assert [sums for _, sums in answers] == [[1, 2, 6, 0, 6], [1, 4, 6, 1, 6], [5, 2, 6, 2, 6], [5, 4, 6, 3, 6]]


def naive_local_synchronization(rank):
    from datetime import timedelta

    dist.new_group([0], use_local_synchronization=True)
    dist.new_group([0, 1], use_local_synchronization=True, timeout=timedelta(seconds=1))


def test_the_naive_way_fails():
    """The reason for all this: should PyTorch mend its names one day, this test says so."""
    with pytest.raises(RankError):
        run_ranks(naive_local_synchronization, 2, timeout=8)


def made_again_and_again(rank):
    sums = []
    for turn in range(3):
        bound = ParallelTopology(3, ep=3).bind(backend="gloo", timeout=20)
        value = torch.tensor([rank + turn])
        dist.all_reduce(value, group=bound.group("ep"))
        sums.append(value.item())
        bound.close()
    return sums


def test_the_same_ranks_can_be_grouped_again():
    assert run_ranks(made_again_and_again, 3) == [[3, 6, 9]] * 3


def beside_each_other(rank):
    """Two topologies with the same ranks, and user groups made before, between and after."""
    first = ParallelTopology(4, tp=2).bind(timeout=20)
    second = ParallelTopology(4, tp=2).bind(timeout=21)
    user = dist.new_group([1, 2])
    handles = [first.group("tp"), second.group("tp")]
    other = dist.new_group([0, 1, 2, 3])
    sums = []
    for group in [*handles, other]:
        value = torch.tensor([rank])
        dist.all_reduce(value, group=group)
        sums.append(value.item())
    if rank in (1, 2):
        value = torch.tensor([rank])
        dist.all_reduce(value, group=user)
        sums.append(value.item())
    assert handles[0] is not handles[1]
    second.close()
    dist.barrier(group=handles[0])
    first.close()
    return sums


def test_topologies_and_user_groups_live_together():
    assert run_ranks(beside_each_other, 4) == [[1, 1, 6], [1, 1, 6, 3], [5, 5, 6, 3], [5, 5, 6]]
