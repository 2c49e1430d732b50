"""Values by tensor, by identity and weakly; and whether tensors are the same as before.

As `torch.utils.weak.WeakIdKeyDictionary`, whose look-ups cost ten times as much: what is read by the thousand is looked
up several times for each parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch

V = TypeVar("V")


class IdentityMap(Generic[V]):
    """A value for each of some tensors, which it does not keep alive; it goes when its tensor goes."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], V]] = {}

    def get(self, tensor: torch.Tensor) -> V | None:
        """The tensor's value, or None."""
        found = self._kept.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def pop(self, tensor: torch.Tensor) -> V | None:
        """Take the tensor's value away and return it; None where there is none."""
        found = self.get(tensor)
        if found is not None:
            del self._kept[id(tensor)]
        return found

    def values(self) -> Iterator[V]:
        """All values."""
        return (value for _, value in list(self._kept.values()))

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that are still there."""
        return (tensor for reference, _ in list(self._kept.values()) if (tensor := reference()) is not None)

    def __setitem__(self, tensor: torch.Tensor, value: V) -> None:
        key, kept = id(tensor), self._kept

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            found = kept.get(key)
            if found is not None and found[0] is gone:
                del kept[key]

        kept[key] = (weakref.ref(tensor, forget), value)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return self.get(tensor) is not None

    def __len__(self) -> int:
        return len(self._kept)


class Seen:
    """Some tensors, which it does not keep alive, to tell whether others are the same.

    An id means one tensor as long as that lives, so that ids are compared once it is known that none is gone.
    """

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        self._gone: list[object] = []
        self._ids = list(map(id, tensors))
        self._references = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    @property
    def alive(self) -> bool:
        """Whether all of them are still there."""
        return not self._gone

    def are(self, tensors: Sequence[object]) -> bool:
        """Whether these are the same, in the same order."""
        return list(map(id, tensors)) == self._ids and self.alive
