"""Plain parameters and DistributedDataParallel: everything is here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ds_fragment import attach, get_local, iter_full, set_local, set_many, state_keys, update_many
from ds_fragment.engines import adapter_of
from ds_fragment.engines.deepspeed import at_boundary
from ds_fragment.errors import GradientUnavailableError
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)
from fragment_oracle import assert_same, ragged, raised
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def test_everything_of_a_plain_model() -> None:
    model = ragged()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    attach(model, optimizer)
    model(torch.randn(4, 5)).sum().backward()
    model.unused.grad = torch.ones(6)
    for param in optimizer.param_groups[0]["params"]:
        assert_same(safe_get_full_grad(param), param.grad)
    optimizer.step()
    for name, param in model.named_parameters():
        assert adapter_of(param).name == "plain"
        assert_same(safe_get_full_fp32_param(param), param.detach())
        assert_same(get_local(param), param.detach())
        assert safe_get_full_fp32_param(param).data_ptr() != param.data_ptr() or not param.numel()
        if param.requires_grad:
            with pytest.raises(GradientUnavailableError, match="the optimizer has stepped with it"):
                safe_get_full_grad(param)
            for key in state_keys(param):
                assert_same(safe_get_full_optimizer_state(param, key), optimizer.state[param][key])
        else:
            assert name == "frozen"
    assert [name for name, _ in iter_full(model)] == [name for name, _ in model.named_parameters()]


def test_writes_go_through_whatever_the_memory_order() -> None:
    for param in (
        nn.Parameter(torch.zeros(4, 3).t()),
        nn.Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(8)[::2]),
        nn.Parameter(torch.zeros(())),
    ):
        strides = param.stride()
        value = torch.randn(param.shape)
        safe_set_full_fp32_param(param, value)
        assert_same(param.detach(), value)
        assert_same(safe_get_full_fp32_param(param), value)
        update_many([param], lambda _, whole: whole.mul_(2))
        assert_same(param.detach(), value * 2)
        safe_set_local_fp32_param(param, value)
        assert_same(safe_get_local_fp32_param(param), value)
        param.grad = torch.zeros_like(param)
        safe_set_full_grad(param, value)
        assert_same(param.grad, value)
        assert param.stride() == strides


def test_writing_leaves_autograd_alone() -> None:
    param = nn.Parameter(torch.ones(3))
    value = torch.ones(3, requires_grad=True)
    safe_set_full_fp32_param(param, value * 2)
    assert param.is_leaf
    assert param.requires_grad
    assert param.grad_fn is None
    got = safe_get_full_fp32_param(param)
    assert not got.requires_grad


def test_no_gradient_says_so() -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(GradientUnavailableError, match="has no gradient: no backward pass used it"):
        safe_get_full_grad(param)
    with pytest.raises(GradientUnavailableError):
        safe_set_full_grad(param, torch.ones(3))


def test_values_are_converted_to_what_the_parameter_is() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    safe_set_full_fp32_param(param, torch.tensor([1.0, 1.00390625, 1.01171875], dtype=torch.float64))
    assert param.tolist() == [1.0, 1.0, 1.015625]
    got = safe_get_full_fp32_param(param)
    assert got.dtype == torch.float32


def _ddp(rank: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    attach(model, optimizer)
    weight = model.module.weight
    model(torch.full((1, 3), float(rank))).sum().backward()
    assert_same(safe_get_full_grad(weight), torch.full((2, 3), 0.5))
    optimizer.step()
    assert_same(safe_get_full_optimizer_state(weight, "momentum_buffer"), torch.full((2, 3), 0.5))
    set_many([(weight, torch.ones(2, 3))])
    set_local(weight, torch.ones(2, 3) * 2, "value")
    safe_set_full_optimizer_state(weight, torch.zeros(2, 3), "momentum_buffer")
    assert_same(weight.detach(), torch.full((2, 3), 2.0))
    optimizer.zero_grad()
    with model.no_sync():
        model(torch.full((1, 3), float(rank))).sum().backward()
    kind, text = raised(lambda: safe_get_full_grad(weight)) or ("", "")
    assert kind == "GradientUnavailableError"
    assert "no_sync" in text
    model(torch.full((1, 3), float(rank))).sum().backward()
    assert_same(safe_get_full_grad(weight), torch.full((2, 3), 1.0))


def test_distributed_data_parallel() -> None:
    run_ranks(_ddp, 2)


def _mixed(rank: int) -> list[Any]:
    """A plain parameter without a gradient on one rank, beside sharded ones: nobody waits for ever."""
    from ds_fragment import FlatPartition

    plain, sharded = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(5))
    alone = nn.ParameterList([plain])
    attach(alone)
    partition = FlatPartition([sharded])
    sharded.grad = torch.ones(5)
    partition.reduce_gradients()
    plain.grad = torch.ones(2) if rank else None
    found = []
    for params in ([plain, sharded], [sharded, plain], [sharded, plain, sharded]):
        for bucket_bytes in (1, 1 << 20):
            found.append(raised(lambda p=params, b=bucket_bytes: list(iter_full(p, "grad", bucket_bytes=b))))
            found.append(
                raised(lambda p=params, b=bucket_bytes: update_many(p, lambda _, g: g, "grad", bucket_bytes=b))
            )
    return found


def test_a_missing_plain_gradient_beside_sharded_ones() -> None:
    mine, other = run_ranks(_mixed, 2, timeout=20)
    assert mine == other
    assert {error and error[0] for error in mine} == {"GradientUnavailableError"}
    assert all(error[1].startswith("rank 0: parameter '0' has no gradient") for error in mine)


@pytest.mark.parametrize("boundary", [False, True])
def test_where_a_window_ends_is_a_method_of_deepspeed_or_was_a_bool(boundary: bool) -> None:
    assert at_boundary(SimpleNamespace(is_gradient_accumulation_boundary=boundary)) is boundary
    assert at_boundary(SimpleNamespace(is_gradient_accumulation_boundary=lambda: boundary)) is boundary
