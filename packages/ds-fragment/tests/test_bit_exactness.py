"""Bits survive: -0.0, NaN payloads, infinities and subnormals, through reads and writes, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import FlatPartition, attach, get_local, iter_full, set_local, set_many, update_many
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from fragment_oracle import assert_same, awkward_values, bits, from_every_rank
from ranks import run_ranks
from torch import nn

SHAPES = [(1,), (3, 5), (), (0, 2), (40,), (7, 2, 2)]


def linked(dtype: torch.dtype) -> tuple[list[nn.Parameter], FlatPartition, torch.optim.Optimizer]:
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    partition = FlatPartition(params)
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(None, optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    partition.reduce_gradients()
    optimizer.step()
    return params, partition, optimizer


def awkward(shape: tuple[int, ...], turn: int) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return awkward_values(numel + turn)[turn:].reshape(shape).clone()


def _writes_and_reads(rank: int, ranks: int, dtype: torch.dtype) -> None:
    params, partition, _optimizer = linked(dtype)  # kept alive: attach holds nothing
    for turn in range(0, 12, 3):
        values = [awkward(shape, turn) for shape in SHAPES]
        for what in ("value", "grad", "exp_avg", "exp_avg_sq"):
            set_many(zip(params, values, strict=True), what)
            for (_, got), expected in zip(iter_full(params, what, bucket_bytes=100), values, strict=True):
                assert_same(got, expected, what)
            kept = get_local(params[4], what)
            everybodys = torch.cat(from_every_rank(kept))
            assert_same(everybodys, values[4].flatten())
        for param, expected in zip(params, values, strict=True):
            assert_same(param.detach(), expected.to(dtype))  # the lp weights are the master, rounded once
    partition.publish()
    for param, expected in zip(params, values, strict=True):
        assert_same(param.detach(), expected.to(dtype))


@pytest.mark.parametrize(
    ("ranks", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16), (4, torch.float16)]
)
def test_writes_and_reads(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(_writes_and_reads, ranks, ranks, dtype)


def _one_at_a_time(rank: int) -> None:
    params, _partition, _optimizer = linked(torch.bfloat16)
    for param, shape in zip(params, SHAPES, strict=True):
        value = awkward(shape, 5)
        safe_set_full_fp32_param(param, value)
        assert_same(safe_get_full_fp32_param(param), value)
        safe_set_full_grad(param, value)
        assert_same(safe_get_full_grad(param), value)
        safe_set_full_optimizer_state(param, value, "exp_avg")
        assert_same(safe_get_full_optimizer_state(param, "exp_avg"), value)
        update_many([param], lambda _, whole: whole.flip(0) if whole.dim() else whole)
        assert_same(safe_get_full_fp32_param(param), value.flip(0) if value.dim() else value)
        piece = awkward_values(get_local(param).numel() + 3)[3:]
        set_local(param, piece, "value")
        assert_same(get_local(param), piece)


def test_one_at_a_time() -> None:
    run_ranks(_one_at_a_time, 3)


def test_awkward_values_are_awkward() -> None:
    values = awkward_values(12)
    assert values.isnan().sum() == 3
    assert values.isinf().sum() == 2
    assert ((values == 0) & values.signbit()).sum() == 1
    assert ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).sum() == 3
    assert len(set(bits(values).tolist())) == 12


def test_a_plain_parameter_keeps_its_bits() -> None:
    param = nn.Parameter(torch.zeros(24))
    safe_set_full_fp32_param(param, awkward_values(24))
    assert_same(param.detach(), awkward_values(24))
    assert_same(safe_get_full_fp32_param(param), awkward_values(24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_value_is_upcast_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = nn.Parameter(every[~every.isnan()])
    got = safe_get_full_fp32_param(param)
    assert got.dtype == torch.float32
    assert_same(got.to(dtype), param.detach())
