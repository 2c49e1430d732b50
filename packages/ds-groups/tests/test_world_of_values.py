"""What is assigned to `ds_groups.parallel_state` in one world is not answered in the next."""

from __future__ import annotations

from types import SimpleNamespace

import torch.distributed as dist
from ds_groups import parallel_state as groups
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh


def restart(rank, number):
    dist.destroy_process_group()
    between = groups.mesh_device, groups.expert_tensor_parallel_world_size
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return between, (groups.mesh_device, groups.expert_tensor_parallel_world_size)


def assigned(rank):
    groups.expert_tensor_parallel_world_size = 3
    groups.mesh_device = mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    assert groups.mesh_device is mesh
    assert groups._get_expert_model_parallel_world_size() == 3
    first = restart(rank, 1)
    assert groups._get_data_parallel_world_size() == 1  # of the new world, not of the dead mesh
    groups.expert_tensor_parallel_world_size = 3
    assert groups.expert_tensor_parallel_world_size == 3
    return first, groups._get_expert_model_parallel_world_size()


def test_a_dead_world_does_not_answer():
    assert run_ranks(assigned, 1) == [(((None, 1), (None, 1)), 3)]


def before(rank):
    groups.expert_tensor_parallel_world_size = 2
    groups.mpu = mpu = SimpleNamespace()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert groups.expert_tensor_parallel_world_size == 2
    assert groups.mpu is mpu
    return restart(rank, 1), groups.mpu is mpu


def test_what_was_assigned_before_the_first_world_belongs_to_it():
    assert run_ranks(before, 1, init=False) == [(((None, 1), (None, 1)), True)]
