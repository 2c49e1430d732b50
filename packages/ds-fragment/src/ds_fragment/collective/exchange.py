"""Gather the shards of many items, bucket by bucket; or of one.

[Note: failure] A rank that has an error sends a mark instead of its shards (see [Note: mark] of `status`). All ranks of
a group read the same marks with the same bucket, and send nothing more over that group. A rank may know of an error
that others do not know yet, from another group or of an item that it holds whole. It takes part as the others do, and
sends the mark with the next bucket that is not in flight, until all its groups have been told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _flight, kernels
from ds_fragment.collective import status
from ds_fragment.collective.agree import raise_as_told
from ds_fragment.collective.plan import Bucket, Plan, Section, Transfer
from ds_fragment.errors import FragmentError
from ds_fragment.sharding import Sharding, box

Shards = Sequence["torch.Tensor | None"]  # of this rank, by item
Locate = Callable[[Sequence[int]], Shards]
Out = Callable[[int], torch.Tensor]  # where the whole of an item is to be written
Wholes = dict[int, "torch.Tensor | None"]  # by item
# Of one bucket: what is in flight, this rank's shards, and the error of which it sent the mark.
_Started = tuple[list["InFlight"], dict[int, "torch.Tensor | None"], Exception | None]

_WORDS = status.MARK_BYTES // 8
_SHARED = ("cuda",)  # devices where small wholes share storages, as a launch takes longer than a copy
# What every backend gathers as it is, and torch.cat takes.
_COMMON = {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8}


def gather(
    plan: Plan,
    locate: Locate,
    *,
    dst: int | None = None,
    out: Out | None = None,
    told: set[dist.ProcessGroup] | None = None,
) -> Iterator[list[torch.Tensor | None]]:
    """Bring the whole of every item to every rank (or to one), bucket by bucket, in order.

    All ranks of the plan's groups must call it and take the same number of buckets.

    Args:
        plan: the items and their buckets.
        locate: this rank's shards of some items: for each a tensor of the fragment's size, any strides, or None. What
            it raises is raised on every rank.
        dst: the global rank that receives, or None for all.
        out: where item i is to be written, contiguous, of the whole shape; a fresh tensor unless told.
        told: takes the groups whose ranks all know of a failure.

    Yields:
        For each bucket, the whole tensors in the plan's order, None where another rank receives.

    Raises:
        FragmentError: a rank could not deliver its shard; the same on every rank.
    """
    run = _Gather(plan, locate, dst, out, set() if told is None else told)
    try:
        for number, bucket in enumerate(plan.buckets):
            for ahead in plan.buckets[number + (number > 0) : number + 2]:
                run.start(ahead)
            wholes = run.finish(bucket)
            if run.failure is None:
                yield [wholes.pop(item) for item in bucket.items]
            elif run.told >= plan.groups:
                break
        if run.failure is not None:
            run.fail()
    finally:
        for transfers, _, _ in run.in_flight:
            for transfer in transfers:
                transfer.wait()


class _Gather:
    """What one call of `gather` has in flight, and whether it failed; see [Note: failure]."""

    def __init__(
        self, plan: Plan, locate: Locate, dst: int | None, out: Out | None, told: set[dist.ProcessGroup]
    ) -> None:
        self.plan, self.locate, self.dst, self.out, self.told = plan, locate, dst, out, told
        self.here = dst is None or dist.get_rank() == dst
        self.failure: Exception | None = None  # why nothing more is delivered
        self.sent: Exception | None = None  # what this rank sends the mark of
        self.in_flight: list[_Started] = []

    def start(self, bucket: Bucket) -> None:
        """Send this rank's shards of a bucket, or the mark of an error."""
        asked = bucket.items if self.here else [item for item in bucket.items if item not in bucket.alone]
        shards: dict[int, torch.Tensor | None] = {}
        if self.sent is None:
            try:
                shards = _located(self.plan.shardings, asked, self.locate)
            except Exception as error:
                self.sent = error
        transfers = [
            InFlight(transfer, shards, self.sent, self.out, self.dst)
            for transfer in bucket.transfers
            if transfer.group not in self.told
        ]
        self.sent = self.sent or next((t.error for t in transfers if t.error is not None), None)
        self.in_flight.append((transfers, shards, self.sent))

    def finish(self, bucket: Bucket) -> Wholes:
        """Wait for the oldest bucket in flight; the wholes, unless anything failed."""
        transfers, shards, sent = self.in_flight.pop(0)
        wholes: Wholes = dict.fromkeys(bucket.items)
        for transfer in transfers:
            try:
                wholes.update(transfer.finish())
            except Exception as error:
                self.failure = self.failure or error
                if isinstance(error, FragmentError) and error.status:
                    self.told.add(transfer.transfer.group)
        self.failure = self.failure or sent
        if self.failure is None and self.here and bucket.alone:
            try:
                wholes.update(self._copied({item: shards[item] for item in bucket.alone}))
            except Exception as error:
                self.failure = error
        self.sent = self.sent or self.failure
        return wholes

    def _copied(self, shards: dict[int, torch.Tensor | None]) -> Wholes:
        """The wholes from shards that are the wholes."""
        wholes = {item: _room(self.plan.shardings[item], item, self.out) for item in shards}
        pairs = [(wholes[item], _dense(shard)) for item, shard in shards.items() if shard is not None]
        kernels.copy([whole for whole, _ in pairs], [shard for _, shard in pairs])
        return dict(wholes)

    def fail(self) -> None:
        """Raise the failure, in the words in which the others hear it."""
        error, self.failure, self.sent = self.failure, None, None
        assert error is not None
        try:
            raise_as_told(error, told=bool(self.told))
        finally:
            del error  # its traceback refers to this frame


