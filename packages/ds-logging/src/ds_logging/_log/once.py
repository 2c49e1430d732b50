"""Remembers what was said already."""

from __future__ import annotations

from collections.abc import Hashable


class Once:
    """A set of keys that says whether a key is new. Threads and signal handlers may share it: it has no lock."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, object] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._seen

    def first(self, key: Hashable) -> bool:
        """Say whether this is the first time that ``key`` is asked for, and remember it.

        >>> once = Once()
        >>> once.first("a"), once.first("a"), once.first("b")
        (True, False, True)
        """
        mine = object()
        return self._seen.setdefault(key, mine) is mine  # one atomic operation
