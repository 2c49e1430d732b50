"""DeepSpeed's expert layouts: the expert groups of a world, and the groups of the ranks that hold the same experts."""

from __future__ import annotations

from typing import Any

from ._axis import Axis, Partition, TableAxis
from ._presets import deepspeed
from ._topology import ParallelTopology
from .errors import TopologyError

Table = tuple[tuple[int, ...], ...]


def folded(world_size: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Axis, Axis]:
    """Expert and expert-data groups over all ranks of a pipeline stage, tensor parallel ones included."""
    topology = deepspeed(world_size, pp=pp, ep=ep, data_before_expert=data_before_expert)
    return topology.axis("ep"), topology.axis("edp")


def lanes(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Axis, Axis]:
    """Expert and expert-data groups inside each tensor-parallel lane."""
    topology = deepspeed(world_size, tp=tp, pp=pp, ep=ep, experts="lane", data_before_expert=data_before_expert)
    return topology.axis("ep"), topology.axis("edp")


def strided(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Partition, Partition]:
    """Whole experts over a stage's ranks, those of one tensor-parallel lane first.

    A group may take in more than one lane when ``ep`` does not divide the lane. DeepSpeed's process groups number
    their members in ascending order, so an expert's replicas are the ranks at the same place of their *sorted* groups.
    """
    folded(world_size, ep, pp, data_before_expert=data_before_expert)  # refuses sizes that do not divide
    layout = {"tp": tp, "pp": pp, "ep": ep, "experts": "lane_by_lane", "data_before_expert": data_before_expert}
    topology = deepspeed(world_size, **layout)  # type: ignore[arg-type]
    expert, data = topology.axis("ep"), topology.axis("edp")
    if expert.is_ascending and (ascending := data.ascending()) is not None:
        return expert, ascending
    groups, replicas = strided_tables(world_size, tp, ep, pp, data_before_expert=data_before_expert)
    return TableAxis(groups), TableAxis(replicas)


def from_spec(spec: Any, world_size: int, ep: int, tp: int, pp: int) -> tuple[Axis, Axis]:
    """Expert and expert-data groups of a folding spec: consecutive ranks of each stage.

    Raises:
        TopologyError: the spec was made for other sizes.
    """
    for field, value in {"world_size": world_size, "ep_size": ep, "tp_size": tp, "pp_size": pp}.items():
        held = getattr(spec, field, value)
        if held != value:
            raise TopologyError(f"folding_spec.{field}={held} is not the {value} of this call")
    return folded(world_size, ep, pp, data_before_expert=False)


def folded_tables(world_size: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Every group of `folded`."""
    expert, data = folded(world_size, ep, pp, data_before_expert=data_before_expert)
    return expert.table(), data.table()


def lane_tables(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Every group of `lanes`, lane after lane, as DeepSpeed lists them."""
    expert, data = lanes(world_size, tp, ep, pp, data_before_expert=data_before_expert)
    return _by_lane(expert.table(), tp, pp), _by_lane(data.table(), tp, pp)


def strided_tables(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Every group of `strided`, in the order in which DeepSpeed makes them."""
    ParallelTopology(world_size, tp=tp, pp=pp, ep=ep)  # refuses sizes that do not divide
    expert: list[tuple[int, ...]] = []
    data: list[tuple[int, ...]] = []
    size = world_size // pp
    for first in range(0, world_size, size):
        members = [rank for lane in range(tp) for rank in range(first + lane, first + size, tp)]
        count = size // ep
        if data_before_expert:
            groups = [tuple(sorted(members[start::count])) for start in range(count)]
        else:
            groups = [tuple(sorted(members[start : start + ep])) for start in range(0, size, ep)]
        expert += groups
        data += [tuple(sorted(replicas)) for replicas in zip(*groups, strict=True)]
    return tuple(expert), tuple(data)


def _by_lane(groups: Table, tp: int, pp: int) -> Table:
    """Groups inside lanes, which come ordered by stage and first rank, so that lanes take turns: lane after lane."""
    stage = len(groups) // pp
    starts = [first + lane for first in range(0, len(groups), stage) for lane in range(tp)]
    return tuple([group for start in starts for group in groups[start : (start // stage + 1) * stage : tp]])
