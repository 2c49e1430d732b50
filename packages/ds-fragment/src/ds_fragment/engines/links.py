"""What every rank knows of a parameter that lies in a flat partition, kept in the parameter's record.

`param._hp_mapping`, the attribute that engines read, is None on a rank that holds no part of the parameter. A
`FlatLink` is there on every rank, and knows the layout on all of them once the ranks have told each other their slices.

[Note: slices] Each rank's partition is a slice of the concatenation of the parameters, and the slices may differ in
size. A rank knows its own. The first collective call about the parameters gathers those of all ranks, in one small
collective for each `link_hp_params`; `FlatPartition` cuts evenly and knows them from the start.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_fragment import _collectives
from ds_fragment.errors import FragmentError, GradientUnavailableError, InvalidValueError, RankMismatchError
from ds_fragment.layout import Layout, interval, overlap
from ds_fragment.record import forget, note, noted
from ds_fragment.sharding import Sharding


class FlatOwner(Protocol):
    """What keeps a flat partition and can say how far its gradients are."""

    def no_gradient(self, param: torch.Tensor) -> GradientUnavailableError | None:
        """The error where there is no reduced gradient of the parameter now, None where there is one."""


class Slices:
    """The slices of the ranks of a group, shared by the parameters of one `link_hp_params`; see [Note: slices].

    Args:
        group: the ranks; None for one rank without torch.distributed.
        mine: this rank's slice of the concatenation, (start, numel).
        spans: where each parameter lies in the concatenation, (start, numel), the same on every rank.
        device: of the partition.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        mine: tuple[int, int],
        spans: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.group, self.mine, self._spans, self._device = group, mine, spans, device
        self.known: tuple[tuple[int, int], ...] | None = None  # by group rank

    def gather(self) -> None:
        """Learn the slices of all ranks; every rank of the group must call it.

        Raises:
            RankMismatchError: the ranks linked different parameters, or other offsets; on every rank.
            InvalidValueError: two slices overlap, or none holds some elements; on every rank.
        """
        if self.group is None or self.group.size() == 1:
            rows = [[*self.mine, 0]]
        else:
            digest = int.from_bytes(hashlib.sha256(repr(self._spans).encode()).digest()[:7], "little")
            row = torch.tensor(
                [*self.mine, digest], dtype=torch.int64, device=_collectives.device_for(self.group, self._device)
            )
            table = torch.empty(self.group.size(), 3, dtype=torch.int64, device=row.device)
            _collectives.leave_gently(row.device.type)
            _collectives.all_gather(table.view(-1), row, group=self.group)
            rows = table.tolist()
        if len({digest for _, _, digest in rows}) > 1:
            raise RankMismatchError(
                "link_hp_params: the ranks linked parameters of other sizes, or at other param_offsets; pass the same "
                "lp_param_list and param_offsets on every rank"
            )
        slices = tuple((start, numel) for start, numel, _ in rows)
        _check_cover(slices, self._spans)
        self.known = slices

    def layout(self, start: int, numel: int) -> Layout:
        """The fragments of a parameter that lies there in the concatenation.

        Raises:
            FragmentError: the other ranks' slices are not known yet.
        """
        if self.known is None:
            raise FragmentError(
                "where the other ranks' partitions lie is not known before the first collective read or write of "
                "parameters that link_hp_params linked: make one on every rank, such as safe_get_full_fp32_param"
            )
        pieces = [overlap(start, numel, begin, size) for begin, size in self.known]
        return Layout((numel,), tuple(interval(first - start, count) for first, count in pieces))


def _check_cover(slices: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> None:
    """Raise unless every element of the parameters is in exactly one slice."""
    in_order = sorted((start, start + numel) for start, numel in slices if numel)
    for (first, end), (begin, last) in pairwise(in_order):
        if begin < end:
            raise InvalidValueError(
                f"partitions overlap: link_hp_params was given elements {first} to {end} on one rank and {begin} to "
                f"{last} on another; partition_start and partition_size must cut the parameters into disjoint slices"
            )
    for start, numel in spans:
        held = sum(overlap(start, numel, begin, size)[1] for begin, size in slices)
        if held != numel:
            raise InvalidValueError(
                f"a parameter at offset {start} has {numel} elements, of which the ranks' partitions hold {held}: "
                f"by group rank they begin and end at {[(begin, begin + size) for begin, size in slices]}"
            )


@dataclass(slots=True, eq=False)
class FlatLink:
    """One parameter in a flat partition.

    Attributes:
        slices: of the ranks.
        start: where the parameter begins in the concatenation, in elements.
        numel: its elements.
        group: the ranks that the partition is cut over; None for one rank without torch.distributed.
        flat: this rank's flat fp32 partition, weakly.
        dtype: of the partition.
        device: of the partition.
        owner: what made the link, weakly; None for `link_hp_params` called alone.
        engine_sought: whether it was asked for an engine that calls `link_hp_params`.
        places: by quantity, made on first use.
    """

    slices: Slices
    start: int
    numel: int
    group: dist.ProcessGroup | None
    flat: weakref.ref[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    owner: weakref.ref[Any] | None = None
    engine_sought: bool = False
    shardings: dict[str, Sharding] = field(default_factory=dict)

    def layout(self) -> Layout:
        """Over the flattened parameter, by group rank; see `Slices.layout`."""
        return self.slices.layout(self.start, self.numel)


def link_of(param: torch.Tensor) -> FlatLink | None:
    """The parameter's link, or None."""
    return noted(param, FlatLink)


def set_link(param: torch.Tensor, link: FlatLink | None) -> None:
    """Link a parameter, or take its link away."""
    if link is None:
        forget(param, FlatLink)
    else:
        note(param, link)
