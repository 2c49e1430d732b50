"""The process groups that torch has at the moment: their ranks, and whether they were asked to measure."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any


class Groups:
    """Remembers groups weakly, also when they are destroyed before their operations are read."""

    def __init__(self) -> None:
        self._ranks: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._timed: weakref.WeakSet[Any] = weakref.WeakSet()
        self._world: Any = None

    def look(self, *, timing: bool) -> bool:
        """Note the groups that are new; say whether the default group is another one than at the last look.

        Args:
            timing: ask their backends to measure operations on the device.
        """
        dist: Any = sys.modules.get("torch.distributed")
        for group in _names():
            if group not in self._ranks:
                with contextlib.suppress(Exception):  # destroyed at this moment
                    self._ranks[group] = tuple(dist.get_process_group_ranks(group))
            if timing and group not in self._timed:
                self._timed.add(group)
                with contextlib.suppress(Exception):  # a backend that cannot measure says so by an error of its own
                    if group.name() != "gloo":
                        group._enable_collectives_timing()
        world = getattr(getattr(dist, "group", None), "WORLD", None)
        changed = world is not self._world
        self._world = world
        return changed

    def ranks_of(self, group: Any, name: str) -> tuple[int, ...] | None:
        """Return global ranks, in order of group rank; ``None`` where nobody knows them any more.

        Args:
            group: the process group; ``None``: the one that is called ``name`` now.
            name: its name.
        """
        if group is None:
            group = next((one for one, called in _names().items() if called == name), None)
        return None if group is None else self._ranks.get(group)


def _names() -> dict[Any, str]:
    world = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)
    return dict(getattr(world, "pg_names", {}))
