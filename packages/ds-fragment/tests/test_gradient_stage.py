"""A gradient is read between the backward pass that reduces it and the step: else it is refused, by the right name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import attach, iter_full, set_many
from ds_fragment.errors import GradientUnavailableError
from ds_fragment.record import registry
from ds_fragment.tensor_fragment import safe_get_full_grad, safe_get_full_optimizer_state, safe_set_full_grad
from fragment_oracle import assert_same, raised
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.ones(2, 3)) * scale).sum().backward()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_gradient_is_stepped_with_once(kind: type[torch.optim.Optimizer], attached: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    if attached:
        attach(model, optimizer)
    for clear in ("to none", "to zero", "not at all"):
        backward(model)
        assert_same(safe_get_full_grad(model.weight), model.weight.grad)
        optimizer.step()
        for refused in (
            lambda: safe_get_full_grad(model.weight),
            lambda: safe_set_full_grad(model.weight, torch.ones(2, 3)),
            lambda: dict(iter_full(model, "grad")),
        ):
            with pytest.raises(GradientUnavailableError, match="the optimizer has stepped with it"):
                refused()
        if clear != "not at all":
            optimizer.zero_grad(set_to_none=clear == "to none")
    backward(model)  # adds to what is there
    assert_same(safe_get_full_grad(model.weight), torch.full((2, 3), 4.0))


def test_two_optimizers_step_with_their_own() -> None:
    model = nn.Linear(3, 2)
    one, other = torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    attach(model, [one, other])
    backward(model)
    one.step()
    with pytest.raises(GradientUnavailableError, match="'weight' has no gradient any more"):
        safe_get_full_grad(model.weight)
    assert_same(safe_get_full_grad(model.bias), torch.full((2,), 2.0))


@pytest.mark.parametrize("given", [list, tuple, lambda all: dict(enumerate(all)), iter])
def test_optimizers_come_in_any_collection(given: Any) -> None:
    model = nn.Linear(3, 2)
    optimizers = [torch.optim.AdamW([param]) for param in model.parameters()]
    attach(model, given(optimizers))
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
    for param, optimizer in zip(model.parameters(), optimizers, strict=True):
        assert_same(safe_get_full_optimizer_state(param, "exp_avg"), optimizer.state[param]["exp_avg"])


@pytest.mark.parametrize("wrong", [3, "adam", [torch.nn.ReLU()], {"a": object()}])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected torch\.optim optimizers"):
        attach(nn.Linear(3, 2), wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.distributed.optim imports it
def test_optimizers_that_step_in_the_backward_pass() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Linear(3, 2)
    _apply_optimizer_in_backward(torch.optim.Adam, model.parameters(), {"lr": 0.1})
    attach(model)
    backward(model)
    for param in model.parameters():
        (optimizer,) = param._in_backward_optimizers
        assert_same(safe_get_full_optimizer_state(param, "exp_avg"), optimizer.state[param]["exp_avg"])
        with pytest.raises(GradientUnavailableError, match="has no gradient"):
            safe_get_full_grad(param)


def test_a_master_that_was_stepped_with_takes_the_low_precision_gradient_along() -> None:
    model = nn.Linear(3, 2).bfloat16()
    masters = [nn.Parameter(param.detach().float()) for param in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    attach(model, optimizer, masters=zip(model.parameters(), masters, strict=True))
    model(torch.ones(2, 3).bfloat16()).sum().backward()
    for param, master in zip(model.parameters(), masters, strict=True):
        master.grad = param.grad.float()
    optimizer.step()
    optimizer.zero_grad()  # of the masters: those of the model stay
    with pytest.raises(GradientUnavailableError, match="the optimizer has stepped with it"):
        safe_get_full_grad(model.weight)


def _scaler(rank: int) -> None:
    for engine in ("plain", "ddp", "fsdp2"):
        torch.manual_seed(0)
        inner = nn.Linear(3, 2)
        model: nn.Module = DistributedDataParallel(inner) if engine == "ddp" else inner
        if engine == "fsdp2":
            fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        other = nn.Linear(3, 2)
        attach(other, torch.optim.SGD(other.parameters(), lr=0.1))
        weight, right = inner.weight, torch.full((2, 3), 2.0)
        for _ in range(2):  # accumulated
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            found = raised(partial(safe_get_full_grad, weight))
            assert found is not None, engine
            assert found[0] == "GradientUnavailableError"
            assert "scaler.unscale_(optimizer)" in found[1]
            assert raised(partial(set_many, [(weight, right)], "grad")) is not None
        backward(other)  # of another model, by a loss that is not scaled
        assert_same(safe_get_full_grad(other.weight), right)
        scaler.unscale_(optimizer)
        assert_same(safe_get_full_grad(weight), 2 * right)
        set_many([(weight, right)], "grad")
        assert_same(safe_get_full_grad(weight), right)
        scaler.step(optimizer)
        scaler.update()
        told = raised(partial(safe_get_full_grad, weight))
        assert told is not None
        assert "has stepped with it" in told[1]
        optimizer.zero_grad()
        backward(model)  # a loss that is not scaled
        assert_same(safe_get_full_grad(weight), right)
        if engine == "plain":
            lone = nn.Linear(3, 2)
            scaler.scale(lone(torch.ones(2, 3)).sum()).backward()
            told = raised(partial(safe_get_full_grad, lone.weight))
            assert told is not None
            assert "call attach(model, optimizer)" in told[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scaled_gradient_is_refused(ranks: int) -> None:
    run_ranks(_scaler, ranks)


def _unreduced(rank: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2))
    weight = model.module.weight
    data = torch.full((2, 3), float(rank + 1))
    told = raised(lambda: safe_get_full_grad(weight))
    assert told is not None
    model(data).sum().backward()
    with pytest.warns(UserWarning, match="nothing tells whether it is reduced over the ranks: call attach"):
        safe_get_full_grad(weight)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_same(safe_get_full_grad(weight), torch.full((2, 3), 3.0))
    with torch.no_grad():
        model(data)  # an evaluation changes nothing
    assert_same(safe_get_full_grad(weight), torch.full((2, 3), 3.0))
    model.zero_grad()
    with model.no_sync():
        model(data).sum().backward()
    model(data)  # nor does a forward that would reduce
    for call in (
        lambda: safe_get_full_grad(weight),
        lambda: dict(iter_full(model, "grad")),
        lambda: set_many([(weight, torch.ones(2, 3))], "grad"),
    ):
        told = raised(call)
        assert told is not None
        assert told[0] == "GradientUnavailableError"
        assert "the gradients of parameter 'weight' are not reduced: each rank holds another" in told[1]
    if dist.get_rank() == 1:
        weight.grad = None
    told = raised(lambda: safe_get_full_grad(weight))
    everywhere: list[Any] = [None] * 2
    dist.all_gather_object(everywhere, told)
    assert everywhere == [told] * 2


def test_an_unreduced_gradient_is_refused() -> None:
    run_ranks(_unreduced, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler imports it
def test_a_compiled_step_is_noticed() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        assert_same(safe_get_full_grad(model.weight), model.weight.grad)
        step()
        with pytest.raises(GradientUnavailableError, match="the optimizer has stepped with it"):
            safe_get_full_grad(model.weight)


def test_attaching_again_and_again_keeps_nothing() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer)
    kept = len(list(registry.models()))
    for _ in range(5):
        attach(model, optimizer)
    assert len(list(registry.models())) == kept
