"""`GroupPool`: every process group that somebody made for one world, each rank set once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable
from datetime import timedelta
from itertools import pairwise

import torch.distributed as dist

from . import _c10d
from .errors import GroupCreationError, RankRangeError, StaleGroupsError

_log = logging.getLogger("ds.groups")

RankSet = tuple[int, ...]
Partition = Callable[[], Iterable[RankSet]]


class GroupPool:
    """Makes groups and shares those of the same ranks, until the world they belong to is destroyed.

    Args:
        backend: of the groups; None is the default group's.
        timeout: of their collectives, in seconds or as a timedelta.
        share_world: answer with the default group itself where a group has every rank.
    """

    def __init__(
        self, *, backend: str | None = None, timeout: timedelta | float | None = None, share_world: bool = True
    ) -> None:
        default = _c10d.default_group()
        self.mode: _c10d.Mode = _c10d.mode_of(backend)
        self.world_size: int = default.size()
        self.rank: int = default.rank()
        self._default = weakref.ref(default)
        self._backend = backend
        self.timeout = timeout if timeout is None or isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self._share_world = share_world and backend is None and timeout is None
        self._made: dict[Hashable, dist.ProcessGroup] = {}

    def __len__(self) -> int:
        """How many groups this rank has made here (shared ones and the default group do not count again)."""
        return len(self._made)

    def is_stale(self) -> bool:
        """Whether the default process group is no longer the one that this pool was made for."""
        return not _c10d.is_initialized() or self._default() is not dist.group.WORLD

    def check(self) -> None:
        """Raise `StaleGroupsError` when the world was destroyed."""
        if self.is_stale():
            raise StaleGroupsError(
                "the default process group was destroyed since these groups were made; "
                "bind the topology again after init_process_group()"
            )

    def get(self, partition: Partition, ranks: RankSet, description: str) -> dist.ProcessGroup:
        """The group of ``ranks``, made now unless it exists.

        Its members must all call (mode ``members``), or every rank of the world (the other modes).

        Args:
            partition: yields all groups of the axis, which are disjoint and cover the world.
            ranks: this rank's own one, ascending.
            description: what the group is for, shown by PyTorch's tools.
        """
        self.check()
        if self._share_world and len(ranks) == self.world_size:
            return _c10d.default_group()
        # Only in mode `members` may two ranks decide differently whether a group exists already.
        key: Hashable = ranks if self.mode == "members" else tuple(sorted(partition()))
        group = self._made.get(key)
        if group is not None and not _c10d.is_alive(group):
            raise StaleGroupsError(f"the group of ranks {list(ranks)} was destroyed by somebody else")
        if group is None:
            group = self._make(partition, ranks, description)
            self._made[key] = group
        return group

    def discard_dead(self) -> None:
        """Forget groups that somebody else destroyed."""
        self._made = {key: group for key, group in self._made.items() if _c10d.is_alive(group)}

    def close(self) -> None:
        """Destroy what was made here, the last one first. Every rank that made something must call."""
        made = [] if self.is_stale() else list(self._made.values())
        self._made.clear()
        for group in reversed(made):
            if _c10d.is_alive(group):
                dist.destroy_process_group(group)

    def _make(self, partition: Partition, ranks: RankSet, description: str) -> dist.ProcessGroup:
        _log.debug("making %s group of ranks %s (mode %s)", description, ranks, self.mode)
        backend, timeout = self._backend, self.timeout
        try:
            if self.mode == "everyone":
                groups = sorted(partition())
                group = _c10d.make_every(groups, backend=backend, timeout=timeout, description=description)
            else:
                group = _c10d.make_own(ranks, backend=backend, timeout=timeout, description=description)
        except (RuntimeError, ValueError) as error:
            who = "every rank of the group" if self.mode == "members" else "every rank of the world"
            raise GroupCreationError(
                f"rank {self.rank} could not make the {description} group of ranks {list(ranks)}: {error}\n"
                f"{who} must ask for it, and for several groups in the same order"
            ) from error
        if group is None:
            raise RankRangeError(f"rank {self.rank} is in no {description} group")
        return group


def check_partition(what: str, groups: Iterable[RankSet], world_size: int) -> None:
    """Raise `RankRangeError` unless ``groups`` hold every rank of the world exactly once."""
    found = sorted(rank for group in groups for rank in group)
    outside = [rank for rank in found if not 0 <= rank < world_size]
    if outside:
        raise RankRangeError(f"{what}: rank {outside[0]} is outside the world: 0..{world_size - 1}")
    twice = [rank for rank, after in pairwise(found) if rank == after]
    if twice:
        raise RankRangeError(f"{what}: rank {twice[0]} is in two groups")
    absent = sorted(set(range(world_size)) - set(found))
    if absent:
        raise RankRangeError(f"{what}: ranks {absent} of {world_size} are in no group")
