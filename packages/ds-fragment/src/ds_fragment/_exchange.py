"""Bring the fragments of many parameters together: pack, one collective for each group and bucket, unpack.

[Note: wire] The pieces that a rank contributes to one collective stand in one buffer of bytes, its *chunk*: first the
status (see `_status`), then the pieces, each at a multiple of `_ALIGN` bytes, whatever their dtype. All chunks of a
collective are equally long, and each rank computes every rank's offsets from the layouts alone. Bytes travel as they
are, so that -0.0, NaN payloads and subnormals arrive bit for bit.

[Note: buckets] Parameters travel in the caller's order, as many at a time as fit ``bucket_bytes``. The next bucket is
in flight while the caller works on this one: two buckets are the most memory an exchange takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _kernels, _status
from ds_fragment._layout import Fragment, Layout
from ds_fragment.errors import FragmentError, RankMismatchError

_ALIGN = 16  # bytes; the widest load of a GPU, and a multiple of every dtype's size

Locate = Callable[[int], "torch.Tensor | None"]


def box(whole: torch.Tensor, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
    """The fragment of a contiguous tensor, as a view."""
    view = whole.view(shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        if size != shape[dim]:
            view = view.narrow(dim, offset, size)
    return view


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where one quantity of one parameter is, the same answer on every rank of the group.

    Attributes:
        shape: of the whole quantity.
        dtype: of the pieces.
        device: the parameter's compute device; collectives run there unless the backend cannot.
        layout: the fragments by group rank.
        group: the ranks that hold them; None where every rank holds the whole.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    group: dist.ProcessGroup | None

    @property
    def alone(self) -> bool:
        """Whether this rank holds everything, so that there is nothing to communicate."""
        return self.group is None or len(self.layout.fragments) == 1

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return 0 if self.group is None else self.group.rank()

    def cut(self, whole: torch.Tensor) -> torch.Tensor | None:
        """This rank's fragment of a whole tensor, as a view; None where it holds nothing."""
        fragment = self.layout.fragments[self.rank]
        return None if fragment is None else box(whole, self.layout.shape, fragment)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole quantity."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(slots=True)