def _located(shardings: Sequence[Sharding], items: Sequence[int], locate: Locate) -> dict[int, torch.Tensor | None]:
    """This rank's shards of some items, if they are as large as their layouts say."""
    shards = dict(zip(items, locate(items), strict=True))
    for item, shard in shards.items():
        _check_size(shardings[item], item, shard)
    return shards


def _check_size(sharding: Sharding, item: int, shard: torch.Tensor | None) -> None:
    numel = 0 if shard is None else shard.numel()
    if numel != sharding.held:
        raise FragmentError(f"item {item}: {numel} elements are here where the layout says {sharding.held}")


def _dense(shard: torch.Tensor) -> torch.Tensor:
    """The shard itself, unless it is a sparse gradient."""
    return shard.detach() if shard.layout == torch.strided else shard.detach().to_dense()


def _room(sharding: Sharding, item: int, out: Out | None) -> torch.Tensor:
    return torch.empty(sharding.shape, dtype=sharding.dtype, device=sharding.device) if out is None else out(item)


class InFlight:
    """One transfer in flight: see [Note: ways] of `plan`.

    Args:
        transfer: what travels.
        shards: this rank's, by item; ignored where there is an error.
        error: this rank's, of which it sends the mark.
        out: where item i is to be written; a fresh tensor unless told.
        dst: the global rank that receives, or None for all.
    """

    def __init__(
        self,
        transfer: Transfer,
        shards: dict[int, torch.Tensor | None],
        error: Exception | None,
        out: Out | None,
        dst: int | None,
    ) -> None:
        self.transfer, self.error = transfer, error
        self.here = dst is None or transfer.ranks[transfer.rank] == dst
        self.works: list[dist.Work] = []
        self.held: list[torch.Tensor] = []  # what is sent
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []  # where this rank's shards belong, and the shards
        self.marks: torch.Tensor | None = None  # int64, (ranks, 2)
        self.staging: torch.Tensor | None = None
        self.out = out
        self.wholes = self._rooms([*transfer.gathered, *transfer.broadcast])
        if transfer.sections and (self.here or dst in transfer.ranks):
            self.staging = torch.empty(transfer.begins[-1], dtype=torch.uint8, device=transfer.device)
        self.ready: dict[int, torch.Tensor] = {}  # this rank's shards of what travels in place, as bytes
        if error is None:
            try:
                self._load({item: shard.detach() for item in transfer.items if (shard := shards[item]) is not None})
            except Exception as caught:  # this rank takes part all the same
                self.error, self.ready = caught, {}
        if dst is None:
            self._to_all()
        else:
            self._to_one(dst)

    def _rooms(self, items: Sequence[int]) -> dict[int, torch.Tensor]:
        """Where some items are received, if that is here."""
        return {item: _room(self.transfer.shardings[item], item, self.out) for item in items if self.here}

    def _mark(self, room: torch.Tensor) -> None:
        """Write this rank's mark, or zeros; int64, (2,)."""
        if self.error is None:
            room.zero_()
        else:
            room.copy_(torch.tensor(status.mark(self.error), dtype=torch.int64))

    def _load(self, shards: dict[int, torch.Tensor]) -> None:
        """Make this rank's shards ready to be sent: pack them, or cast them where they travel in place."""
        transfer = self.transfer
        mine = {item: shard for item, shard in shards.items() if transfer.shardings[item].sent[transfer.rank]}
        for item in (*transfer.gathered, *transfer.broadcast):
            if item in mine:
                self.ready[item] = self._cast(item, mine[item])
        if self.staging is not None:
            self._pack(mine, transfer.chunk(self.staging, transfer.rank))

    def _cast(self, item: int, shard: torch.Tensor) -> torch.Tensor:
        """A shard as bytes, in the dtype in which it travels; cast where it belongs if that is here."""
        transfer, sharding = self.transfer, self.transfer.shardings[item]
        if shard.dtype == sharding.dtype or item not in self.wholes or not sharding.even:
            return _bytes(shard.to(sharding.device, sharding.dtype).contiguous())
        part = _bytes(self.wholes[item]).view(transfer.size, -1)[transfer.rank]
        part.view(sharding.dtype).copy_(shard.reshape(-1))
        return part

    def _to_all(self) -> None:
        transfer = self.transfer
        outputs = [_bytes(self.wholes[item]) for item in transfer.gathered]
        inputs = [self._sent(item) for item in transfer.gathered]
        broadcast = [part for item in transfer.broadcast for part in self._parts(item)]
        if self.staging is not None:
            chunk = transfer.chunk(self.staging, transfer.rank)
            if transfer.padded:
                self.marks = self.staging.view(transfer.size, -1)[:, : status.MARK_BYTES].view(torch.int64)
                self._mark(chunk[: status.MARK_BYTES].view(torch.int64))
                outputs, inputs = [*outputs, self.staging], [*inputs, chunk]
            else:
                chunks = [(rank, transfer.chunk(self.staging, rank)) for rank in range(transfer.size)]
                broadcast += [(rank, part) for rank, part in chunks if part.numel()]
        if self.marks is None:
            outputs, inputs = self._with_marks(outputs, inputs)
        self._launch(outputs, inputs, broadcast)

    def _with_marks(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The marks by an all-gather of their own."""
        transfer = self.transfer
        self.marks = torch.empty(transfer.size, _WORDS, dtype=torch.int64, device=transfer.device)
        mark = torch.empty(_WORDS, dtype=torch.int64, device=transfer.device)
        self._mark(mark)
        return [*outputs, _bytes(self.marks)], [*inputs, _bytes(mark)]

    def _launch(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], broadcast: list[tuple[int, torch.Tensor]]
    ) -> None:
        group = self.transfer.group
        if outputs:
            self.works += _collectives.all_gather_many(outputs, inputs, group)
        if broadcast:
            self.works += _collectives.broadcast_many(broadcast, group)
        self.held = [*inputs, *(part for _, part in broadcast)]
        if self.own:
            kernels.copy([part for part, _ in self.own], [shard for _, shard in self.own])
            self.own.clear()

    def _sent(self, item: int) -> torch.Tensor:
        """This rank's shard of an item that travels in place, as bytes; any bytes if it sends a mark."""
        if item in self.ready:
            return self.ready[item]
        sharding = self.transfer.shardings[item]
        nbytes = sharding.sent[self.transfer.rank] * sharding.dtype.itemsize
        return torch.empty(nbytes, dtype=torch.uint8, device=sharding.device)

    def _parts(self, item: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What is broadcast in place of an item, as (sender, bytes)."""
        whole, size = _bytes(self.wholes[item]), self.wholes[item].itemsize
        for rank, start, numel in self.transfer.shardings[item].spans or ():
            part = whole[start * size : (start + numel) * size]
            if rank == self.transfer.rank and item in self.ready:
                self.own.append((part, self.ready[item]))
                part = self.ready[item]
            yield rank, part

    def _to_one(self, dst: int) -> None:
        """The marks to all ranks, everything else from each rank that holds a part to the receiver."""
        transfer = self.transfer
        self._launch(*self._with_marks([], []), [])
        if dst not in transfer.ranks:
            return  # its ranks have what they hold; the receiver is none of them
        parts = [part for item in (*transfer.gathered, *transfer.broadcast) for part in self._parts_to(item)]
        if self.staging is not None:
            parts += [
                (rank, transfer.chunk(self.staging, rank))
                for rank in range(transfer.size)
                if any(sum(section.sent[rank]) for section in transfer.sections)
            ]
        operations, root = [], transfer.ranks.index(dst)
        for rank, part in parts:
            if rank != root and (self.here or rank == transfer.rank):
                call, peer = (dist.irecv, transfer.ranks[rank]) if self.here else (dist.isend, dst)
                operations.append(dist.P2POp(call, part, peer, group=transfer.group))
        if operations:
            self.works += _collectives.exchange_many(operations)
        self.held += [part for _, part in parts]

    def _parts_to(self, item: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What is sent in place to one rank, as (sender, bytes): all parts there, this rank's elsewhere."""
        transfer, size = self.transfer, self.transfer.shardings[item].dtype.itemsize
        for rank, start, numel in transfer.shardings[item].spans or ():
            if self.here:
                part = _bytes(self.wholes[item])[start * size : (start + numel) * size]
                if rank == transfer.rank and item in self.ready:
                    part.copy_(self.ready[item])
                yield rank, part
            elif rank == transfer.rank:
                yield rank, self._sent(item)

    def _pack(self, mine: dict[int, torch.Tensor], chunk: torch.Tensor) -> None:
        """Fill this rank's chunk."""
        transfer = self.transfer
        room = chunk if transfer.home == transfer.device else torch.empty_like(chunk, device=transfer.home)
        for section in transfer.sections:
            shards = [mine[item] for item in section.items if item in mine]
            if shards:
                _pack_section(section, section.of(room, transfer.rank), shards, transfer.rank)
        if room is not chunk:
            chunk.copy_(room)

    def _unpack(self) -> None:
        """Bring the shards from the staging buffer to where they belong."""
        transfer = self.transfer
        assert self.staging is not None
        staging = self.staging if transfer.home == transfer.device else self.staging.to(transfer.home)
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        shares = self.out is None and transfer.home.type in _SHARED
        for section in transfer.sections:
            even = section.kind == "even" and transfer.padded
            if shares and even:
                self._unpack_runs(section, staging)
            elif shares and section.kind == "single":
                self._take(section, staging)
            elif even and section.dtype in _COMMON:
                self.wholes.update(self._rooms(section.items))
                targets = [self.wholes[item].view(transfer.size, -1) for item in section.items]
                torch.split_with_sizes_copy(self._rows(section, staging), section.sent[0], dim=1, out=targets)
            else:
                self.wholes.update(self._rooms(section.items))
                for rank in range(transfer.size):
                    pairs += self._pairs(section, transfer.chunk(staging, rank), rank)
        if pairs:
            kernels.copy([part for part, _ in pairs], [shard for _, shard in pairs])

    def _rows(self, section: Section, staging: torch.Tensor) -> torch.Tensor:
        """An even section of all chunks: (ranks, elements of a rank)."""
        width = sum(section.sent[0]) * section.dtype.itemsize
        return staging.view(self.transfer.size, -1).narrow(1, section.begins[0], width).view(section.dtype)

    def _unpack_runs(self, section: Section, staging: torch.Tensor) -> None:
        """Make the wholes of one shape by one copy, in one storage."""
        size, start, rows = self.transfer.size, 0, self._rows(section, staging)
        for shape, run in groupby(section.items, key=lambda item: self.transfer.shardings[item].shape):
            items = list(run)
            numel = shape.numel() // size
            shards = rows.narrow(1, start, numel * len(items)).view(size, len(items), numel)
            storage = shards.transpose(0, 1).contiguous()
            self.wholes.update(zip(items, _apart(storage, shape, len(items)), strict=True))
            start += numel * len(items)

    def _take(self, section: Section, staging: torch.Tensor) -> None:
        """The wholes are where they were received."""
        for rank in range(self.transfer.size):
            received = section.of(self.transfer.chunk(staging, rank), rank)
            shards = torch.unsafe_split_with_sizes(received, section.sent[rank])
            for item, shard in zip(section.items, shards, strict=True):
                if shard.numel():
                    self.wholes[item] = shard.view(self.transfer.shardings[item].shape)

    def _pairs(self, section: Section, chunk: torch.Tensor, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where each shard of a rank belongs, and the shard."""
        shards = section.of(chunk, rank).split_with_sizes(section.sent[rank])
        for item, shard in zip(section.items, shards, strict=True):
            layout = self.transfer.shardings[item].layout
            fragment = layout.fragments[rank]
            if shard.numel() and fragment is not None:
                target = box(self.wholes[item], layout.shape, fragment)
                yield target, shard.view(target.shape)

    def wait(self) -> None:
        """Wait for the data: the host on a CPU, the current stream on a GPU."""
        while self.works:
            _collectives.wait_for(self.works.pop(0))
        self.held.clear()

    def finish(self) -> dict[int, torch.Tensor]:
        """Wait, raise what any rank has to say, and return the wholes that are received here."""
        self.wait()
        assert self.marks is not None
        self.check(self.marks.tolist())
        return self.unpacked()

    def unpacked(self) -> dict[int, torch.Tensor]:
        """The wholes that are received here, once the data is there."""
        if self.here and self.staging is not None:
            with torch.no_grad():
                self._unpack()
            self.staging = None
        return self.wholes

    def check(self, marks: list[list[int]]) -> None:
        """Raise what any rank has to say."""
        transfer = self.transfer
        holds = [any(transfer.shardings[item].sent[rank] for item in transfer.items) for rank in range(transfer.size)]
        _raise_marks(marks, transfer.ranks, self.error, holds)


def _pack_section(section: Section, room: torch.Tensor, shards: list[torch.Tensor], rank: int) -> None:
    """Shards one after the other, cast to the section's dtype."""
    alike = {(shard.dtype, shard.device) for shard in shards} == {(section.dtype, room.device)}
    with torch.no_grad():
        if alike and section.dtype in _COMMON:
            torch.cat([shard.reshape(-1) for shard in shards], out=room)
        else:
            parts = room.split_with_sizes([numel for numel in section.sent[rank] if numel])
            kernels.copy(list(parts), shards)


def _raise_marks(
    marks: Sequence[Sequence[int]],
    ranks: Sequence[int],
    error: Exception | None,
    holds: Sequence[bool] | None = None,
    *,
    certain: bool = True,
) -> None:
    """Raise the error of the lowest rank that sent a mark; ``holds`` and the cause are as in `status.check`."""
    if all(mark[0] != status.MAGIC for mark in marks):
        return
    found = status.statuses(marks, ranks, certain=certain)
    if found is not None:
        status.check(found, holders=holds, cause=error)


def _apart(storage: torch.Tensor, shape: torch.Size, count: int) -> Iterable[torch.Tensor]:
    """Tensors of one shape that share a storage; to autograd they are no views, so that each is by itself."""
    if not shape:
        return (each.view(()) for each in torch.unsafe_split_with_sizes(storage.view(-1), [1] * count))
    return torch.unsafe_split_with_sizes(storage.view(count * shape[0], *shape[1:]), [shape[0]] * count)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes: what every backend moves, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


class _Direct:
    """One item that is received where it belongs, with no staging buffer and by one collective.

    Equal intervals of the whole are all-gathered; what one rank holds whole is broadcast, on a GPU. A rank that cannot
    send sends a mark and NaN behind it, see [Note: mark] of `status`. A rank that has nothing to send and fails is the
    only one to know.

    Attributes:
        root: the group rank that holds the whole; None where all hold equal intervals.
    """

    def __init__(self, sharding: Sharding, ranks: Sequence[int], root: int | None) -> None:
        assert sharding.group is not None
        self.group, self.ranks, self.device, self.root = sharding.group, ranks, sharding.device, root
        self.shape, self.dtype, self.numel = sharding.shape, sharding.dtype, sharding.held
        self.sends = root is None or sharding.rank == root
        self.senders = ranks if root is None else [ranks[root]]
        self.as_bytes = sharding.dtype not in _COMMON
        words = sharding.nbytes // 8 // len(self.senders)
        self.marks = ((len(self.senders), _WORDS), (words, 1))  # sizes and strides

    def gather(self, shard: torch.Tensor | None, error: Exception | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole, and what may be marks: int64, (senders, 2)."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.sends and error is not None:
            shard = self.ready(self._marked(error))
        flat = _bytes(whole) if self.as_bytes else whole.view(-1)
        if self.root is not None:
            if self.sends and shard is not None:
                flat.copy_(shard)
            (work,) = _collectives.broadcast_many([(self.root, flat)], self.group)
            _collectives.wait_for(work)
        else:
            assert shard is not None  # every rank holds one
            _collectives.all_gather(flat, shard, group=self.group)
        return whole, flat.view(torch.int64).as_strided(*self.marks)

    def ready(self, shard: torch.Tensor) -> torch.Tensor:
        """A shard as it is sent: 1-D, contiguous."""
        if shard.dtype != self.dtype or shard.device != self.device or not shard.is_contiguous():
            shard = shard.to(self.device, self.dtype).contiguous()
        if shard.requires_grad:
            shard = shard.detach()
        return _bytes(shard) if self.as_bytes else shard.view(-1)

    def _marked(self, error: Exception) -> torch.Tensor:
        shard = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        if self.dtype.is_floating_point:
            shard = torch.full((self.numel,), float("nan"), device=self.device).to(self.dtype)
        mark = torch.tensor(status.mark(error), dtype=torch.int64)
        _bytes(shard)[: status.MARK_BYTES].copy_(_bytes(mark))
        return shard


def _prepared(sharding: Sharding) -> _Direct | Transfer:
    transfer = Transfer([0], [sharding])
    nbytes = [sent * sharding.dtype.itemsize for sent in sharding.sent]
    if transfer.device != transfer.home or any(sent % status.MARK_BYTES for sent in nbytes):
        return transfer
    if sharding.even and sharding.held:
        return _Direct(sharding, transfer.ranks, None)
    if transfer.home.type == "cuda" and sum(map(bool, nbytes)) == 1 and max(nbytes) == sharding.nbytes:
        return _Direct(sharding, transfer.ranks, nbytes.index(max(nbytes)))
    return transfer


def fetch(sharding: Sharding, locate: Locate, *, later: Callable[[Exception], None] | None = None) -> torch.Tensor:
    """Gather one item that several ranks hold. All ranks of its group must call it.

    Args:
        sharding: of the item; without stages.
        locate: as in `gather`; called with ``[0]``.
        later: on a GPU do not wait for the data, see [Note: deferred] of `_flight`. It is called with the error of any
            rank, on every rank, at the next call. None waits.

    Raises:
        FragmentError: a rank could not deliver its shard.
    """
    check: Callable[[list[list[int]]], None]
    prepared = sharding.plans.get("one")
    if prepared is None:
        prepared = sharding.plans["one"] = _prepared(sharding)
    shard: torch.Tensor | None = None
    error: Exception | None = None
    try:
        (shard,) = locate([0])
        if shard is not None or sharding.held:
            _check_size(sharding, 0, shard)
        if shard is not None and isinstance(prepared, _Direct):
            shard = prepared.ready(shard)
    except Exception as caught:
        error = caught
    if isinstance(prepared, _Direct):
        whole, marks = prepared.gather(shard, error)
        check = partial(_raise_marks, ranks=prepared.senders, error=error, certain=False)
    else:
        transfer = InFlight(prepared, {0: shard}, error, None, None)
        transfer.wait()
        assert transfer.marks is not None
        marks, check, error = transfer.marks, transfer.check, transfer.error
        whole = transfer.unpacked()[0]
    if later is None or not marks.is_cuda:
        check(marks.tolist())
    else:
        _defer(marks, check, later)
    if error is not None:  # the other ranks have been told, or need not be
        try:
            raise_as_told(error, told=True)
        finally:
            del error  # its traceback refers to this frame
    return whole


def _defer(marks: torch.Tensor, check: Callable[[list[list[int]]], None], later: Callable[[Exception], None]) -> None:
    """Write the marks to the host's memory, and read them at the next call."""
    slots = _pinned(marks.device, marks.shape)
    slots.append(slots.pop(0))
    host, mapped = slots[0]
    torch.add(marks, 0, out=mapped)
    there = torch.cuda.current_stream(marks.device).record_event()

    def checked() -> None:
        there.synchronize()
        try:
            check(host.tolist())
        except FragmentError as error:
            later(error)
            raise

    _flight.defer(checked)


class _Mapped:
    """Pinned memory as a GPU sees it. A kernel writes it without a copy engine, which makes the next kernel wait."""

    def __init__(self, pinned: torch.Tensor) -> None:
        self.pinned = pinned
        self.__cuda_array_interface__ = {
            "data": (pinned.data_ptr(), False),
            "shape": tuple(pinned.shape),
            "typestr": "<i8",
            "version": 3,
        }


@functools.cache
def _pinned(device: torch.device, shape: torch.Size) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two pinned tensors for marks, and the same on the device: those of the read before are read meanwhile."""
    slots = []
    for _ in range(2):
        pinned = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
        slots.append((pinned, torch.as_tensor(_Mapped(pinned), device=device)))
    return slots
