"""DTensors of every placement, against `full_tensor()` and against torch's own account of who holds what."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import attach, get_local, iter_full, set_local, set_many, update_many
from ds_fragment.engines.dtensor import mesh_sharding
from ds_fragment.errors import InvalidValueError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from fragment_oracle import assert_same, awkward_values, raised
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def sharded(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Placement], seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, placements))


def whole_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _one_axis(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    params, wholes = [], []
    shapes = [(1,), (2,), (3, 4), (5,), (7, 3), (8, 2), (2, 9, 3), (4, 0), (0, 4)]
    for seed, (shape, dim) in enumerate([(s, dim) for s in shapes for dim in range(-1, len(s))]):
        params.append(sharded(shape, mesh, [Shard(dim)], seed))
        wholes.append(whole_of(shape, seed))
    params.append(sharded((3, 2), mesh, [Replicate()], 99))
    wholes.append(whole_of((3, 2), 99))
    for (_, got), param, expected in zip(iter_full(params), params, wholes, strict=True):
        assert_same(got, expected, param.placements)
        assert_same(got, param.full_tensor().detach())
        assert_same(get_local(param), param.to_local().detach())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_axis(ranks: int) -> None:
    run_ranks(_one_axis, ranks, ranks)


def _two_axes(rank: int) -> None:
    chance = random.Random(0)
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), DeviceMesh("cpu", [[0, 2], [1, 3]])]
    options: list[Placement] = [Replicate(), Shard(0), Shard(1)]
    params, wholes = [], []
    for mesh, placements in itertools.product(meshes, itertools.product(options, repeat=2)):
        shape = (chance.choice([1, 2, 3, 5, 8]), chance.choice([1, 3, 4, 7]))
        params.append(sharded(shape, mesh, list(placements), len(params)))
        wholes.append(whole_of(shape, len(wholes)))
    for bucket_bytes in (1, 1 << 20):
        for (_, got), param, expected in zip(iter_full(params, bucket_bytes=bucket_bytes), params, wholes, strict=True):
            about = (param.placements, param.device_mesh.mesh.tolist(), tuple(param.shape))
            assert_same(param.full_tensor().detach(), expected, about)
            assert_same(got, expected, about)
    received = [tensor for _, tensor in iter_full(params, dst=2)]
    assert len(received) == (len(params) if rank == 2 else 0)
    for got, expected in zip(received, wholes, strict=False):
        assert_same(got, expected)
    values = [awkward_values(param.numel()).view(param.shape) for param in params]
    set_many(zip(params, values, strict=True))
    for param, value in zip(params, values, strict=True):
        assert_same(param.full_tensor().detach(), value)
        assert_same(safe_get_full_fp32_param(param), value)
    update_many(params, lambda _, whole: torch.zeros_like(whole))
    for param in params:
        assert param.to_local().abs().sum() == 0


def test_two_axes_of_every_placement_also_on_a_transposed_mesh() -> None:
    run_ranks(_two_axes, 4)


def _three_axes(rank: int) -> None:
    """A part of a larger mesh: axes of size one need no group, and a pipeline stage reads for itself."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "dp", "tp"))
    stage = sharded((5, 3), mesh["dp", "tp"], [Shard(0), Shard(1)], seed=rank // 2)
    for _ in range(2):
        if rank < 2:  # the other stage does not take part
            assert_same(safe_get_full_fp32_param(stage), whole_of((5, 3), 0))
    assert_same(safe_get_full_fp32_param(stage), whole_of((5, 3), rank // 2))
    wide = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("x", "y", "z"))
    param = sharded((5, 7), wide, [Shard(0), Shard(1), Shard(0)], seed=3)
    assert_same(safe_get_full_fp32_param(param), whole_of((5, 7), 3))
    pair = dist.new_group([1, 3])
    if rank % 2:
        part = sharded((7,), DeviceMesh.from_group(pair, "cpu", mesh_dim_names=("c",)), [Shard(0)], seed=1)
        assert_same(safe_get_full_fp32_param(part), whole_of((7,), 1))
    both = sharded((5, 7), wide["x", "z"], [Shard(1), Shard(0)], seed=4)
    assert_same(safe_get_full_fp32_param(both), whole_of((5, 7), 4))


def test_parts_of_larger_meshes() -> None:
    run_ranks(_three_axes, 4)


def _partial(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor import DTensor

    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    found = [raised(lambda: safe_get_full_fp32_param(partial)), raised(lambda: mesh_sharding(partial, partial.dtype))]
    param = sharded((4, 2), mesh, [Shard(0)])
    found.append(raised(lambda: safe_get_full_grad(param)))
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])
    found.append(raised(lambda: safe_get_full_grad(param)))
    found.append(raised(lambda: set_many([(param, param.detach())])))
    assert_same(safe_get_full_fp32_param(param), whole_of((4, 2)))
    return found


def test_what_cannot_be_read_says_so() -> None:
    mine, other = run_ranks(_partial, 2)
    assert mine == other
    assert mine[0][0] == mine[1][0] == InvalidValueError.__name__
    assert "is a partial sum: redistribute it" in mine[0][1]
    assert mine[2][0] == mine[3][0] == "GradientUnavailableError"
    assert "redistribute it first" in mine[3][1]
    assert mine[4][0] == "InvalidValueError"
    assert "pass value.full_tensor()" in mine[4][1]


def _states(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = sharded((5, 3), mesh, [Shard(0)])
    optimizer = torch.optim.Adafactor([param]) if hasattr(torch.optim, "Adafactor") else torch.optim.AdamW([param])
    attach(None, optimizer)
    optimizer.state[param].update(
        row=distribute_tensor(torch.arange(5.0).view(5, 1), mesh, [Shard(0)]),
        column=distribute_tensor(torch.arange(3.0), mesh, [Replicate()]),
        double=distribute_tensor(torch.arange(15.0, dtype=torch.float64).view(5, 3), mesh, [Shard(0)]),
        other=distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(1)]),
        step=torch.tensor(4.0),
    )
    expected = {
        "row": torch.arange(5.0).view(5, 1),
        "column": torch.arange(3.0),
        "double": torch.arange(15.0, dtype=torch.float64).view(5, 3),
        "other": torch.arange(15.0).view(5, 3),
        "step": torch.tensor(4.0),
    }
    for key, whole in expected.items():
        assert_same(safe_get_full_optimizer_state(param, key), whole, key)
        set_many([(param, whole + 1)], key)
        assert_same(safe_get_full_optimizer_state(param, key), whole + 1, key)
    set_local(param, torch.zeros_like(get_local(param, "row")), "row")
    assert safe_get_full_optimizer_state(param, "row").abs().sum() == 0


def test_states_of_other_shapes_dtypes_and_placements() -> None:
    run_ranks(_states, 2)
