"""`ParallelState`: the named groups behind `ds_groups.parallel_state`, in one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from . import _c10d
from ._axis import Partition, TableAxis
from ._engine import Assigned
from ._pool import GroupPool, check_partition
from ._variables import TENSOR, Variables
from ._verify import Plan
from .errors import LayoutConflictError, NotInitializedError

Layout = Mapping[str, Partition]


@dataclass(frozen=True)
class Made:
    """This rank's group of one kind, and the groups of all ranks; None where DeepSpeed made them."""

    group: dist.ProcessGroup
    axis: Partition | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the group, as it numbers them."""
        return tuple(dist.get_process_group_ranks(self.group))


class ParallelState:
    """Named sets of groups of one world; forgets them when that world is destroyed.

    Groups that DeepSpeed made are found here, and groups made here are found by DeepSpeed; see [Note: live].

    Attributes:
        tensor_size: size to report instead of the tensor group's, if any.
        tensor_rank: rank to report instead of this one's, if any.
        timeout: how long ranks wait for each other's plan before groups are made.
    """

    tensor_size: Assigned[int | None] = Assigned("_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE", None)
    tensor_rank: Assigned[int | None] = Assigned("_MPU_TENSOR_MODEL_PARALLEL_RANK", None)

    def __init__(self) -> None:
        self.timeout = timedelta(minutes=5)
        self._variables = Variables()
        self._made: dict[tuple[Hashable, str], Made] = {}  # here, not by DeepSpeed
        self._pool: GroupPool | None = None

    def pool(self) -> GroupPool:
        """Where the groups of the present world are made."""
        self.refresh()
        if self._pool is None:
            self._pool = GroupPool(share_world=False)  # whoever gets a group may destroy it
        return self._pool

    def refresh(self) -> None:
        """Forget what was destroyed since, with the world or alone, and publish the rest."""
        if self._pool is not None and self._pool.is_stale():
            self._pool = None
            del self.tensor_size, self.tensor_rank
        dead = {made.group for made in self._made.values() if not _c10d.is_alive(made.group)}
        if dead:
            self._forget(lambda group: group in dead)
        for key, made in self._made.items():
            self._variables.publish(*key, made.group, made.axis)

    def variable(self, name: str) -> Any:
        """What DeepSpeed's module has, or would have, in its variable ``name``: a dict, a group or None."""
        self.refresh()
        return self._variables.read(name)

    def find(self, name: Hashable, kind: str) -> Made | None:
        """The group of this kind in the set ``name``, if there is one in the present world: the engine's first."""
        self.refresh()
        group = self._variables.find(name, kind)
        made = self._made.get((name, kind))
        return made if group is None or (made is not None and made.group is group) else Made(group)

    def get(self, name: Hashable, kind: str, what: str, how: str, more: str = "") -> Made:
        """What `find` finds; `NotInitializedError` tells ``how`` to make it, and ``more``."""
        made = self.find(name, kind)
        if made is None:
            raise NotInitializedError(f"{what} is not initialized: call {how} first, on every rank{more}")
        return made

    def make(self, name: Hashable, layout: Layout, plan: Plan | None = None) -> dict[str, Made]:
        """Make a set of groups, or find the one that exists with this layout.

        Args:
            name: of the set.
            layout: kind -> the groups of all ranks.
            plan: what ranks must agree on first; None skips the question.

        Raises:
            RankRangeError: a table does not hold every rank exactly once. Nothing has been made.
            LayoutConflictError: the set exists with another layout.
            PlanMismatchError: ranks called with different plans.
        """
        pool = self.pool()
        for kind, axis in layout.items():
            if isinstance(axis, TableAxis):
                check_partition(f"{name} {kind} groups", axis.table(), pool.world_size)
        made = {kind: found for kind in layout if (found := self.find(name, kind)) is not None}
        fits = {kind: _fits(found, layout[kind], pool.rank) for kind, found in made.items()}
        # A rank knows its own group of the engine's only, so that one may see a conflict where another sees none.
        if plan is not None and any(kind not in made or made[kind].axis is None for kind in layout):
            pool.agree("parallel_state", {**plan, "fits the groups there are": fits}, self.timeout)
        for kind, good in fits.items():
            if not good:
                raise _conflict(name, kind, made[kind], layout[kind])
        for kind, axis in layout.items():
            if kind not in made:
                made[kind] = self._made[name, kind] = Made(pool.get(axis, f"{name} {kind}"), axis)
        self.refresh()  # publishes
        return made

    def make_expert(self, size: int, axes: tuple[Partition, Partition], plan: Plan) -> None:
        """Make the expert and expert-data groups called ``ep_size_<size>``; raises as `make`."""
        self.make(f"ep_size_{size}", {"expert": axes[0], "expert_data": axes[1]}, plan)

    def share(self, name: Hashable, kind: str, build: Callable[[], Layout]) -> dist.ProcessGroup:
        """The group of this kind in the set ``name``, made from what ``build`` returns the first time."""
        made = self.find(name, kind)
        return self.make(name, build())[kind].group if made is None else made.group

    def close(self) -> None:
        """Let go of every group made here and forget it; those that nobody else holds are destroyed. All must call."""
        made = {made.group for made in self._made.values()}
        if self._pool is not None:
            self._pool.close()
        self._pool = None
        del self.tensor_size, self.tensor_rank
        self._forget(lambda group: group in made)

    def release(self, group: dist.ProcessGroup | None) -> None:
        """Forget a group that was destroyed, the engine's too; None: everything, with the world."""
        if group is None:
            self._pool = None
            self.tensor_size = self.tensor_rank = None
        self._forget(lambda held: group is None or held is group)

    def _forget(self, gone: Callable[[object], bool]) -> None:
        self._made = {key: made for key, made in self._made.items() if not gone(made.group)}
        if self._pool is not None:
            self._pool.discard_dead()
        if TENSOR in self._variables.remove(gone):
            self.tensor_size = self.tensor_rank = None


state = ParallelState()  # the one that `ds_groups.parallel_state` speaks for


def alone() -> bool:
    """Whether this process trains by itself: no process group, and the launcher started no other rank.

    Raises:
        NotInitializedError: there are other ranks, but no process group to know them by.
    """
    if _c10d.is_initialized():
        return False
    started = os.environ.get("WORLD_SIZE", "1")
    if started not in ("", "1"):
        raise NotInitializedError(
            f"the launcher started {started} ranks (WORLD_SIZE), but there is no process group: "
            "call torch.distributed.init_process_group() first"
        )
    return True


def _fits(made: Made, asked: Partition, rank: int) -> bool:
    if made.axis is None:
        return sorted(made.ranks) == sorted(asked.ranks(rank))
    return made.axis.key == asked.key or sorted(made.axis.table()) == sorted(asked.table())


def _conflict(name: Hashable, kind: str, made: Made, asked: Partition) -> LayoutConflictError:
    fix = "call destroy_groups() first if nothing uses them" if made.axis else "DeepSpeed made them: ask for its layout"
    held = [tuple(sorted(made.ranks))] if made.axis is None else made.axis.table()
    return LayoutConflictError(
        f"{name} groups exist with another layout: {kind} groups are {_short(held)}, asked for "
        f"{_short(asked.table())}; {fix}"
    )


def _short(table: Sequence[tuple[int, ...]]) -> str:
    shown = ", ".join(str(list(group)) for group in sorted(table)[:4])
    return f"{shown}, ..." if len(table) > 4 else shown
