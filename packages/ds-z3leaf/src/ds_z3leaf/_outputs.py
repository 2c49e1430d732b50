"""The tensors in what a module returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an output: alone, or in tuples, lists, mappings and data classes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


def seen_by_hooks(value: Any) -> bool:
    """Whether torch finds a gradient in an output, or in a tuple of arguments, for a module's full backward hooks.

    It looks at a tensor, and at the tensors in a tuple, no deeper.
    """
    values = value if isinstance(value, tuple) else (value,)
    return any(isinstance(entry, torch.Tensor) and entry.requires_grad for entry in values)
