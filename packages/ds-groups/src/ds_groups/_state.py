"""`ParallelState`: the named groups behind `ds_groups.parallel_state`, in one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from . import _c10d
from ._expert_tables import Table
from ._pool import GroupPool, check_partition
from ._verify import Plan, agree
from .errors import LayoutConflictError, NotInitializedError

Layout = Mapping[str, Table]


@dataclass(frozen=True)
class GroupSet:
    """Groups that were made together: this rank's, by kind, and the tables they come from."""

    layout: Layout
    groups: dict[str, dist.ProcessGroup]
    ranks: dict[str, tuple[int, ...]]


class ParallelState:
    """Named sets of groups of one world; forgets them when that world is destroyed.

    Attributes:
        expert_groups: name -> this rank's expert group. One dict for ever, kept up to date in place.
        expert_data_groups: the same for expert-data groups.
        all_to_all_groups: name -> group, of the hierarchical all-to-all.
        tensor_size: size to report instead of the tensor group's, if any.
        tensor_rank: rank to report instead of this one's, if any.
        timeout: how long ranks wait for each other's plan before groups are made.
    """

    def __init__(self) -> None:
        self.expert_groups: dict[str, dist.ProcessGroup] = {}
        self.expert_data_groups: dict[str, dist.ProcessGroup] = {}
        self.all_to_all_groups: dict[str, dist.ProcessGroup | None] = {}
        self.tensor_size: int | None = None
        self.tensor_rank: int | None = None
        self.timeout = timedelta(minutes=5)
        self._sets: dict[Hashable, GroupSet] = {}
        self._pool: GroupPool | None = None

    def pool(self) -> GroupPool:
        """Where the groups of the present world are made."""
        self.refresh()
        if self._pool is None:
            self._pool = GroupPool(share_world=False)
        return self._pool

    def refresh(self) -> None:
        """Forget what was destroyed since: everything with the world, or single sets."""
        if self._pool is None:
            return
        if self._pool.is_stale():
            self._forget()
            return
        dead = [name for name, made in self._sets.items() if not all(map(_c10d.is_alive, made.groups.values()))]
        for name in dead:
            self._drop(name)
        if dead:
            self._pool.discard_dead()

    def find(self, name: Hashable) -> GroupSet | None:
        """The set of this name, if it has been made in the present world."""
        self.refresh()
        return self._sets.get(name)

    def get(self, name: str, what: str, how: str) -> GroupSet:
        """The set of this name; `NotInitializedError` tells ``how`` to make it."""
        made = self.find(name)
        if made is None:
            raise NotInitializedError(f"{what} is not initialized: call {how} first, on every rank")
        return made

    def make(self, name: Hashable, layout: Layout, plan: Plan | None = None) -> GroupSet:
        """Make a set of groups, or find the one that exists with this layout.

        Args:
            name: of the set.
            layout: kind -> table of groups, each of which covers the world.
            plan: what ranks must agree on first; None skips the question.

        Raises:
            RankRangeError: a table does not hold every rank exactly once. Nothing has been made.
            LayoutConflictError: the set exists with another layout.
            PlanMismatchError: ranks called with different plans.
        """
        pool = self.pool()
        for kind, table in layout.items():
            check_partition(f"{name} {kind} groups", table, pool.world_size)
        made = self._sets.get(name)
        if made is not None:
            _check_same(name, made.layout, layout)
            return made
        if plan is not None:
            agree(_c10d.default_store(), pool.rank, pool.world_size, "parallel_state", plan, self.timeout)
        ranks = {kind: _own(table, pool.rank) for kind, table in layout.items()}
        groups = {kind: pool.get(partial(layout.__getitem__, kind), ranks[kind], f"{name} {kind}") for kind in layout}
        made = GroupSet(layout, groups, ranks)
        self._sets[name] = made
        return made

    def make_expert(self, size: int, tables: tuple[Table, Table], plan: Plan) -> None:
        """Make the expert and expert-data groups called ``ep_size_<size>``; raises as `make`."""
        name = f"ep_size_{size}"
        made = self.make(name, {"expert": tables[0], "expert_data": tables[1]}, plan)
        self.expert_groups[name] = made.groups["expert"]
        self.expert_data_groups[name] = made.groups["expert_data"]

    def share(self, name: Hashable, build: Callable[[], Layout]) -> GroupSet:
        """The set of this name, made from what ``build`` returns the first time."""
        made = self.find(name)
        return self.make(name, build()) if made is None else made

    def close(self) -> None:
        """Destroy every group made here and forget all. Every rank must call."""
        if self._pool is not None:
            self._pool.close()
        self._forget()

    def _forget(self) -> None:
        self._pool = None
        self.tensor_size = self.tensor_rank = None
        for name in list(self._sets):
            self._drop(name)

    def _drop(self, name: Hashable) -> None:
        del self._sets[name]
        self.expert_groups.pop(str(name), None)
        self.expert_data_groups.pop(str(name), None)
        if name == "all_to_all":
            self.all_to_all_groups.clear()


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


def _own(table: Table, rank: int) -> tuple[int, ...]:
    return next(group for group in table if rank in group)


def _check_same(name: Hashable, old: Layout, new: Layout) -> None:
    for kind, table in new.items():
        if sorted(old.get(kind, ())) != sorted(table):
            raise LayoutConflictError(
                f"{name} groups exist with another layout: {kind} groups are {_short(old.get(kind, ()))}, asked for "
                f"{_short(table)}; call destroy_groups() first if nothing uses them"
            )


def _short(table: Table) -> str:
    shown = ", ".join(str(list(group)) for group in sorted(table)[:4])
    return f"{shown}, ..." if len(table) > 4 else shown
