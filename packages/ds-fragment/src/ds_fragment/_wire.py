"""What travels between the ranks of one group for one bucket of parameters, and by which collectives.

[Note: wire] Large parameters whose fragments are stretches of the flattened whole travel *in place*, out of the piece
and into the whole: by one all-gather where the stretches are equal and in rank order, else by a broadcast from each
rank that holds one. All others are *packed*: a rank's pieces stand in one buffer of bytes, its chunk, each at a
multiple of `_ALIGN` bytes, whatever their dtype, and each rank computes every rank's offsets from the layouts alone.
Chunks of about the same length go by one all-gather, others by a broadcast each, so that nobody receives padding in
the place of data. Where one rank receives, it receives from each holder. Bytes travel as they are: -0.0, NaN payloads
and subnormals arrive bit for bit.

The status of each rank (see `_status`) travels at the head of its chunk where all chunks are gathered, else beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _kernels, _status
from ds_fragment._layout import Layout
from ds_fragment._place import Place, box, wire_device
from ds_fragment.errors import FragmentError

_ALIGN = 16  # bytes; the widest load of a GPU, and a multiple of every dtype's size
# Bytes of the whole from which a copy costs more than a collective of its own; on a GPU copies are cheap, launches not.
_IN_PLACE = 256 << 10
_IN_PLACE_GPU = 16 << 20
_LITTLE = 1 << 20  # bytes received by which latency counts and padding does not

Locate = Callable[[int], "torch.Tensor | None"]
_Splits = dict[torch.dtype, tuple[list[int], list[int], list[int]]]


class Wire:
    """Which parts of which items go which way; made once, used for every exchange of the same places."""

    def __init__(self, group: dist.ProcessGroup, items: Sequence[int], places: Sequence[Place]) -> None:
        self.group, self.places, self.size, self.rank = group, places, group.size(), group.rank()
        self.device = wire_device(group, places[items[0]].device)
        self.global_ranks = dist.get_process_group_ranks(group)
        self.in_place: dict[int, list[tuple[int, int, int]]] = {}  # by item: (rank, start, bytes) of each stretch
        for item in items:
            stretches = stretches_of(places[item])
            if stretches:
                self.in_place[item] = stretches
        self.packed = [item for item in items if item not in self.in_place]
        lengths = [self._length(rank) for rank in range(self.size)]
        padded = self.size * max(lengths)
        self.gathered = not self.in_place and (padded <= _LITTLE or 4 * padded <= 5 * sum(lengths))
        self.head = _status.STATUS_BYTES if self.gathered else 0
        longest = max(lengths)
        self.lengths = [self.head + (longest if self.gathered else length) for length in lengths]
        self.splits = [self._split_of(rank) for rank in range(self.size)]

    def even(self, item: int) -> bool:
        """Whether an item in place is cut into equal stretches, one a rank in rank order."""
        stretches = self.in_place[item]
        nbytes = stretches[0][2]
        return len(stretches) == self.size and all(
            stretch == (rank, rank * nbytes, nbytes) for rank, stretch in enumerate(stretches)
        )

    def _length(self, rank: int) -> int:
        numels = ((item, self.places[item].layout.sent(rank)) for item in self.packed)
        return sum(_aligned(numel * self.places[item].dtype.itemsize) for item, numel in numels)

    def _split_of(self, rank: int) -> _Splits:
        """For each dtype: sizes that split the chunk, which of the parts are pieces, and of which items."""
        found: _Splits = {}
        ends: dict[torch.dtype, int] = {}
        position = self.head
        for item in self.packed:
            dtype, numel = self.places[item].dtype, self.places[item].layout.sent(rank)
            if not numel:
                continue
            sizes, parts, items = found.setdefault(dtype, ([], [], []))
            begin, end = position // dtype.itemsize, ends.get(dtype, 0)
            if begin > end:
                sizes.append(begin - end)  # status, alignment, or pieces of another dtype
            parts.append(len(sizes))
            items.append(item)
            sizes.append(numel)
            ends[dtype] = begin + numel
            position += _aligned(numel * dtype.itemsize)
        for dtype, (sizes, _, _) in found.items():
            rest = self.lengths[rank] // dtype.itemsize - ends[dtype]
            if rest:
                sizes.append(rest)
        return found

    def parts(self, chunk: torch.Tensor, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The pieces of a rank as views into its chunk: (item, 1-D tensor of the item's dtype)."""
        for dtype, (sizes, parts, items) in self.splits[rank].items():
            split = chunk.view(dtype).split_with_sizes(sizes)
            yield from zip(items, (split[part] for part in parts), strict=True)

    def pack(self, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
        """This rank's chunk, uint8, (lengths[rank],), status included and zero."""
        chunk = torch.empty(self.lengths[self.rank], dtype=torch.uint8, device=self.device)
        dsts, srcs = [], []
        for item, part in self.parts(chunk, self.rank):
            piece = pieces[item]
            dsts.append(part if piece.dim() == 1 else part.view(piece.shape))
            srcs.append(piece)
        _kernels.copy(dsts, srcs)
        chunk[: self.head].zero_()
        return chunk

    def pieces(self, locate: Locate) -> dict[int, torch.Tensor]:
        """What this rank sends, by item; it is asked about all, as it may know of an error where it sends nothing."""
        found = {}
        for item in (*self.in_place, *self.packed):
            place, piece = self.places[item], locate(item)
            expected = place.layout.sent(self.rank)
            if not expected:
                continue
            held = 0 if piece is None else piece.numel()
            if piece is None or held != expected:
                raise FragmentError(f"item {item}: {held} elements are here where the layout says {expected}")
            piece = piece.detach()
            in_place = item in self.in_place
            found[item] = _bytes(piece.to(self.device, place.dtype).contiguous()) if in_place else piece
        return found

    def unpack(self, chunks: Sequence[torch.Tensor | None], wholes: dict[int, torch.Tensor]) -> None:
        """Copy every rank's packed pieces to where they belong."""
        dsts, srcs = [], []
        for rank, chunk in enumerate(chunks):
            if chunk is None:
                continue
            for item, part in self.parts(chunk, rank):
                layout = self.places[item].layout
                fragment = layout.fragments[rank]
                assert fragment is not None
                target = box(wholes[item], layout.shape, fragment)
                dsts.append(target)
                srcs.append(part if target.dim() == 1 else part.view(target.shape))
        _kernels.copy(dsts, srcs)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes: what every backend moves, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def stretches_of(place: Place) -> list[tuple[int, int, int]]:
    """What travels in place of an item, as `_stretches` says; nothing where all of it is packed."""
    if place.group is None:
        return []
    threshold = _IN_PLACE if place.device.type == "cpu" else _IN_PLACE_GPU
    if place.nbytes < threshold or place.device != wire_device(place.group, place.device):
        return []
    return _stretches(place.layout, place.dtype.itemsize) or []


def _stretches(layout: Layout, itemsize: int) -> list[tuple[int, int, int]] | None:
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


@dataclass(slots=True)
class Flight:
    """One exchange over a wire, under way."""

    wire: Wire
    wholes: dict[int, torch.Tensor]  # by item; in the beginning those that travel in place; none where others receive
    statuses: torch.Tensor  # uint8, (ranks, STATUS_BYTES)
    chunks: list[torch.Tensor | None]  # uint8, by rank; None for nothing
    works: list[dist.Work] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)  # what is being sent
    error: Exception | None = None

    @classmethod
    def start(cls, wire: Wire, locate: Locate, wholes: dict[int, torch.Tensor], dst: int | None) -> Flight:
        """Send this rank's pieces, or its error in their place."""
        error: Exception | None = None
        try:
            pieces = wire.pieces(locate)
            chunk = wire.pack(pieces)
        except Exception as caught:
            error, pieces = caught, {}
            chunk = torch.zeros(wire.lengths[wire.rank], dtype=torch.uint8, device=wire.device)
        status = torch.zeros(_status.STATUS_BYTES, dtype=torch.uint8) if error is None else _status.encode(error)
        flight = cls(wire, wholes, status, [None] * wire.size, error=error)
        if wire.gathered and dst is None:
            flight._gather(chunk, status)
        else:
            flight._gather_statuses(status)
            if dst is None:
                flight._spread(chunk, pieces)
            else:
                flight._send_to(dst, chunk, pieces)
        return flight

    def _gather(self, chunk: torch.Tensor, status: torch.Tensor) -> None:
        """All chunks, statuses included, by one all-gather."""
        if self.error is not None:
            chunk[: self.wire.head].copy_(status)
        rows = torch.empty(self.wire.size, len(chunk), dtype=torch.uint8, device=chunk.device)
        self.works.append(_collectives.all_gather(rows.view(-1), chunk, group=self.wire.group, async_op=True))
        self.statuses, self.chunks, self.held = rows[:, : self.wire.head], list(rows.unbind(0)), [chunk]

    def _gather_statuses(self, status: torch.Tensor) -> None:
        wired = status.to(self.wire.device)
        self.statuses = torch.empty(self.wire.size, len(status), dtype=torch.uint8, device=wired.device)
        work = _collectives.all_gather(self.statuses.view(-1), wired, group=self.wire.group, async_op=True)
        self.works.append(work)
        self.held.append(wired)

    def _spread(self, chunk: torch.Tensor, pieces: dict[int, torch.Tensor]) -> None:
        """Every item to all ranks."""
        wire = self.wire
        for item, stretches in wire.in_place.items():
            whole = _bytes(self.wholes[item])
            piece = pieces.get(item)
            if wire.even(item):
                mine = torch.empty(stretches[0][2], dtype=torch.uint8, device=wire.device) if piece is None else piece
                self.works.append(_collectives.all_gather(whole, mine, group=wire.group, async_op=True))
                self.held.append(mine)
                continue
            for rank, start, nbytes in stretches:
                part = whole.narrow(0, start, nbytes)
                if rank == wire.rank and piece is not None:
                    part.copy_(piece)
                self._broadcast(part, rank)
        if wire.packed:
            for rank, length in enumerate(wire.lengths):
                if length:
                    here = rank == wire.rank
                    part = chunk if here else torch.empty(length, dtype=torch.uint8, device=wire.device)
                    self.chunks[rank] = part
                    self._broadcast(part, rank)

    def _broadcast(self, part: torch.Tensor, rank: int) -> None:
        source = self.wire.global_ranks[rank]
        self.works.append(dist.broadcast(part, source, group=self.wire.group, async_op=True))

    def _send_to(self, dst: int, chunk: torch.Tensor, pieces: dict[int, torch.Tensor]) -> None:
        """Every item to one rank, from each that holds a part of it."""
        wire = self.wire
        if dst not in wire.global_ranks:
            return  # its ranks have what they hold of it; the receiver is none of them
        root = wire.global_ranks.index(dst)
        operations = []
        parts: list[tuple[int, torch.Tensor | None]] = []  # (holder, where it comes from or goes to)
        for item, stretches in wire.in_place.items():
            whole = _bytes(self.wholes[item]) if wire.rank == root else None
            for rank, start, nbytes in stretches:
                target = None if whole is None else whole.narrow(0, start, nbytes)
                if rank == wire.rank and target is not None and item in pieces:
                    target.copy_(pieces[item])
                mine = pieces.get(item, torch.empty(nbytes if self.error else 0, dtype=torch.uint8, device=wire.device))
                parts.append((rank, mine if rank == wire.rank else target))
        for rank, length in enumerate(wire.lengths):
            if length > wire.head:
                here = rank == wire.rank
                room = None if wire.rank != root or here else torch.empty(length, dtype=torch.uint8, device=wire.device)
                parts.append((rank, chunk if here else room))
                self.chunks[rank] = parts[-1][1] if wire.rank == root else None
        for rank, part in parts:
            if rank == root or part is None:
                continue
            if wire.rank == rank:
                operations.append(dist.P2POp(dist.isend, part, dst, group=wire.group))
                self.held.append(part)
            elif wire.rank == root:
                operations.append(dist.P2POp(dist.irecv, part, wire.global_ranks[rank], group=wire.group))
        if operations:
            self.works.extend(dist.batch_isend_irecv(operations))

    def wait(self) -> None:
        """Wait for the data, whatever it says."""
        while self.works:
            self.works.pop(0).wait()

    def land(self) -> None:
        """Wait for the data and raise what any rank has to say."""
        self.wait()
        _status.check(self.statuses.cpu(), cause=self.error)

    def deliver(self) -> None:
        """Copy what was packed into the whole tensors, which are all there by now."""
        if self.wholes:
            self.wire.unpack(self.chunks, self.wholes)
            self.chunks.clear()
