"""What a checkpoint holds, and where: nothing of it is read yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ds_fragment.zero_checkpoint.unpickle import Stored


@dataclass(frozen=True)
class Piece:
    """A run of elements of a flat tensor in a file."""

    stored: Stored
    start: int
    numel: int


@dataclass(frozen=True)
class Source:
    """A tensor and the pieces that it is made of, in order; a single piece of a tensor of this shape may be strided."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        buffers: persistent buffers.
        frozen: parameters that the optimizer does not train.
        trained: those that it does: their fp32 weights.
        tied: for each name that is a second one, the name of the same parameter among the others.
        state: optimizer state, named ``PARAMETER/KEY``, key after key; where it was asked for.
        scalars: optimizer state that is a number, by the same names.
        param_groups: hyperparameters, with the parameters' names under ``params``.
    """

    buffers: dict[str, Source] = field(default_factory=dict)
    frozen: dict[str, Source] = field(default_factory=dict)
    trained: dict[str, Source] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    state: list[Source] = field(default_factory=list)
    scalars: dict[str, float | Stored] = field(default_factory=dict)
    param_groups: list[dict[str, Any]] = field(default_factory=list)


def whole(name: str, stored: Stored) -> Source:
    """A source of one stored tensor."""
    return Source(name, stored.shape, stored.dtype, (Piece(stored, 0, stored.shape.numel()),))
