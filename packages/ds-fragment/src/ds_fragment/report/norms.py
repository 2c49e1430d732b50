"""Norms and counts of many sharded parameters, computed on the shards: nothing is gathered but one number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import nn

from ds_fragment.engines.counts import count_over_ranks, is_absent, over_axes
from ds_fragment.engines.model import Named, check_what, named
from ds_fragment.engines.shards import Shards
from ds_fragment.errors import FragmentError, GradientUnavailableError, StateKeyError, StateNotReadyError


def norms(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "value", *, ord: float = 2
) -> dict[str | torch.Tensor, float]:
    """The norm of each whole parameter, gradient or optimizer state, the same on every rank.

    All ranks of the parameters' groups must call it; one small collective for each group. Sums are fp64 and added in
    rank order, so that the bits are the same on every rank and in every run. Of complex elements the magnitudes count;
    integers and booleans count as numbers, float8 as what it is upcast to, and of a sparse gradient the sums of what
    it has for one place.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        ord: 2, or ``float("inf")`` for the largest magnitude.

    Returns:
        By name where names were given, else by parameter. NaN and infinite elements show in the norm.

    Raises:
        ValueError: another ``ord``.
        FragmentError: a rank could not deliver its piece, or it is of a kind that has no norm; the same on every rank.
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
    counts = _reduced(params, what, _nonfinite, lambda rows: rows.sum(dim=0))
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
    shards = Shards(tensors, "value", "available")

    kinds = (GradientUnavailableError, StateNotReadyError, StateKeyError)

    def missing(param: torch.Tensor, error: FragmentError) -> int:
        if isinstance(error, kinds) or is_absent(param, error):
            return 1
        raise error

    counts = count_over_ranks(shards, check_what(what), missing)
    chosen = [item for item, count in enumerate(counts) if not count]
    return [tensors[i] for i in chosen] if names is None else [(names[i], tensors[i]) for i in chosen]


_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # what torch computes with as they are


def _sum_of_squares(piece: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(_magnitudes(piece), dtype=torch.float64)
    return norm.square()


def _largest(piece: torch.Tensor) -> torch.Tensor:
    found = _magnitudes(piece)
    return found.abs().amax() if found.numel() else found.new_zeros(())


def _nonfinite(piece: torch.Tensor) -> torch.Tensor:
    found = _elements(piece)
    return (~(found if found.is_complex() else _real(found)).isfinite()).sum()


def _magnitudes(piece: torch.Tensor) -> torch.Tensor:
    """The elements but for their signs, of a kind that torch computes with."""
    found = _elements(piece)
    return found.to(torch.complex128).abs() if found.is_complex() else _real(found)


def _real(found: torch.Tensor) -> torch.Tensor:
    return found if found.dtype in _FLOATS else found.to(torch.float64)  # which holds all of the others


def _elements(piece: torch.Tensor) -> torch.Tensor:
    """The elements as a dense tensor; of a sparse one those that it has, as the others are 0.

    Raises:
        RuntimeError: there are none to be had.
    """
    if piece.is_meta:
        raise RuntimeError("it is on the meta device and has no data")
    if piece.layout == torch.strided:
        return piece
    return piece.coalesce().values() if piece.layout == torch.sparse_coo else piece.to_dense()


def _reduced(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str,
    measure: Callable[[torch.Tensor], torch.Tensor],
    combine: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str | torch.Tensor, float]:
    names, tensors = named(params)
    shards = Shards(tensors, check_what(what), "norms or count_nonfinite")

    def share(item: int) -> torch.Tensor:
        sharding, piece = shards.shardings[item], shards.local(item)
        if piece is None or sharding.rank in sharding.layout.copies:
            return torch.zeros((), device=sharding.device)
        try:
            return measure(piece)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise FragmentError(
                f"'{what}' of {shards.name(item)} is a {type(piece).__name__} of {piece.dtype} and {piece.layout} on "
                f"{piece.device.type}, which torch does not measure: {str(error).partition(chr(10))[0]}"
            ) from error

    with shards.named_if_broken(range(len(tensors))):
        axes = [() if sharding.alone else sharding.shards for sharding in shards.shardings]
        totals = over_axes(axes, shards.device(), share, combine, shards.gather)
    keys: list[str | torch.Tensor] = list(tensors if names is None else names)
    return dict(zip(keys, totals, strict=True))
