"""Functions that need the numbers in a tensor on meta, or that torch has no meta kernel for."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ds_ondevice._ops import is_recorded
from ds_ondevice.errors import MetaValueError


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Any:
    """The result of a function that failed on meta, computed at once on the CPU if its values depend on no draws.

    A tensor in the result goes to meta, recorded with its value, unless it is sparse or the like.

    Args:
        func: the function.
        args: its arguments; some are recorded tensors on meta.
        kwargs: its keyword arguments.
        error: what it raised; raised again where meta is not the cause.

    Raises:
        MetaValueError: a value that it needs is not known before `materialize`.
    """
    from ds_ondevice._replay import value_of  # that module is built on this package's recording, as the modes are

    recorded = [leaf for leaf in tree_leaves((args, kwargs)) if is_recorded(leaf)]
    if not recorded or isinstance(error, MetaValueError):
        raise error
    name = resolve_name(func) or str(getattr(func, "__qualname__", func))
    if "meta" not in str(error).lower() and not isinstance(error, NotImplementedError):
        raise error
    in_place = name.endswith("__setitem__") or (name.endswith("_") and not name.endswith("__"))
    if in_place or kwargs.get("out") is not None:
        raise MetaValueError(
            f"{name} writes to a tensor on meta (shape {tuple(recorded[0].shape)}) and cannot run there ({error}): "
            "make the tensor with device='cpu'"
        ) from error
    try:
        values = tree_map(lambda leaf: value_of(leaf) if is_recorded(leaf) else leaf, (args, kwargs))
    except MetaValueError as unknown:
        raise MetaValueError(f"{name} needs values: {unknown}") from error
    made = func(*values[0], **values[1])
    return tree_map(lambda leaf: leaf.to("meta") if _can_go(leaf) else leaf, made)


def printed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``repr`` or ``format`` of a recorded tensor gives; where its value is not known, that of a tensor on meta.

    Raises:
        MetaValueError: a format for numbers was given, and the value is not known.
    """
    from ds_ondevice._replay import value_of

    try:
        return func(value_of(args[0]), *args[1:], **kwargs)
    except MetaValueError:
        if func is torch.Tensor.__format__ and args[1:] and args[1]:
            raise
        return func(*args, **kwargs)


def _can_go(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_quantized
