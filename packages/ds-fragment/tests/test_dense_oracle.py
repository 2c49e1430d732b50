"""Training on flat partitions beside a dense fp32 model: values, gradients and every state, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, iter_full, set_many, state_keys, update_many
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_update_full_grad_vectorized,
)
from fragment_oracle import assert_same, from_every_rank, ragged, slices_of_flat
from ranks import run_ranks
from torch import nn

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
}
STATES = {
    "sgd": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"],
    "adamw": ["exp_avg", "exp_avg_sq", "step"],
    "adagrad": ["step", "sum"],
    "rmsprop": ["grad_avg", "momentum_buffer", "square_avg", "step"],
}


class Dense:
    """The whole model in fp32 on this rank, which plays the batches of all ranks one after the other."""

    def __init__(self, dtype: torch.dtype, make: Make, ranks: int) -> None:
        self.model, self.ranks = ragged(dtype), ranks
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.masters = [nn.Parameter(param.detach().float().clone()) for param in self.params]
        self.optimizer = make(self.masters)

    def backward(self, turn: int) -> None:
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        for rank in range(self.ranks):
            self.model.zero_grad()
            loss(self.model, turn, rank).backward()
            for param, master in zip(self.params, self.masters, strict=True):
                if param.grad is not None:
                    master.grad += param.grad.float()
        for master in self.masters:
            master.grad /= self.ranks

    def step(self) -> None:
        self.optimizer.step()
        self.to_lp()

    def to_lp(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            param.data.copy_(master.data)


def loss(model: nn.Module, turn: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    x = torch.randn(4, 5, generator=generator).to(model.weight.dtype)
    return model(x).float().square().mean() * 0.01


def close(got: torch.Tensor, expected: torch.Tensor, about: object) -> None:
    """Equal but for how an optimizer's kernel rounds at another position of a longer vector."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6, msg=lambda text: f"{about}: {text}")


def _train(rank: int, ranks: int, dtype: torch.dtype, name: str) -> None:
    make = OPTIMIZERS[name]
    model, dense = ragged(dtype), Dense(dtype, make, ranks)
    partition = FlatPartition(model.parameters())
    optimizer = make([partition.hp_param])
    attach(model, optimizer)
    params, shapes = partition.params, [param.shape for param in partition.params]
    for turn in range(3):
        for param, same in zip(params, dense.params, strict=True):
            same.data.copy_(param.data)  # a rounding apart would grow; the oracle starts each turn where we are
        loss(model, turn, rank).backward()
        dense.backward(turn)
        partition.reduce_gradients()
        used = [param for param in params if param is not model.unused]
        for param, master in zip(params, dense.masters, strict=True):
            if param is model.unused:
                continue
            got = safe_get_full_grad(param)
            if ranks in (1, 2):
                assert_same(got, master.grad)  # the sum of two is the same in any order
            else:
                close(got, master.grad, "grad")
        assert [tensor.shape for _, tensor in iter_full(used, "grad")] == [param.shape for param in used]
        optimizer.step()
        dense.step()
        partition.publish()
        flats = from_every_rank(partition.hp_param)
        pieces = slices_of_flat(flats, shapes)
        for (_, value), piece, param, master in zip(iter_full(params), pieces, params, dense.masters, strict=True):
            assert_same(value, piece)  # what the optimizers hold, bit for bit
            assert_same(param.detach(), value.to(dtype))
            close(value, master.detach(), (turn, "value"))
        assert state_keys(model.weight) == STATES[name]
        for key in STATES[name]:
            entry = optimizer.state[partition.hp_param][key]
            pieces = slices_of_flat(from_every_rank(entry), shapes) if key != "step" else [entry] * len(params)
            for (_, got), piece, master in zip(iter_full(params, key), pieces, dense.masters, strict=True):
                assert_same(got, piece)
                close(got, dense.optimizer.state[master][key], (turn, key))
    assert_same(safe_get_full_fp32_param(model.tied), safe_get_full_fp32_param(model.weight))
    frozen = ragged(dtype).frozen
    assert_same(model.frozen.detach(), frozen.detach())


