"""Work tables: which bytes one launch moves, made once for a list of tensors and used while they stay where they are.

[Note: tables] The table is planned on the host and copied to the device on the stream that is to read it, once for each
stream, so that no stream waits for another. While a graph is captured neither will do: the graph would copy the table
again at every replay, and memory of the capture's own pool may be overwritten in between. The library then keeps a copy
that lives as long as the process, since nobody knows how long the graph will.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

import torch

from ds_fragment.kernels.library import MIXED, WORKSPACE_BYTES, KernelError, Loaded, Work

Op = Literal["copy", "gather_grads", "norm", "publish"]

EACH_CHUNK = 0xFFFFFFFF  # DSF_EACH_CHUNK
# By operation: vectors in a chunk (of 16 bytes of the wider side), and blocks (0: as many as fit).
# What was fastest on an H200; chunks are whole rounds of a block (threads times vectors in flight, see kernels.cuh).
GROUPS: dict[Op, int] = {"copy": 4096, "gather_grads": 3072, "norm": 3072, "publish": 4096}
BLOCKS: dict[Op, int] = {"copy": EACH_CHUNK, "gather_grads": 0, "norm": 0, "publish": 0}

SAME = 15 | 15 << 4  # DSF_BYTES on both sides
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dsf_type
PLAIN = {torch.Tensor, torch.nn.Parameter}  # types that are memory and nothing else

# The same as torch.cuda.current_stream(device).cuda_stream, without an object in between; what Triton launches on.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@functools.cache
def kind_of(op: Op, dst: torch.dtype, src: torch.dtype) -> int | None:
    """How an operation's kernel moves such a pair: the source's code plus 16 times the destination's; or None."""
    if op == "copy" and dst == src:
        return None if dst.is_complex else SAME
    if op == "publish" and (dst == src or src != torch.float32):
        return None
    if op == "gather_grads" and dst != torch.float32:
        return None
    return CODES[src] | CODES[dst] << 4 if src in CODES and dst in CODES else None


class Pieces(NamedTuple):
    """What goes to the kernel, column by column."""

    dsts: array[int]  # addresses; the sources' where nothing is written
    srcs: array[int]  # addresses
    numels: array[int]  # elements, or bytes where both dtypes are the same; 0 for what does not go to the kernel
    kinds: bytes  # one byte each, see `kind_of`
    rest: list[int]  # positions of the pairs that torch has to move: other dtypes, other devices, strides


def pieces_of(op: Op, dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor], device: torch.device) -> Pieces:
    """Sort pairs of tensors into what the kernel moves and what it cannot."""
    kinds = [kind_of(op, dst.dtype, src.dtype) for dst, src in zip(dsts, srcs, strict=True)]
    fits = zip(kinds, _plain(dsts, device), _plain(srcs, device), strict=True)
    left = {i for i, (kind, dst, src) in enumerate(fits) if kind is None or not dst or not src}
    numels = array("Q", (src.nbytes if kind == SAME else src.numel() for kind, src in zip(kinds, srcs, strict=True)))
    for i in left:
        numels[i] = 0
    to, of = (array("Q", [0 if i in left else x.data_ptr() for i, x in enumerate(side)]) for side in (dsts, srcs))
    rest = [i for i in sorted(left) if dsts[i].numel()]
    return Pieces(to, of, numels, bytes(kind or 0 for kind in kinds), rest)


def _plain(tensors: Sequence[torch.Tensor], device: torch.device) -> list[bool]:
    """Of each tensor, whether it is nothing but contiguous memory of the device."""
    asked = map(type, tensors), map(attrgetter("device"), tensors), map(torch.Tensor.is_contiguous, tensors)
    columns = zip(*asked, map(torch.Tensor.is_neg, tensors), strict=True)
    return [kind in PLAIN and where == device and dense and not negated for kind, where, dense, negated in columns]


class Plan:
    """The work table of one list of pieces on one device."""

    def __init__(self, loaded: Loaded, op: Op, pieces: Pieces, device: torch.device) -> None:
        assert loaded.library is not None
        self.loaded, self.library, self.op, self.device = loaded, loaded.library, op, device
        self.rest = pieces.rest
        moved = {kind for kind, numel in zip(pieces.kinds, pieces.numels, strict=True) if numel}
        kind = moved.pop() if len(moved) == 1 else MIXED
        self._reduces = op in ("gather_grads", "norm")
        self.chunks, self._host = table_of(self.library, op, pieces)
        self._fields = (len(pieces.kinds), self.chunks, GROUPS[op], BLOCKS[op], device.index, kind)  # of a `Work`
        self._works: dict[int, tuple[Work, torch.Tensor]] = {}  # by stream

    def launch(self, *arguments: object) -> None:
        """Run the kernel on the device's current stream.

        Args:
            arguments: of the C function between the work and, where it reduces, the workspace.

        Raises:
            KernelError: CUDA refused the launch.
        """
        index = self.device.index
        stream = torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else int(_raw_stream(index))
        work, workspace = self._work(stream)
        if self._reduces:
            arguments = (*arguments, workspace)
        code = getattr(self.library, f"dsf_{self.op}")(ctypes.byref(work), *arguments)
        self.loaded.check(code, f"the {self.op} kernel")

    def _work(self, stream: int) -> tuple[Work, int]:
        """The table for a stream, and the address of a zeroed workspace that nothing else uses meanwhile."""
        if self.library.dsf_capturing(stream):
            return self._kept(stream)
        if stream not in self._works:
            table = torch.empty(self._host.numel(), dtype=torch.uint8, device=self.device)
            table.copy_(self._host.pin_memory(), non_blocking=True)
            self._works[stream] = (Work(table.data_ptr(), *self._fields, stream), table)
        return self._works[stream][0], _workspace(self.device, stream).data_ptr() if self._reduces else 0

    def _kept(self, stream: int) -> tuple[Work, int]:
        """See [Note: tables]."""
        size = -(-self._host.numel() // 16) * 16
        kept = ctypes.c_void_p()
        host = torch.zeros(size, dtype=torch.uint8)
        host[: self._host.numel()] = self._host
        zeroed = WORKSPACE_BYTES if self._reduces else 0
        code = self.library.dsf_keep(self.device.index, host.data_ptr(), size, zeroed, ctypes.byref(kept))
        self.loaded.check(code, "keeping a work table for a graph")
        assert kept.value is not None
        return Work(kept.value, *self._fields, stream), kept.value + size


def table_of(library: ctypes.CDLL, op: Op, pieces: Pieces) -> tuple[int, torch.Tensor]:
    """The number of chunks, and the table: uint8, on the host."""
    need = ctypes.c_uint64()

    def plan(out: int | None, size: int) -> int:
        columns = [column.buffer_info()[0] for column in (pieces.dsts, pieces.srcs, pieces.numels)]
        flags = (pieces.kinds, GROUPS[op], op == "norm", out, size, ctypes.byref(need))
        return int(library.dsf_plan(len(pieces.kinds), *columns, *flags))

    chunks = plan(None, 0)
    host = torch.empty(need.value, dtype=torch.uint8)
    if chunks < 0 or plan(host.data_ptr(), need.value) != chunks:
        raise KernelError(f"{len(pieces.kinds)} pieces of {sum(pieces.numels)} elements are more than one launch moves")
    return chunks, host


@functools.cache
def _workspace(device: torch.device, stream: int) -> torch.Tensor:
    """Zeroed memory for the reductions on a stream; each leaves it zeroed for the next."""
    del stream  # the current one of the device
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
