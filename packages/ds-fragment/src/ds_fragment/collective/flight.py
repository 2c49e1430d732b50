"""One exchange over a wire, under way: which collectives carry it.

Chunks of about the same length go by one all-gather, others by a broadcast each, so that nobody receives padding in
the place of data. What travels in place goes by an all-gather where the stretches are equal and in rank order, else
by a broadcast from each rank that holds one; so does what is large on a CPU, and nearly all between two GPUs: see
[Note: pairs]. Where one rank receives, it receives from each holder.

[Note: behind] On a GPU what follows the collectives is set off together with them, on a stream of its own: it runs as
soon as they are done, whatever the host and the caller's stream are busy with. What is copied while another bucket is
under way is copied by few blocks, since NCCL, which has few itself, gets its share of the memory then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ds_fragment import _collectives, kernels
from ds_fragment.collective import status
from ds_fragment.collective.chunks import Unpacking
from ds_fragment.collective.wire import Locate, Wire, as_bytes
from ds_fragment.sharding import Out


@dataclass(slots=True)
class _Behind:
    """What is set off behind the collectives; see [Note: behind].

    Attributes:
        caller: the stream that the caller was on.
        heads: what tells of an error, on the host.
        told: when the heads are there.
        unpacking: of the chunks; None where that waits for the heads.
        done: when all is there.
    """

    caller: torch.cuda.Stream
    heads: torch.Tensor
    told: torch.cuda.Event
    unpacking: Unpacking | None
    done: torch.cuda.Event

    def wait(self) -> None:
        """Wait for the heads; the caller's stream waits for the rest, and so does the one that its memory is of."""
        self.told.synchronize()
        now = torch.cuda.current_stream(self.caller.device)
        now.wait_event(self.done)
        if now != self.caller:
            self.caller.wait_event(self.done)


