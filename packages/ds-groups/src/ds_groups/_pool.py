"""`GroupPool`: the process groups that one holder has asked for, shared with the other holders of the same world."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from itertools import pairwise

import torch.distributed as dist

from . import _c10d
from ._axis import Partition
from ._options import Settings
from ._registry import Key, registry
from ._verify import Plan, agree
from .errors import RankRangeError, StaleGroupsError, TopologyError

RankSet = tuple[int, ...]


class GroupPool:
    """Groups of the present world, until it is destroyed. Equal ones are made once, whoever holds them.

    Args:
        settings: of the groups, where `get` is not told other ones.
        share_world: answer with the default group itself where a group has every rank and no settings of its own.
    """

    def __init__(self, settings: Settings | None = None, *, share_world: bool = True) -> None:
        self._registry = registry()
        self.settings = settings if settings is not None else Settings()
        self.world_size = self._registry.world_size
        self.rank = self._registry.rank
        self.mode = _c10d.mode_of(self.settings.backend)
        self._share_world = share_world
        self._made: dict[Key, dist.ProcessGroup] = {}
        self._outside: set[Key] = set()  # sets of groups that this rank took part in making, but is not in
        self._adopted: dict[RankSet, dist.ProcessGroup] = {}

    def __len__(self) -> int:
        """How many groups this rank holds here (the default group and adopted ones do not count)."""
        return len(self._made)

    @property
    def can_agree(self) -> bool:
        """Whether ranks can compare plans."""
        return self._registry.meets

    def is_stale(self) -> bool:
        """Whether the default process group is no longer the one that this pool was made for."""
        return self._registry.is_stale()

    def check(self) -> None:
        """Raise `StaleGroupsError` when the world was destroyed."""
        if self.is_stale():
            raise StaleGroupsError(
                "the default process group was destroyed since these groups were made; "
                "bind the topology again after init_process_group()"
            )

    def get(self, axis: Partition, what: str, settings: Settings | None = None) -> dist.ProcessGroup:
        """This rank's group of an axis, made now unless it exists.

        Its members must all call (mode ``members``), or every rank of the world (the other modes).

        Args:
            axis: the groups; those of one axis are disjoint.
            what: the group is for, shown by PyTorch's tools.
            settings: of the group; None is the pool's.

        Raises:
            StaleGroupsError: the world, or this group, was destroyed by somebody else.
            RankRangeError: this rank is in no group of the axis. It has taken part where every rank must.
            GroupCreationError: it could not be made, or others did not come.
            PlanMismatchError: others make it with other settings.
        """
        self.check()
        settings = self.settings if settings is None else settings
        ranks, outside = None, None
        try:
            ranks = axis.ranks(self.rank)
        except RankRangeError as error:
            outside = error
        mode = self.mode if settings.backend == self.settings.backend else _c10d.mode_of(settings.backend)
        if ranks is None and mode == "members":
            assert outside is not None
            raise outside
        if ranks in self._adopted:
            return self._living(self._adopted[ranks], ranks)
        if ranks is not None and self._is_world(ranks, settings):
            world = _c10d.default_group()
            if settings.warm_up:
                self._registry.warm_up(world, what)
            return world
        # Only in mode `members` may two ranks decide differently whether a group exists already.
        if ranks is not None and len(ranks) == 1 and _c10d.can_make_single():
            key = Key("one", settings)
        else:
            key = Key(ranks if mode == "members" else axis.key, settings)
        group = self._made.get(key)
        if group is None and key not in self._outside:
            if mode == "everyone" and not axis.is_ascending:
                raise TopologyError(
                    f"the {what} groups number their ranks in an order of their own, which mode 'everyone' cannot "
                    "make: torch.distributed.new_group sorts ranks"
                )
            group = self._registry.acquire(key, axis, ranks, mode=mode, what=what)
            if group is None:
                self._outside.add(key)
            else:
                self._made[key] = group
        if group is None:
            raise outside or RankRangeError(f"rank {self.rank} is in no {what} group")
        return self._living(group, ranks)

    def adopt(self, ranks: RankSet, group: dist.ProcessGroup) -> None:
        """Answer with a group that somebody else made, and destroys, where one of these ranks is asked for.

        Args:
            ranks: of the group, in its order.
            group: this rank's.
        """
        self._adopted[tuple(ranks)] = group

    def agree(self, topic: str, plan: Plan, timeout: timedelta) -> None:
        """Return when every rank of the world has called with the same plan; raises as `ds_groups._verify.agree`."""
        self.check()
        agree(self._registry, topic, plan, timeout)

    def discard_dead(self) -> None:
        """Forget groups that somebody else destroyed."""
        for key, group in list(self._made.items()):
            if not _c10d.is_alive(group):
                del self._made[key]
                self._registry.release(key, group)

    def close(self) -> None:
        """Let go of all groups, the last one first. Every rank that made something must call.

        A group is destroyed by its last holder.
        """
        for key, group in self._drop():
            self._registry.release(key, group)

    def abort(self) -> None:
        """Break off what runs in these groups, and forget them, whoever shares them; no other rank is waited for."""
        self._registry.abort(self._drop())

    def _drop(self) -> list[tuple[Key, dist.ProcessGroup | None]]:
        held = [] if self.is_stale() else [*reversed(self._made.items()), *((key, None) for key in self._outside)]
        self._made.clear()
        self._outside.clear()
        self._adopted.clear()
        return held

    def _is_world(self, ranks: RankSet, settings: Settings) -> bool:
        whole = self._share_world and settings.plain and len(ranks) == self.world_size
        return whole and ranks == tuple(range(self.world_size))

    def _living(self, group: dist.ProcessGroup, ranks: RankSet | None) -> dist.ProcessGroup:
        if not _c10d.is_alive(group):
            raise StaleGroupsError(f"the group of ranks {list(ranks or ())} was destroyed by somebody else")
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
