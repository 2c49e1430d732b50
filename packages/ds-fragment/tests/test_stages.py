"""A mesh that is not the world: parameters cut along several of its axes are read axis by axis; no group is made."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from ds_fragment import (
    attach,
    available,
    count_nonfinite,
    describe,
    iter_full,
    norms,
    set_many,
    update_many,
)
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_local_fp32_param,
)
from fragment_oracle import assert_same, raised
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STAGE = [[0, 1], [2, 3]]  # of six ranks
INNER, OUTER = 5, 7


def _dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INNER, 8), nn.Linear(8, OUTER))


def _trained(mesh: DeviceMesh) -> tuple[nn.Sequential, torch.optim.Optimizer, nn.Sequential]:
    """A model over both axes after a backward pass, and the same in one piece."""
    dense, model = _dense(), _dense()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    attach(model, optimizer)
    data = torch.randn(2, 3, INNER, generator=torch.Generator().manual_seed(1))
    for net, batches in ((dense, data), (model, data[mesh.get_local_rank("dp") :][:1])):
        for batch in batches:
            (net(batch).square().sum() / len(batches)).backward()
    return model, optimizer, dense


def _members(mesh: DeviceMesh) -> None:
    model, optimizer, dense = _trained(mesh)
    groups = len(dist.distributed_c10d._world.pg_map)
    named = dict(dense.named_parameters())
    found, grads = dict(iter_full(model, bucket_bytes=64)), dict(iter_full(model, "grad"))
    assert set(found) == set(named)
    for name, param in model.named_parameters():
        assert_same(found[name], named[name].detach())
        assert_same(safe_get_full_fp32_param(param), named[name].detach())
        torch.testing.assert_close(grads[name], named[name].grad)
        torch.testing.assert_close(safe_get_full_grad(param), named[name].grad)
        told: Any = describe(param)
        assert sorted(told.ranks) == (
            [0, 1, 2, 3] if name != "1.bias" else [mesh.get_local_rank("tp"), mesh.get_local_rank("tp") + 2]
        )
        assert sum(fragment.numel for fragment in told.fragments if fragment) == param.numel()
    for what, right in (("value", lambda p: p), ("grad", lambda p: p.grad)):
        for name, norm in norms(model, what).items():
            assert math.isclose(norm, right(named[name]).double().norm().item(), rel_tol=1e-6), (what, name)
    assert set(count_nonfinite(model).values()) == {0}
    assert [name for name, _ in available(model)] == list(named)
    assert [name for name, _ in iter_full(model, dst=3)] == (list(named) if dist.get_rank() == 3 else [])

    optimizer.step()
    beside = torch.optim.AdamW(dense.parameters(), lr=0.1, foreach=False)
    beside.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            safe_get_full_optimizer_state(param, "exp_avg"), beside.state[named[name]]["exp_avg"]
        )

    # Writes of every kind.
    values = {
        name: torch.randn(param.shape, generator=torch.Generator().manual_seed(2)) for name, param in named.items()
    }
    set_many([(param, values[name]) for name, param in model.named_parameters()])
    update_many(model, lambda name, whole: whole + values[name])
    weight = model[0].weight
    safe_set_local_fp32_param(weight, safe_get_local_fp32_param(weight) + 1)
    for name, whole in iter_full(model):
        assert_same(whole, 2 * values[name] + (name == "0.weight"))
    different = [(weight, torch.full((8, INNER), float(dist.get_rank() == 3)))]
    assert (raised(lambda: set_many(different)) or ("",))[0] == "RankMismatchError"

    # One rank lacks its state: the same error on all four, and all is well once it is back.
    kept = optimizer.state[weight]
    if dist.get_rank() == 2:
        optimizer.state[weight] = {}
    told = raised(lambda: list(iter_full(model, "exp_avg")))
    lost: list[Any] = [None] * 4
    dist.all_gather_object(lost, told, group=GROUPS[0])
    assert told is not None
    assert lost == [told] * 4, lost
    optimizer.state[weight] = kept
    assert len(list(iter_full(model, "exp_avg"))) == 4
    assert len(dist.distributed_c10d._world.pg_map) == groups


GROUPS: list[dist.ProcessGroup] = []


def _stage(rank: int) -> None:
    mesh = DeviceMesh("cpu", STAGE, mesh_dim_names=("dp", "tp"))
    GROUPS[:] = [dist.new_group([0, 1, 2, 3])]
    if rank < 4:
        _members(mesh)
    everybody = dist.new_group(list(range(dist.get_world_size())))
    total = torch.ones(1)
    dist.all_reduce(total, group=everybody)
    assert total.item() == dist.get_world_size()


def test_a_stage_of_a_pipeline() -> None:
    run_ranks(_stage, 6)


def _uneven(rank: int) -> None:
    """Three axes, of which some ranks hold nothing, without names."""
    mesh = DeviceMesh("cpu", [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]) if dist.get_world_size() == 8 else None
    assert mesh is not None
    spare = DeviceMesh("cpu", [[0, 1, 2], [3, 4, 5]])
    for ways, shape in (
        ((Shard(0), Shard(0)), (3, 2)),
        ((Shard(1), Shard(0)), (4, 5)),
        ((Shard(0), Shard(1)), (1, 7)),
        ((Replicate(), Shard(0)), (4, 2)),
    ):
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        if rank < 6:
            param = nn.Parameter(distribute_tensor(whole, spare, ways))
            assert_same(safe_get_full_fp32_param(param), whole)
            set_many([(param, whole + 1)])
            assert_same(safe_get_full_fp32_param(param), whole + 1)
            assert math.isclose(norms([param])[param], (whole + 1).double().norm().item(), rel_tol=1e-6)
    whole = torch.arange(60.0).view(3, 4, 5)
    assert_same(safe_get_full_fp32_param(nn.Parameter(distribute_tensor(whole, mesh, (Shard(0),) * 3))), whole)


def test_uneven_cuts() -> None:
    run_ranks(_uneven, 8)


def _by_itself(rank: int) -> None:
    root = DeviceMesh("cpu", [STAGE, [[4, 5], [6, 7]]], mesh_dim_names=("pp", "dp", "tp"))
    model, _, dense = _trained(root["dp", "tp"])
    right = dict(dense.named_parameters())
    for _ in range(1 if rank < 4 else 3):  # the other stage reads more often
        for name, whole in iter_full(model):
            assert_same(whole, right[name].detach())


def test_every_stage_reads_by_itself() -> None:
    run_ranks(_by_itself, 8)
