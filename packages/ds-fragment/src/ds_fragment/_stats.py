"""Norms and counts of many sharded parameters, computed on the shards: nothing is gathered but one number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment._exchange import Place, Plan, gather
from ds_fragment._layout import Fragment, Layout
from ds_fragment._read import Named, Quantity, check_what, named


def norms(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "value", *, ord: float = 2
) -> dict[str | torch.Tensor, float]:
    """The norm of each whole parameter, gradient or optimizer state, the same on every rank.

    All ranks of the parameters' groups must call it; one small collective for each group. Sums are fp64 and added in
    rank order, so that the bits are the same on every rank and in every run.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        ord: 2, or ``float("inf")`` for the largest magnitude.

    Returns:
        By name where names were given, else by parameter. NaN and infinite elements show in the norm.

    Raises:
        ValueError: another ``ord``.
        FragmentError: a rank could not deliver its piece; the same on every rank.
    """
    if ord not in (2, math.inf):
        raise ValueError(f"ord is {ord}, expected 2 or float('inf')")
    if ord == 2:
        sums = _reduced(params, what, _sum_of_squares, lambda rows: rows.sum(dim=0))
        return {key: math.sqrt(total) if total == total else total for key, total in sums.items()}
    return _reduced(params, what, _largest, lambda rows: rows.amax(dim=0))


def count_nonfinite(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "value"
) -> dict[str | torch.Tensor, int]:
    """How many elements of each whole quantity are NaN or infinite; otherwise as `norms`."""
    counts = _reduced(params, what, lambda piece: (~piece.isfinite()).sum(), lambda rows: rows.sum(dim=0))
    return {key: int(count) for key, count in counts.items()}


def _sum_of_squares(piece: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(piece, dtype=torch.float64)
    return norm.square()


def _largest(piece: torch.Tensor) -> torch.Tensor:
    return piece.abs().amax() if piece.numel() else piece.new_zeros(())


def _reduced(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str,
    measure: Callable[[torch.Tensor], torch.Tensor],
    combine: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str | torch.Tensor, float]:
    names, tensors = named(params)
    quantity = Quantity(tensors, check_what(what))
    result: dict[int, float] = {}
    by_group: dict[dist.ProcessGroup | None, list[int]] = {}
    for item, place in enumerate(quantity.places):
        by_group.setdefault(None if place.alone else place.group, []).append(item)

    def row(items: list[int]) -> torch.Tensor:
        """This rank's share, fp64, (1, items); a copy of what another rank has counts nothing."""
        shares = []
        for item in items:
            place, piece = quantity.places[item], quantity.local(item)
            counts = piece is not None and place.rank not in place.layout.copies
            share = measure(piece) if counts and piece is not None else torch.zeros((), device=place.device)
            shares.append(share.to(device=place.device, dtype=torch.float64))
        return torch.stack(shares).view(1, -1)

    # One row a rank, brought together like a parameter that is sharded by rows.
    groups = list(by_group)
    places = []
    for group in groups:
        ranks, count = 1 if group is None else group.size(), len(by_group[group])
        rows = Layout((ranks, count), tuple(Fragment((rank, 0), (1, count)) for rank in range(ranks)))
        device = quantity.places[by_group[group][0]].device
        places.append(Place(torch.Size((ranks, count)), torch.float64, device, rows, group))
    plan = Plan(places, bucket_bytes=1 << 30)
    for bucket in gather(plan, lambda i: row(by_group[groups[i]])):
        for group, rows_of in zip(groups, bucket, strict=True):
            assert rows_of is not None
            result.update(zip(by_group[group], combine(rows_of).tolist(), strict=True))
    keys: list[str | torch.Tensor] = list(tensors if names is None else names)
    return {key: result[item] for item, key in enumerate(keys)}
