"""Give a zero gradient to parameters of an FSDP2 unit that a rank did not use.

Recent torch does it itself (``FSDPModule.set_reduce_scatter_unused_params``). Before that, a forward hook does: the
block's output is passed through a function of all the block's parameters whose gradient to them is zero.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_z3leaf._outputs import tensors_in

logger = logging.getLogger("ds.z3leaf")
_METHOD = "set_reduce_scatter_unused_params"
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # once a module


def reduce_unused(unit: nn.Module) -> Callable[[], None]:
    """Prepare a module that is about to become an FSDP2 unit; call what is returned once it is one."""
    from torch.distributed.fsdp import FSDPModule

    if hasattr(FSDPModule, _METHOD):
        unit.register_forward_hook(_warn_without_gradient)
        return lambda: getattr(unit, _METHOD)(True, recurse=False)
    # Hooks run in the order in which they are registered: this one comes before FSDP2's, which frees the parameters.
    unit.register_forward_hook(_touch_parameters)
    return lambda: None


def _warn_without_gradient(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled() or module in _warned or any(tensor.requires_grad for tensor in tensors_in(output)):
        return
    if any(param.requires_grad for param in module.parameters()):
        _warned.add(module)
        logger.warning(
            "leaf %s returned no tensor that requires a gradient: ranks whose output has one wait for this rank in "
            "backward",
            type(module).__name__,
        )


def _touch_parameters(module: nn.Module, args: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    replaced, done = _through(output, [param for param in _own_parameters(module) if param.requires_grad])
    if not done:
        logger.warning(
            "%s returns no tensor with a gradient (alone, in a list, tuple or dict): unused parameters get none",
            type(module).__name__,
        )
    return replaced


def _own_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters of a unit without those of units inside, which are sharded again when their forward is over."""
    from torch.distributed.fsdp import FSDPModule

    found: dict[int, nn.Parameter] = {}
    stack = [unit]
    while stack:
        module = stack.pop()
        found.update((id(param), param) for param in module.parameters(recurse=False))
        stack.extend(child for child in module.children() if not isinstance(child, FSDPModule))
    return list(found.values())


def _through(output: Any, params: list[nn.Parameter]) -> tuple[Any, bool]:
    """Pass the first tensor of an output that has a gradient through `_ZeroGradients`."""
    if isinstance(output, torch.Tensor):
        if not output.requires_grad:
            return output, False
        return _ZeroGradients.apply(output, *params), True  # type: ignore[no-untyped-call]
    if isinstance(output, (list, tuple)):
        for index, entry in enumerate(output):
            replaced, done = _through(entry, params)
            if done:
                entries = [*output[:index], replaced, *output[index + 1 :]]
                named = hasattr(output, "_fields")
                return type(output)(*entries) if named else type(output)(entries), True
    if isinstance(output, dict):
        for key, entry in output.items():
            replaced, done = _through(entry, params)
            if done:
                copied = copy.copy(output)
                copied[key] = replaced
                return copied, True
    return output, False


class _ZeroGradients(torch.autograd.Function):
    """The first input, unchanged; in backward its gradient, and zeros for all the others."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        # The parameters are freed after forward: remember what their gradients look like, not them.
        ctx.likes = [_Like.of(param) for param in params]
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*grads, *(like.zeros() for like in ctx.likes))


@dataclass(frozen=True)
class _Like:
    """What a gradient of zeros looks like; tensor parallelism makes DTensors of parameters."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    mesh: Any = None
    placements: Any = None

    @classmethod
    def of(cls, param: torch.Tensor) -> _Like:
        from torch.distributed.tensor import DTensor

        parallel = (param.device_mesh, param.placements) if isinstance(param, DTensor) else ()
        return cls(param.shape, param.dtype, param.device, *parallel)

    def zeros(self) -> torch.Tensor:
        if self.mesh is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        from torch.distributed import tensor

        return tensor.zeros(self.shape, dtype=self.dtype, device_mesh=self.mesh, placements=self.placements)