class _Wire:
    """The chunks of one collective: for each rank, the (item, offset in bytes) of its pieces."""

    group: dist.ProcessGroup
    items: list[int]
    places: Sequence[Place]
    chunk_bytes: int = 0
    pieces: list[list[tuple[int, int]]] = field(default_factory=list)  # by rank
    splits: list[dict[torch.dtype, tuple[list[int], list[int], list[int]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rank in range(self.group.size()):
            position, pieces = _status.STATUS_BYTES, []
            for item in self.items:
                place = self.places[item]
                numel = place.layout.sent(rank)
                if numel:
                    pieces.append((item, position))
                    position += -(-numel * place.dtype.itemsize // _ALIGN) * _ALIGN
            self.pieces.append(pieces)
            self.chunk_bytes = max(self.chunk_bytes, position)
        self.splits = [self._split_of(rank) for rank in range(len(self.pieces))]

    def _split_of(self, rank: int) -> dict[torch.dtype, tuple[list[int], list[int], list[int]]]:
        """For each dtype: sizes that split the chunk, which of the parts are pieces, and of which items."""
        found: dict[torch.dtype, tuple[list[int], list[int], list[int]]] = {}
        ends: dict[torch.dtype, int] = {}
        for item, position in self.pieces[rank]:
            place = self.places[item]
            sizes, parts, items = found.setdefault(place.dtype, ([], [], []))
            begin, end = position // place.dtype.itemsize, ends.get(place.dtype, 0)
            if begin > end:
                sizes.append(begin - end)  # status, alignment, or pieces of another dtype
            parts.append(len(sizes))
            items.append(item)
            sizes.append(place.layout.sent(rank))
            ends[place.dtype] = begin + sizes[-1]
        for dtype, (sizes, _, _) in found.items():
            rest = self.chunk_bytes // dtype.itemsize - ends[dtype]
            if rest:
                sizes.append(rest)
        return found

    def parts(self, chunk: torch.Tensor, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The pieces of a rank as views into its chunk: (item, 1-D tensor of the item's dtype)."""
        for dtype, (sizes, parts, items) in self.splits[rank].items():
            split = chunk.view(dtype).split_with_sizes(sizes)
            yield from zip(items, (split[part] for part in parts), strict=True)

    def send(self, locate: Locate) -> tuple[torch.Tensor, Exception | None]:
        """This rank's chunk, uint8 (chunk_bytes,), and what kept it from being right, if anything."""
        rank = self.group.rank()
        device = wire_device(self.group, self.places[self.items[0]].device)
        chunk = torch.empty(self.chunk_bytes, dtype=torch.uint8, device=device)
        try:
            pieces = {item: self._piece(item, rank, locate(item)) for item in self.items}
            dsts, srcs = [], []
            for item, part in self.parts(chunk, rank):
                piece = pieces[item]
                assert piece is not None
                dsts.append(part if piece.dim() == 1 else part.view(piece.shape))
                srcs.append(piece)
            _kernels.copy(dsts, srcs)
            chunk[: _status.STATUS_BYTES].zero_()
        except Exception as error:
            chunk[: _status.STATUS_BYTES].copy_(_status.encode(error))
            return chunk, error
        return chunk, None

    def _piece(self, item: int, rank: int, piece: torch.Tensor | None) -> torch.Tensor | None:
        expected = self.places[item].layout.sent(rank)
        held = 0 if piece is None else piece.numel()
        if expected == 0:
            return None  # a copy of what another rank sends, or nothing
        if piece is None or held != expected:
            raise FragmentError(f"item {item}: {held} elements are here where the layout says {expected}")
        return piece.detach()


def wire_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The parameter's device if the group's backend moves its memory, else the one that the backend moves."""
    supported = {d.type for d in group._device_types}
    if device.type in supported:
        return device
    kind = "cuda" if "cuda" in supported else sorted(supported)[0]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@dataclass(slots=True)
class _Flight:
    """A collective under way."""

    wire: _Wire
    works: list[dist.Work]
    chunk: torch.Tensor  # uint8, (chunk_bytes,); held until the collective is done
    gathered: torch.Tensor | None  # uint8, (ranks, chunk_bytes); None where another rank receives
    statuses: torch.Tensor  # uint8, (ranks, STATUS_BYTES)
    error: Exception | None

    @classmethod
    def start(cls, wire: _Wire, locate: Locate, dst: int | None) -> _Flight:
        chunk, error = wire.send(locate)
        size, group = wire.group.size(), wire.group
        head = slice(None, _status.STATUS_BYTES)
        here = dst is None or dist.get_rank() == dst
        gathered = torch.empty(size, wire.chunk_bytes, dtype=torch.uint8, device=chunk.device) if here else None
        if dst is None:
            assert gathered is not None
            works = [_collectives.all_gather(gathered.view(-1), chunk, group=group, async_op=True)]
            return cls(wire, works, chunk, gathered, gathered[:, head], error)
        # Only one rank receives the data, so the statuses travel to all on their own, at the same time.
        statuses = torch.empty(size, _status.STATUS_BYTES, dtype=torch.uint8, device=chunk.device)
        rows = None if gathered is None else list(gathered.unbind(0))
        works = [
            _collectives.all_gather(statuses.view(-1), chunk[head], group=group, async_op=True),
            dist.gather(chunk, rows, dst=dst, group=group, async_op=True),
        ]
        return cls(wire, works, chunk, gathered, statuses, error)

    def wait(self) -> None:
        """Wait for the data, whatever it says."""
        while self.works:
            self.works.pop(0).wait()

    def land(self) -> None:
        """Wait for the data and raise what any rank has to say."""
        self.wait()
        _status.check(self.statuses.cpu(), cause=self.error)

    def deliver(self, outs: dict[int, torch.Tensor]) -> None:
        """Copy every rank's pieces to where they belong in ``outs``."""
        assert self.gathered is not None
        dsts, srcs = [], []
        for rank, chunk in enumerate(self.gathered.unbind(0)):
            for item, part in self.wire.parts(chunk, rank):
                layout = self.wire.places[item].layout
                fragment = layout.fragments[rank]
                assert fragment is not None
                target = box(outs[item], layout.shape, fragment)
                dsts.append(target)
                srcs.append(part if target.dim() == 1 else part.view(target.shape))
        _kernels.copy(dsts, srcs)


class Plan:
    """What travels with what, for one list of places: made once, used for as long as the places stay the same."""

    def __init__(self, places: Sequence[Place], bucket_bytes: int) -> None:
        self.places = places
        self.buckets: list[list[int]] = []
        filled = 0
        for item, place in enumerate(places):
            if not self.buckets or filled + place.nbytes > bucket_bytes:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(item)
            filled += place.nbytes
        self.wires = [self._wires_of(bucket) for bucket in self.buckets]
        self.groups = len({wire.group for wires in self.wires for wire in wires})

    def _wires_of(self, bucket: list[int]) -> list[_Wire]:
        groups: dict[dist.ProcessGroup, list[int]] = {}
        for item in bucket:
            place = self.places[item]
            if place.group is not None and not place.alone:
                groups.setdefault(place.group, []).append(item)
        return [_Wire(group, items, self.places) for group, items in groups.items()]


def gather(
    plan: Plan,
    locate: Locate,
    *,
    dst: int | None = None,
    out: Callable[[int], torch.Tensor] | None = None,
) -> Iterator[list[torch.Tensor | None]]:
    """Bring the whole of every quantity to every rank (or to one), bucket by bucket, in order.

    All ranks of the plan's groups must call it and take the same number of buckets.

    Args:
        plan: which quantities, and their buckets.
        locate: this rank's piece of item i: a tensor of the fragment's size, any strides, or None. What it raises is
            raised on every rank.
        dst: the global rank that receives, or None for all.
        out: where item i is to be written, contiguous, of the whole shape; a fresh tensor unless told.

    Yields:
        For each bucket, the whole tensors in the plan's order, None where another rank receives.

    Raises:
        FragmentError: a rank could not deliver its piece; the same on every rank.
    """
    flights: list[list[_Flight]] = []
    started = 0

    def start(locate: Locate) -> None:
        nonlocal started
        flights.append([_Flight.start(wire, locate, dst) for wire in plan.wires[started]])
        started += 1

    try:
        for bucket, items in enumerate(plan.buckets):
            while started < min(bucket + 2, len(plan.buckets)):
                start(locate)
            landing = flights.pop(0)
            shared = True  # whether the other ranks of the group learn of a failure with this bucket
            try:
                for flight in landing:
                    flight.land()
                shared = False
                whole: dict[int, torch.Tensor] = {}
                if dst is None or dist.get_rank() == dst:
                    for item in items:
                        whole[item] = _room(plan.places[item], locate, item, out)
                    for flight in landing:
                        flight.deliver(whole)
            except Exception as error:
                for flight in landing:
                    flight.wait()
                # Ranks that learn of it with a later bucket only must not wait for that in vain.
                while started < len(plan.buckets) and (plan.groups > 1 or not shared):
                    start(partial(_raise, error))
                raise
            del landing
            yield [whole.get(item) for item in items]
            del whole
    finally:
        for flight in (f for left in flights for f in left):
            flight.wait()


def _raise(error: Exception, _item: int) -> torch.Tensor | None:
    raise error


def _room(place: Place, locate: Locate, item: int, out: Callable[[int], torch.Tensor] | None) -> torch.Tensor:
    """Room for an item, filled already where this rank holds all of it."""
    target = torch.empty(place.shape, dtype=place.dtype, device=place.device) if out is None else out(item)
    if place.alone:
        piece = locate(item)
        if piece is None or piece.numel() != target.numel():
            held = 0 if piece is None else piece.numel()
            raise FragmentError(f"item {item}: {held} elements are here where the whole has {target.numel()}")
        target.copy_(piece.detach().view(place.shape))
    return target


def agree(
    error: Exception | None,
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
    sums: Sequence[int] = (),
    name: Callable[[int], str] = str,
) -> None:
    """Raise on every rank of the groups if any rank has an error; one small collective for each group.

    All ranks of the groups must call it.

    Args:
        error: what is wrong here, or None.
        groups: whose ranks must all be right; without any, this rank alone.
        device: the parameters' device.
        sums: numbers that should be the same on every rank.
        name: what the i-th of them is about.

    Raises:
        FragmentError: the error of the lowest failing rank.
        RankMismatchError: the sums are not the same.
    """
    mine = _status.encode_sums(sums) if error is None else _status.encode(error)
    seen = mine.view(1, -1)
    mismatch: RankMismatchError | None = None
    for _ in range(min(len(groups), 2)):  # the second round carries what one group knows to the ranks of another
        for group in groups:
            wired = mine.to(wire_device(group, device))
            statuses = torch.empty(group.size(), _status.STATUS_BYTES, dtype=torch.uint8, device=wired.device)
            _collectives.all_gather(statuses.view(-1), wired, group=group)
            seen = statuses.cpu() if len(groups) == 1 else torch.cat([seen, statuses.cpu()])
        failing = seen[seen[:, 0] != 0]
        if len(failing):
            mine = failing[0]
        elif different := _status.differing(mine, seen, len(sums)):
            names = ", ".join(name(i) for i in different[:3] if i < len(sums)) or "some parameters"
            mismatch = RankMismatchError(f"the ranks gave different values for {names}: pass the same on every rank")
            mine = _status.encode(mismatch)
    if mismatch is not None:
        raise mismatch
    _status.check(seen, cause=error)
