"""A topology with the attributes of Megatron-Core's ``ProcessGroupCollection``, and the groups that are no axis."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from .errors import RankRangeError, TopologyError

if TYPE_CHECKING:
    import torch.distributed as dist

    from ._axis import Axis
    from ._bound import BoundTopology

_AXES: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "pp": ("pp",),
    "mp": ("tp", "pp"),
    "cp": ("cp",),
    "tp_cp": ("tp", "cp"),
    "dp": ("dp",),
    "dp_cp": ("dp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "intra_dp_cp": ("dp_shard", "cp"),
    "intra_dist_opt": ("tp", "cp", "dp_shard", "pp"),
    "ep": ("ep",),
    "expt_tp": ("etp",),
    "tp_ep": ("etp", "ep"),
    "tp_ep_pp": ("etp", "ep", "pp"),
}
_OTHERS = ("embd", "pos_embd", "expt_dp", "intra_expt_dp", "inter_dist_opt")


class Alone(NamedTuple):
    """Every rank in a group of its own: the axis that a plan does not have."""

    world_size: int
    key: str = "alone"
    is_ascending: bool = True

    def ranks(self, rank: SupportsIndex, /) -> tuple[int, ...]:
        """The rank itself."""
        return (operator.index(rank),)

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Every rank."""
        return tuple((rank,) for rank in range(self.world_size))


class PipelineEnds(NamedTuple):
    """The first and, unless ``first_only``, the last stage of each pipeline, which share the embedding."""

    pipeline: Axis
    first_only: bool

    @property
    def key(self) -> str:
        """See `Partition`."""
        return f"{self.pipeline.key}/{'first' if self.first_only else 'ends'}"

    @property
    def is_ascending(self) -> bool:
        """See `Partition`."""
        return self.pipeline.is_ascending

    def ranks(self, rank: SupportsIndex, /) -> tuple[int, ...]:
        """The ends of the pipeline of ``rank``.

        Raises:
            RankRangeError: ``rank`` is between them.
        """
        ends = self._ends(self.pipeline.ranks(rank))
        if operator.index(rank) not in ends:
            raise RankRangeError(f"rank {rank} is in no stage that holds the embedding: {list(ends)} are")
        return ends

    def table(self) -> tuple[tuple[int, ...], ...]:
        """The ends of every pipeline."""
        return tuple(self._ends(group) for group in self.pipeline.table())

    def _ends(self, group: tuple[int, ...]) -> tuple[int, ...]:
        return group[:1] if self.first_only or len(group) == 1 else (group[0], group[-1])


def known_axis(bound: BoundTopology, axis: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an axis that the plan has; what it lacks has one rank."""
    return tuple(name for name in axis if name in bound.topology.names)


def group_along(bound: BoundTopology, axis: tuple[str, ...]) -> dist.ProcessGroup:
    """The group along an axis, of this rank alone where the plan has none of its names."""
    known = known_axis(bound, axis)
    return bound.group(known) if known else bound.group_of(Alone(bound.topology.world_size), "_".join(axis))


def expert_data_axis(bound: BoundTopology, *, inside: bool = False) -> tuple[str, ...]:
    """The ranks that hold the same experts; ``inside`` one sharded copy only.

    Where experts stay inside a replica these are ``edp`` of every replica.
    """
    if not inside and "edp" in bound.topology.names:
        try:
            bound.topology.axis(("edp", "dp_replicate"))
        except TopologyError:  # experts cut the replicas too, or there are none
            return ("edp",)
        return ("edp", "dp_replicate")
    return ("edp",)


class ProcessGroupCollection:
    """Groups by the names of Megatron-Core's ``ProcessGroupCollection``; see ``BoundTopology``.

    A group is made when its attribute is read, and so by ``hasattr()``; its members must all read it. Other values
    can be assigned. ``embd`` and ``pos_embd`` are None between the ends of a pipeline, ``inter_dist_opt`` where the
    plan has one replica.
    """

    def __init__(self, bound: BoundTopology) -> None:
        self._bound = bound

    def __getattr__(self, name: str) -> dist.ProcessGroup | None:
        if name in _AXES:
            return group_along(self._bound, _AXES[name])
        if name not in _OTHERS:
            raise AttributeError(f"no process group {name!r}; there are {', '.join((*_AXES, *_OTHERS))}")
        if name.endswith("expt_dp"):
            return group_along(self._bound, expert_data_axis(self._bound, inside=name == "intra_expt_dp"))
        if name == "inter_dist_opt":
            replicas = known_axis(self._bound, ("dp_replicate",))
            return self._bound.group(replicas) if replicas and self._bound.size(replicas) > 1 else None
        if not known_axis(self._bound, ("pp",)):
            return group_along(self._bound, ("pp",))
        try:
            return self._bound.group_of(PipelineEnds(self._bound.topology.axis("pp"), name == "pos_embd"), name)
        except RankRangeError:
            return None

    def __dir__(self) -> list[str]:
        return sorted((*_AXES, *_OTHERS))

    def __repr__(self) -> str:
        return f"ProcessGroupCollection({self._bound!r})"
