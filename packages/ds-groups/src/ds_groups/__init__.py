"""Rank arithmetic for parallel training, and process groups made from it.

``ParallelTopology`` needs no torch; ``bind()`` imports it. ``ds_groups.parallel_state`` has the functions of
``deepspeed.utils.groups``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .__about__ import __version__
from ._grid import RankGrid
from ._options import GroupOptions
from ._presets import deepspeed, megatron, torchtitan
from ._topology import ParallelTopology
from .errors import (
    DeadlockError,
    DivisibilityError,
    GroupCreationError,
    GroupsError,
    LayoutConflictError,
    MissingDependencyError,
    NoSequenceGroupError,
    NotInitializedError,
    PlanMismatchError,
    PlanTimeoutError,
    RankRangeError,
    StaleGroupsError,
    StoreError,
    TopologyError,
    TopologyWarning,
    UnsupportedTorchError,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from . import parallel_state
    from ._bound import BoundTopology

__all__ = [
    "__version__",
    "BoundTopology",
    "DeadlockError",
    "DivisibilityError",
    "GroupCreationError",
    "GroupOptions",
    "GroupsError",
    "LayoutConflictError",
    "MissingDependencyError",
    "NoSequenceGroupError",
    "NotInitializedError",
    "ParallelTopology",
    "PlanMismatchError",
    "PlanTimeoutError",
    "RankRangeError",
    "RankGrid",
    "StaleGroupsError",
    "StoreError",
    "TopologyError",
    "TopologyWarning",
    "UnsupportedTorchError",
    "deepspeed",
    "from_mesh",
    "megatron",
    "parallel_state",
    "torchtitan",
]


def from_mesh(mesh: DeviceMesh) -> BoundTopology:
    """The topology that a PyTorch `DeviceMesh` was cut from; see `BoundTopology.from_mesh`."""
    found: BoundTopology = importlib.import_module("._bound", __name__).BoundTopology.from_mesh(mesh)
    return found


def __getattr__(name: str) -> Any:
    if name == "BoundTopology":  # this and `parallel_state` need torch, which rank arithmetic does not
        return importlib.import_module("._bound", __name__).BoundTopology
    if name == "parallel_state":
        return importlib.import_module(".parallel_state", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})
