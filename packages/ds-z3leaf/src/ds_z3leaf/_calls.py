"""Let DeepSpeed's hook on a leaf run after the leaf's backward, or say that it cannot.

[Note: full backward hooks] DeepSpeed reduces the gradients of a ZeRO-3 leaf in a full backward hook. Torch calls such a
hook when the gradients of the module's inputs are there. It looks at positional tensors only. If none of them requires
a gradient, it calls the hook before the module's own backward: the leaf's gradients are not there yet, and DeepSpeed
frees the parameters that the backward is about to read. So a leaf that is called by keywords, or whose input comes from
frozen modules, cannot be trained as it is. If the output is no tensor that requires a gradient, and no tuple with one,
torch never calls the hook: the leaf's gradients are not reduced, and other ranks wait for this one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_z3leaf.errors import LeafShardError


def adapt_calls(leaf: nn.Module) -> list[RemovableHandle]:
    """Have a leaf called with a positional tensor that requires a gradient, whenever it is trained; check its output.

    Arguments given by keyword become positional ones as far as the signature of ``forward`` allows. If none of the
    positional tensors requires a gradient then, the first one of floating point is replaced by one that does.

    Args:
        leaf: a module that is to be a ZeRO-3 leaf. Call it on every rank, before the engine is built.

    Returns:
        Handles whose ``remove()`` ends it. A call of the leaf in training raises `LeafShardError` if no argument will
        do, or if the output has no gradient where the hook looks for it.
    """
    positional = [
        parameter.name
        for parameter in inspect.signature(leaf.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not torch.is_grad_enabled() or _any_requires_grad(args):
            return None
        if not any(param.requires_grad for param in module.parameters()):
            return None
        moved = list(args)
        kept = dict(kwargs)
        while len(moved) < len(positional) and positional[len(moved)] in kept:
            moved.append(kept.pop(positional[len(moved)]))
        if not _any_requires_grad(moved):
            for place, value in enumerate(moved):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    moved[place] = value.detach().requires_grad_()
                    break
            else:
                raise LeafShardError(
                    f"leaf {type(module).__name__} is called with no positional tensor of floating point: ZeRO-3 would "
                    "reduce its gradients before its backward; make the module around it the leaf"
                )
        return tuple(moved), kept

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or _any_requires_grad(output if isinstance(output, tuple) else (output,)):
            return
        if any(param.requires_grad for param in module.parameters()):
            raise LeafShardError(
                f"leaf {type(module).__name__} returns a {type(output).__name__} without a tensor that requires a "
                "gradient (alone or in a tuple): ZeRO-3 would never reduce its gradients; have it return one on every "
                "rank, or make the module around it the leaf"
            )

    return [
        leaf.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        leaf.register_forward_hook(after, prepend=True),
    ]


def _any_requires_grad(args: Any) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
