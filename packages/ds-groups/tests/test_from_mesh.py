"""`from_mesh`: the topology of a mesh that PyTorch made."""

from __future__ import annotations

import ds_groups
import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, RankRangeError, TopologyError
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def alive(group):
    return group in dist.distributed_c10d._world.pg_map


def adopted(rank):
    names = ("pp", "dp_replicate", "dp_shard")
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)
    flat = mesh["dp_replicate", "dp_shard"]._flatten("data")
    bound = ds_groups.from_mesh(mesh)
    assert [digit.name for digit in bound.topology.digits] == ["dp_shard", "dp_replicate", "pp"]
    for name in names:
        assert bound.group(name) is mesh.get_group(name)
        assert bound.index(name) == mesh.get_local_rank(name)
    assert len(bound) == 0
    assert bound.topology.axis("dp").ranks(rank) == tuple(flat.mesh.tolist())
    joined = ds_groups.from_mesh(flat)
    assert joined.group("data") is flat.get_group()
    assert joined.topology.aliases["data"] == ("dp_shard", "dp_replicate")
    again = bound.to_device_mesh(*names)
    assert again.mesh.tolist() == mesh.mesh.tolist()
    assert ds_groups.from_mesh(again).to_device_mesh(*names) == again
    assert bound.to_device_mesh("dp_replicate").get_group() is mesh.get_group("dp_replicate")
    bound.close()
    joined.close()
    assert all(alive(mesh.get_group(name)) for name in names)
    assert alive(flat.get_group())


def test_groups_of_the_mesh_are_adopted():
    run_ranks(adopted, 8)


def stage(rank):
    """A slice has the topology of the whole mesh, so that all ranks hold the same plan."""
    bound = ParallelTopology(8, tp=2, pp=2, dp_shard=1).bind(timeout=20)
    part = bound.to_device_mesh("dp", "tp")
    found = ds_groups.from_mesh(part)
    assert found.group("tp") is bound.group("tp")
    assert found.to_device_mesh("dp", "tp") == part
    found.verify(timeout=20)
    return {name: found.size(name) for name in ("pp", "dp", "tp")}


def test_a_slice_has_the_topology_of_its_root():
    assert run_ranks(stage, 8) == [{"pp": 2, "dp": 2, "tp": 2}] * 8


def some_ranks(rank):
    mesh = DeviceMesh("cpu", torch.tensor([[1, 2], [3, 0]])[:1], mesh_dim_names=("dp", "tp"))
    bound = ds_groups.from_mesh(mesh)
    assert bound.topology.world_size == 4
    assert list(bound.topology.span) == [1, 2]
    if rank not in (1, 2):
        with pytest.raises(RankRangeError):
            bound.group("tp")
        return None
    assert bound.group("tp") is mesh.get_group("tp")
    return bound.ranks("tp")


def test_a_mesh_of_some_ranks():
    assert run_ranks(some_ranks, 4) == [None, (1, 2), (1, 2), None]


def any_order(rank):
    # Ranks ascend along each dimension, though not as they are laid out.
    mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("dp", "tp"))
    bound = ds_groups.from_mesh(mesh)
    assert bound.ranks("tp") == tuple(dist.get_process_group_ranks(mesh.get_group("tp")))
    assert bound.to_device_mesh("dp", "tp") == mesh["dp", "tp"]
    wrong = DeviceMesh("cpu", torch.tensor([[0, 3], [2, 1]]), mesh_dim_names=("dp", "tp"))
    lies = any(
        dist.get_process_group_ranks(wrong.get_group(place)) != along
        for place, along in enumerate(
            (wrong.mesh[:, wrong.get_coordinate()[1]].tolist(), wrong.mesh[wrong.get_coordinate()[0]].tolist())
        )
    )
    if lies:
        with pytest.raises(TopologyError, match="in this order, and its process group numbers"):
            ds_groups.from_mesh(wrong)
    else:
        ds_groups.from_mesh(wrong)
    return lies


def test_any_order_that_the_groups_have_too():
    answers = run_ranks(any_order, 4)
    if tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 13):
        assert answers == [False, True, True, True]  # only [0, 3] and [0, 2] ascend
