"""FSDP1 itself as the engine: ``use_orig_params=True``, padding between parameters, parameters with no local piece."""

import warnings

import pytest
import torch
from ranks import run_ranks
from torch import nn


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.Tanh(), nn.Linear(3, 1))


def _wrapped(dtype: torch.dtype | None):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore", FutureWarning)
    policy = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else None
    return FullyShardedDataParallel(
        _model(),
        use_orig_params=True,
        mixed_precision=policy,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
    )


def _every_quantity(rank: int, mixed: bool) -> list[int]:
    import ds_fragment
    import torch.distributed as dist
    from ds_fragment.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
    )
    from torch.distributed.fsdp import FullyShardedDataParallel

    world_size = dist.get_world_size()
    model = _wrapped(torch.bfloat16 if mixed else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ds_fragment.attach(model, optimizer)
    names = [name for name, _ in ds_fragment.iter_full(model)]
    assert names == [name for name, _ in _model().named_parameters()]
    data = torch.randn(world_size, 4, 5, generator=torch.Generator().manual_seed(1))

    # Values, against what FSDP1 gathers itself.
    with FullyShardedDataParallel.summon_full_params(model):
        expected = {ds_fragment.engines.model.clean_name(n): p.detach().clone() for n, p in model.named_parameters()}
    for name, value in ds_fragment.iter_full(model):
        assert torch.equal(value, expected[name]), name

    # Gradients, against FSDP1's own and, without mixed precision, a dense model on all the data.
    model(data[rank]).sum().backward()
    gradients = dict(ds_fragment.iter_full(model, "grad"))
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for name, param in model.named_parameters():
            assert torch.equal(gradients[ds_fragment.engines.model.clean_name(name)], param.grad), name
    if not mixed:
        dense = _model()
        for part in data:
            (dense(part).sum() / world_size).backward()
        for name, param in dense.named_parameters():
            torch.testing.assert_close(gradients[name], param.grad)

    # State: AdamW on the gathered values and gradients computes the same bits on each slice.
    oracle = {name: nn.Parameter(expected[name].clone()) for name in names}
    beside = torch.optim.AdamW(oracle.values(), lr=0.1)
    for name in names:
        oracle[name].grad = gradients[name].clone()
    optimizer.step()
    beside.step()
    params = dict(zip(names, model.parameters(), strict=True))
    for name, param in params.items():
        assert torch.equal(safe_get_full_fp32_param(param), oracle[name]), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(safe_get_full_optimizer_state(param, key), beside.state[oracle[name]][key]), (name, key)
        with pytest.raises(ds_fragment.errors.StateKeyError, match="bogus"):
            safe_get_full_optimizer_state(param, "bogus")

    # Writes are followed by training.
    for name, param in params.items():
        safe_set_full_fp32_param(param, torch.full_like(oracle[name], 0.25))
    with FullyShardedDataParallel.summon_full_params(model):
        assert all(bool((param == 0.25).all()) for param in model.parameters())

    # Unreduced gradients are refused.
    optimizer.zero_grad()
    with model.no_sync():
        model(data[rank]).sum().backward()
    with pytest.raises(ds_fragment.errors.GradientUnavailableError, match=r"no_sync|no gradient"):
        safe_get_full_grad(params["0.weight"])
    return [param.numel() for param in model.parameters()]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_quantity_equals_fsdp1s_own(world_size: int, mixed: bool) -> None:
    held = run_ranks(_every_quantity, world_size, mixed)
    assert any(0 in numels for numels in held), "some parameter should have no piece on some rank"


def _not_attached(rank: int) -> None:
    import ds_fragment

    model = _wrapped(None)
    with pytest.raises(ds_fragment.errors.UnlinkedParameterError, match="attach"):
        next(ds_fragment.iter_full(model))


def test_without_attach_the_error_says_so() -> None:
    run_ranks(_not_attached, 2)
