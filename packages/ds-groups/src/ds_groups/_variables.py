"""`Variables`: process groups under the names that DeepSpeed's module has for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch.distributed as dist

from ._axis import Partition
from ._c10d import is_alive
from ._engine import deepspeed_groups

TENSOR = "_TENSOR_MODEL_PARALLEL_GROUP"
ALL_TO_ALL = "_ALL_TO_ALL_GROUP"
EXPERT = {"expert": "_EXPERT_PARALLEL_GROUP", "expert_data": "_EXPERT_DATA_PARALLEL_GROUP"}  # kind -> a dict by name
SINGLE: dict[tuple[Hashable, str], tuple[str, ...]] = {  # (set, kind) -> variables that hold its group
    ("world", "world"): ("_WORLD_GROUP",),
    ("zero_param", "shard"): ("_ZERO_PARAM_INTRA_PARALLEL_GROUP",),
    ("tensor_parallel", "tensor"): (TENSOR, "_MODEL_PARALLEL_GROUP"),
    ("tensor_parallel", "data"): ("_DATA_PARALLEL_GROUP",),
}
RANKS = tuple(f"{variable}_RANKS" for variable in EXPERT.values())  # dicts of rank lists
DICTS = (*EXPERT.values(), *RANKS, ALL_TO_ALL)
NAMES = (*DICTS, *(variable for variables in SINGLE.values() for variable in variables))


class Variables:
    """This rank's groups: in DeepSpeed's module where it is live (see [Note: live]), else in here.

    A variable that some DeepSpeed does not have is one in which it has no group.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}

    def read(self, variable: str) -> Any:
        """The dict, or the group if there is a living one, of this name in ``NAMES``."""
        now = self._now()
        if variable in DICTS:
            return now.setdefault(variable, {})
        group = now.get(variable)
        return group if is_alive(group) else None

    def find(self, name: Hashable, kind: str) -> dist.ProcessGroup | None:
        """The living group of this kind in the set ``name``."""
        if kind in EXPERT:
            found = [self.read(EXPERT[kind]).get(name)]
        elif name == "all_to_all":
            found = [group for key, group in self.read(ALL_TO_ALL).items() if key.startswith(kind)]
        else:
            found = [self.read(variable) for variable in SINGLE.get((name, kind), ())]
        return next(filter(is_alive, found), None)

    def publish(self, name: Hashable, kind: str, group: dist.ProcessGroup, axis: Partition | None) -> None:
        """Put a group where the engine looks for it, unless a living one is there.

        Args:
            name: of the set.
            kind: of the group in it.
            group: this rank's.
            axis: all groups of the kind, which it numbers.
        """
        if self.find(name, kind) is not None:
            return
        if kind in EXPERT:
            self.read(EXPERT[kind])[name] = group
            self.read(f"{EXPERT[kind]}_RANKS")[name] = dist.get_process_group_ranks(group)
        elif name == "all_to_all":
            ranks = tuple(dist.get_process_group_ranks(group))
            for number, row in enumerate(() if axis is None else axis.table()):
                self.read(ALL_TO_ALL)[f"{kind}_{number}"] = group if row == ranks else None
        for variable in SINGLE.get((name, kind), ()):
            self._now()[variable] = group

    def remove(self, gone: Callable[[object], bool]) -> set[str]:
        """Forget every group of which ``gone`` is true; returns the variables that held one."""
        changed = set()
        for variables in (self._own, self._now()):
            for variable in set(NAMES).difference(RANKS):
                held = variables.get(variable)
                if isinstance(held, dict):
                    for key in [key for key, group in held.items() if gone(group)]:
                        del held[key]
                        variables.get(f"{variable}_RANKS", {}).pop(key, None)
                        changed.add(variable)
                    if set(held.values()) <= {None}:  # groups of others only
                        held.clear()
                elif held is not None and gone(held):
                    variables[variable] = None
                    changed.add(variable)
        return changed

    def _now(self) -> dict[str, Any]:
        engine = deepspeed_groups()
        return self._own if engine is None else vars(engine)
