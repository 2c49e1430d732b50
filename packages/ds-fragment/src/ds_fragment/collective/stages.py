"""Gather shards axis by axis where no group has all ranks that hold one: [Note: stages] of `Sharding`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ds_fragment.collective.agree import raise_as_told
from ds_fragment.collective.exchange import Locate, Shards, gather
from ds_fragment.collective.plan import Plan
from ds_fragment.sharding import Sharding

_EVERYTHING = 1 << 62  # bytes of a bucket that takes all


def gather_by_stages(
    shardings: Sequence[Sharding], plan: Plan, locate: Locate, *, dst: int | None, told: set[dist.ProcessGroup]
) -> Iterator[list[torch.Tensor | None]]:
    """As `gather`, bucket after bucket, for shardings of which some have stages.

    A rank that knows of a failure takes part until the end, and sends its mark instead of its shards.

    Args:
        shardings: of all items.
        plan: of the last stages.
        locate: this rank's shards of some items, before the first stage.
        dst: as in `gather`, for the last stage; the earlier stages give theirs to all ranks of their groups.
        told: as in `gather`.
    """
    failure: Exception | None = None
    for bucket in plan.buckets:
        try:
            shards = _earlier_stages([shardings[item] for item in bucket.items], bucket.items, locate, failure, told)
            located = _those(shards)
        except Exception as error:
            failure = failure or error
            located = raising(failure)
        try:
            wholes = _one_bucket([shardings[item].last for item in bucket.items], located, dst, told)
        except Exception as error:
            failure = failure or error
        if failure is None:
            yield wholes
    if failure is not None:
        raise_as_told(failure, told=bool(told))


def _earlier_stages(
    shardings: Sequence[Sharding],
    items: Sequence[int],
    locate: Locate,
    failure: Exception | None,
    told: set[dist.ProcessGroup],
) -> Shards:
    """What this rank has of some items once all stages but the last are done."""
    shards: list[torch.Tensor | None] = [None] * len(items)
    try:
        if failure is None:
            shards = list(locate(items))
    except Exception as error:
        failure = error
    stages = [sharding.stages[:-1] for sharding in shardings]
    for level in range(max(map(len, stages))):
        chosen = [at for at, earlier in enumerate(stages) if level < len(earlier)]
        located = raising(failure) if failure is not None else _those([shards[at] for at in chosen])
        try:
            wholes = _one_bucket([stages[at][level] for at in chosen], located, None, told)
        except Exception as error:
            failure = failure or error
            continue
        for at, whole in zip(chosen, wholes, strict=True):
            shards[at] = whole
    if failure is not None:
        raise failure
    return shards


def _one_bucket(
    shardings: Sequence[Sharding], locate: Locate, dst: int | None, told: set[dist.ProcessGroup]
) -> list[torch.Tensor | None]:
    (wholes,) = gather(Plan(shardings, _EVERYTHING), locate, dst=dst, told=told)
    return wholes


def _those(shards: Shards) -> Locate:
    return lambda items: [shards[item] for item in items]


def raising(error: Exception) -> Locate:
    """What a rank that has an error locates."""

    def locate(_: Sequence[int]) -> Shards:
        raise error

    return locate
