"""Remembers what was said already."""

from __future__ import annotations

import threading
from collections.abc import Hashable


class Once:
    """A set of keys that says whether a key is new. Threads may share it."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def first(self, key: Hashable) -> bool:
        """Say whether this is the first time that ``key`` is asked for, and remember it.

        >>> once = Once()
        >>> once.first("a"), once.first("a"), once.first("b")
        (True, False, True)
        """
        with self._lock:
            if key in self._seen:
                return False
            self._seen.add(key)
            return True