@dataclass(slots=True)
class Flight:
    """What one rank sends and receives."""

    wire: Wire
    out: Out | None
    dst: int | None  # the global rank that receives; None for all
    later: bool = True  # whether to come back from collectives before they are done
    error: Exception | None = None
    pieces: dict[int, torch.Tensor] = field(default_factory=dict)
    wholes: dict[int, torch.Tensor] = field(default_factory=dict)  # what travels in place, where it is received
    landing: torch.Tensor | None = None  # uint8, (chunks.begins[-1],), where it is received
    statuses: torch.Tensor | None = None  # uint8, (ranks, STATUS_BYTES), on the wire's device
    works: list[dist.Work] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)  # what is being sent or received on the way
    own: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # a place, and the part for it
    behind: _Behind | None = None

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
        before: int = 0,
    ) -> Flight:
        """Send this rank's pieces, or its error in their place, and come back before they are there if ``later``.

        ``before``: the buckets under way before this one. The second is waited for soon, and packed as fast as it goes.
        """
        flight = cls(wire, out, dst, later)
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
        wire, chunks = self.wire, self.wire.chunks
        if not self._here:
            return torch.empty(chunks.lengths[wire.rank], dtype=torch.uint8, device=wire.device)
        self.landing = torch.empty(chunks.begins[-1], dtype=torch.uint8, device=wire.device)
        self.wholes = wire.rooms(self.out)
        return chunks.of(self.landing, wire.rank)

    def _spread(self, chunk: torch.Tensor) -> None:
        """Every item to all ranks."""
        wire, chunks, landing = self.wire, self.wire.chunks, self.landing
        assert landing is not None
        outputs, inputs = self._even() if wire.even else ([], [])
        parts = self._apart() if wire.apart else []
        if chunks.gathered:
            if self.error is not None:
                chunk[: chunks.head].copy_(status.encode(self.error))
            self.statuses = chunks.statuses(landing)
        if chunks.gathered and not wire.pair:
            outputs, inputs = [*outputs, landing], [*inputs, chunk]
        else:
            parts += [(rank, chunks.of(landing, rank)) for rank, length in enumerate(chunks.lengths) if length]
        if self.statuses is None and wire.marked is None:
            self._gather(outputs, inputs)
        else:
            self._all_gather(outputs, inputs)
        self._broadcast(parts)

    def _even(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where what is cut evenly is received, and what of it is sent."""
        wire = self.wire
        outputs = [self.wholes[item] for item in wire.even]
        if self.error is None:
            inputs = [self.pieces[item] for item in wire.even]
        else:
            inputs = [torch.empty_like(whole.view(-1)[: whole.numel() // wire.size]) for whole in outputs]
            if wire.marked in wire.even:
                status.mark(as_bytes(inputs[wire.even.index(wire.marked)]))
        if wire.as_bytes:
            return list(map(as_bytes, outputs)), list(map(as_bytes, inputs))
        return outputs, inputs

    def _apart(self) -> list[tuple[int, torch.Tensor]]:
        """What is broadcast in place, as (sender, what it sends)."""
        wire, parts = self.wire, []
        for item, stretches in wire.apart.items():
            whole, piece, size = self.wholes[item].view(-1), self.pieces.get(item), 1
            if wire.as_bytes:
                whole, piece = as_bytes(whole), None if piece is None else as_bytes(piece)
            else:
                size = whole.itemsize
            for rank, start, nbytes in stretches:
                part = whole[start // size : (start + nbytes) // size]  # half as long to make as by narrow
                if rank == wire.rank:
                    if piece is not None:
                        if piece.data_ptr() != part.data_ptr():
                            self.own.append((part, piece))
                            part = piece
                    elif item == wire.marked:
                        part = torch.empty_like(part)  # the whole may be the caller's
                        status.mark(as_bytes(part))
                parts.append((rank, part))
        return parts

    def _broadcast(self, parts: list[tuple[int, torch.Tensor]]) -> None:
        if parts:
            self.held.extend(part for _, part in parts)
            self.works.extend(_collectives.broadcast_many(parts, self.wire.group))
        if self.own:  # meanwhile this rank's parts go to their own places
            stream = _beside(self.wire.device)
            with _after_current(stream):
                kernels.copy([part for part, _ in self.own], [sent for _, sent in self.own])

    def _gather(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """The statuses, and what else all ranks send as much of."""
        mine = torch.zeros(status.STATUS_BYTES, dtype=torch.uint8, device=self.wire.device)
        if self.error is not None:
            mine.copy_(status.encode(self.error))
        self.statuses = torch.empty(self.wire.size, len(mine), dtype=torch.uint8, device=mine.device)
        self._all_gather([*outputs, self.statuses.view(-1)], [*inputs, mine])

    def _all_gather(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        if outputs:
            self.held.extend(inputs)
            self.works.extend(_collectives.all_gather_many(outputs, inputs, self.wire.group, later=self.later))

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
        for rank, length in enumerate(wire.chunks.lengths):
            if length > wire.chunks.head and (self._here or rank == wire.rank):
                parts.append((rank, chunk if self.landing is None else wire.chunks.of(self.landing, rank)))
        operations = []
        for rank, part in parts:
            if rank == root:
                continue
            peer = wire.global_ranks[rank] if self._here else dst
            operations.append(dist.P2POp(dist.irecv if self._here else dist.isend, part, peer, group=wire.group))
            self.held.append(part)
        if operations:
            self.works.extend(_collectives.exchange_many(operations))

    def follow(self, *, last: bool) -> None:
        """On a GPU, set off what comes behind the collectives; see [Note: behind]. Once is enough.

        ``last``: no bucket is under way after this one.
        """
        wire, stream = self.wire, _beside(self.wire.device)
        if self.behind is not None or stream is None or wire.home != wire.device:
            return
        unpacking = None
        if self.out is None:  # else nothing is written before the statuses are known
            try:
                unpacking = self._unpack()
            except torch.OutOfMemoryError:  # to be raised where all ranks are heard
                return
        # The caller's stream may not have come as far as where it let go of that memory: pieces that were made for a
        # later bucket are freed when they are packed.
        caller = torch.cuda.current_stream(stream.device)
        with _after_current(stream):
            self._wait_works()
            heads = self._heads().to("cpu", non_blocking=True)
            told = stream.record_event()
            if unpacking is not None:
                unpacking.move()
            self.behind = _Behind(caller, heads, told, unpacking, stream.record_event())

    def prepare(self) -> None:
        """Do what can be done before the data is there."""
        if self.behind is not None and self.behind.unpacking is not None:
            self.behind.unpacking.wholes()

    def wait(self) -> None:
        """Wait for the data, whatever it says."""
        self._wait_works()
        stream = _beside(self.wire.device)
        if self.behind is not None:
            self.behind.wait()
        elif self.own and stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _wait_works(self) -> None:
        while self.works:
            _collectives.wait_for(self.works.pop(0))

    def land(self) -> dict[int, torch.Tensor]:
        """Wait for the data, raise what any rank has to say, and return the whole of every item received here."""
        self.wait()
        try:
            wholes = {} if self.out is not None else self._unpacked()
        finally:  # all ranks look, whatever went wrong here
            self._check()
        if self.out is not None:
            wholes = self._unpacked()
        return {**self.wholes, **wholes} if self.wholes else wholes

    def _unpacked(self) -> dict[int, torch.Tensor]:
        unpacking = None if self.behind is None else self.behind.unpacking
        if unpacking is None:
            unpacking = self._unpack()
            unpacking.move()
        return unpacking.wholes()

    def _unpack(self) -> Unpacking:
        if self.landing is None:
            return Unpacking()
        return self.wire.chunks.unpack(self.landing, self.out)

    def _heads(self) -> torch.Tensor:
        """What tells of an error on another rank: the first byte of each status, or of each part those of the mark."""
        wire = self.wire
        if self.statuses is not None:  # of two ranks the other's alone: one piece is fetched faster
            return self.statuses[1 - wire.rank, :1] if wire.size == 2 else self.statuses[:, 0]
        assert wire.marked is not None
        whole = self.wholes[wire.marked]
        shape = (wire.size, len(status.MARK) // whole.itemsize)
        return whole.as_strided(shape, (whole.numel() // wire.size, 1)).view(torch.uint8)

    def _check(self) -> None:
        """Raise what any rank has to say."""
        heads = self._heads() if self.behind is None else self.behind.heads
        told = status.is_marked(heads) if self.statuses is None else any(heads.tolist())
        if self.error is None and not told:
            return
        if self.statuses is None:
            self._gather([], [])
            self.wait()
        assert self.statuses is not None
        shardings = [self.wire.shardings[item] for item in self.wire.items]
        holders = [any(sharding.layout.sent(rank) for sharding in shardings) for rank in range(self.wire.size)]
        status.check(self.statuses.cpu(), holders=holders, cause=self.error)


def _beside(device: torch.device) -> torch.cuda.Stream | None:
    """The stream beside the caller's; None where there are no streams."""
    return _stream_beside(device) if device.type == "cuda" else None


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _after_current(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is set off in it runs on that stream, after what the current one has by now."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with stream if hasattr(stream, "__enter__") else torch.cuda.stream(stream):  # as of torch 2.7 it is one itself
        yield
