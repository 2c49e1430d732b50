"""The global order of samples: how it is cut into batches for each rank, and what of it was handed out.

[Note: order, share, plan] The *order* is the list of sample indices of one epoch over all ranks, before anything is
padded or dropped. A rank's *share* is its part of the order, or of the rest of it. A *plan* says how shares are cut: by
`DistributedSampler`, by Accelerate's `BatchSamplerShard`, or not at all. With each of them, what all ranks together
were handed after any number of steps is a prefix of the order. So the length of the prefix is all that another number
of ranks needs to know to go on.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler


@dataclass(frozen=True)
class Plan:
    """How an order is cut into batches.

    Attributes:
        sampler: the innermost sampler of the loader, which gives the order or, if ``distributed``, a share of it.
        world_size, rank: among how many the order is divided, and which of them this is.
        batch_size: samples of one rank in one batch; None if the loader hands out samples instead of batches.
        drop_last: whether a last batch that is too small is left out.
        distributed: whether the sampler has ``num_replicas`` and ``rank``.
        drop_tail: whether the sampler leaves out what does not divide by the ranks, instead of repeating samples.
        shard: Accelerate's batch sampler, if one divides the batches.
        simple: whether batches are cut by PyTorch's own ``BatchSampler`` straight from the sampler.
    """

    sampler: Any
    world_size: int
    rank: int
    batch_size: int | None
    drop_last: bool
    distributed: bool = False
    drop_tail: bool = False
    shard: Any = None
    simple: bool = True

    @property
    def length(self) -> int:
        """Samples in one epoch of all ranks, before padding."""
        return len(self.sampler.dataset) if self.distributed else len(self.sampler)

    def handed_out(self, batches: int, rest: int) -> int:
        """How many of the ``rest`` last samples of an order all ranks have together after so many batches each."""
        tail = rest // self.world_size * self.world_size if self.distributed and self.drop_tail else rest
        return min(batches * (self.batch_size or 1) * self.world_size, tail)

    def batches(self, rest: Sequence[Any], world_size: int, rank: int, batch_size: int | None) -> Iterator[Any]:
        """The batches of indices that one rank takes of the rest of an order."""
        if not rest:
            return iter(())
        if self.shard is not None:
            whole = (batch_size or 1) * (world_size if self.shard.split_batches else 1)
            shard = copy.copy(self.shard)
            shard.batch_sampler = BatchSampler(rest, whole, self.drop_last)
            shard.batch_size = whole
            shard.num_processes, shard.process_index = world_size, rank
            return iter(shard)
        share = iter(self.share(rest, world_size, rank))
        if batch_size is None:
            return share
        return iter(BatchSampler(share, batch_size, self.drop_last))

    def share(self, rest: Sequence[Any], world_size: int, rank: int) -> Iterable[Any]:
        """The samples that one rank takes of the rest of an order."""
        if world_size == 1 or not rest:
            return rest
        everybody: Any = rest  # a sequence is all that the sampler needs of a dataset
        places: Iterable[int] = DistributedSampler(everybody, world_size, rank, shuffle=False, drop_last=self.drop_tail)
        return [rest[place] for place in places]

    def order(self) -> list[Any]:
        """The order of the epoch that the sampler was told.

        Raises:
            ValueError: the sampler divides it among the ranks in another way than PyTorch's ``DistributedSampler``.
        """
        if not self.distributed:
            return list(self.sampler)
        alone = copy.copy(self.sampler)
        alone.num_replicas, alone.rank = 1, 0
        for name in ("num_samples", "total_size"):
            if name in vars(alone):
                setattr(alone, name, self.length)
        return list(alone)


def plan_of(indices: Any, *, batched: bool = True) -> Plan | None:
    """The plan of a loader's index sampler, or None if one of its parts is not known.

    Args:
        indices: a batch sampler, or a sampler if not ``batched``.
    """
    accelerate = sys.modules.get("accelerate.data_loader")
    shard = None
    if accelerate is not None and type(indices) is accelerate.BatchSamplerShard:
        shard, indices = indices, indices.batch_sampler
    batch_size, drop_last, simple = None, False, shard is None
    if batched:
        if not _cuts_plainly(indices) or not isinstance(indices.batch_size, int):
            return None
        batch_size, drop_last, indices = indices.batch_size, indices.drop_last, indices.sampler
    replicas: Any = getattr(indices, "num_replicas", None)
    rank: Any = getattr(indices, "rank", None)
    distributed = isinstance(replicas, int) and isinstance(rank, int)
    if (distributed and (shard is not None or not hasattr(indices, "dataset"))) or not hasattr(indices, "__len__"):
        return None
    if shard is not None:
        if shard.split_batches:
            batch_size = (batch_size or 1) // shard.num_processes
        return Plan(indices, shard.num_processes, shard.process_index, batch_size, drop_last, shard=shard, simple=False)
    if distributed:
        tail = bool(getattr(indices, "drop_last", False))
        return Plan(indices, replicas, rank, batch_size, drop_last, distributed=True, drop_tail=tail)
    return Plan(indices, 1, 0, batch_size, drop_last, simple=simple)


def _cuts_plainly(batch_sampler: object) -> bool:
    """Whether it is PyTorch's own batch sampler, or torchdata's."""
    kind = type(batch_sampler)
    return kind is BatchSampler or (kind.__name__ == "BatchSampler" and kind.__module__.startswith("torchdata."))


@dataclass(frozen=True)
class Coverage:
    """What an epoch's samples came to, over all ranks: those handed out so far and those that will be.

    Attributes:
        epoch: from 0.
        length: samples in the epoch.
        seen: how many of them were handed out.
        left: how many others will be.
        twice: how many are handed out more than once. Where ranks divide unevenly, samplers repeat a few to even out.
        lost: how many are not handed out at all: those that ``drop_last`` leaves out, and no others.
        dropped: how many of those ``drop_last`` leaves out.
    """

    epoch: int
    length: int
    seen: int
    left: int
    twice: int
    lost: int
    dropped: int


def coverage(
    epoch: int, order: Sequence[Any], segments: Sequence[tuple[int, int | None, int]], seen: int, plan: Plan
) -> Coverage:
    """Count every sample of an epoch: cut the order again for every rank of every segment.

    Args:
        epoch: from 0.
        order: all samples.
        segments: (world size, batch size, samples handed out before) of each piece of the epoch that one number of
            ranks went through; the last one is not over.
        seen: samples handed out.
        plan: how orders are cut.
    """
    out: Counter[Any] = Counter()
    ends = [*(start for _, _, start in segments[1:]), seen]
    for (world_size, batch_size, start), end in zip(segments, ends, strict=True):
        rest = order[start:]
        steps = -(-(end - start) // (world_size * (batch_size or 1)))
        for rank in range(world_size):
            out.update(_flat(islice(plan.batches(rest, world_size, rank, batch_size), steps), batch_size))
    handed = Counter(out)
    world_size, batch_size, start = segments[-1]
    rest = order[start:]
    steps = -(-(seen - start) // (world_size * (batch_size or 1)))
    for rank in range(world_size):
        out.update(_flat(islice(plan.batches(rest, world_size, rank, batch_size), steps, None), batch_size))
    all_of_them = Counter(order)
    lost = sum((all_of_them - out).values())
    may_drop = plan.drop_last or plan.drop_tail
    most = (plan.world_size * (plan.batch_size or 1) - 1 if plan.drop_last else plan.world_size - 1) if may_drop else 0
    return Coverage(
        epoch=epoch,
        length=len(order),
        seen=sum((handed & all_of_them).values()),
        left=sum((out & all_of_them).values()) - sum((handed & all_of_them).values()),
        twice=sum((out - all_of_them).values()),
        lost=lost,
        dropped=min(lost, most),
    )


def _flat(batches: Iterable[Any], batch_size: int | None) -> Iterator[Any]:
    return iter(batches) if batch_size is None else (index for batch in batches for index in batch)
