"""The class of the module `ds_groups.parallel_state`: what can be assigned to it, and what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

from ._engine import Assigned
from ._state import state
from ._variables import NAMES

ASSIGNABLE = ("expert_tensor_parallel_world_size", "mesh_device", "mpu")


class ParallelStateModule(ModuleType):
    """A module whose variables are DeepSpeed's where its module is live; see [Note: live].

    DeepSpeed's private variables for groups, such as ``_EXPERT_PARALLEL_GROUP``, can be read.
    """

    __all__: list[str]
    mpu: Assigned[Any] = Assigned("mpu", None)
    mesh_device: Assigned[Any] = Assigned("mesh_device", None, of_world=True)
    expert_tensor_parallel_world_size: Assigned[int] = Assigned("expert_tensor_parallel_world_size", 1, of_world=True)

    def __dir__(self) -> Iterable[str]:
        private = {name for name in (*super().__dir__(), *vars(ParallelStateModule)) if name.startswith("_")}
        return sorted(private.union(self.__all__, ASSIGNABLE))

    @property
    def _MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE(self) -> int | None:
        state.refresh()
        return state.tensor_size

    @property
    def _MPU_TENSOR_MODEL_PARALLEL_RANK(self) -> int | None:
        state.refresh()
        return state.tensor_rank


def _variable(name: str, module: ParallelStateModule) -> Any:
    return state.variable(name)


for _name in NAMES:
    setattr(ParallelStateModule, _name, property(partial(_variable, _name)))
