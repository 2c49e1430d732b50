"""Where one quantity of one parameter is: the answer that adapters give and exchanges work from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_fragment._layout import Fragment, Layout

Out = Callable[[int], torch.Tensor]  # where the whole of an item is to be written


def box(whole: torch.Tensor, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
    """The fragment of a contiguous tensor, as a view."""
    view = whole.view(shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        if size != shape[dim]:
            view = view.narrow(dim, offset, size)
    return view


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where one quantity of one parameter is, the same answer on every rank of the group.

    Attributes:
        shape: of the whole quantity.
        dtype: of the pieces.
        device: the parameter's compute device; collectives run there unless the backend cannot.
        layout: the fragments by group rank.
        group: the ranks that hold them; None where every rank holds the whole.
        replicas: further groups, whose ranks hold the same once more and must be written alike.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    group: dist.ProcessGroup | None
    replicas: tuple[dist.ProcessGroup, ...] = ()

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """All groups whose ranks hold the same quantity."""
        return self.replicas if self.group is None else (self.group, *self.replicas)

    @property
    def alone(self) -> bool:
        """Whether this rank holds everything, so that there is nothing to communicate."""
        return self.group is None or len(self.layout.fragments) == 1

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return 0 if self.group is None else self.group.rank()

    def like(self, other: Place) -> bool:
        """Whether what one says holds for the other too."""
        return self is other or all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

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


def room_for(place: Place, item: int, out: Out | None) -> torch.Tensor:
    """Where the whole of an item goes."""
    return torch.empty(place.shape, dtype=place.dtype, device=place.device) if out is None else out(item)
