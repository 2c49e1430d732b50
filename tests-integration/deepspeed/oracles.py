"""What must come out, by means that know nothing of ds-fragment, and how to compare."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from engines import Net, batch, groups_of

STATES = ("exp_avg", "exp_avg_sq", "step")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit: -0.0 is not 0.0, NaN is NaN."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(width), other.contiguous().view(width)
    )


def differing(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two sets of tensors are not the same."""
    assert mine.keys() == other.keys()
    return [name for name in mine if not same(mine[name], other[name])]


def told(call: Callable[[], Any], *, replicated: bool = False) -> str:
    """The type and text of the error that every rank raises, the same on all.

    Args:
        call: what should raise.
        replicated: it is about what each rank holds whole, so that each may speak for itself: "rank N:" is cut off.
    """
    try:
        call()
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    if replicated:
        text = re.sub(r"rank \d+: ", "", text)
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert len(set(texts)) == 1, texts
    return text


def loss_scale(engine: Any) -> float:
    """What the loss is multiplied by."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def as_torch(
    value: dict[str, torch.Tensor], grad: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]], lr: float
) -> dict[str, dict[str, torch.Tensor]]:
    """What one step of `torch.optim.AdamW` makes of whole tensors: ``{"value": by name, "exp_avg": by name, ...}``.

    Args:
        value: the whole parameters, by name.
        grad: their gradients.
        state: by key and name; empty before the first step.
        lr: the learning rate.
    """
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in value.items()}
    holder = torch.nn.Module()
    for position, param in enumerate(params.values()):
        holder.register_parameter(str(position), param)
    optimizer = torch.optim.AdamW(groups_of(holder), lr=lr)
    for name, param in params.items():
        param.grad = grad[name].clone()
        if state:
            optimizer.state[param] = {key: state[key][name].clone() for key in STATES}
    optimizer.step()
    found = {key: {name: optimizer.state[param][key] for name, param in params.items()} for key in STATES}
    return {"value": {name: param.detach() for name, param in params.items()}, **found}


def dense_gradients(
    engine: Any, weights: dict[str, torch.Tensor], step: int, micros: int, extra: Callable[[int], bool]
) -> dict[str, torch.Tensor]:
    """The mean over the ranks of the sum over ``micros`` micro batches, in fp32 on one process.

    Args:
        engine: how many micro batches there are to a step.
        weights: the whole lp weights, by name.
        step: which batches.
        micros: how many micro batches of the step.
        extra: whether a micro batch uses the parameter that can be left out.
    """
    world, gas = dist.get_world_size(), engine.gradient_accumulation_steps()
    model = Net()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights[name])
    for rank in range(world):
        for micro in range(micros):
            (model(batch(step, micro, rank), extra=extra(micro)) / gas / world).backward()
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def lp_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole low-precision weights that the next forward pass computes with, as fp32, by DeepSpeed's own means."""
    import deepspeed

    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            found[name] = param.detach().float().clone()
    return found
