"""Bring the fragments of many parameters together, bucket by bucket; and have all ranks agree before a write.

[Note: buckets] Parameters travel in the caller's order, as many at a time as fit ``bucket_bytes``. The next bucket is
in flight while the caller works on this one. What travels in place takes its own room only. What is packed takes as
much again while it is unpacked, so it counts twice; that leaves room for more than one in flight. On a GPU it is
unpacked as soon as it is there, and takes that room from the start. How one bucket travels over one group is `_wire`'s
and `_flight`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from ds_fragment import _collectives, kernels
from ds_fragment._collectives import CollectiveError
from ds_fragment.collective import status
from ds_fragment.collective.flight import Flight
from ds_fragment.collective.recent import Recent
from ds_fragment.collective.sections import is_even
from ds_fragment.collective.wire import Locate, Pieces, Wire, numels, stretches_of
from ds_fragment.errors import FragmentError, RankMismatchError
from ds_fragment.sharding import Out, Sharding, box, room_for, wire_device

__all__ = [
    "Locate",
    "Pieces",
    "Sharding",
    "Plan",
    "agree",
    "box",
    "bucket_bytes_for",
    "fetch",
    "gather",
    "numels",
    "plan_of",
    "raise_as_told",
    "raising",
    "wire_device",
]


_BUCKET_BYTES = 64 << 20  # about what a CPU moves in the time that it takes to start some collectives
_BUCKET_BYTES_GPU = 1 << 30
# How much a GPU's first bucket, and any other, sets off in place: it takes the host's time before the bucket is sent.
_AT_FIRST, _AT_ONCE = 128, 512
_SET_OFF = 16  # a tensor that is broadcast; one that is gathered counts 1


def bucket_bytes_for(shardings: Sequence[Sharding]) -> int:
    """How much travels at once unless the caller says."""
    on_cpu = all(sharding.device.type == "cpu" for sharding in shardings)
    return _BUCKET_BYTES if on_cpu else _BUCKET_BYTES_GPU


class Plan:
    """What travels with what, for one list of places: made once, used for as long as the places stay the same."""

    def __init__(self, shardings: Sequence[Sharding], bucket_bytes: int) -> None:
        self.shardings, self.bucket_bytes = shardings, bucket_bytes
        self._on_gpu = any(sharding.device.type == "cuda" for sharding in shardings)
        cuts = [[] if sharding.alone else stretches_of(sharding) for sharding in shardings]  # of what travels in place
        packed = [
            0 if cut or sharding.alone else sharding.nbytes for cut, sharding in zip(cuts, shardings, strict=True)
        ]
        moves = [0 if not cut else 1 if is_even(cut, len(cut)) and len(cut) > 2 else _SET_OFF for cut in cuts]
        # What a rank holds whole it may keep in another dtype than the others do, and all must cut and start alike.
        together = any(not sharding.alone for sharding in shardings)
        taken = [
            4 * sharding.shape.numel() if sharding.alone and together else sharding.nbytes for sharding in shardings
        ]
        self.buckets = self._cut(taken, packed, moves)
        self.alone = [[item for item in bucket if shardings[item].alone] for bucket in self.buckets]
        self.wires = [self._wires_of(bucket) for bucket in self.buckets]
        self.groups = {wire.group for wires in self.wires for wire in wires}
        # Bytes of each bucket: when it is there, while it is unpacked, and in flight.
        self.sizes = [sum(taken[item] for item in bucket) for bucket in self.buckets]
        doubled = [sum(taken[item] + packed[item] for item in bucket) for bucket in self.buckets]
        self.unpacking, self.flying = doubled, doubled if self._on_gpu else self.sizes

    def _cut(self, taken: Sequence[int], packed: Sequence[int], moves: Sequence[int]) -> list[list[int]]:
        """Items by bucket, from the bytes that each takes, how many of them are packed, and what it takes to set off.

        On a GPU the first bucket is soon packed and set off, as the wire waits for it; but not at the cost of one more
        bucket, which takes the host's time.
        """
        limits = [self.bucket_bytes // part for part in ((4, 2, 1) if self._on_gpu else (1,))]
        return min((self._filled(taken, packed, moves, limit) for limit in limits), key=len)

    def _filled(
        self, taken: Sequence[int], packed: Sequence[int], moves: Sequence[int], packed_first: int
    ) -> list[list[int]]:
        buckets: list[list[int]] = []
        filled = packing = setting_off = 0
        for item, extra in enumerate(packed):
            fits = filled + taken[item] + extra <= self.bucket_bytes
            if self._on_gpu:
                first = len(buckets) == 1
                fits = fits and not (first and packing + 2 * extra > packed_first)
                fits = fits and setting_off + moves[item] <= (_AT_FIRST if first else _AT_ONCE)
            if not buckets or not fits:
                buckets.append([])
                filled = packing = setting_off = 0
            buckets[-1].append(item)
            filled += taken[item] + extra
            packing += 2 * extra
            setting_off += moves[item]
        return buckets

    def _wires_of(self, bucket: list[int]) -> list[Wire]:
        found: dict[tuple[dist.ProcessGroup, torch.device], list[int]] = {}
        for item in bucket:
            sharding = self.shardings[item]
            if sharding.group is not None and not sharding.alone:
                found.setdefault((sharding.group, sharding.device), []).append(item)
        return [Wire(group, items, self.shardings) for (group, _), items in found.items()]


_plans = Recent[Plan](most=20_000)  # items


def plan_of(shardings: Sequence[Sharding], bucket_bytes: int) -> Plan:
    """A plan for the places, from the few that were used last if it is one of them."""
    if all(sharding.alone for sharding in shardings):
        return Plan(shardings, bucket_bytes)
    key = (bucket_bytes, *map(id, shardings))  # a plan keeps its places, so that an id means one place
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(shardings, bucket_bytes)
        _plans.put(key, plan, len(shardings))
    return plan


def gather(
    plan: Plan,
    locate: Locate,
    *,
    dst: int | None = None,
    out: Out | None = None,
    settle: Sequence[dist.ProcessGroup] = (),
    told: set[dist.ProcessGroup] | None = None,
) -> Iterator[list[torch.Tensor | None]]:
    """Bring the whole of every quantity to every rank (or to one), bucket by bucket, in order.

    All ranks of the plan's groups must call it and take the same number of buckets.

    Args:
        plan: which quantities, and their buckets.
        locate: this rank's pieces of some items: for each a tensor of the fragment's size, any strides, or None. What
            it raises is raised on every rank.
        dst: the global rank that receives, or None for all.
        out: where item i is to be written, contiguous, of the whole shape; a fresh tensor unless told.
        settle: groups whose ranks tell each other at the end how it went, which all of them wait for: that a rank lacks
            what all of them hold whole is told nobody, unless something travels later.
        told: takes the groups whose ranks all know of a failure.

    Yields:
        For each bucket, the whole tensors in the plan's order, None where another rank receives.

    Raises:
        FragmentError: a rank could not deliver its piece; the same on every rank.
    """
    convoy = _Convoy(plan, locate, dst, out, set() if told is None else told)
    try:
        for bucket in range(len(plan.buckets)):
            convoy.fill(bucket, plan.unpacking[bucket])
            wholes = convoy.land(bucket)
            convoy.fill(bucket, plan.sizes[bucket])
            if convoy.failure is None:
                yield wholes
            elif convoy.told >= plan.groups:
                break
        convoy.settle(settle)
        if convoy.failure is not None:
            convoy.fail()
    finally:
        convoy.wait()


_UnderWay = tuple[list[Flight], "Pieces | Exception"]  # of one bucket, with the pieces that are wholes


class _Convoy:
    """The buckets of a plan on their way.

    [Note: failure] All ranks of a group read the same statuses with the same bucket, and send nothing more over that
    group. What only one rank knows of (a whole that it lacks or has no memory for, what it heard in another of its
    groups) travels in the place of its pieces with the next bucket that is not yet under way; until all its groups have
    been told, that rank goes on as the others do, so that nobody waits for it in vain.
    """

    def __init__(
        self, plan: Plan, locate: Locate, dst: int | None, out: Out | None, told: set[dist.ProcessGroup]
    ) -> None:
        self.plan, self.locate, self.dst, self.out = plan, locate, dst, out
        self.here = dst is None or dist.get_rank() == dst
        self.failure: Exception | None = None  # why nothing more is delivered
        self.told = told  # the groups whose ranks all know of a failure
        self._word: Exception | None = None  # what this rank sends in the place of pieces
        self._under_way: list[_UnderWay] = []
        self._started = 0

    def fill(self, bucket: int, taken: int) -> None:
        """Start what there is room for beside a bucket, which takes so many bytes, and the next one in any case."""
        plan = self.plan
        while self._started < len(plan.buckets):
            flying = sum(plan.flying[bucket + 1 : self._started + 1])
            if self._started > bucket + 1 and taken + flying > 2 * plan.bucket_bytes:
                break
            self._start(plan.alone[self._started], plan.wires[self._started])
            self._started += 1
            self._follow(self._under_way[:-1], last=False)
        self._follow(self._under_way, last=self._started == len(plan.buckets))

    @staticmethod
    def _follow(under_way: Sequence[_UnderWay], *, last: bool) -> None:
        for flights, _ in under_way:
            for flight in flights:
                flight.follow(last=last)

    def _start(self, alone: list[int], wires: list[Wire]) -> None:
        pieces: Pieces | Exception = ()
        if alone and self.here and self._word is None:
            try:
                pieces = _whole_pieces(self.plan, alone, self.locate)
            except Exception as error:
                pieces = self._word = error
        locate = self.locate if self._word is None else raising(self._word)
        before = len(self._under_way)
        flights = [
            Flight.start(wire, locate, self.out, self.dst, before=before)
            for wire in wires
            if wire.group not in self.told
        ]
        self._under_way.append((flights, pieces))

    def land(self, bucket: int) -> list[torch.Tensor | None]:
        """The wholes of the oldest bucket under way, which nothing refers to any more afterwards."""
        for flights, _ in self._under_way:
            for flight in flights:
                flight.prepare()
        flights, pieces = self._under_way.pop(0)
        for flight in flights:
            flight.wait()
        wholes: dict[int, torch.Tensor] = {}
        for flight in flights:
            try:
                landed = flight.land()
                wholes = {**wholes, **landed} if wholes else landed
            except Exception as error:
                self.failure = self.failure or error
                if isinstance(error, FragmentError) and error.status:
                    self.told.add(flight.wire.group)
        if isinstance(pieces, Exception):
            self.failure = self.failure or pieces
        elif pieces and self.failure is None:
            try:
                wholes.update(_copied(self.plan, self.plan.alone[bucket], pieces, self.out))
            except Exception as error:
                self.failure = error
        self._word = self._word or self.failure
        return list(map(wholes.get, self.plan.buckets[bucket]))

    def settle(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Tell some groups of a failure, one after the other, and hear of theirs."""
        for group in groups:
            try:
                agree(self.failure, [group], self.plan.shardings[0].device)
            except FragmentError as error:
                self.failure = error
                self.told.add(group)

    def fail(self) -> NoReturn:
        """Raise the failure, in the words in which the others hear it."""
        error, self.failure, self._word = self.failure, None, None
        assert error is not None
        try:
            raise_as_told(error, told=bool(self.told))
        finally:
            del error  # whose traceback refers to this frame

    def wait(self) -> None:
        """Wait for what is still under way, whatever it says."""
        for flights, _ in self._under_way:
            for flight in flights:
                flight.wait()


