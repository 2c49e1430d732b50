"""Bring the fragments of many parameters together, bucket by bucket; and have all ranks agree before a write.

[Note: buckets] Parameters travel in the caller's order, as many at a time as fit ``bucket_bytes``. The next bucket is
in flight while the caller works on this one. What travels in place takes its own room only. What is packed takes as
much again until it is unpacked, so it counts twice. How one bucket travels over one group is `_wire`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

from ds_fragment import _collectives, _status
from ds_fragment._place import Place, box, wire_device
from ds_fragment._wire import Flight, Locate, Wire, stretches_of
from ds_fragment.errors import FragmentError, RankMismatchError

__all__ = ["Locate", "Place", "Plan", "agree", "box", "gather", "wire_device"]


class Plan:
    """What travels with what, for one list of places: made once, used for as long as the places stay the same."""

    def __init__(self, places: Sequence[Place], bucket_bytes: int) -> None:
        self.places = places
        self.buckets: list[list[int]] = []
        filled = 0
        for item, place in enumerate(places):
            taken = place.nbytes if place.alone or stretches_of(place) else 2 * place.nbytes
            if not self.buckets or filled + taken > bucket_bytes:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(item)
            filled += taken
        self.wires = [self._wires_of(bucket) for bucket in self.buckets]
        self.groups = len({wire.group for wires in self.wires for wire in wires})

    def _wires_of(self, bucket: list[int]) -> list[Wire]:
        groups: dict[dist.ProcessGroup, list[int]] = {}
        for item in bucket:
            place = self.places[item]
            if place.group is not None and not place.alone:
                groups.setdefault(place.group, []).append(item)
        return [Wire(group, items, self.places) for group, items in groups.items()]


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
    here = dst is None or dist.get_rank() == dst
    flights: list[tuple[list[Flight], dict[int, torch.Tensor]]] = []
    started = 0

    def start(locate: Locate) -> None:
        nonlocal started
        in_place = [item for wire in plan.wires[started] for item in wire.in_place] if here else []
        wholes = {item: _room(plan.places[item], item, out) for item in in_place}
        flights.append(([Flight.start(wire, locate, wholes, dst) for wire in plan.wires[started]], wholes))
        started += 1

    def land(items: list[int]) -> list[torch.Tensor | None]:
        """The oldest bucket under way, which nothing refers to any more afterwards."""
        landing, wholes = flights.pop(0)
        shared = True  # whether the other ranks of the group learn of a failure with this bucket
        try:
            for flight in landing:
                flight.land()
            shared = False
            for item in items if here else ():
                if item not in wholes:
                    wholes[item] = _room(plan.places[item], item, out)
                if plan.places[item].alone:
                    _fill(wholes[item], locate(item), item)
            for flight in landing:
                flight.deliver()
        except Exception as error:
            for flight in landing:
                flight.wait()
            # Ranks that learn of it with a later bucket only must not wait for that in vain.
            while started < len(plan.buckets) and (plan.groups > 1 or not shared):
                start(partial(_raise, error))
            if isinstance(error, FragmentError):  # say it here in the words in which the others will hear it
                _status.check(_status.encode(error).view(1, -1), cause=error.__cause__ or error)
            raise
        return [wholes.get(item) for item in items]

    try:
        for bucket, items in enumerate(plan.buckets):
            while started < min(bucket + 2, len(plan.buckets)):
                start(locate)
            yield land(items)
    finally:
        for flight in (f for left, _ in flights for f in left):
            flight.wait()


def _raise(error: Exception, _item: int) -> torch.Tensor | None:
    raise error


def _room(place: Place, item: int, out: Callable[[int], torch.Tensor] | None) -> torch.Tensor:
    return torch.empty(place.shape, dtype=place.dtype, device=place.device) if out is None else out(item)


def _fill(target: torch.Tensor, piece: torch.Tensor | None, item: int) -> None:
    """The whole from a piece that is the whole."""
    held = 0 if piece is None else piece.numel()
    if held != target.numel():
        raise FragmentError(f"item {item}: {held} elements are here where the whole has {target.numel()}")
    if piece is not None:
        target.copy_(piece.detach().view(target.shape))


def agree(
    error: Exception | None,
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
    sums: Sequence[int] = (),
    name: Callable[[int], str] = str,
    scopes: Sequence[Sequence[dist.ProcessGroup]] | None = None,
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

    Raises:
        FragmentError: the error of the lowest failing rank.
        RankMismatchError: the sums are not the same.
    """
    failing = [] if error is None else [_status.encode(error)]
    for _ in range(min(len(groups), 2)):  # the second round carries what one group knows to the ranks of another
        for group in groups:
            chosen = [i for i in range(len(sums)) if scopes is None or group in scopes[i]]
            digest = _status.encode_sums([sums[i] for i in chosen])
            mine = min(failing, key=_status.rank_of, default=digest)
            statuses = _all_gather(mine, group, device)
            found = statuses[statuses[:, 0] != 0]
            failing.extend(found)
            if not len(found) and not torch.equal(statuses, mine.expand_as(statuses)):
                failing.append(_status.encode(_mismatch(sums, chosen, statuses, group, device, name)))
    if failing:
        _status.check(torch.stack(failing), cause=error)


def _mismatch(
    sums: Sequence[int],
    chosen: list[int],
    statuses: torch.Tensor,
    group: dist.ProcessGroup,
    device: torch.device,
    name: Callable[[int], str],
) -> RankMismatchError:
    """Which of the sums differ; all ranks of the group call it once they know that some do."""
    counts = _status.counts(statuses)
    if len(set(counts)) > 1:
        return RankMismatchError(
            f"the ranks of a group passed different numbers of things, by group rank: {counts}; make the same call on "
            "every rank"
        )
    rows = _all_gather(torch.tensor([sums[i] for i in chosen], dtype=torch.int64), group, device)
    different = [name(i) for i, equal in zip(chosen, (rows == rows[0]).all(dim=0).tolist(), strict=True) if not equal]
    names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
    return RankMismatchError(f"the ranks gave different values for {names}: pass the same on every rank")


def _all_gather(mine: torch.Tensor, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """A CPU tensor of every rank of the group, stacked, on the CPU."""
    wired = mine.to(wire_device(group, device))
    rows = torch.empty(group.size(), *mine.shape, dtype=mine.dtype, device=wired.device)
    _collectives.all_gather(rows.view(-1), wired, group=group)
    return rows.cpu()
