"""How large parameters are as a whole, also where an engine has left this rank a part of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The shape before sharding. ZeRO-3 leaves an empty parameter behind and keeps its shape beside it."""
    return tuple(getattr(param, "ds_shape", param.shape))


@dataclass(frozen=True)
class Size:
    """Elements, and bytes in the parameters' own dtypes."""

    elements: int
    bytes: int


def size_of(params: Iterable[nn.Parameter]) -> Size:
    """The size of some parameters; one that comes twice counts once."""
    unique = {id(param): param for param in params}.values()
    counts = [(math.prod(full_shape(param)), param.element_size()) for param in unique]
    return Size(sum(count for count, _ in counts), sum(count * size for count, size in counts))
