"""One record on each parameter: it goes with the parameter, is no one else's, and comes back after a move."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_fragment import attach, iter_full, set_many, state_keys
from ds_fragment.errors import UnlinkedParameterError
from ds_fragment.record import record_of, records_of, registry
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from fragment_oracle import assert_same
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def test_a_record_is_its_parameters_own() -> None:
    param = nn.Parameter(torch.ones(2))
    record = record_of(param)
    assert record_of(param) is record
    assert records_of([param, nn.Parameter(torch.ones(3))])[0] is record
    for copied in (copy.copy(param), copy.deepcopy(param)):
        assert record_of(copied) is not record
        assert records_of([copied]) == [record_of(copied)]
    assert record_of(param) is record
    gone = weakref.ref(param)
    del param
    gc.collect()
    assert gone() is None


def test_a_saved_parameter_needs_no_ds_fragment() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    safe_get_full_grad(model.weight)
    optimizer.step()
    for thing in (model.weight, model.weight.grad, model.state_dict(), dict(model.named_parameters())):
        file = io.BytesIO()
        torch.save(thing, file)
        assert b"ds_fragment._" not in file.getvalue()
        file.seek(0)
        torch.load(file, weights_only=True)  # raises for any class that torch does not know
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(UnlinkedParameterError, match="call attach"):
        state_keys(loaded.weight)
    assert state_keys(model.weight)


def test_a_copied_model_is_not_attached() -> None:
    model = nn.Linear(3, 2)
    attach(model, torch.optim.AdamW(model.parameters()))
    twin = copy.deepcopy(model)
    assert registry.is_named(model.weight)
    assert not registry.is_named(twin.weight)


def _swapped(model: nn.Module) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


MOVES: list[Callable[[Any], Any]] = [
    lambda model: model.cpu(),
    lambda model: model.double().float(),
    lambda model: model.to(torch.device("cpu")),
    _swapped,
]


@pytest.mark.parametrize("move", MOVES)
def test_a_plain_model_moves(move: Callable[[Any], Any]) -> None:
    model = nn.Linear(3, 2).bfloat16().float()
    masters = [param.detach().clone() for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    attach(model, optimizer, masters=zip(model.parameters(), masters, strict=True))
    masters[0].fill_(5.0)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    right = safe_get_full_fp32_param(model.weight)
    move(model)
    assert_same(safe_get_full_fp32_param(model.weight), right)
    assert registry.name_of(model.weight) == "parameter 'weight'"
    assert state_keys(model.weight) == ["exp_avg", "exp_avg_sq", "step"]


def _sharded(how: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if how == "fsdp2":
        fully_shard(model)
        return model
    mesh = init_device_mesh("cpu", (2,))
    for module in model:
        for name, param in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])))
    return model


def _move(rank: int) -> None:
    """Every way to look at a model first, every way to move it, training and reading in between."""
    for how in ("fsdp2", "dtensor"):
        for move in MOVES:
            model = _sharded(how)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            attach(model, optimizer)
            for _ in range(2):
                optimizer.zero_grad()
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
                grads = dict(iter_full(model, "grad"))
                assert set(grads) == {name for name, _ in model.named_parameters()}
                optimizer.step()
                values, moments = dict(iter_full(model)), dict(iter_full(model, "exp_avg"))
                ids = list(map(id, model.parameters()))
                move(model)
                assert list(map(id, model.parameters())) == ids
                for name, param in model.named_parameters():
                    assert registry.name_of(param) == f"parameter '{name}'"
                    assert_same(safe_get_full_fp32_param(param), values[name])
                    assert_same(safe_get_full_optimizer_state(param, "exp_avg"), moments[name])
                    safe_set_full_fp32_param(param, values[name] + 1)
                set_many([(param, values[name]) for name, param in model.named_parameters()])
                for name, value in iter_full(model):
                    assert_same(value, values[name])


def test_a_sharded_model_moves() -> None:
    run_ranks(_move, 2)


def _emptied(rank: int) -> None:
    model = _sharded("fsdp2")
    attach(model, torch.optim.AdamW(model.parameters()))
    dict(iter_full(model))
    model.to_empty(device="cpu")
    set_many([(param, torch.full(param.shape, 0.5)) for param in model.parameters()])
    assert_same(model(torch.ones(1, 5)).detach(), torch.full((1, 3), 0.5 + 7 * 0.5 * 3.0))


def test_a_sharded_model_is_emptied() -> None:
    run_ranks(_emptied, 2)


def _assigned(rank: int) -> None:
    """Weights are assigned to a model on meta, and read before the first forward, at which FSDP2 takes them over."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for module in (*model, model):
        fully_shard(module, reshard_after_forward=False)
    given = {
        name: distribute_tensor(torch.full(param.shape, 0.1), param.device_mesh, param.placements)
        for name, param in model.state_dict().items()
    }
    model.load_state_dict(given, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    kept = list(model.parameters())
    for name, value in iter_full(model):
        assert_same(value, torch.full(given[name].shape, 0.1))
    assert len(list(iter_full(kept))) == len(kept)
    model(torch.ones(1, 5))
    set_many([(param, torch.full(param.shape, 0.5)) for param in kept])
    right = torch.full((1, 3), 0.5 + 7 * 0.5 * 3.0)
    assert_same(model(torch.ones(1, 5)).detach(), right)
    set_many([(param, torch.full(param.shape, 0.0)) for param in model.parameters()])  # of gathered copies
    assert_same(model(torch.ones(1, 5)).detach(), right * 0)
    for value in dict(iter_full(model)).values():
        assert_same(value, value * 0)


def test_assigned_weights_are_read_and_written() -> None:
    run_ranks(_assigned, 2)
