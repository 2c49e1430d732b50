"""The parts of a chunk: pieces of one dtype that are cut in the same way, and where the wholes made of them stand.

[Note: sections] A section holds pieces one after the other, without gaps. Pieces that are equal stretches in rank order
come first, so that they stand in the same place in every rank's chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch

from ds_fragment.layout import Layout
from ds_fragment.sharding import Sharding

# even: equal stretches, one a rank in rank order; single: one rank sends the whole; runs: other stretches of the
# flattened whole; boxes: anything else.
Cut = Literal["even", "single", "runs", "boxes"]
# What NCCL moves as it is, and torch.cat takes.
COMMON = {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8}
CUTS: tuple[Cut, ...] = ("even", "single", "runs", "boxes")


@dataclass(slots=True)
class Section:
    """The pieces of some items in each rank's chunk; see [Note: sections].

    Attributes:
        cut: how the items are cut.
        dtype: of the pieces.
        items: in the order in which they stand.
        sent: by rank, the elements of each item.
        begins: by rank, the byte of the chunk where the section begins.
    """

    cut: Cut
    dtype: torch.dtype
    items: list[int]
    sent: list[list[int]]
    begins: list[int]

    @property
    def alone(self) -> bool:
        """Whether it is one item that one rank sends whole."""
        return self.cut == "single" and len(self.items) == 1

    def nbytes(self, rank: int) -> int:
        """Bytes of a rank's part."""
        return sum(self.sent[rank]) * self.dtype.itemsize

    def of(self, chunk: torch.Tensor, rank: int) -> torch.Tensor:
        """The section of a rank's chunk, 1-D, of the section's dtype."""
        return chunk.narrow(0, self.begins[rank], self.nbytes(rank)).view(self.dtype)

    def parts(self, chunk: torch.Tensor, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The pieces of a rank, as views of its chunk: (item, 1-D tensor); those that are not empty."""
        found = [(item, numel) for item, numel in zip(self.items, self.sent[rank], strict=True) if numel]
        parts = self.of(chunk, rank).split_with_sizes([numel for _, numel in found])
        return zip((item for item, _ in found), parts, strict=True)

    def offsets(self, rank: int) -> list[int]:
        """The byte of the chunk where each item's piece begins."""
        size = self.dtype.itemsize
        return [self.begins[rank] + size * before for before in accumulate(self.sent[rank][:-1], initial=0)]


class Room:
    """Where whole items of one dtype stand in one storage; neighbours of one shape are made into tensors at once.

    Args:
        items: in the order in which they stand.
        places: of all items.
        align: bytes, of which each begins at a multiple; without gaps unless told.

    Attributes:
        starts: by item, in elements.
        numel: of the storage.
    """

    def __init__(self, items: Sequence[int], shardings: Sequence[Sharding], align: int = 1) -> None:
        self.items, self.starts, self.numel = items, list[int](), 0
        self.dtype = shardings[items[0]].dtype
        step = align // self.dtype.itemsize or 1
        self._runs: list[tuple[int, int, torch.Size]] = []  # (start, items, shape)
        for item in items:
            shape = shardings[item].shape
            start, count, before = self._runs[-1] if self._runs else (0, 0, None)
            if shape == before and shape.numel() % step == 0:
                self._runs[-1] = (start, count + 1, shape)
            else:
                self.numel += -self.numel % step
                self._runs.append((self.numel, 1, shape))
            self.starts.append(self.numel)
            self.numel += shape.numel()

    def fresh(self, device: torch.device) -> torch.Tensor:
        """A storage."""
        return torch.empty(self.numel, dtype=self.dtype, device=device)

    def views(self, storage: torch.Tensor) -> list[torch.Tensor]:
        """Each item in a 1-D tensor of ``numel`` elements; to autograd they are no views, so that each is by itself."""
        found: list[torch.Tensor] = []
        for start, count, shape in self._runs:
            run = storage.narrow(0, start, count * shape.numel())
            if not shape:
                found += run.unbind(0)
            else:
                rows = run.view(count * shape[0], *shape[1:])
                found += torch.unsafe_split_with_sizes(rows, [shape[0]] * count)
        return found


def stretches(layout: Layout, itemsize: int) -> list[tuple[int, int, int]] | None:
    """(rank, start, bytes) in the flattened whole of each fragment that is sent; None where one is no stretch of it."""
    found = []
    row = prod(layout.shape[1:]) * itemsize
    for rank, fragment in enumerate(layout.fragments):
        if fragment is None or rank in layout.copies:
            continue
        if not layout.shape or fragment.size[1:] != layout.shape[1:]:
            return None
        found.append((rank, fragment.offset[0] * row, fragment.numel * itemsize))
    return found


def is_even(cuts: Sequence[tuple[int, int, int]], ranks: int) -> bool:
    """Whether a whole is cut into equal stretches, one a rank in rank order."""
    nbytes = cuts[0][2]
    return len(cuts) == ranks and all(stretch == (rank, rank * nbytes, nbytes) for rank, stretch in enumerate(cuts))


def cut_of(layout: Layout) -> Cut:
    """How a quantity is cut."""
    sent = [layout.sent(rank) for rank in range(len(layout.fragments))]
    if max(sent, default=0) == layout.numel == sum(sent) > 0:
        return "single"
    found = stretches(layout, 1)
    if not found:
        return "boxes"
    return "even" if is_even(found, len(sent)) else "runs"
