"""After `destroy_process_group` and a new start, old handles are noticed and new groups work."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, StaleGroupsError, parallel_state as groups
from ds_groups.errors import NotInitializedError
from ranks import run_ranks


def start(rank, folder, turn):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{turn}", 2), rank=rank, world_size=2)


def bound_again(rank, folder):
    start(rank, folder, 0)
    bound = ParallelTopology(2, tp=2).bind(timeout=20)
    old = bound.group("tp")
    bound.group("dp")
    dist.destroy_process_group()
    with pytest.raises(StaleGroupsError, match="bind the topology again"):
        bound.group("tp")
    start(rank, folder, 1)
    for call in (bound.verify, lambda: bound.group("tp"), lambda: bound.group("pp")):
        with pytest.raises(StaleGroupsError, match="bind the topology again"):
            call()
    assert "stale" in repr(bound)
    bound.close()  # nothing of the new world is touched
    fresh = ParallelTopology(2, tp=2).bind(timeout=20)
    value = torch.tensor([rank + 1])
    dist.all_reduce(value, group=fresh.group("tp"))
    assert fresh.group("tp") is not old
    dist.destroy_process_group()
    return value.item()


def test_bound_topology():
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(bound_again, 2, folder, init=False) == [3, 3]


def state_again(rank, folder):
    mesh_like = object()
    start(rank, folder, 0)
    groups._init_tp_mesh_device(2)
    groups._create_expert_and_data_parallel(2)
    groups._create_zero_param_parallel_group(2)
    groups._get_local_all_to_all_group(ranks_per_node=1)
    groups.set_tensor_model_parallel_rank(7)
    names = groups._get_expert_parallel_group_dict()
    world = groups._clone_world_group()
    assert list(names) == ["ep_size_2"]
    dist.destroy_process_group()
    assert groups._get_max_expert_size() is None
    assert names == {}
    assert not groups._zero_param_parallel_is_initialized()
    start(rank, folder, 1)
    for call in (
        groups.get_tensor_model_parallel_group,
        groups.get_tensor_model_parallel_rank,
        lambda: groups._get_expert_parallel_group("ep_size_2"),
        groups._get_zero_param_intra_parallel_group_ranks,
        groups._get_max_expert_size_name,
    ):
        with pytest.raises(NotInitializedError):
            call()
    assert groups._clone_world_group() is not world
    groups.mesh_device = None
    groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)  # another layout is fine now
    value = torch.tensor([rank + 1])
    dist.all_reduce(value, group=names["ep_size_2"])
    dist.destroy_process_group()
    del mesh_like
    return value.item()


def test_parallel_state():
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(state_again, 2, folder, init=False) == [3, 3]


def one_group_destroyed(rank):
    groups._create_expert_and_data_parallel(2)
    names = groups._get_expert_parallel_group_dict()
    dist.destroy_process_group(names["ep_size_2"])
    with pytest.raises(NotInitializedError, match="'ep_size_2' is not initialized"):
        groups._get_expert_parallel_group("ep_size_2")
    assert names == {}
    groups._create_expert_and_data_parallel(2)
    value = torch.tensor([1])
    dist.all_reduce(value, group=names["ep_size_2"])
    groups.destroy_groups()
    assert names == {}
    return value.item()


def test_a_group_that_somebody_destroys_is_forgotten():
    assert run_ranks(one_group_destroyed, 2) == [2, 2]
