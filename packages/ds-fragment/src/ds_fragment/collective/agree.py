"""Have the ranks agree: on an error of any of them, or on numbers that have to be the same on all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ds_fragment import _collectives
from ds_fragment._collectives import CollectiveError, device_for
from ds_fragment.collective import status
from ds_fragment.errors import FragmentError, RankMismatchError


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


def everyone() -> list[dist.ProcessGroup]:
    """The default group; none without torch.distributed."""
    world = dist.group.WORLD if dist.is_initialized() else None
    return [] if world is None else [world]


def share(mine: Any) -> list[Any]:
    """What every rank of the default group passed, by rank. All of them must call it.

    Args:
        mine: what JSON can hold.
    """
    blob, groups, device = json.dumps(mine).encode(), everyone(), torch.device("cpu")
    if not groups:
        return [json.loads(blob)]
    (group,) = groups
    sizes = _all_gather(torch.tensor([len(blob)]), group, device).flatten().tolist()
    padded = torch.frombuffer(bytearray(blob.ljust(max(sizes), b" ")), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in _all_gather(padded, group, device)]


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
    moved = mine.to(device_for(group, device))
    _collectives.leave_gently(moved.device.type)
    rows = torch.empty(group.size(), *mine.shape, dtype=mine.dtype, device=moved.device)
    _collectives.all_gather(rows.view(-1), moved, group=group)
    return rows.cpu()


def raise_as_told(error: Exception, *, told: bool) -> NoReturn:
    """Raise an error of this rank's in the words in which others hear it; ``told`` is whether any do."""
    try:
        told = isinstance(error, FragmentError) or (told and not isinstance(error, CollectiveError))
        if told and not getattr(error, "status", b""):
            status.check(status.encode(error).view(1, -1), cause=error.__cause__ or error)
        raise error
    finally:
        del error  # whose traceback refers to this frame
