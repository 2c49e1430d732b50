"""Rank tables of DeepSpeed's expert layouts, as pure functions."""

from __future__ import annotations

from typing import Any

from ._topology import ParallelTopology
from .errors import TopologyError

Table = tuple[tuple[int, ...], ...]


def folded_tables(world_size: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Expert and expert-data groups over all ranks of a pipeline stage, tensor parallel ones included."""
    topology = ParallelTopology(world_size, pp=pp, ep=ep, data_before_expert=data_before_expert)
    return tuple(topology.groups("ep")), tuple(topology.groups("edp"))


def lane_tables(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Expert and expert-data groups inside each tensor-parallel lane; lane after lane, as DeepSpeed lists them."""
    topology = ParallelTopology(world_size, tp=tp, pp=pp, ep=ep, ep_axes="dp", data_before_expert=data_before_expert)

    def by_lane(group: tuple[int, ...]) -> tuple[int, int, int]:
        at = topology.coordinates(group[0])
        return at["pp"], at["tp"], group[0]

    return tuple(sorted(topology.groups("ep"), key=by_lane)), tuple(sorted(topology.groups("edp"), key=by_lane))


def strided_tables(world_size: int, tp: int, ep: int, pp: int, *, data_before_expert: bool) -> tuple[Table, Table]:
    """Whole experts over a stage's ranks, those of one tensor-parallel lane first.

    A group may take in more than one lane when ``ep`` does not divide the lane. Process groups number their members
    in ascending order, so an expert's replicas are the ranks at the same place of their *sorted* groups.
    """
    stage = ParallelTopology(world_size, tp=tp, pp=pp)
    folded_tables(world_size, ep, pp, data_before_expert=data_before_expert)  # refuses sizes that do not divide
    expert: list[tuple[int, ...]] = []
    data: list[tuple[int, ...]] = []
    for members in stage.groups("tp_cp_dp"):
        lanes = sorted(members, key=lambda rank: (stage.coordinates(rank)["tp"], rank))
        count = len(lanes) // ep
        if data_before_expert:
            groups = [tuple(sorted(lanes[start::count])) for start in range(count)]
        else:
            groups = [tuple(sorted(lanes[start : start + ep])) for start in range(0, len(lanes), ep)]
        expert += groups
        data += [tuple(sorted(replicas)) for replicas in zip(*groups, strict=True)]
    return tuple(expert), tuple(data)


def spec_tables(spec: Any, world_size: int, ep: int, tp: int, pp: int) -> tuple[Table, Table]:
    """Expert and expert-data groups of a folding spec: consecutive ranks of each stage.

    Raises:
        TopologyError: the spec was made for other sizes.
    """
    for field, value in {"world_size": world_size, "ep_size": ep, "tp_size": tp, "pp_size": pp}.items():
        held = getattr(spec, field, value)
        if held != value:
            raise TopologyError(f"folding_spec.{field}={held} is not the {value} of this call")
    return folded_tables(world_size, ep, pp, data_before_expert=False)
