"""What travels between the ranks of one group for one bucket of parameters, and where in the ranks' chunks it stands.

[Note: wire] Large parameters whose fragments are stretches of the flattened whole travel *in place*, out of the piece
and into the whole. All others are *packed*: a rank's pieces stand one after the other in one buffer of bytes, its
*chunk*, and each rank computes every rank's offsets from the layouts alone. The chunks of all ranks lie side by side
where they arrive, in the *landing*. Bytes travel as they are: -0.0, NaN payloads and subnormals arrive bit for bit.

The status of each rank (see `_status`) stands at the head of its chunk where all chunks are gathered. What follows it
is cut into sections (see `_sections`). Without such chunks an error is marked in the data itself: see [Note: mark].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import attrgetter

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _kernels, _status
from ds_fragment._place import Place, box, wire_device
from ds_fragment._sections import CUTS, Cut, Room, Section, cut_of, is_even, stretches
from ds_fragment.errors import FragmentError

# Bytes of the whole from which a copy costs more than a collective of its own; on a GPU copies are cheap, launches not.
_IN_PLACE = 256 << 10
_IN_PLACE_GPU = 8 << 20
_IN_PLACE_TOGETHER = 1 << 20  # of each rank's part, where all-gathers on many tensors are one launch
_ALL_GATHER = 256 << 10  # of each rank's part, at most, on a CPU: gloo copies what it gathers once more
_ASIDE = 4 << 20  # bytes from which it is worth the host's time to take from NCCL what needs no NCCL
_LITTLE = 1 << 20  # bytes received by which latency counts and padding does not
_LITTLE_GPU = 8 << 20
_SECTION_ALIGN = 16  # bytes; a multiple of every dtype's size
_ROOM_ALIGN = 16  # bytes between tensors that share a storage, the widest load of a GPU

Pieces = Sequence["torch.Tensor | None"]
Locate = Callable[[Sequence[int]], Pieces]
Out = Callable[[int], torch.Tensor]

# What NCCL moves as it is, and torch.cat takes.
_COMMON = {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8}
_dtype, _requires_grad = attrgetter("dtype"), attrgetter("requires_grad")


class Wire:
    """Which parts of which items go which way; made once, used for every exchange of the same places.

    Args:
        group: the ranks.
        items: positions in ``places``.
        places: all of the same group and device.
        to_one: whether one rank receives.
    """

    def __init__(
        self, group: dist.ProcessGroup, items: Sequence[int], places: Sequence[Place], *, to_one: bool = False
    ) -> None:
        self.group, self.places, self.size, self.rank = group, places, group.size(), group.rank()
        self.home = places[items[0]].device
        self.device = wire_device(group, self.home)
        self.shares = self.home.type == "cuda"  # whether fresh tensors of a bucket share a storage
        self.global_ranks = dist.get_process_group_ranks(group)
        _collectives.leave_gently(self.device.type)
        on_cpu, coalesces = self.device.type == "cpu", _collectives.coalesces(group, self.device)
        in_place = self._moving_in_place(items, to_one)
        equal = {item for item, cuts in in_place.items() if is_even(cuts, self.size)}  # all ranks send as much
        even = {item for item in equal if not on_cpu or in_place[item][0][2] <= _ALL_GATHER}
        # What is gathered by all ranks at once, and the stretches of what each holder broadcasts.
        self.even = sorted((item for item in in_place if item in even), key=lambda item: places[item].shape)
        self.apart = {item: cuts for item, cuts in in_place.items() if item not in even}
        self.in_place = {item: in_place[item] for item in (*self.even, *self.apart)}
        dtypes = {places[item].dtype for item in self.in_place}
        self.as_bytes = not (dtypes <= _COMMON and coalesces)
        self._only_dtype = dtypes.pop() if len(dtypes) == 1 else None  # of all that travels in place, if it is one
        self._shared = self._shared_rooms()
        # Positions in `even` of what a rank copies into its own place itself.
        self.aside = [i for i, item in enumerate(self.even) if coalesces and places[item].nbytes >= _ASIDE]
        self.sections = self._sections([item for item in items if item not in in_place])
        sections = self.sections
        self.only = sections[0] if len(sections) == 1 and len(sections[0].items) == 1 and not in_place else None
        # Pieces that are sent here, in the order of `pieces`.
        self.items = [*self.in_place, *(item for section in self.sections for item in section.items)]
        self.sent = [places[item].layout.sent(self.rank) for item in self.items]

        bodies = [sum(_aligned(section.nbytes(rank)) for section in self.sections) for rank in range(self.size)]
        padded = self.size * max(bodies)
        little = _LITTLE if on_cpu else _LITTLE_GPU
        self.gathered = 0 < padded <= little or 0 < 4 * padded <= 5 * sum(bodies)
        least = self.size * len(_status.MARK)
        roomy = [item for item in self.in_place if item in equal and places[item].nbytes >= least]
        self.marked = roomy[0] if roomy and not self.gathered else None  # the item in which an error travels
        self.head = _status.STATUS_BYTES if self.gathered else 0
        longest = max(bodies)
        lengths = [self.head + (longest if self.gathered else body) for body in bodies]
        self.lengths = [_aligned(length, _kernels.ALIGN) for length in lengths]
        self.begins = list(accumulate(self.lengths, initial=0))  # of each rank's chunk in the landing, and the end
        for rank in range(self.size):
            position = self.head
            for section in self.sections:
                section.begins.append(position)
                position += _aligned(section.nbytes(rank))
        self._packer: _kernels.Tensors | None = None
        self._unpacker: _kernels.Tensors | None = None
        self._rooms: dict[int, Room] = {}  # by section, as those below
        self._single: dict[int, list[tuple[int, Room]]] = {}  # with the rank
        self._tables: dict[int, _kernels.Stretches] = {}

    def _moving_in_place(self, items: Sequence[int], to_one: bool) -> dict[int, list[tuple[int, int, int]]]:
        """What travels in place, and its stretches."""
        found = {item: cuts for item in items if (cuts := stretches_of(self.places[item], to_one=to_one))}
        if len(items) == 1 and self.device == self.home:  # then a copy or a launch less counts more than anything
            only = self.places[items[0]]
            whole = stretches(only.layout, only.dtype.itemsize)
            if whole and is_even(whole, self.size) and whole[0][2] >= len(_status.MARK):
                found[items[0]] = whole
        return found

    def _shared_rooms(self) -> list[Room]:
        """For what is cut evenly and small, by dtype."""
        found: dict[torch.dtype, list[int]] = {}
        for item in self.even:
            if self.shares and self.places[item].nbytes < _IN_PLACE_GPU:
                found.setdefault(self.places[item].dtype, []).append(item)
        return [Room(items, self.places, _ROOM_ALIGN) for items in found.values() if len(items) > 1]

    def _sections(self, items: list[int]) -> list[Section]:
        found: dict[tuple[Cut, torch.dtype], list[int]] = {}
        for item in items:
            found.setdefault((cut_of(self.places[item].layout), self.places[item].dtype), []).append(item)
        sections = []
        for (cut, dtype), chosen in sorted(found.items(), key=lambda entry: CUTS.index(entry[0][0])):
            chosen.sort(key=lambda item: self.places[item].shape)
            sent = [[self.places[item].layout.sent(rank) for item in chosen] for rank in range(self.size)]
            sections.append(Section(cut, dtype, chosen, sent, []))
        return sections

    def rooms(self, out: Out | None) -> dict[int, torch.Tensor]:
        """Where each item that travels in place is received."""
        found: dict[int, torch.Tensor] = {}
        if out is None:
            for room in self._shared:
                found.update(zip(room.items, room.fresh(self.home)[1], strict=True))
        found.update((item, room_for(self.places[item], item, out)) for item in self.in_place if item not in found)
        return found

    def chunk(self, landing: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's part of the landing."""
        return landing.narrow(0, self.begins[rank], self.lengths[rank])

    def load(self, locate: Locate, wholes: dict[int, torch.Tensor], chunk: torch.Tensor) -> dict[int, torch.Tensor]:
        """Fill this rank's chunk, with a status that is all zeros, and return the pieces that travel in place, by item.

        Those are ready for it: contiguous, of the place's dtype, on the wire's device. What was not is copied to where
        it is received, if that is here, and sent from there. The rank is asked about all items, as it may know of an
        error where it sends nothing.
        """
        found = locate(self.items)
        lead = len(self.in_place)
        packed = self._packer is not None and _kernels.usable(self.device) and self._packer.again(chunk, found[lead:])
        if packed:
            found = found[:lead]
        self._check(found)
        triples = zip(self.items, found, self.sent, strict=not packed)
        pieces = {item: piece for item, piece, sent in triples if sent and piece is not None}
        if any(map(_requires_grad, pieces.values())):
            pieces = {item: piece.detach() for item, piece in pieces.items()}
        if self.in_place:
            self._set_off(pieces, wholes)
        if not packed:
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
        tensors = [pieces[item] for item in moving]
        if set(map(_dtype, tensors)) <= {self._only_dtype} and _kernels.all_plain(tensors, self.device):
            return  # as a rule on a GPU, and told fast
        late = [item for item in moving if not self._travels(pieces[item], self.places[item].dtype)]
        if not wholes:
            for item in late:
                pieces[item] = pieces[item].to(self.device, self.places[item].dtype).contiguous()
            return
        parts = [self._part(wholes[item], item) for item in late]
        _kernels.copy(parts, [pieces[item] for item in late])
        pieces.update(zip(late, parts, strict=True))

    def _travels(self, piece: torch.Tensor, dtype: torch.dtype) -> bool:
        return piece.dtype == dtype and piece.device == self.device and piece.is_contiguous()

    def _part(self, whole: torch.Tensor, item: int) -> torch.Tensor:
        """The part of a whole that this rank sends in place, 1-D."""
        size = whole.dtype.itemsize
        start, nbytes = next((start, nbytes) for rank, start, nbytes in self.in_place[item] if rank == self.rank)
        return whole.view(-1).narrow(0, start // size, nbytes // size)

    def _pack(self, pieces: dict[int, torch.Tensor], chunk: torch.Tensor) -> None:
        packed = [pieces[item] for section in self.sections for item in section.items if item in pieces]
        if packed and self.only is None and _kernels.usable(self.device) and self._pack_by_kernel(chunk, packed):
            return
        if self.head:
            chunk[: self.head].zero_()
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
                if alike and section.dtype in _COMMON:
                    torch.cat([p if p.dim() == 1 else p.reshape(-1) for p in mine], out=section.of(room, self.rank))
                else:
                    _kernels.copy([part for _, part in section.parts(room, self.rank)], mine)
            if room is not chunk:
                chunk[self.head :].copy_(room[self.head :])

    def _pack_by_kernel(self, chunk: torch.Tensor, packed: list[torch.Tensor]) -> bool:
        if self._packer is None:
            offsets, dtypes = [], []
            for section in self.sections:
                for offset, numel in zip(section.offsets(self.rank), section.sent[self.rank], strict=True):
                    if numel:
                        offsets.append(offset)
                        dtypes.append(section.dtype)
            status = torch.zeros(self.head, dtype=torch.uint8, device=self.device) if self.head else None
            self._packer = _kernels.Tensors(offsets, dtypes, head=status)
        return self._packer.pack(chunk, packed)

    def unpack(self, landing: torch.Tensor, out: Out | None) -> dict[int, torch.Tensor]:
        """The whole of every packed item, from the chunks of all ranks.

        Fresh tensors of one bucket share a storage on a GPU, where making one of each costs more than moving it.
        """
        only = self.only
        if only is not None and only.cut == "single" and out is None and self.device == self.home:
            (item,) = only.items
            holder = next(rank for rank, (sent,) in enumerate(only.sent) if sent)
            whole = only.of(self.chunk(landing, holder), holder)
            return {item: whole.view(self.places[item].shape).clone()}  # the landing may be far larger
        wholes: dict[int, torch.Tensor] = {}
        dsts: list[torch.Tensor] = []
        srcs: list[torch.Tensor] = []
        if self.device != self.home:
            landing = landing.to(self.home)
        shares = out is None and self.shares
        kernels = _kernels.usable(self.home)
        if kernels and out is not None:
            wholes = self._unpack_into(out, landing)
        for number, section in enumerate(self.sections):
            if section.items[0] in wholes:
                continue
            if section.cut == "single" and shares:
                wholes.update(self._views(number, landing))
                continue
            if shares:
                room, rooms = self._room(number).fresh(self.home)
            else:
                rooms = [room_for(self.places[item], item, out) for item in section.items]
            wholes.update(zip(section.items, rooms, strict=True))
            if kernels and shares and section.cut in ("even", "runs"):
                self._table(number).move(room, landing)
            elif section.cut == "even" and self.gathered and section.dtype in _COMMON:
                self._unpack_rows(section, landing, rooms)
            else:
                for rank in range(self.size):
                    for item, part in section.parts(self.chunk(landing, rank), rank):
                        layout = self.places[item].layout
                        fragment = layout.fragments[rank]
                        assert fragment is not None
                        target = box(wholes[item], layout.shape, fragment)
                        dsts.append(target)
                        srcs.append(part if target.dim() == 1 else part.view(target.shape))
        if dsts:
            _kernels.copy(dsts, srcs)
        return wholes

    def _unpack_into(self, out: Out, landing: torch.Tensor) -> dict[int, torch.Tensor]:
        """By kernel: every item whose pieces are stretches of it, into the caller's tensors; or nothing."""
        sections = [section for section in self.sections if section.cut != "boxes"]
        items = [item for section in sections for item in section.items]
        targets = list(map(out, items))
        if self._unpacker is None:
            offsets, dtypes, pieces, numels = [], [], [], []
            first = 0  # of the section's items among all
            for section in sections:
                for position, start, numel, byte in self._landed(section):
                    offsets.append(byte)
                    dtypes.append(section.dtype)
                    pieces.append((first + position, start))
                    numels.append(numel)
                first += len(section.items)
            self._unpacker = _kernels.Tensors(offsets, dtypes, pieces, numels)
        return dict(zip(items, targets, strict=True)) if self._unpacker.unpack(landing, targets) else {}

    def _landed(self, section: Section) -> Iterator[tuple[int, int, int, int]]:
        """Every stretch of a section's items: whose, by position; where in the whole; elements; byte of the landing."""
        offsets = [section.offsets(rank) for rank in range(self.size)]
        for position, item in enumerate(section.items):
            cuts = [(rank, 0, section.sent[rank][position]) for rank in range(self.size)]
            if section.cut != "single":
                cuts = stretches(self.places[item].layout, 1) or []
            for rank, start, numel in cuts:
                yield position, start, numel, self.begins[rank] + offsets[rank][position]

    def _rows(self, section: Section, landing: torch.Tensor) -> torch.Tensor:
        """A section of every rank's chunk, (ranks, elements), where all begin at the same byte."""
        rows = landing.view(self.size, -1).narrow(1, section.begins[0], section.nbytes(0))
        return rows.view(section.dtype)

    def _views(self, number: int, landing: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The items of a section that one rank each sends whole, where they have landed."""
        section = self.sections[number]
        if number not in self._single:
            rooms = []
            for rank, sent in enumerate(section.sent):
                items = [item for item, numel in zip(section.items, sent, strict=True) if numel]
                if items:
                    rooms.append((rank, Room(items, self.places)))
            self._single[number] = rooms
        for rank, room in self._single[number]:
            views = room.views(section.of(self.chunk(landing, rank), rank))
            yield from zip(room.items, views, strict=True)

    def _unpack_rows(self, section: Section, landing: torch.Tensor, wholes: list[torch.Tensor]) -> None:
        """Every rank's piece of every item at once, as columns of a table with a row for each rank."""
        targets = [whole.view(self.size, -1) for whole in wholes]
        with torch.no_grad():
            torch.split_with_sizes_copy(self._rows(section, landing), section.sent[0], dim=1, out=targets)

    def _room(self, number: int) -> Room:
        """Where the items of a section stand in one storage."""
        if number not in self._rooms:
            self._rooms[number] = Room(self.sections[number].items, self.places, _ROOM_ALIGN)
        return self._rooms[number]

    def _table(self, number: int) -> _kernels.Stretches:
        """From the landing into the section's shared room."""
        if number not in self._tables:
            section, room = self.sections[number], self._room(number)
            size = section.dtype.itemsize
            landed = list(self._landed(section))
            dsts = [size * (room.starts[position] + start) for position, start, _, _ in landed]
            srcs = [byte for _, _, _, byte in landed]
            nbytes = [size * numel for _, _, numel, _ in landed]
            self._tables[number] = _kernels.Stretches.within(dsts, srcs, nbytes, self.home)
        return self._tables[number]


def _aligned(nbytes: int, align: int = _SECTION_ALIGN) -> int:
    return -(-nbytes // align) * align


def numels(pieces: Pieces) -> list[int]:
    """The elements of each; 0 for None."""
    try:
        return list(map(torch.Tensor.numel, pieces))  # type: ignore[arg-type]
    except TypeError:  # one of them is None
        return [0 if piece is None else piece.numel() for piece in pieces]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes: what every backend moves, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def room_for(place: Place, item: int, out: Out | None) -> torch.Tensor:
    """Where the whole of an item goes."""
    return torch.empty(place.shape, dtype=place.dtype, device=place.device) if out is None else out(item)


def stretches_of(place: Place, *, to_one: bool) -> list[tuple[int, int, int]]:
    """What travels in place of an item, as `stretches` says; nothing where all of it is packed."""
    if place.group is None or place.device != wire_device(place.group, place.device):
        return []
    cuts = stretches(place.layout, place.dtype.itemsize)
    if not cuts:
        return []
    if place.nbytes >= (_IN_PLACE if place.device.type == "cpu" else _IN_PLACE_GPU):
        return cuts
    together = not to_one and is_even(cuts, len(place.layout.fragments)) and cuts[0][2] >= _IN_PLACE_TOGETHER
    return cuts if together and _collectives.coalesces(place.group, place.device) else []
