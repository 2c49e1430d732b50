"""Stretches of buffers that are others at every use: what goes where is prepared once, by offset."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import cast

import torch

from ds_fragment._identity import Seen
from ds_fragment._kernels import _cuda
from ds_fragment._kernels._library import LINE, loaded
from ds_fragment._kernels._plan import SAME, Pieces, Plan, all_plain, kind_of

ALIGN = LINE  # bytes; of what is given as a buffer
_address, _dtype = torch.Tensor.data_ptr, attrgetter("dtype")


class Stretches:
    """Copies from one buffer into another, in one launch; or from or to tensors that stay where they are.

    Args:
        dsts: for each stretch, its offset in the destination, in bytes; or an address, where `move` is given none.
        srcs: likewise in the source.
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
    def within(cls, rows: Sequence[tuple[int, int, int]], device: torch.device) -> Stretches:
        """Stretches of bytes from one buffer to another, as (offset there, offset here, bytes); at least one."""
        dsts, srcs, nbytes = zip(*rows, strict=True)
        return cls(dsts, srcs, nbytes, bytes([SAME]) * len(rows), device)

    def move(self, dst: torch.Tensor | None, src: torch.Tensor | None, *, blocks: int | None = None) -> None:
        """Copy, on the device's current stream; a buffer begins at a multiple of `ALIGN`, None stands for addresses.

        ``blocks``: how many run it, so that others get their share of the memory; as many as are fastest unless told.
        """
        _cuda.move(
            self._plan, 0 if dst is None else dst.data_ptr(), 0 if src is None else src.data_ptr(), blocks=blocks
        )


class Tensors:
    """Copies between tensors and a buffer, cast to the destination's dtype; prepared anew when a tensor has moved.

    Args:
        offsets: for each stretch, its offset in the buffer, in bytes.
        dtypes: of the stretches there.
        pieces: for each stretch, which tensor it is of, and where in it, in elements; each of the tensors whole and in
            order unless told.
        numels: elements of each stretch; all of its tensor unless told.
        head: bytes that `pack` puts at the beginning of the buffer; nothing unless told.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        dtypes: Sequence[torch.dtype],
        pieces: Sequence[tuple[int, int]] | None = None,
        numels: Sequence[int] | None = None,
        head: torch.Tensor | None = None,
    ) -> None:
        self._offsets, self._dtypes, self._numels, self._head = offsets, dtypes, numels, head
        self._pieces = [(position, 0) for position in range(len(offsets))] if pieces is None else pieces
        self._seen = Seen()  # the last time
        self._made_of: tuple[list[int], list[torch.dtype], list[int]] = ([], [], [])
        self._stretches: dict[bool, Stretches] = {}  # by direction

    def pack(self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor], *, blocks: int | None = None) -> bool:
        """Fill the buffer; False, and nothing done, where a kernel cannot read the tensors as they are.

        ``blocks``: as in `Stretches.move`, here and below.
        """
        return self._move(buffer, tensors, into_tensors=False, blocks=blocks)

    def again(self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor | None], *, blocks: int | None = None) -> bool:
        """Fill the buffer as the last time; False, and nothing done, where these are others or look otherwise."""
        if False not in self._stretches or not self._seen.are(tensors):
            return False
        same = cast("Sequence[torch.Tensor]", tensors)  # as none that was seen is None
        if _columns(same) != self._made_of or not all(map(torch.Tensor.is_contiguous, same)):
            return False
        self._stretches[False].move(buffer, None, blocks=blocks)
        return True

    def unpack(self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
        """Fill the tensors from the buffer; False, and nothing done, where a kernel cannot write to them."""
        return self._move(buffer, tensors, into_tensors=True)

    def _move(
        self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor], *, into_tensors: bool, blocks: int | None = None
    ) -> bool:
        columns = _columns(tensors)
        if columns != self._made_of:
            self._stretches.clear()
            self._made_of = columns
        if not all_plain(tensors, buffer.device):
            self._seen = Seen()
            return False
        if not self._seen.are(tensors):
            self._seen = Seen(tensors)
        if into_tensors not in self._stretches:
            made = self._prepared(tensors, buffer.device, into_tensors)
            if made is None:
                return False
            self._stretches[into_tensors] = made
        if into_tensors:
            self._stretches[True].move(None, buffer)
        else:
            self._stretches[False].move(buffer, None, blocks=blocks)
        return True

    def _prepared(self, tensors: Sequence[torch.Tensor], device: torch.device, into_tensors: bool) -> Stretches | None:
        addresses, sizes, kinds = [], [], []
        for at, (dtype, (position, start)) in enumerate(zip(self._dtypes, self._pieces, strict=True)):
            tensor = tensors[position]
            numel = tensor.numel() if self._numels is None else self._numels[at]
            pair = (tensor.dtype, dtype) if into_tensors else (dtype, tensor.dtype)
            kind = kind_of("copy", *pair)
            if kind is None:
                return None
            addresses.append(tensor.data_ptr() + start * tensor.dtype.itemsize)
            sizes.append(numel * dtype.itemsize if kind == SAME else numel)
            kinds.append(kind)
        offsets = list(self._offsets)
        if self._head is not None and not into_tensors:
            offsets.append(0)
            addresses.append(self._head.data_ptr())
            sizes.append(self._head.numel())
            kinds.append(SAME)
        dsts, srcs = (addresses, offsets) if into_tensors else (offsets, addresses)
        return Stretches(dsts, srcs, sizes, bytes(kinds), device)


def _columns(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[torch.dtype], list[int]]:
    """Addresses, dtypes and numbers of elements."""
    return list(map(_address, tensors)), list(map(_dtype, tensors)), list(map(torch.Tensor.numel, tensors))
