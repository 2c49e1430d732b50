"""What ranks agree upon once an epoch, by torch's own collectives."""

from __future__ import annotations

from typing import Any

import torch
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
    everybody = _gathered([epoch, batch, length], group)
    if len({(e, b) for e, b, _ in everybody}) > 1:
        told = ", ".join(f"rank {rank}: epoch {e}, batch {b}" for rank, (e, b, _) in enumerate(everybody))
        raise UnevenRanksError(f"the ranks are at different places ({told}): load states of one moment on all of them")
    lengths = [length for _, _, length in everybody]
    if must_be_even and len(set(lengths)) > 1:
        told = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths))
        raise UnevenRanksError(
            f"the ranks have epochs of different length in batches ({told}): pass on_uneven='stop' to end each epoch "
            "with the shortest, or a sampler that divides evenly, such as DistributedSampler"
        )
    return min(lengths)


def require_alike(ledger: Ledger, rank: int, order: int, group: Any) -> None:
    """Raise the same LoaderStateError on all ranks if ledgers or orders differ. All ranks of the group call it."""
    names = ("epoch", "samples", "world_size", "batch_size", "length")
    # None, of a batch size, is told as -1.
    mine = [-1 if value is None else value for value in (getattr(ledger, name) for name in names)]
    everybody = _gathered([rank, order, *mine], group)
    _, first_order, *first = everybody[0]
    told = []
    for place, (_, other_order, *other) in enumerate(everybody):
        told += [
            f"{name}: {here} on rank 0, {there} on rank {place}"
            for name, here, there in zip(names, first, other, strict=True)
            if here != there
        ]
        if other_order != first_order:
            told.append(f"rank {place} has another order of samples than rank 0")
    shares = sorted(numbers[0] for numbers in everybody)
    ranks = first[names.index("world_size")]
    if len(shares) >= ranks and set(shares) != set(range(ranks)):
        told.append(f"the shares {shares} of an epoch are taken, of {ranks}")
    if told:
        raise LoaderStateError("the ranks do not go through one epoch together: " + "; ".join(told))


def _gathered(numbers: list[int], group: Any) -> list[list[int]]:
    """The numbers of every rank; as tensors, since torch gathers objects by way of numpy, which may be missing."""
    whole: Any = dist.group.WORLD if group is None else group
    if "cpu" in {device.type for device in whole._device_types}:
        device = torch.device("cpu")
    else:
        kind: Any = torch.accelerator.current_accelerator()
        device = torch.device(kind.type, torch.get_device_module(kind).current_device())
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    return [theirs.tolist() for theirs in everybody]
