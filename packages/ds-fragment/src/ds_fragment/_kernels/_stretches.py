"""Stretches of buffers that are others at every use: what goes where is prepared once, by offset."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from ds_fragment._kernels import _cuda
from ds_fragment._kernels._library import LINE, loaded
from ds_fragment._kernels._plan import SAME, Pieces, Plan, all_plain, kind_of

ALIGN = LINE  # bytes; of what is given as a buffer


class Stretches:
    """Copies from one buffer, or from tensors that stay where they are, into another buffer, in one launch.

    Args:
        dsts: for each stretch, its offset in the destination, in bytes.
        srcs: likewise in the source; or an address, where `move` is called without a source.
        numels: elements of each; bytes where the dtypes on both sides are the same.
        kinds: one byte each, see `_plan.kind_of`.
        device: the CUDA device.
    """

    def __init__(
        self, dsts: Sequence[int], srcs: Sequence[int], numels: Sequence[int], kinds: bytes, device: torch.device
    ) -> None:
        pieces = Pieces(array("Q", dsts), array("Q", srcs), array("Q", numels), kinds, [])
        self._plan = Plan(loaded(), "copy", pieces, device)

    @classmethod
    def within(cls, dsts: Sequence[int], srcs: Sequence[int], nbytes: Sequence[int], device: torch.device) -> Stretches:
        """Stretches of bytes from one buffer to another."""
        return cls(dsts, srcs, nbytes, bytes([SAME]) * len(nbytes), device)

    def move(self, dst: torch.Tensor, src: torch.Tensor | None = None) -> None:
        """Copy, on the current stream of the device; both buffers begin at a multiple of `ALIGN`."""
        _cuda.move(self._plan, dst.data_ptr(), 0 if src is None else src.data_ptr())


class Packer:
    """Copies tensors into a buffer at fixed offsets, cast to fixed dtypes; prepared anew when a tensor has moved."""

    def __init__(self, offsets: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        self._offsets, self._dtypes = offsets, dtypes
        self._seen: tuple[list[int], list[int], list[torch.dtype]] | None = None
        self._stretches: Stretches | None = None

    def pack(self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
        """Fill the buffer; False, and nothing done, where a kernel cannot read the tensors as they are."""
        if not all_plain(tensors, buffer.device):
            return False
        seen = ([t.data_ptr() for t in tensors], [t.numel() for t in tensors], [t.dtype for t in tensors])
        if seen != self._seen:
            kinds = [kind_of("copy", to, of) for to, of in zip(self._dtypes, seen[2], strict=True)]
            if None in kinds:
                return False
            numels = [t.nbytes if kind == SAME else t.numel() for t, kind in zip(tensors, kinds, strict=True)]
            codes = bytes(kind or 0 for kind in kinds)
            self._stretches, self._seen = Stretches(self._offsets, seen[0], numels, codes, buffer.device), seen
        assert self._stretches is not None
        self._stretches.move(buffer)
        return True
