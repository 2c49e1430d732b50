"""One exchange over a wire, under way: which collectives carry it.

Chunks of about the same length go by one all-gather, others by a broadcast each, so that nobody receives padding in
the place of data. What travels in place goes by an all-gather where the stretches are equal and in rank order, else
by a broadcast from each rank that holds one; so does what is large on a CPU. Where one rank receives, it receives from
each holder.

[Note: aside] An all-gather also copies what a rank sends to that rank's own place. NCCL, which has few multiprocessors,
is faster where that is done already: large pieces are copied while it is busy with the bucket before, by a kernel that
takes little of the memory's time, on a stream of its own, so that the caller's work on earlier buckets does not wait.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _kernels, _status
from ds_fragment._wire import Locate, Out, Wire, as_bytes


@dataclass(slots=True)
class Flight:
    """What one rank sends and receives."""

    wire: Wire
    out: Out | None
    dst: int | None  # the global rank that receives; None for all
    later: bool = True  # whether to come back from collectives before they are done
    behind: bool = False  # whether another bucket is under way, which hides what is copied meanwhile
    error: Exception | None = None
    pieces: dict[int, torch.Tensor] = field(default_factory=dict)
    wholes: dict[int, torch.Tensor] = field(default_factory=dict)  # what travels in place, where it is received
    landing: torch.Tensor | None = None  # uint8, (wire.begins[-1],), where it is received
    statuses: torch.Tensor | None = None  # uint8, (ranks, STATUS_BYTES), on the wire's device
    works: list[dist.Work] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)  # what is being sent or received on the way
    stream: torch.cuda.Stream | None = None  # where pieces are copied aside, if any are

    @classmethod
    def at_once(cls, wire: Wire, whole: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        """The only item of a wire, which is marked if any rank has an error, received into its whole."""
        flight = cls(wire, None, None, later=False, wholes={wire.items[0]: whole})
        if wire.apart:
            flight.pieces = {wire.items[0]: piece}
            flight._broadcast(flight._apart())
            flight.wait()
        else:
            unknown = wire.as_bytes and whole.dtype != torch.float32  # which every backend moves
            pair = (as_bytes(whole), as_bytes(piece)) if unknown else (whole.view(-1), piece.view(-1))
            _collectives.all_gather(*pair, group=wire.group)
        flight._check()
        return whole

    @classmethod
    def start(
        cls,
        wire: Wire,
        locate: Locate,
        out: Out | None,
        dst: int | None,
        *,
        later: bool = True,
        behind: bool = False,
    ) -> Flight:
        """Send this rank's pieces, or its error in their place, and come back before they are there if ``later``."""
        flight = cls(wire, out, dst, later, behind)
        chunk = flight._room()
        try:
            flight.pieces = wire.load(locate, flight.wholes, chunk)
        except Exception as error:
            flight.error, flight.pieces = error, {}
            chunk.zero_()
        if dst is not None:
            flight._gather([], [])
            flight._send_to(dst, chunk)
        else:
            flight._spread(chunk)
        flight.pieces = {}
        return flight

    @property
    def _here(self) -> bool:
        return self.dst is None or self.wire.global_ranks[self.wire.rank] == self.dst

    def _room(self) -> torch.Tensor:
        """This rank's chunk, in the landing where there is one."""
        wire = self.wire
        if not self._here:
            return torch.empty(wire.lengths[wire.rank], dtype=torch.uint8, device=wire.device)
        self.landing = torch.empty(wire.begins[-1], dtype=torch.uint8, device=wire.device)
        self.wholes = wire.rooms(self.out)
        return wire.chunk(self.landing, wire.rank)

    def _spread(self, chunk: torch.Tensor) -> None:
        """Every item to all ranks."""
        wire, landing = self.wire, self.landing
        assert landing is not None
        outputs, inputs, parts = self._in_place() if wire.in_place else ([], [], [])
        if wire.gathered:
            if self.error is not None:
                chunk[: wire.head].copy_(_status.encode(self.error))
            self._all_gather([*outputs, landing], [*inputs, chunk])
            self.statuses = landing.view(wire.size, -1)[:, : wire.head]
        else:
            if wire.marked is None:
                self._gather(outputs, inputs)
            else:
                self._all_gather(outputs, inputs)
            parts += [(rank, wire.chunk(landing, rank)) for rank, length in enumerate(wire.lengths) if length]
        self._broadcast(parts)

    def _in_place(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[int, torch.Tensor]]]:
        """What travels in place: where it is gathered, what is sent for it, and what is broadcast."""
        outputs, inputs = self._even()
        return outputs, self._copy_aside(outputs, inputs), self._apart()

    def _even(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where what is cut evenly is received, and what of it is sent."""
        wire = self.wire
        outputs = [self.wholes[item] for item in wire.even]
        if self.error is None:
            inputs = [self.pieces[item] for item in wire.even]
        else:
            inputs = [torch.empty_like(whole.view(-1)[: whole.numel() // wire.size]) for whole in outputs]
            if wire.marked in wire.even:
                _status.mark(as_bytes(inputs[wire.even.index(wire.marked)]))
        if wire.as_bytes:
            return list(map(as_bytes, outputs)), list(map(as_bytes, inputs))
        return outputs, inputs

    def _apart(self) -> list[tuple[int, torch.Tensor]]:
        """What is broadcast in place, as (sender, what it sends)."""
        parts = []
        for item, stretches in self.wire.apart.items():
            whole, piece = as_bytes(self.wholes[item]), self.pieces.get(item)
            for rank, start, nbytes in stretches:
                part = whole.narrow(0, start, nbytes)
                if rank == self.wire.rank:
                    if piece is not None and piece.data_ptr() != part.data_ptr():
                        part.copy_(as_bytes(piece))
                    if self.error is not None and item == self.wire.marked:
                        part = torch.empty_like(part)  # the whole may be the caller's
                        _status.mark(part)
                parts.append((rank, part))
        return parts

    def _broadcast(self, parts: list[tuple[int, torch.Tensor]]) -> None:
        if parts:
            sources = [(self.wire.global_ranks[rank], part) for rank, part in parts]
            self.works.extend(_collectives.broadcast_many(sources, self.wire.group))

    def _gather(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """The statuses, and what else all ranks send as much of."""
        mine = torch.zeros(_status.STATUS_BYTES, dtype=torch.uint8, device=self.wire.device)
        if self.error is not None:
            mine.copy_(_status.encode(self.error))
        self.statuses = torch.empty(self.wire.size, len(mine), dtype=torch.uint8, device=mine.device)
        self._all_gather([*outputs, self.statuses.view(-1)], [*inputs, mine])

    def _all_gather(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        if outputs:
            self.held.extend(inputs)
            with self._after_copies():
                self.works.extend(_collectives.all_gather_many(outputs, inputs, self.wire.group, later=self.later))

    def _copy_aside(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What to send if the large inputs are copied to their place in the outputs first; see [Note: aside]."""
        wire = self.wire
        if not (wire.aside and self.behind and self.error is None and _kernels.usable(wire.device)):
            return inputs
        parts = {i: outputs[i].view(wire.size, -1)[wire.rank] for i in wire.aside}
        parts = {i: part for i, part in parts.items() if part.data_ptr() != inputs[i].data_ptr()}
        if not parts:
            return inputs
        self.held.extend(inputs)
        self.stream = _stream_aside(wire.device)
        with self._after_copies():
            _kernels.copy(list(parts.values()), [inputs[i] for i in parts], aside=True)
        return [parts.get(i, given) for i, given in enumerate(inputs)]

    def _after_copies(self) -> contextlib.AbstractContextManager[object]:
        """What is set off in it waits for what was set off before, and for the copies aside."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.wire.device))
        return torch.cuda.stream(self.stream)

    def _send_to(self, dst: int, chunk: torch.Tensor) -> None:
        """Every item to one rank, from each that holds a part of it."""
        wire = self.wire
        if dst not in wire.global_ranks:
            return  # its ranks have what they hold of it; the receiver is none of them
        root = wire.global_ranks.index(dst)
        parts: list[tuple[int, torch.Tensor]] = []  # (holder, where it comes from or goes to), of those seen here
        for item, stretches in wire.in_place.items():
            piece = as_bytes(self.pieces[item]) if item in self.pieces else None
            for rank, start, nbytes in stretches:
                if self._here:
                    target = as_bytes(self.wholes[item]).narrow(0, start, nbytes)
                    if rank == root and piece is not None and piece.data_ptr() != target.data_ptr():
                        target.copy_(piece)
                    parts.append((rank, target))
                elif rank == wire.rank:
                    nothing = torch.empty(nbytes, dtype=torch.uint8, device=wire.device) if piece is None else piece
                    parts.append((rank, nothing))
        for rank, length in enumerate(wire.lengths):
            if length > wire.head and (self._here or rank == wire.rank):
                parts.append((rank, chunk if self.landing is None else wire.chunk(self.landing, rank)))
        operations = []
        for rank, part in parts:
            if rank == root:
                continue
            peer = wire.global_ranks[rank] if self._here else dst
            operations.append(dist.P2POp(dist.irecv if self._here else dist.isend, part, peer, group=wire.group))
            self.held.append(part)
        if operations:
            self.works.extend(dist.batch_isend_irecv(operations))

    def wait(self) -> None:
        """Wait for the data, whatever it says."""
        while self.works:
            self.works.pop(0).wait()

    def land(self) -> dict[int, torch.Tensor]:
        """Wait for the data, raise what any rank has to say, and return the whole of every item received here."""
        self.wait()
        try:  # on a GPU this is under way before the statuses are here; nothing of the caller's is written before that
            wholes = self._unpacked() if self.out is None else {}
        finally:  # all ranks look, whatever went wrong here
            self._check()
        return wholes if self.out is None else self._unpacked()

    def _unpacked(self) -> dict[int, torch.Tensor]:
        return {} if self.landing is None else {**self.wholes, **self.wire.unpack(self.landing, self.out)}

    def _check(self) -> None:
        """Raise what any rank has to say."""
        marked = self.wire.marked
        if self.statuses is None and marked is not None:
            whole, ranks = self.wholes[marked], self.wire.size
            heads = whole.as_strided((ranks, len(_status.MARK) // whole.itemsize), (whole.numel() // ranks, 1))
            if self.error is None and not _status.is_marked(heads.view(torch.uint8)):
                return
            self._gather([], [])
            self.wait()
        assert self.statuses is not None
        if any(self.statuses[:, 0].tolist()):
            _status.check(self.statuses.cpu(), cause=self.error)


@functools.cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
