"""Stretches of buffers that are others at every use: what goes where is prepared once, by offset."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import cast

import torch

from ds_fragment.kernels import cuda
from ds_fragment.kernels.library import LINE, loaded
from ds_fragment.kernels.plan import SAME, Pieces, Plan, all_plain, kind_of

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
        cuda.move(self._plan, 0 if dst is None else dst.data_ptr(), 0 if src is None else src.data_ptr(), blocks=blocks)


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
        self._offsets, self._dtypes, self._pieces, self._numels, self._head = offsets, dtypes, pieces, numels, head
        self._seen = _Seen()  # what was given twice
        self._made_of: tuple[list[int], list[torch.dtype], list[int]] = ([], [], [])
        # By direction; the sizes and kinds for as long as the tensors look alike, wherever they are.
        self._sized: dict[bool, tuple[list[int], bytes] | None] = {}
        self._stretches: dict[bool, Stretches] = {}

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
        moved = columns != self._made_of
        if moved:
            self._stretches.clear()
            if columns[1:] != self._made_of[1:]:
                self._sized.clear()
            self._made_of = columns
        plain = all_plain(tensors, buffer.device)
        if moved or not plain:
            self._seen = _Seen()  # as gradients are others at every step, only what comes again is worth remembering
        elif not self._seen.are(tensors):
            self._seen = _Seen(tensors)
        if not plain:
            return False
        if into_tensors not in self._stretches:
            made = self._prepared(buffer.device, into_tensors)
            if made is None:
                return False
            self._stretches[into_tensors] = made
        if into_tensors:
            self._stretches[True].move(None, buffer)
        else:
            self._stretches[False].move(buffer, None, blocks=blocks)
        return True

    def _prepared(self, device: torch.device, into_tensors: bool) -> Stretches | None:
        if into_tensors not in self._sized:
            self._sized[into_tensors] = self._sizes(into_tensors)
        sized = self._sized[into_tensors]
        if sized is None:
            return None
        addresses, dtypes, _ = self._made_of
        if self._pieces is not None:
            addresses = [addresses[at] + start * dtypes[at].itemsize for at, start in self._pieces]
        offsets = self._offsets
        if self._head is not None and not into_tensors:
            addresses, offsets = [*addresses, self._head.data_ptr()], [*offsets, 0]
        dsts, srcs = (addresses, offsets) if into_tensors else (offsets, addresses)
        return Stretches(dsts, srcs, *sized, device)

    def _sizes(self, into_tensors: bool) -> tuple[list[int], bytes] | None:
        """What `Stretches` takes for the sizes and kinds; None where there is no kernel for a pair of dtypes."""
        _, dtypes, numels = self._made_of
        tensors = range(len(dtypes)) if self._pieces is None else [at for at, _ in self._pieces]
        sizes, kinds = [], []
        for there, at, numel in zip(self._dtypes, tensors, self._numels or numels, strict=True):
            kind = kind_of("copy", dtypes[at], there) if into_tensors else kind_of("copy", there, dtypes[at])
            if kind is None:
                return None
            sizes.append(numel * there.itemsize if kind == SAME else numel)
            kinds.append(kind)
        if self._head is not None and not into_tensors:
            sizes.append(self._head.numel())
            kinds.append(SAME)
        return sizes, bytes(kinds)


def _columns(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[torch.dtype], list[int]]:
    """Addresses, dtypes and numbers of elements."""
    return list(map(_address, tensors)), list(map(_dtype, tensors)), list(map(torch.Tensor.numel, tensors))


class _Seen:
    """Some tensors, which it does not keep alive, to tell whether others are the same.

    An id means one tensor as long as that lives, so that ids are compared once it is known that none is gone.
    """

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        self._gone: list[object] = []
        self._ids = list(map(id, tensors))
        self._references = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    @property
    def alive(self) -> bool:
        """Whether all of them are still there."""
        return not self._gone

    def are(self, tensors: Sequence[object]) -> bool:
        """Whether these are the same, in the same order."""
        return list(map(id, tensors)) == self._ids and self.alive
