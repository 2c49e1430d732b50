"""Norms and counts of many sharded parameters, computed on the shards: nothing is gathered but one number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import compress
from operator import attrgetter
from typing import overload

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.collective.plan import bucket_bytes_for
from ds_fragment.engines.counts import count_over_ranks, is_absent, over_axes
from ds_fragment.engines.model import Named, check_what, named
from ds_fragment.engines.shards import Shards
from ds_fragment.errors import FragmentError, GradientUnavailableError, StateKeyError, StateNotReadyError
from ds_fragment.report.measures import Measure, largest, nonfinite, squares, total

_copies = attrgetter("layout.copies")


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
    _check_ord(ord)
    if ord == 2:
        sums = _reduced(params, what, squares, lambda rows: rows.sum(dim=0))
        return {key: math.sqrt(total) if total == total else total for key, total in sums.items()}
    return _reduced(params, what, largest, lambda rows: rows.amax(dim=0))


def count_nonfinite(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "value"
) -> dict[str | torch.Tensor, int]:
    """How many elements of each whole quantity are NaN or infinite; otherwise as `norms`."""
    counts = _reduced(params, what, nonfinite, lambda rows: rows.sum(dim=0))
    return {key: int(count) for key, count in counts.items()}


def total_norm(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named], what: str = "value", *, ord: float = 2
) -> float:
    """The norm over all parameters together, as `torch.nn.utils.clip_grad_norm_` computes it for gradients.

    All ranks of the parameters' groups must call it; one small collective for each group. What is replicated counts
    once. Of a mixture of experts each rank's own experts count: pass it the parameters that are to be together.

    Args:
        params: a module, parameters, or (name, parameter) pairs; of gradients those that have one, see `available`.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        ord: 2, or ``float("inf")`` for the largest magnitude.

    Returns:
        The norm; 0.0 without parameters, NaN or infinite where an element is. As with `norms` sums are fp64 and have
        the same bits on every rank. Where the CUDA kernels run squares are fp32, of which that of a magnitude over
        1.8e19 is infinite.

    Raises:
        ValueError: another ``ord``.
        FragmentError: a rank could not deliver its piece, or it is of a kind that has no norm; the same on every rank.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
    5.0
    """
    _check_ord(ord)
    _, tensors = named(params)
    shards = Shards(tensors, check_what(what), "total_norm")
    together: Callable[..., torch.Tensor] = torch.sum if ord == 2 else torch.amax
    combine: Callable[[torch.Tensor], torch.Tensor] = partial(together, dim=0)
    measure = partial(total, ord=ord)
    by_axes: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for item, sharding in enumerate(shards.shardings):
        by_axes.setdefault(() if sharding.alone else sharding.shards, []).append(item)
    parts = list(by_axes.values())

    def numbers(chosen: list[int]) -> torch.Tensor:
        found = torch.zeros(len(chosen), dtype=torch.float64, device=shards.device())
        for at, part in enumerate(chosen):
            items = parts[part]
            sums = [_measured(measure, own, shards, [items[i] for i in of]) for of, own in _own_pieces(shards, items)]
            if sums:
                found[at] = together(torch.cat([each.to(found.device) for each in sums]))
        return found

    with shards.named_if_broken(range(len(tensors))):
        totals = over_axes(list(by_axes), shards.device(), numbers, combine, shards.gather)
    norm = float(together(torch.tensor(totals, dtype=torch.float64))) if totals else 0.0
    return math.sqrt(norm) if ord == 2 and norm == norm else norm


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
        (name, parameter) pairs where names were given, else parameters, those that no rank would raise
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


def _check_ord(ord: float) -> None:
    if ord not in (2, math.inf):
        raise ValueError(f"ord is {ord}, expected 2 or float('inf')")


def _reduced(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str,
    measure: Measure,
    combine: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str | torch.Tensor, float]:
    names, tensors = named(params)
    shards = Shards(tensors, check_what(what), "norms or count_nonfinite")

    def numbers(items: list[int]) -> torch.Tensor:
        found = torch.zeros(len(items), dtype=torch.float64, device=shards.device())
        for at, pieces in _own_pieces(shards, items):
            measured = _measured(measure, pieces, shards, [items[i] for i in at])
            if len(at) == len(items):
                return measured
            found[torch.tensor(at, device=found.device)] = measured.to(found.device)
        return found

    with shards.named_if_broken(range(len(tensors))):
        axes = [() if sharding.alone else sharding.shards for sharding in shards.shardings]
        totals = over_axes(axes, shards.device(), numbers, combine, shards.gather)
    keys: list[str | torch.Tensor] = list(tensors if names is None else names)
    return dict(zip(keys, totals, strict=True))


def _own_pieces(shards: Shards, items: list[int]) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Positions in ``items`` and this rank's pieces of those, but for copies of what a lower rank of the group has.

    Values are views, and come at once. Of gradients and state, which some engines copy, as many as fill a bucket.
    """
    for batch in _batches(shards, items):
        found = shards.pieces([items[i] for i in batch])
        places = [shards.shardings[items[i]] for i in batch]
        own = [piece is not None for piece in found]
        if any(map(_copies, places)):
            own = [has and place.rank not in place.layout.copies for has, place in zip(own, places, strict=True)]
        pieces = [piece for piece in compress(found, own) if piece is not None]
        if pieces:
            yield list(compress(batch, own)), pieces


def _batches(shards: Shards, items: list[int]) -> Iterator[list[int]]:
    if shards.what == "value":
        yield list(range(len(items)))
        return
    batch, filled, limit = list[int](), 0, bucket_bytes_for(shards.shardings)
    for position, item in enumerate(items):
        batch.append(position)
        filled += shards.shardings[item].nbytes
        if filled >= limit:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _measured(measure: Measure, pieces: list[torch.Tensor], shards: Shards, items: list[int]) -> torch.Tensor:
    """What is measured of some items' pieces.

    Raises:
        FragmentError: torch does not measure one of them.
    """
    with torch.no_grad():
        try:
            return measure(pieces)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            for item, piece in zip(items, pieces, strict=True):
                _require_measured(measure, piece, shards, item)
            raise


def _require_measured(measure: Measure, piece: torch.Tensor, shards: Shards, item: int) -> None:
    try:
        measure([piece])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        raise FragmentError(
            f"'{shards.what}' of {shards.name(item)} is a {type(piece).__name__} of {piece.dtype} and {piece.layout} "
            f"on {piece.device.type}, which torch does not measure: {str(error).partition(chr(10))[0]}"
        ) from error
