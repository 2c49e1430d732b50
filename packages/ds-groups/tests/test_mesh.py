"""`to_device_mesh`: PyTorch's mesh over groups that exist already."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, TopologyError
from ds_groups._mesh import rank_grid
from ranks import run_ranks


def mesh_of(rank, options, axes, names):
    bound = ParallelTopology(dist.get_world_size(), **options).bind(timeout=20)
    mesh = bound.to_device_mesh(*axes, names=names)
    count = len(dist.distributed_c10d._world.pg_map)
    found = {}
    for name, axis in zip(mesh.mesh_dim_names, axes or ("dp", "tp"), strict=True):
        assert mesh.get_group(name) is bound.group(axis)
        assert mesh.get_local_rank(name) == bound.index(axis)
        value = torch.tensor([rank])
        dist.all_reduce(value, group=mesh.get_group(name))
        found[name] = value.item()
    assert len(dist.distributed_c10d._world.pg_map) == count
    return mesh.mesh.tolist(), found


def test_default_mesh_is_the_one_pytorch_would_build():
    answers = run_ranks(mesh_of, 4, {"tp": 2}, (), None)
    assert answers[3] == ([[0, 1], [2, 3]], {"dp": 4, "tp": 5})


def test_names_of_deepspeed():
    names = ("data_parallel", "sequence_parallel")
    answers = run_ranks(mesh_of, 4, {"cp": 2}, ("dp", "cp"), names)
    assert answers[1] == ([[0, 1], [2, 3]], {"data_parallel": 4, "sequence_parallel": 1})


def test_mesh_of_a_pipeline_stage():
    answers = run_ranks(mesh_of, 4, {"tp": 2, "pp": 2}, ("tp",), None)
    assert [mesh for mesh, _ in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def sharded(rank):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20)
    mesh = bound.to_device_mesh("tp")
    tensor = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    assert isinstance(tensor, DTensor)
    return tensor.to_local().tolist(), tensor.full_tensor().tolist()


def test_a_tensor_can_be_distributed_over_it():
    assert run_ranks(sharded, 2) == [([0.0, 1.0], [0.0, 1.0, 2.0, 3.0]), ([2.0, 3.0], [0.0, 1.0, 2.0, 3.0])]


def test_grids():
    topology = ParallelTopology(16, tp=2, cp=2, pp=2, dp_shard=1, ep=4)
    assert rank_grid(topology, ("pp", "dp", "cp", "tp"), 9).tolist() == torch.arange(16).reshape(2, 2, 2, 2).tolist()
    assert rank_grid(topology, ("dp", "tp"), 14).tolist() == [[10, 11], [14, 15]]
    assert rank_grid(topology, ("dp_cp", "tp"), 0).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_grid(topology, ("pp", "edp", "ep"), 3).tolist() == torch.arange(16).reshape(2, 2, 4).tolist()


def test_refused_axes():
    topology = ParallelTopology(16, tp=2, ep=2)
    with pytest.raises(TopologyError, match="overlap"):
        rank_grid(topology, ("dp", "dp_shard"), 0)
    with pytest.raises(TopologyError, match="mixes expert axes with"):
        rank_grid(topology, ("ep", "tp"), 0)


def wrong_names(rank):
    bound = ParallelTopology(2).bind()
    with pytest.raises(TopologyError, match="must name each of the axes"):
        bound.to_device_mesh("dp", names=("a", "b"))
    return len(bound)


def test_names_must_fit():
    assert run_ranks(wrong_names, 2) == [0, 0]
