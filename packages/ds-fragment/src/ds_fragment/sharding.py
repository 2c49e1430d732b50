"""Where one quantity of one parameter is: the answer that adapters give and exchanges work from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_fragment.layout import Fragment, Layout

Out = Callable[[int], torch.Tensor]  # where the whole of an item is to be written


def box(whole: torch.Tensor, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
    """The fragment of a contiguous tensor, as a view."""
    view = whole.view(shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        if size != shape[dim]:
            view = view.narrow(dim, offset, size)
    return view


@dataclass(frozen=True, slots=True)
class Sharding:
    """Where one quantity of one parameter is, the same answer on every rank of the group.

    [Note: stages] Where a parameter is cut along several axes of a mesh that is not the world, no group has all ranks
    that hold a piece of it, and a read must not make one: a group is made by all ranks of the world. It is brought
    together axis by axis instead, first along the axis that cut it last. Each axis is a stage: the place of what this
    rank has once the stages before it are done.

    Attributes:
        shape: of the whole quantity.
        dtype: of the pieces.
        device: the parameter's compute device; collectives run there unless the backend cannot.
        layout: the fragments by group rank, or by the order of ``ranks`` where there are stages.
        group: the ranks that hold them; None where every rank holds the whole, or where there are stages.
        replicas: further groups, whose ranks hold the same once more and must be written alike.
        stages: see [Note: stages]; the last one's whole is the quantity.
        ranks: the global ranks of the layout where there are stages.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    group: dist.ProcessGroup | None
    replicas: tuple[dist.ProcessGroup, ...] = ()
    stages: tuple[Sharding, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def shards(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups over which it is cut."""
        if self.stages:
            return tuple(group for stage in self.stages for group in stage.shards)
        return () if self.group is None else (self.group,)

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """All groups whose ranks hold the same quantity."""
        return (*self.shards, *self.replicas)

    @property
    def alone(self) -> bool:
        """Whether this rank holds everything, so that there is nothing to communicate."""
        return not self.stages and (self.group is None or len(self.layout.fragments) == 1)

    @property
    def last(self) -> Sharding:
        """The place of the last stage, which brings the whole; the place itself without stages."""
        return self.stages[-1] if self.stages else self

    @property
    def rank(self) -> int:
        """This rank in the layout."""
        if self.stages:
            return self.ranks.index(dist.get_rank())
        return 0 if self.group is None else self.group.rank()

    def global_ranks(self) -> tuple[int, ...]:
        """The ranks of the layout; none where every rank holds the whole."""
        if self.stages or self.group is None:
            return self.ranks
        return tuple(dist.get_process_group_ranks(self.group))

    def cut(self, whole: torch.Tensor) -> torch.Tensor | None:
        """This rank's fragment of a whole tensor, as a view; None where it holds nothing."""
        fragment = self.layout.fragments[self.rank]
        return None if fragment is None else box(whole, self.layout.shape, fragment)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole quantity."""
        return self.shape.numel() * self.dtype.itemsize


def wire_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The parameter's device if the group's backend moves its memory, else the one that the backend moves."""
    supported = {d.type for d in group._device_types}
    if device.type in supported:
        return device
    kind = "cuda" if "cuda" in supported else sorted(supported)[0]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def room_for(sharding: Sharding, item: int, out: Out | None) -> torch.Tensor:
    """Where the whole of an item goes."""
    return torch.empty(sharding.shape, dtype=sharding.dtype, device=sharding.device) if out is None else out(item)
