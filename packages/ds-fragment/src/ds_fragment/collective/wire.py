"""What travels between the ranks of one group for one bucket of parameters, and how.

[Note: wire] Large parameters whose fragments are stretches of the flattened whole travel *in place*, out of the piece
and into the whole. All others are *packed*: a rank's pieces stand one after the other in one buffer of bytes, its
*chunk*, and each rank computes every rank's offsets from the layouts alone. The chunks of all ranks lie side by side
where they arrive, in the *landing*. Bytes travel as they are: -0.0, NaN payloads and subnormals arrive bit for bit.
Where chunks carry no status, an error is marked in the data itself: see [Note: mark].

[Note: pairs] Between two ranks NCCL takes a tenth less time, and less for each launch, if each rank broadcasts its part
than if both gather: an all-gather also copies a rank's own part, between what it sends and what it receives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
import torch.distributed as dist

from ds_fragment import _collectives, kernels
from ds_fragment.collective import status
from ds_fragment.collective.chunks import Chunks
from ds_fragment.collective.sections import COMMON, CUTS, Cut, Section, cut_of, is_even, stretches
from ds_fragment.errors import FragmentError
from ds_fragment.sharding import Out, Sharding, room_for, wire_device

# Bytes of the whole from which a copy costs more than a collective of its own; on a GPU copies are cheap, and launches
# are not, least of all from a slow host.
_IN_PLACE = 256 << 10
_IN_PLACE_GPU = 32 << 20
# Bytes of each rank's part from which broadcasts take less time than an all-gather.
_BROADCAST = 256 << 10  # gloo copies what it gathers once more
_BROADCAST_PAIR = 8 << 20  # NCCL, between two ranks: see [Note: pairs]
_BROADCAST_ONE = 128 << 20  # likewise where there is nothing else: two broadcasts take the host longer than a gather

Pieces = Sequence["torch.Tensor | None"]
Locate = Callable[[Sequence[int]], Pieces]

_requires_grad = attrgetter("requires_grad")


class Wire:
    """Which parts of which items go which way; made once, used for every exchange of the same places.

    Args:
        group: the ranks.
        items: positions in ``places``.
        places: all of the same group and device.

    Attributes:
        even: what all ranks gather in place at once.
        apart: what each holder broadcasts in place; by item, its stretches.
        in_place: both of them.
        pair: whether two ranks broadcast their chunks to each other; see [Note: pairs].
        marked: the item in which an error travels, where it travels in the data.
        items: whose pieces are sent here, in the order in which `load` asks for them.
    """

    def __init__(self, group: dist.ProcessGroup, items: Sequence[int], shardings: Sequence[Sharding]) -> None:
        self.group, self.shardings, self.size, self.rank = group, shardings, group.size(), group.rank()
        self.home = shardings[items[0]].device
        self.device = wire_device(group, self.home)
        self.global_ranks = dist.get_process_group_ranks(group)
        _collectives.leave_gently(self.device.type)
        on_cpu, coalesces = self.device.type == "cpu", _collectives.coalesces(group, self.device)
        self.pair = coalesces and self.size == 2
        in_place = self._moving_in_place(items)
        equal = {item for item, cuts in in_place.items() if is_even(cuts, self.size)}  # all ranks send as much
        even = equal
        if on_cpu or self.pair:
            apart = _BROADCAST if on_cpu else _BROADCAST_PAIR if len(items) > 1 else _BROADCAST_ONE
            even = {item for item in equal if in_place[item][0][2] < apart}
        self.even = sorted((item for item in in_place if item in even), key=lambda item: shardings[item].shape)
        self.apart = {item: cuts for item, cuts in in_place.items() if item not in even}
        self.in_place = {item: in_place[item] for item in (*self.even, *self.apart)}
        dtypes = {shardings[item].dtype for item in self.in_place}
        self.as_bytes = not (dtypes <= COMMON and coalesces)
        sections = self.sections = self._sections([item for item in items if item not in in_place])
        self.chunks = Chunks(sections, shardings, self.size, self.home, self.device)
        self.only = sections[0] if len(sections) == 1 and len(sections[0].items) == 1 and not in_place else None
        self.items = [*self.in_place, *(item for section in sections for item in section.items)]
        self.sent = [shardings[item].layout.sent(self.rank) for item in self.items]
        least = self.size * len(status.MARK)
        roomy = [item for item in self.in_place if item in equal and shardings[item].nbytes >= least]
        self.marked = roomy[0] if roomy and not self.chunks.gathered else None

    def _moving_in_place(self, items: Sequence[int]) -> dict[int, list[tuple[int, int, int]]]:
        """What travels in place, and its stretches."""
        found = {item: cuts for item in items if (cuts := stretches_of(self.shardings[item]))}
        if len(items) == 1 and self.device == self.home:  # then a copy or a launch less counts more than anything
            only = self.shardings[items[0]]
            whole = stretches(only.layout, only.dtype.itemsize)
            if whole and is_even(whole, self.size) and whole[0][2] >= len(status.MARK):
                found[items[0]] = whole
        return found

    def _sections(self, items: list[int]) -> list[Section]:
        found: dict[tuple[Cut, torch.dtype], list[int]] = {}
        for item in items:
            found.setdefault((cut_of(self.shardings[item].layout), self.shardings[item].dtype), []).append(item)
        sections = []
        for (cut, dtype), chosen in sorted(found.items(), key=lambda entry: CUTS.index(entry[0][0])):
            chosen.sort(key=lambda item: self.shardings[item].shape)
            sent = [[self.shardings[item].layout.sent(rank) for item in chosen] for rank in range(self.size)]
            sections.append(Section(cut, dtype, chosen, sent, []))
        return sections

    def rooms(self, out: Out | None) -> dict[int, torch.Tensor]:
        """Where each item that travels in place is received."""
        return {item: room_for(self.shardings[item], item, out) for item in self.in_place}

    def load(self, locate: Locate, wholes: dict[int, torch.Tensor], chunk: torch.Tensor) -> dict[int, torch.Tensor]:
        """Fill this rank's chunk, with a status that is all zeros, and return the pieces that travel in place, by item.

        Those are ready for it: contiguous, of the place's dtype, on the wire's device. What was not is copied to where
        it is received, if that is here, and sent from there. The rank is asked about all items, as it may know of an
        error where it sends nothing.
        """
        found = locate(self.items)
        self._check(found)
        triples = zip(self.items, found, self.sent, strict=True)
        pieces = {item: piece for item, piece, sent in triples if sent and piece is not None}
        if any(map(_requires_grad, pieces.values())):
            pieces = {item: piece.detach() for item, piece in pieces.items()}
        if self.in_place:
            self._set_off(pieces, wholes)
        self._pack(pieces, chunk)
        return pieces

    def ready(self, locate: Locate, whole: torch.Tensor) -> torch.Tensor:
        """The piece of the only item, ready to travel in place; see `load`."""
        found = locate(self.items)
        self._check(found)
        assert found[0] is not None  # every rank sends a part of it
        piece = found[0].detach() if found[0].requires_grad else found[0]  # which takes ten times as long as to ask
        if self._travels(piece, whole.dtype):
            return piece
        return self._part(whole, self.items[0]).copy_(piece.reshape(-1))

    def _check(self, found: Pieces) -> None:
        """Raise where a piece that is sent is of another size than its place says."""
        held = numels(found)
        expecting = self.sent[: len(held)]
        if held != expecting:
            for item, numel, expected in zip(self.items, held, expecting, strict=False):
                if expected not in (numel, 0):
                    raise FragmentError(f"item {item}: {numel} elements are here where the layout says {expected}")

    def _set_off(self, pieces: dict[int, torch.Tensor], wholes: dict[int, torch.Tensor]) -> None:
        """Make what travels in place ready for it."""
        moving = [item for item in self.in_place if item in pieces]
        late = [item for item in moving if not self._travels(pieces[item], self.shardings[item].dtype)]
        if not wholes:
            for item in late:
                pieces[item] = pieces[item].to(self.device, self.shardings[item].dtype).contiguous()
            return
        parts = [self._part(wholes[item], item) for item in late]
        kernels.copy(parts, [pieces[item] for item in late])
        pieces.update(zip(late, parts, strict=True))

    def _travels(self, piece: torch.Tensor, dtype: torch.dtype) -> bool:
        return piece.dtype == dtype and piece.device == self.device and piece.is_contiguous()

    def _part(self, whole: torch.Tensor, item: int) -> torch.Tensor:
        """The part of a whole that this rank sends in place, 1-D."""
        size = whole.dtype.itemsize
        start, nbytes = next((start, nbytes) for rank, start, nbytes in self.in_place[item] if rank == self.rank)
        return whole.view(-1).narrow(0, start // size, nbytes // size)

    def _pack(self, pieces: dict[int, torch.Tensor], chunk: torch.Tensor) -> None:
        """Fill the chunk by torch."""
        packed = [pieces[item] for section in self.sections for item in section.items if item in pieces]
        head = self.chunks.head
        if head:
            chunk[:head].zero_()
        if not packed:
            return
        if self.only is not None:
            self.only.of(chunk, self.rank).copy_(packed[0].reshape(-1))
            return
        room = chunk if self.home == self.device else torch.empty_like(chunk, device=self.home)
        with torch.no_grad():
            for section in self.sections:
                mine = [pieces[item] for item in section.items if item in pieces]
                if not mine:
                    continue
                alike = {(piece.dtype, piece.device) for piece in mine} == {(section.dtype, self.home)}
                if alike and section.dtype in COMMON:
                    torch.cat([p if p.dim() == 1 else p.reshape(-1) for p in mine], out=section.of(room, self.rank))
                else:
                    kernels.copy([part for _, part in section.parts(room, self.rank)], mine)
            if room is not chunk:
                chunk[head:].copy_(room[head:])


def numels(pieces: Pieces) -> list[int]:
    """The elements of each; 0 for None."""
    try:
        return list(map(torch.Tensor.numel, pieces))  # type: ignore[arg-type]
    except TypeError:  # one of them is None
        return [0 if piece is None else piece.numel() for piece in pieces]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes: what every backend moves, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def stretches_of(sharding: Sharding) -> list[tuple[int, int, int]]:
    """What travels in place of an item, as `stretches` says; nothing where all of it is packed."""
    if sharding.group is None or sharding.device != wire_device(sharding.group, sharding.device):
        return []
    large = sharding.nbytes >= (_IN_PLACE if sharding.device.type == "cpu" else _IN_PLACE_GPU)
    return (stretches(sharding.layout, sharding.dtype.itemsize) or []) if large else []
