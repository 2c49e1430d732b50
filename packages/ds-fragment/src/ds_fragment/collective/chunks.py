"""The chunks of all ranks, side by side where they arrive, and how whole items are made of them.

A chunk is what one rank has packed for the others: see [Note: wire]. The status of the rank (see `_status`) stands at
its head where all chunks are about as long; what follows is cut into sections (see `_sections`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from ds_fragment import kernels
from ds_fragment.collective import status
from ds_fragment.collective.sections import COMMON, Room, Section
from ds_fragment.sharding import Out, Sharding, box, room_for

_LITTLE = 1 << 20  # bytes received by which latency counts and padding does not
_LITTLE_GPU = 8 << 20
_CHUNK_ALIGN = 128  # bytes
_SECTION_ALIGN = 16  # bytes; a multiple of every dtype's size
_ROOM_ALIGN = 16  # bytes between tensors that share a storage, the widest load of a GPU


@dataclass(slots=True)
class Unpacking:
    """How whole items are made of chunks, which takes no memory where those are on the items' device.

    Attributes:
        moves: what moves all of it, on the device's current stream.
        single: by item, tensors of their own.
        shared: storages in which items stand together, and where.
    """

    moves: list[Callable[..., object]] = field(default_factory=list)
    single: dict[int, torch.Tensor] = field(default_factory=dict)
    shared: list[tuple[Room, torch.Tensor]] = field(default_factory=list)

    def move(self) -> None:
        """Set the moves off."""
        for move in self.moves:
            move()

    def wholes(self) -> dict[int, torch.Tensor]:
        """By item, its whole; to make many takes its time, which is best done while others are on their way."""
        while self.shared:
            room, storage = self.shared.pop()
            self.single.update(zip(room.items, room.views(storage), strict=True))
        return self.single


class Chunks:
    """Where the sections of a wire stand in every rank's chunk; sets where they begin.

    Args:
        sections: of the packed items; each sent by some rank of the ``size``.
        places: of all items.
        size: ranks.
        home: the items' device.
        device: where the chunks travel.

    Attributes:
        head: bytes of each chunk before the sections, for the status; 0 where chunks differ in length.
        gathered: whether all chunks are as long, with a status each.
        lengths: of the chunks, in bytes.
        begins: of the chunks in the landing, in bytes, and its end.
        shares: whether fresh tensors of a bucket share a storage.
    """

    def __init__(
        self,
        sections: list[Section],
        shardings: Sequence[Sharding],
        size: int,
        home: torch.device,
        device: torch.device,
    ) -> None:
        self.sections, self.shardings, self.size, self.home, self.device = sections, shardings, size, home, device
        bodies = [sum(_aligned(section.nbytes(rank)) for section in sections) for rank in range(size)]
        longest = max(bodies)
        padded = size * longest
        little = _LITTLE if device.type == "cpu" else _LITTLE_GPU
        self.gathered = 0 < padded <= little or 0 < 4 * padded <= 5 * sum(bodies)
        self.head = status.STATUS_BYTES if self.gathered else 0
        lengths = [self.head + (longest if self.gathered else body) for body in bodies]
        self.lengths = [_aligned(length, _CHUNK_ALIGN) for length in lengths]
        self.begins = list(accumulate(self.lengths, initial=0))
        for rank in range(size):
            position = self.head
            for section in sections:
                section.begins.append(position)
                position += _aligned(section.nbytes(rank))
        self.shares = home.type == "cuda"
        self._rooms: dict[int, Room] = {}  # by section, as those below
        self._single: dict[int, list[tuple[int, Room]]] = {}  # with the rank

    def of(self, landing: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's chunk in the landing."""
        return landing.narrow(0, self.begins[rank], self.lengths[rank])

    def statuses(self, landing: torch.Tensor) -> torch.Tensor:
        """All ranks' statuses, (ranks, STATUS_BYTES); the chunks are `gathered`."""
        return landing.view(self.size, -1)[:, : self.head]

    def unpack(self, landing: torch.Tensor, out: Out | None) -> Unpacking:
        """How whole items are made of the chunks.

        Fresh tensors of one bucket share a storage on a GPU, where making one of each costs more than moving it.

        Args:
            landing: the chunks.
            out: where item i is to be written; a fresh tensor unless told.
        """
        if out is None and self.device == self.home and len(self.sections) == 1 and self.sections[0].alone:
            return self._unpack_only(landing)
        found = Unpacking()
        if self.device != self.home:
            landing = landing.to(self.home)
        shares = out is None and self.shares
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, section in enumerate(self.sections):
            if shares and section.cut == "single":
                found.shared += self._landed_whole(number, landing)
            else:
                if shares:
                    room = self._room(number)
                    rooms = room.views(room.fresh(self.home))
                else:
                    rooms = [room_for(self.shardings[item], item, out) for item in section.items]
                found.single.update(zip(section.items, rooms, strict=True))
                if section.cut == "even" and self.gathered and section.dtype in COMMON:
                    found.moves.append(partial(self._unpack_rows, section, landing, rooms))
                else:
                    pairs += self._pairs(section, landing, found.single)
        if pairs:
            found.moves.append(partial(kernels.copy, [dst for dst, _ in pairs], [src for _, src in pairs]))
        return found

    def _unpack_only(self, landing: torch.Tensor) -> Unpacking:
        """The only item, which one rank sends whole: no view of the landing, which may be far larger."""
        (section,) = self.sections
        (item,) = section.items
        holder = next(rank for rank, (sent,) in enumerate(section.sent) if sent)
        landed = section.of(self.of(landing, holder), holder)
        whole = torch.empty(self.shardings[item].shape, dtype=landed.dtype, device=landed.device)
        return Unpacking([lambda: whole.view(-1).copy_(landed)], {item: whole})

    def _pairs(
        self, section: Section, landing: torch.Tensor, wholes: dict[int, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Piece by piece, where it goes and where it has landed."""
        for rank in range(self.size):
            for item, part in section.parts(self.of(landing, rank), rank):
                layout = self.shardings[item].layout
                fragment = layout.fragments[rank]
                assert fragment is not None
                target = box(wholes[item], layout.shape, fragment)
                yield target, part if target.dim() == 1 else part.view(target.shape)

    def _landed_whole(self, number: int, landing: torch.Tensor) -> Iterator[tuple[Room, torch.Tensor]]:
        """Where the items of a section that one rank each sends whole have landed."""
        section = self.sections[number]
        if number not in self._single:
            rooms = []
            for rank, sent in enumerate(section.sent):
                items = [item for item, numel in zip(section.items, sent, strict=True) if numel]
                if items:
                    rooms.append((rank, Room(items, self.shardings)))
            self._single[number] = rooms
        return ((room, section.of(self.of(landing, rank), rank)) for rank, room in self._single[number])

    def _unpack_rows(self, section: Section, landing: torch.Tensor, wholes: list[torch.Tensor]) -> None:
        """Every rank's piece of every item at once, as columns of a table with a row for each rank."""
        rows = landing.view(self.size, -1).narrow(1, section.begins[0], section.nbytes(0)).view(section.dtype)
        targets = [whole.view(self.size, -1) for whole in wholes]
        with torch.no_grad():
            torch.split_with_sizes_copy(rows, section.sent[0], dim=1, out=targets)

    def _room(self, number: int) -> Room:
        """Where the items of a section stand in one storage."""
        if number not in self._rooms:
            self._rooms[number] = Room(self.sections[number].items, self.shardings, _ROOM_ALIGN)
        return self._rooms[number]


def _aligned(nbytes: int, align: int = _SECTION_ALIGN) -> int:
    return -(-nbytes // align) * align
