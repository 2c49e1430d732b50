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

from ds_z3leaf._outputs import seen_by_hooks
from ds_z3leaf.errors import LeafShardError

HANDLES = "_ds_leaf_handles"


def adapt_calls(leaf: nn.Module) -> None:
    """Have a leaf called with a positional tensor that requires a gradient, whenever ZeRO-3 trains it.

    Arguments given by keyword become positional ones as far as the signature of ``forward`` allows. If none of the
    positional tensors requires a gradient then, the first one of floating point is replaced by one that does. A call
    of the leaf in training raises `LeafShardError` if no argument will do, or if the output has no gradient where the
    hook looks for it. As long as no ZeRO-3 has partitioned the leaf's parameters, nothing of this is done.

    Args:
        leaf: a module that is to be a ZeRO-3 leaf. Call it on every rank, before the engine is built.
    """
    if HANDLES not in leaf.__dict__:
        leaf.__dict__[HANDLES] = [
            leaf.register_forward_pre_hook(_before, prepend=True, with_kwargs=True),
            leaf.register_forward_hook(_after, prepend=True),
        ]


def restore_calls(leaf: nn.Module) -> None:
    """Take back what `adapt_calls` did."""
    for handle in leaf.__dict__.pop(HANDLES, ()):
        handle.remove()


def _trains(leaf: nn.Module) -> bool:
    """Whether this is a call of a ZeRO-3 leaf that will have a backward."""
    if not torch.is_grad_enabled():
        return False
    params = list(leaf.parameters())
    return any(hasattr(param, "ds_id") for param in params) and any(param.requires_grad for param in params)


def _before(leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if seen_by_hooks(args) or not _trains(leaf):
        return None
    positional = [
        parameter.name
        for parameter in inspect.signature(leaf.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    moved, kept = list(args), dict(kwargs)
    while len(moved) < len(positional) and positional[len(moved)] in kept:
        moved.append(kept.pop(positional[len(moved)]))
    if not seen_by_hooks(tuple(moved)):
        for place, value in enumerate(moved):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                moved[place] = value.detach().requires_grad_()
                break
        else:
            raise LeafShardError(
                f"leaf {type(leaf).__name__} is called with no positional tensor of floating point: ZeRO-3 would "
                "reduce its gradients before its backward; make the module around it the leaf, or use FSDP2"
            )
    return tuple(moved), kept


def _after(leaf: nn.Module, args: Any, output: Any) -> None:
    if not seen_by_hooks(output) and _trains(leaf):
        raise LeafShardError(
            f"leaf {type(leaf).__name__} returns a {type(output).__name__} without a tensor that requires a gradient "
            "(alone or in a tuple): ZeRO-3 would never reduce its gradients; have it return one on every rank, or make "
            "the module around it the leaf"
        )