@pytest.mark.parametrize(
    ("ranks", "dtype", "name"),
    [
        (1, torch.bfloat16, "adamw"),
        (2, torch.bfloat16, "sgd"),
        (2, torch.float32, "adamw"),
        (2, torch.float16, "rmsprop"),
        (3, torch.bfloat16, "adam"),
        (3, torch.float32, "adagrad"),
        (4, torch.bfloat16, "adamw"),
        (4, torch.float32, "sgd"),
    ],
)
def test_training_is_the_dense_model(ranks: int, dtype: torch.dtype, name: str) -> None:
    run_ranks(_train, ranks, ranks, dtype, name)


def _spans(rank: int) -> None:
    """One parameter over three ranks of four, and some wholly elsewhere."""
    params = [nn.Parameter(torch.randn(n)) for n in (2, 19, 3)]  # slices of 6: 2+4 | 6 | 6 | 3+3
    for param in params:
        dist.broadcast(param.data, 0)
    partition = FlatPartition(params)
    held = [0 if param._hp_mapping is None else param._hp_mapping.hp_fragment.numel() for param in params]
    assert held == [[2, 4, 0], [0, 6, 0], [0, 6, 0], [0, 3, 3]][rank]
    for param in params:
        assert_same(safe_get_full_fp32_param(param), param.detach())
    update_many(params, lambda _, whole: whole * 2)
    for param, old in zip(params, [param.detach() / 2 for param in params], strict=True):
        assert_same(safe_get_full_fp32_param(param), old * 2)
    del partition


def test_a_parameter_over_all_ranks_and_parameters_wholly_elsewhere() -> None:
    run_ranks(_spans, 4)


def _writes_are_followed(rank: int, ranks: int) -> None:
    """A changed weight, gradient or state goes into the next step exactly as it would in a dense model."""
    dtype, make = torch.bfloat16, lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5)
    model, dense = ragged(dtype), Dense(dtype, make, ranks)
    partition = FlatPartition(model.parameters())
    optimizer = make([partition.hp_param])
    attach(model, optimizer)
    # Whole numbers and powers of two, so that no arithmetic rounds.
    values = [torch.full(param.shape, 4.0) for param in partition.params]
    set_many(zip(partition.params, values, strict=True))
    for param, master in zip(dense.params, dense.masters, strict=True):
        master.data.fill_(4.0)
        param.data.fill_(4.0)
    for param, same in zip(partition.params, dense.params, strict=True):
        assert_same(param.detach(), same.detach())  # the lp weights followed at once
    with torch.no_grad():
        x = torch.ones(3, 5, dtype=dtype)
        assert_same(model(x), dense.model(x))
    for turn in range(3):
        for i, (param, master) in enumerate(zip(partition.params, dense.masters, strict=True)):
            param.grad = torch.full_like(param, float(turn + i + rank * 2))
            master.grad = torch.full_like(master, turn + i + (ranks - 1.0))
        partition.reduce_gradients()
        safe_set_full_grad(model.weight, safe_get_full_grad(model.weight) * 2)
        dense.masters[1].grad.mul_(2)
        safe_update_full_grad_vectorized([model.frozen, model.bias], lambda grad, param: grad + len(param))
        dense.masters[6].grad.add_(3)
        optimizer.step()
        dense.step()
        partition.publish()
        momentum = torch.full((5, 3), 8.0 * turn)
        safe_set_full_optimizer_state(model.weight, momentum, "momentum_buffer")
        dense.optimizer.state[dense.masters[1]]["momentum_buffer"].copy_(momentum)
        for param, master, same in zip(partition.params, dense.masters, dense.params, strict=True):
            assert_same(safe_get_full_fp32_param(param), master.detach())
            assert_same(param.detach(), same.detach())
            state = dense.optimizer.state[master]["momentum_buffer"]
            assert_same(safe_get_full_optimizer_state(param, "momentum_buffer"), state)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_writes_are_followed_by_training(ranks: int) -> None:
    run_ranks(_writes_are_followed, ranks, ranks)
