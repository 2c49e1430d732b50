"""Norms and counts of many sharded parameters, computed on the shards: nothing is gathered but one number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import nn

from ds_fragment._availability import count_over_ranks, is_absent, over_ranks
from ds_fragment._quantity import Quantity
from ds_fragment._read import Named, check_what, named
from ds_fragment.errors import FragmentError, GradientUnavailableError, StateKeyError, StateNotReadyError


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


@overload
def available(params: nn.Module | Iterable[Named], what: str = "grad") -> list[Named]: ...
@overload
def available(params: Iterable[torch.Tensor], what: str = "grad") -> list[torch.Tensor]: ...
def available(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "grad"
) -> list[Named] | list[torch.Tensor]:
    """The parameters of which a quantity can be read now, the same list on every rank.

    A mixture of experts leaves some experts without a gradient in some steps: ``norms(available(model), "grad")`` is
    the norms of the others. All ranks of the parameters' groups must call it; one small collective for each group.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        what: ``"grad"``, or the key of an optimizer state.

    Returns:
        (name, parameter) pairs where names were given, else parameters: those that no rank would raise
        `GradientUnavailableError`, `StateNotReadyError` or `StateKeyError` for, and that are trained.
    """
    names, tensors = named(params)
    quantity = Quantity(tensors, "value", "available")

    kinds = (GradientUnavailableError, StateNotReadyError, StateKeyError)

    def missing(param: torch.Tensor, error: FragmentError) -> int:
        if isinstance(error, kinds) or is_absent(param, error):
            return 1
        raise error

    counts = count_over_ranks(quantity, check_what(what), missing)
    chosen = [item for item, count in enumerate(counts) if not count]
    return [tensors[i] for i in chosen] if names is None else [(names[i], tensors[i]) for i in chosen]


def _sum_of_squares(piece: torch.Tensor) -> torch.Tensor:
    floating = piece if piece.is_floating_point() or piece.is_complex() else piece.double()
    norm: torch.Tensor = torch.linalg.vector_norm(floating, dtype=torch.float64)
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
    quantity = Quantity(tensors, check_what(what), "norms or count_nonfinite")

    def share(item: int) -> torch.Tensor:
        place, piece = quantity.places[item], quantity.local(item)
        counts = piece is not None and place.rank not in place.layout.copies
        return measure(piece) if counts and piece is not None else torch.zeros((), device=place.device)

    with quantity.named_if_broken(range(len(tensors))):
        groups = [None if place.alone else place.group for place in quantity.places]
        totals = over_ranks(groups, quantity.device(), share, combine, quantity.gather)
    keys: list[str | torch.Tensor] = list(tensors if names is None else names)
    return dict(zip(keys, totals, strict=True))
