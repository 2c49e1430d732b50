"""What ranks agree upon once an epoch, by torch's own collectives."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_loader._ledger import Ledger
from ds_loader.errors import LoaderStateError, UnevenRanksError


def require_group(argument: str) -> None:
    """Raise a ValueError if there is no process group to talk over."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{argument} needs a process group: call torch.distributed.init_process_group first")


def shortest_epoch(epoch: int, batch: int, length: int, group: Any, *, must_be_even: bool) -> int:
    """The fewest batches that an epoch has on any rank. All ranks of the group call it.

    Raises:
        UnevenRanksError: on all of them alike: the ranks are at different places; or, if it ``must_be_even``, their
            epochs have different lengths.
    """
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, (epoch, batch, length), group=group)
    if len({place[:2] for place in everybody}) > 1:
        told = ", ".join(f"rank {rank}: epoch {e}, batch {b}" for rank, (e, b, _) in enumerate(everybody))
        raise UnevenRanksError(f"the ranks are at different places ({told}): load states of one moment on all of them")
    lengths: list[int] = [length for _, _, length in everybody]
    if must_be_even and len(set(lengths)) > 1:
        told = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths))
        raise UnevenRanksError(
            f"the ranks have epochs of different length in batches ({told}): pass on_uneven='stop' to end each epoch "
            "with the shortest, or a sampler that divides evenly, such as DistributedSampler"
        )
    return min(lengths)


def require_alike(ledger: Ledger, rank: int, order: int | None, group: Any) -> None:
    """Raise the same LoaderStateError on all ranks if ledgers or orders differ. All ranks of the group call it."""
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, (rank, order, ledger.plain()), group=group)
    _, first_order, first = everybody[0]
    told = []
    for place, (_, order, plain) in enumerate(everybody):
        told += [
            f"{name}: {first[name]} on rank 0, {value} on rank {place}"
            for name, value in plain.items()
            if value != first[name]
        ]
        if order != first_order:
            told.append(f"rank {place} has another order of samples than rank 0")
    shares = [rank for rank, _, _ in everybody]
    if len(shares) >= first["world_size"] and set(shares) != set(range(first["world_size"])):
        told.append(f"the shares {sorted(shares)} of an epoch are taken, of {first['world_size']}")
    if told:
        raise LoaderStateError("the ranks do not go through one epoch together: " + "; ".join(told))
