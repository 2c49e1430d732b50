"""Gather shards axis by axis where no group has all ranks that hold one: [Note: stages] of `Sharding`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ds_fragment.collective.exchange import (
    Locate,
    Pieces,
    Plan,
    Sharding,
    agree,
    gather,
    plan_of,
    raise_as_told,
    raising,
)
from ds_fragment.errors import FragmentError

_EVERYTHING = 1 << 62  # bytes of a bucket that takes all


def gather_by_stages(
    shardings: Sequence[Sharding],
    plan: Plan,
    locate: Locate,
    *,
    dst: int | None,
    settle: Sequence[dist.ProcessGroup],
    told: set[dist.ProcessGroup],
) -> Iterator[list[torch.Tensor | None]]:
    """As `gather`, bucket after bucket, for places of which some have stages.

    A rank that knows of a failure takes part until the end, and sends it in the place of its pieces.

    Args:
        places: of all items.
        plan: of the last stages: what travels with what.
        locate: this rank's pieces of some items, before the first stage.
        dst: as in `gather`, for the last stage; the earlier ones bring theirs to all ranks of their groups.
        settle: as in `gather`.
        told: as in `gather`.
    """
    failure: Exception | None = None
    for items in plan.buckets:
        try:
            located = _first_stages([shardings[item] for item in items], items, locate, failure, told)
        except Exception as error:
            failure = failure or error
            located = raising(failure)
        try:
            wholes = _one_bucket([shardings[item].last for item in items], located, dst, told)
        except Exception as error:
            failure = failure or error
        if failure is None:
            yield wholes
    for group in settle:
        try:
            agree(failure, [group], plan.shardings[0].device)
        except FragmentError as error:
            failure = error
    if failure is not None:
        raise_as_told(failure, told=bool(told))


def _first_stages(
    shardings: Sequence[Sharding],
    items: Sequence[int],
    locate: Locate,
    failure: Exception | None,
    told: set[dist.ProcessGroup],
) -> Locate:
    """What the last stage of some items begins with: this rank's pieces after the stages before it."""
    pieces: list[torch.Tensor | None] = [None] * len(items)
    try:
        if failure is None:
            pieces = list(locate(items))
    except Exception as error:
        failure = error
    before_last = [sharding.stages[:-1] for sharding in shardings]
    for level in range(max(map(len, before_last))):
        chosen = [at for at, stages in enumerate(before_last) if level < len(stages)]
        located = raising(failure) if failure is not None else _those([pieces[at] for at in chosen])
        try:
            wholes = _one_bucket([before_last[at][level] for at in chosen], located, None, told)
        except Exception as error:
            failure = failure or error
            continue
        for at, whole in zip(chosen, wholes, strict=True):
            pieces[at] = whole
    if failure is not None:
        raise failure
    return _those(pieces)


def _one_bucket(
    shardings: Sequence[Sharding], locate: Locate, dst: int | None, told: set[dist.ProcessGroup]
) -> list[torch.Tensor | None]:
    (wholes,) = gather(plan_of(shardings, _EVERYTHING), locate, dst=dst, told=told)
    return wholes


def _those(pieces: Pieces) -> Locate:
    return lambda items: [pieces[item] for item in items]