def raise_as_told(error: Exception, *, told: bool) -> NoReturn:
    """Raise an error of this rank's in the words in which others hear it; ``told`` is whether any do."""
    try:
        told = isinstance(error, FragmentError) or (told and not isinstance(error, CollectiveError))
        if told and not getattr(error, "status", b""):
            status.check(status.encode(error).view(1, -1), cause=error.__cause__ or error)
        raise error
    finally:
        del error  # whose traceback refers to this frame


def fetch(plan: Plan, locate: Locate) -> torch.Tensor:
    """As `gather` for the plan of one item that several ranks hold, without what it takes to have many under way."""
    wire = plan.wires[0][0]
    if wire.marked is None:
        return Flight.start(wire, locate, None, None, later=False).land()[0]
    whole = room_for(plan.shardings[0], 0, None)
    try:
        piece = wire.ready(locate, whole)
    except Exception as error:
        return Flight.start(wire, raising(error), None, None, later=False).land()[0]
    return Flight.at_once(wire, whole, piece)


def raising(error: Exception) -> Locate:
    """What a rank that has an error locates."""

    def locate(_items: Sequence[int]) -> Pieces:
        raise error

    return locate


def _whole_pieces(plan: Plan, items: Sequence[int], locate: Locate) -> Pieces:
    """This rank's pieces that are the wholes."""
    pieces = locate(items)
    for item, piece in zip(items, pieces, strict=True):
        held, expected = 0 if piece is None else piece.numel(), plan.shardings[item].shape.numel()
        if held != expected:
            raise FragmentError(f"item {item}: {held} elements are here where the whole has {expected}")
    return pieces


