"""Which of many parameters have a quantity now: one number for each, brought together from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from ds_fragment.collective.exchange import Locate, gather
from ds_fragment.collective.plan import Plan
from ds_fragment.engines.shards import Shards
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, StateNotReadyError, UnlinkedParameterError, UnusedGradientError
from ds_fragment.layout import Fragment, Layout
from ds_fragment.sharding import Sharding

Numbers = Callable[[list[int]], torch.Tensor]  # this rank's numbers for some parameters: fp64, (some,)


def is_absent(param: torch.Tensor, error: FragmentError) -> bool:
    """Whether there is nothing to read because nothing trains or used the parameter, so that callers expect None.

    It is so where the backward pass did not use it, and where it does not require a gradient and has no state.
    """
    if isinstance(error, UnusedGradientError):
        return True
    return not param.requires_grad and isinstance(error, UnlinkedParameterError | StateNotReadyError)


def count_over_ranks(shards: Shards, what: str, count: Callable[[torch.Tensor, FragmentError], int]) -> list[int]:
    """For each parameter, the sum over all ranks that share it of what is counted for a rank's error.

    All ranks of the parameters' groups must call it; one small collective for each group.

    Args:
        shards: any quantity of the parameters.
        what: the quantity that is tried, on this rank's piece.
        count: called with the parameter and the error; a piece that is here counts 0.
    """
    counted = torch.zeros(len(shards.params), dtype=torch.float64)
    for item, (adapter, param) in enumerate(zip(shards.adapters, shards.params, strict=True)):
        try:
            with known_engine():
                adapter.local(param, what)
        except FragmentError as error:
            counted[item] = count(param, error)
    axes = [sharding.groups for sharding in shards.shardings]  # of the ranks that share it, and of the replicas
    with shards.named_if_broken(range(len(shards.params))):
        sums = over_axes(axes, shards.device(), lambda items: counted[items], lambda rows: rows.sum(dim=0))
    return list(map(int, sums))


def over_axes(
    axes: Sequence[Sequence[dist.ProcessGroup]],
    device: torch.device,
    numbers: Numbers,
    combine: Callable[[torch.Tensor], torch.Tensor],
    bring: Callable[[Plan, Locate], Iterator[list[torch.Tensor | None]]] = gather,
) -> list[float]:
    """As `over_ranks`, over the groups of each parameter one after the other.

    Raises:
        FragmentError: what a rank's ``numbers`` raises; on every rank, once all axes have heard of it.
    """
    failure: FragmentError | None = None
    totals: list[float] = []
    depth = max(map(len, axes), default=1) or 1
    for axis in range(depth):
        groups = [found[axis] if axis < len(found) else None for found in axes]
        try:
            totals = over_ranks(groups, device, _failing(failure) if failure else numbers, combine, bring)
        except FragmentError as error:
            failure = failure or error
        if axis + 1 < depth and failure is None:
            numbers = _some_of(torch.tensor(totals, dtype=torch.float64))
    if failure is not None:
        raise failure
    return totals


def _failing(error: FragmentError) -> Numbers:
    def numbers(_: list[int]) -> torch.Tensor:
        raise error

    return numbers


def _some_of(known: torch.Tensor) -> Numbers:
    return lambda items: known[items]


def over_ranks(
    groups: Sequence[dist.ProcessGroup | None],
    device: torch.device,
    numbers: Numbers,
    combine: Callable[[torch.Tensor], torch.Tensor],
    bring: Callable[[Plan, Locate], Iterator[list[torch.Tensor | None]]] = gather,
) -> list[float]:
    """One number for each parameter, made from one of each rank of its group; one collective for each group.

    Args:
        groups: of the parameters; None where there is this rank's number only.
        device: where collectives run.
        numbers: this rank's numbers for some of them: fp64, (some,).
        combine: makes one row, fp64 (parameters,), of a row for each rank, (ranks, parameters).
        bring: `gather`, or a quantity's.
    """
    by_group: dict[dist.ProcessGroup | None, list[int]] = {}
    for item, group in enumerate(groups):
        by_group.setdefault(group, []).append(item)

    # One row a rank, brought together like a parameter that is sharded by rows.
    order, tables = list(by_group), []
    for group in order:
        ranks, count = 1 if group is None else group.size(), len(by_group[group])
        rows = Layout((ranks, count), tuple(Fragment((rank, 0), (1, count)) for rank in range(ranks)))
        tables.append(Sharding(torch.Size((ranks, count)), torch.float64, device, rows, group))

    def row(table: int) -> torch.Tensor:
        return numbers(by_group[order[table]]).to(device=device, dtype=torch.float64).view(1, -1)

    def rows_of(chosen: Sequence[int]) -> list[torch.Tensor]:
        return [row(table) for table in chosen]

    totals = [0.0] * len(groups)
    for bucket in bring(Plan(tables, bucket_bytes=1 << 30), rows_of):
        for group, table in zip(order, bucket, strict=True):
            assert table is not None
            for item, total in zip(by_group[group], combine(table).tolist(), strict=True):
                totals[item] = total
    return totals
