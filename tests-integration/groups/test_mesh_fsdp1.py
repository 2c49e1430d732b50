"""FSDP1 over meshes of a topology: its state dicts are those over PyTorch's own meshes."""

from __future__ import annotations

import warnings

import pytest
import torch
from ds_groups import ParallelTopology
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy


def state(mesh):
    torch.manual_seed(0)
    strategy = ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD
    model = FullyShardedDataParallel(
        nn.Linear(8, 8),
        device_mesh=mesh,
        use_orig_params=True,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
    )
    model(torch.ones(2, 8)).sum().backward()
    found = get_model_state_dict(model)
    return {
        name: (value.placements, value.to_local().tolist(), value.full_tensor().tolist())
        for name, value in found.items()
    }


def both(rank, axes):
    warnings.simplefilter("ignore")
    shape = (4,) if len(axes) == 1 else (2, 2)
    theirs = state(init_device_mesh("cpu", shape, mesh_dim_names=axes))
    bound = ParallelTopology(4, dp_shard=shape[-1]).bind(timeout=30)
    assert state(bound.to_device_mesh(*axes)) == theirs
    return len(theirs)


@pytest.mark.parametrize("axes", [("dp",), ("dp_replicate", "dp_shard")])
def test_state_dicts(axes):
    assert run_ranks(both, 4, axes) == [2] * 4
