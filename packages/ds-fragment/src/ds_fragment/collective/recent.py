"""What was made last, kept for reuse as long as there is room."""

from __future__ import annotations

import atexit
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by key; those that were not asked for the longest go first, and all of them at the interpreter's exit.

    What is kept refers to process groups, and a gloo group that outlives the interpreter may abort it.

    Attributes:
        most: the size that all values have together, at most; a single one may be larger.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._size = 0
        atexit.register(self.clear)

    def get(self, key: Hashable) -> V | None:
        """The value, or None."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keep a value, in the place of what was there."""
        _, before = self._kept.pop(key, (None, 0))
        self._kept[key] = (value, size)
        self._size += size - before
        while self._size > self.most and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._size = 0
