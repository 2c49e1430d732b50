"""Plain PyTorch, DistributedDataParallel and ZeroRedundancyOptimizer as engines."""

import pytest
import torch
from ranks import run_ranks
from torch import nn


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def _ddp(rank: int) -> None:
    import ds_fragment
    import torch.distributed as dist
    from ds_fragment.tensor_fragment import safe_get_full_grad
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    optimizer = torch.optim.AdamW(model.parameters())
    ds_fragment.attach(model, optimizer)
    data = torch.randn(dist.get_world_size(), 4, 5, generator=torch.Generator().manual_seed(1))
    model(data[rank]).sum().backward()
    dense = _model()
    for part in data:
        (dense(part).sum() / len(data)).backward()
    for param, expected in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(safe_get_full_grad(param), expected.grad)
    optimizer.step()
    for key in ds_fragment.state_keys(param):
        assert torch.equal(dict(ds_fragment.iter_full([("p", param)], key))["p"], optimizer.state[param][key])

    # A gradient of this rank alone is no gradient of the model.
    optimizer.zero_grad()
    param = next(model.parameters())
    with model.no_sync():
        model(data[rank]).sum().backward()
    with pytest.raises(ds_fragment.errors.GradientUnavailableError, match="no_sync"):
        safe_get_full_grad(param)
    model(data[rank]).sum().backward()
    assert safe_get_full_grad(param).shape == param.shape


def test_ddp() -> None:
    run_ranks(_ddp, 2)


def _zero_redundancy(rank: int) -> None:
    import ds_fragment
    import torch.distributed as dist
    from ds_fragment.tensor_fragment import safe_get_full_optimizer_state, safe_set_full_optimizer_state
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.1)
    ds_fragment.attach(model, optimizer)
    params = list(model.parameters())
    with pytest.raises(ds_fragment.errors.StateNotReadyError, match="first step"):
        safe_get_full_optimizer_state(params[0], "exp_avg")

    data = torch.randn(dist.get_world_size(), 4, 5, generator=torch.Generator().manual_seed(1))
    model(data[rank]).sum().backward()
    dense = _model()
    beside = torch.optim.AdamW(dense.parameters(), lr=0.1)
    for mine, param in zip(dense.parameters(), params, strict=True):
        mine.grad = param.grad.clone()
    optimizer.step()
    beside.step()
    for mine, param in zip(dense.parameters(), params, strict=True):
        assert set(ds_fragment.state_keys(param)) == set(beside.state[mine])
        for key, state in beside.state[mine].items():
            assert torch.equal(safe_get_full_optimizer_state(param, key), state), key
    with pytest.raises(ds_fragment.errors.StateKeyError, match="bogus"):
        safe_get_full_optimizer_state(params[0], "bogus")

    # Written on the one rank that has it, read by all.
    for param in params:
        safe_set_full_optimizer_state(param, torch.full_like(param, 3.0), "exp_avg")
        assert bool((safe_get_full_optimizer_state(param, "exp_avg") == 3.0).all())


@pytest.mark.parametrize("world_size", [2, 3])
def test_zero_redundancy_optimizer(world_size: int) -> None:
    run_ranks(_zero_redundancy, world_size)


@pytest.mark.filterwarnings("ignore:the value of a parameter:UserWarning")  # where a library imported DeepSpeed
def test_a_low_precision_value_is_an_upcast_and_an_attached_master_is_the_value() -> None:
    import ds_fragment
    from ds_fragment.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
    )

    param = nn.Parameter(torch.randn(3, 4).bfloat16())
    assert ds_fragment.describe(param).master == "upcast"
    assert torch.equal(safe_get_full_fp32_param(param), param.detach().float())

    master = nn.Parameter(param.detach().float() + 2.0**-20)
    optimizer = torch.optim.Adam([master])
    ds_fragment.attach(None, optimizer, masters=[(param, master)])
    assert ds_fragment.describe(param).master == "fp32"
    assert torch.equal(safe_get_full_fp32_param(param), master)
    safe_set_full_fp32_param(param, torch.full((3, 4), 1.0 + 2.0**-20))
    assert bool((master == 1.0 + 2.0**-20).all())
    assert bool((param == 1.0).all()), "the low-precision weights agree at once"
    master.grad = torch.ones_like(master)
    optimizer.step()
    assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), optimizer.state[master]["exp_avg"])


def _differing_writes(rank: int, kind: str) -> None:
    import ds_fragment
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    params = list(model.parameters())
    optimizer = (
        ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=0.1)
        if kind == "zero redundancy"
        else torch.optim.AdamW(params)
    )
    ds_fragment.attach(model, optimizer)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    first, last = params[0], params[-1]
    for what in ("value", "exp_avg"):
        before = {what: value.clone() for what, value in ds_fragment.iter_full(model, what)}
        other = torch.full(first.shape, float(rank))
        with pytest.raises(ds_fragment.RankMismatchError):
            ds_fragment.set_many([(last, torch.zeros(last.shape)), (first, other)], what)
        with pytest.raises(ds_fragment.FragmentError):
            ds_fragment.set_many([(first, torch.zeros(first.shape if rank else (2, 2)))], what)
        with pytest.raises(ds_fragment.RankMismatchError):
            ds_fragment.update_many(model, lambda name, tensor: tensor + rank, what)
        for name, value in ds_fragment.iter_full(model, what):
            assert torch.equal(value, before[name]), (what, name)
        ds_fragment.set_many([(first, torch.full(first.shape, 2.0))], what)
        assert all(value.unique().tolist() == [2.0] for _, value in ds_fragment.iter_full([("p", first)], what))


@pytest.mark.parametrize("kind", ["ddp", "zero redundancy"])
def test_values_that_differ_on_replicas_are_the_same_error_everywhere(kind: str) -> None:
    run_ranks(_differing_writes, 2, kind)
