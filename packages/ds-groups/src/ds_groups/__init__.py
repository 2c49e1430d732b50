"""Rank arithmetic for parallel training, and process groups made from it.

``ParallelTopology`` needs no torch; ``bind()`` imports it. ``ds_groups.parallel_state`` has the functions of
``deepspeed.utils.groups``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .__about__ import __version__
from ._topology import ParallelTopology
from .errors import GroupsError, PlanMismatchError, PlanTimeoutError, StaleGroupsError, TopologyError

if TYPE_CHECKING:
    from ._bound import BoundTopology

__all__ = [
    "__version__",
    "BoundTopology",
    "GroupsError",
    "ParallelTopology",
    "PlanMismatchError",
    "PlanTimeoutError",
    "StaleGroupsError",
    "TopologyError",
]


def __getattr__(name: str) -> Any:
    if name == "BoundTopology":  # needs torch, which rank arithmetic does not
        from ._bound import BoundTopology

        return BoundTopology
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
