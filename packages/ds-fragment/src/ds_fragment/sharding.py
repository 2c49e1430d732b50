"""How one quantity of one parameter is sharded: what an engine answers, and what collectives are planned from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ds_fragment.layout import Fragment, Layout


def box(whole: torch.Tensor, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
    """The fragment of a contiguous tensor, as a view."""
    view = whole.view(shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        if size != shape[dim]:
            view = view.narrow(dim, offset, size)
    return view


@dataclass(frozen=True)
class Sharding:
    """How one quantity of one parameter is sharded; equal on every rank of the group.

    [Note: stages] Where several axes of a mesh that is not the world shard a parameter, no group has all ranks that
    hold a shard, and a read must not make one: all ranks of the world would have to. The parameter is gathered axis by
    axis instead, first along the axis that cut it last. Each axis is a stage: the sharding of what this rank has once
    the stages before it are done.

    Attributes:
        shape: of the whole quantity.
        dtype: of the shards.
        device: the parameter's compute device; collectives run there unless the backend cannot.
        layout: the fragments by group rank, or by the order of ``ranks`` where there are stages.
        group: the ranks that hold the shards; None where every rank holds the whole, or where there are stages.
        replicas: further groups, whose ranks hold the same once more and must be written alike.
        stages: see [Note: stages]; the last stage gives the whole quantity.
        ranks: the global ranks of the layout where there are stages.
        plans: what collectives have prepared for it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    group: dist.ProcessGroup | None
    replicas: tuple[dist.ProcessGroup, ...] = ()
    stages: tuple[Sharding, ...] = ()
    ranks: tuple[int, ...] = ()
    plans: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def shards(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups over which the quantity is cut."""
        if self.stages:
            return tuple(group for stage in self.stages for group in stage.shards)
        return () if self.group is None else (self.group,)

    @cached_property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """All groups whose ranks hold the same quantity."""
        return (*self.shards, *self.replicas)

    @cached_property
    def alone(self) -> bool:
        """Whether this rank holds the whole, so that there is nothing to communicate."""
        return not self.stages and (self.group is None or len(self.layout.fragments) == 1)

    @property
    def last(self) -> Sharding:
        """The last stage, which gives the whole; the sharding itself without stages."""
        return self.stages[-1] if self.stages else self

    @cached_property
    def rank(self) -> int:
        """This rank in the layout."""
        if self.stages:
            return self.ranks.index(dist.get_rank())
        return 0 if self.group is None else self.group.rank()

    @cached_property
    def held(self) -> int:
        """Elements that this rank holds."""
        return self.layout.held(self.rank)

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """By rank of the layout, the elements that it contributes to the whole."""
        return tuple(self.layout.sent(rank) for rank in range(len(self.layout.fragments)))

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...] | None:
        """(rank, start, elements) in the flattened whole of each fragment that is sent; None unless all are intervals.

        >>> from ds_fragment.layout import flat_layout
        >>> layout = flat_layout(0, 6, partition_size=4, world_size=2)
        >>> Sharding(torch.Size((6,)), torch.float32, torch.device("cpu"), layout, None).spans
        ((0, 0, 4), (1, 4, 2))
        """
        return self.layout.spans()

    @cached_property
    def even(self) -> bool:
        """Whether the ranks send equal intervals of the flattened whole, in rank order."""
        spans, ranks = self.spans, len(self.layout.fragments)
        if not spans or len(spans) != ranks:
            return False
        numel = spans[0][2]
        return all(span == (rank, rank * numel, numel) for rank, span in enumerate(spans))

    def global_ranks(self) -> tuple[int, ...]:
        """The ranks of the layout; none where every rank holds the whole."""
        if self.stages or self.group is None:
            return self.ranks
        return tuple(dist.get_process_group_ranks(self.group))

    def cut(self, whole: torch.Tensor) -> torch.Tensor | None:
        """This rank's fragment of a whole tensor, as a view; None where it holds nothing."""
        fragment = self.layout.fragments[self.rank]
        return None if fragment is None else box(whole, self.layout.shape, fragment)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole quantity."""
        return self.shape.numel() * self.dtype.itemsize