def _copied(plan: Plan, items: Sequence[int], pieces: Pieces, out: Out | None) -> dict[int, torch.Tensor]:
    """The wholes from pieces that are the wholes."""
    wholes = {item: room_for(plan.shardings[item], item, out) for item in items}
    pairs = [(wholes[item], _dense(piece)) for item, piece in zip(items, pieces, strict=True) if piece is not None]
    kernels.copy([whole for whole, _ in pairs], [piece for _, piece in pairs])
    return wholes


def _dense(piece: torch.Tensor) -> torch.Tensor:
    """The piece itself, unless it is a sparse gradient."""
    return piece.detach() if piece.layout == torch.strided else piece.detach().to_dense()


def different_values(names: str) -> FragmentError:
    """The error for what the ranks were given, and not alike."""
    return RankMismatchError(f"the ranks gave different values for {names}: pass the same on every rank")


def agree(
    error: Exception | None,
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
    sums: Sequence[int] = (),
    name: Callable[[int], str] = str,
    scopes: Sequence[Sequence[dist.ProcessGroup]] | None = None,
    differ: Callable[[str], FragmentError] = different_values,
) -> None:
    """Raise on every rank of the groups if any rank has an error; one small collective for each group.

    All ranks of the groups must call it.

    Args:
        error: what is wrong here, or None.
        groups: whose ranks must all be right; without any, this rank alone.
        device: the parameters' device.
        sums: 64-bit numbers that should be the same on every rank.
        name: what the i-th of them is about.
        scopes: for each of them, in which groups it should be the same; in all of them unless told.
        differ: makes the error for sums that are not the same, given what they are about.

    Raises:
        FragmentError: the error of the lowest failing rank, or what ``differ`` makes.
        RankMismatchError: the sums are not the same, or not as many.
    """
    failing = [] if error is None else [status.encode(error)]
    fine: list[torch.Tensor] = []  # statuses without an error
    for _ in range(min(len(groups), 2)):  # the second round carries what one group knows to the ranks of another
        for group in groups:
            chosen = [i for i in range(len(sums)) if scopes is None or group in scopes[i]]
            digest = status.encode_sums([sums[i] for i in chosen])
            mine = status.first_of(failing) if failing else digest
            statuses = _all_gather(mine, group, device)
            found = statuses[statuses[:, 0] != 0]
            failing.extend(found)
            fine.extend(statuses[statuses[:, 0] == 0])
            if not len(found) and not torch.equal(statuses, mine.expand_as(statuses)):
                error_of_all = _mismatch(sums, chosen, statuses, group, device, name, differ)
                failing.append(status.encode(error_of_all, of_all=True))
    if failing:
        status.check(torch.stack(failing + fine), cause=error)


def _mismatch(
    sums: Sequence[int],
    chosen: list[int],
    statuses: torch.Tensor,
    group: dist.ProcessGroup,
    device: torch.device,
    name: Callable[[int], str],
    differ: Callable[[str], FragmentError],
) -> FragmentError:
    """Which of the sums differ; all ranks of the group call it once they know that some do."""
    counts = status.counts(statuses)
    if len(set(counts)) > 1:
        return RankMismatchError(
            f"the ranks of a group passed different numbers of things, by group rank: {counts}; make the same call on "
            "every rank"
        )
    rows = _all_gather(torch.tensor([sums[i] for i in chosen], dtype=torch.int64), group, device)
    different = [name(i) for i, equal in zip(chosen, (rows == rows[0]).all(dim=0).tolist(), strict=True) if not equal]
    names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
    return differ(names)


def _all_gather(mine: torch.Tensor, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """A CPU tensor of every rank of the group, stacked, on the CPU."""
    wired = mine.to(wire_device(group, device))
    _collectives.leave_gently(wired.device.type)
    rows = torch.empty(group.size(), *mine.shape, dtype=mine.dtype, device=wired.device)
    _collectives.all_gather(rows.view(-1), wired, group=group)
    return rows.cpu()
