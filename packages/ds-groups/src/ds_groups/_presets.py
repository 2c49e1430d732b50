"""The layouts of Megatron-LM, torchtitan and DeepSpeed, under their own names of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ._topology import ParallelTopology
from .errors import DivisibilityError, TopologyError

ExpertLayout = Literal["stage", "lane", "lane_by_lane"]


def megatron(
    world_size: int | None = None,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    order: str = "tp-cp-ep-dp-pp",
    ranks_per_node: int | None = None,
    span: Sequence[int] | None = None,
) -> ParallelTopology:
    """The groups of Megatron-LM's ``initialize_model_parallel``.

    Source: ``RankGenerator`` of megatron/core/parallel_state.py. Dense ranks lie along ``order`` without ``ep``,
    experts along ``order`` with ``etp`` for ``tp`` and ``edp`` for ``dp``, without ``cp``.

    Args:
        world_size: how many ranks there are; None asks the process group or the launcher.
        tp: tensor model parallel size.
        cp: context parallel size.
        pp: pipeline model parallel size.
        ep: expert model parallel size.
        etp: expert tensor parallel size; None is ``tp``.
        order: the axes from the fastest varying to the slowest.
        ranks_per_node: as for `ParallelTopology`.
        span: as for `ParallelTopology`.

    Returns:
        A topology with the axes ``tp, cp, dp, pp, etp, ep, edp``, and ``mp`` (``tp`` and ``pp``).

    Raises:
        TopologyError: Megatron would refuse the sizes, too: they do not divide the ranks, or the pipeline groups of
            experts are others than the dense ones.

    >>> megatron(16, tp=2, ep=4, pp=2).table("ep")
    ((0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15))
    """
    topology = ParallelTopology(
        world_size,  # type: ignore[arg-type]
        tp=tp,
        cp=cp,
        pp=pp,
        ep=ep,
        etp=tp if etp is None else etp,
        order=order,
        ep_axes="tp-cp-dp",
        ranks_per_node=ranks_per_node,
        span=span,  # type: ignore[arg-type]
        extra_axes={"mp": ("tp", "pp")},
    )
    names = topology.order.split("-")
    sizes = {"tp": topology.etp, "ep": ep, "dp": topology.size("edp"), "cp": 1, "pp": pp}
    expert_stride = 1
    for name in names[: names.index("pp")]:
        expert_stride *= sizes.get(name, 1)
    dense_stride = next(digit.stride for digit in topology.digits if digit.name == "pp")
    if pp > 1 and expert_stride != dense_stride:
        raise DivisibilityError(
            f"with order={order!r} and pp={pp} the pipeline groups of experts are {expert_stride} ranks apart and the "
            f"dense ones {dense_stride}; put pp last, or let etp * ep * edp before pp equal tp * cp * dp before it"
        )
    return topology


def torchtitan(
    world_size: int | None = None,
    *,
    dp_replicate: int = 1,
    dp_shard: int = -1,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    ranks_per_node: int | None = None,
) -> ParallelTopology:
    """The meshes of torchtitan's ``ParallelDims``.

    Source: torchtitan/distributed/parallel_dims.py: row-major ``pp, dp_replicate, dp_shard, cp, tp`` and, for experts,
    ``pp, dp_replicate, efsdp, ep, etp``.

    Args:
        world_size: how many ranks there are; None asks the process group or the launcher.
        dp_replicate: replicas of hybrid sharding.
        dp_shard: ranks that share a sharded copy; -1 takes what the others leave.
        cp: context parallel size.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        ep: expert parallel size, inside one replica.
        etp: tensor parallel size of the experts.
        ranks_per_node: as for `ParallelTopology`.

    Returns:
        A topology with these axes, and ``batch`` (``dp_replicate, dp_shard``), ``fsdp`` (``dp_shard, cp``), ``loss``
        (``dp_replicate, dp_shard, cp``) and ``efsdp`` (the ranks beside ``ep`` in one replica; also ``edp``).

    Raises:
        TopologyError: the sizes do not divide the ranks.

    >>> torchtitan(8, dp_replicate=2, ep=2).table("efsdp")
    ((0, 2), (1, 3), (4, 6), (5, 7))
    """
    return ParallelTopology(
        world_size,  # type: ignore[arg-type]
        tp=tp,
        cp=cp,
        pp=pp,
        dp_shard=dp_shard,
        dp_replicate=dp_replicate,
        ep=ep,
        etp=etp,
        ep_axes="tp-cp-dp_shard",
        ranks_per_node=ranks_per_node,
        extra_axes={
            "batch": ("dp_replicate", "dp_shard"),
            "fsdp": ("dp_shard", "cp"),
            "loss": ("dp_replicate", "dp_shard", "cp"),
            "efsdp": ("edp",),
        },
    )


def deepspeed(
    world_size: int | None = None,
    *,
    tp: int = 1,
    sp: int = 1,
    pp: int = 1,
    ep: int = 1,
    hpz: int = 1,
    experts: ExpertLayout = "stage",
    data_before_expert: bool = False,
    ranks_per_node: int | None = None,
) -> ParallelTopology:
    """The groups that DeepSpeed makes.

    Source: deepspeed/utils/groups.py and the grid of deepspeed/runtime/pipe/topology.py: neighbouring ranks are tensor
    (or sequence) parallel, pipeline stages are farthest apart.

    Args:
        world_size: how many ranks there are; None asks the process group or the launcher.
        tp: tensor parallel size, DeepSpeed's model parallel size.
        sp: sequence parallel (Ulysses) size.
        pp: pipeline parallel size.
        ep: expert parallel size.
        hpz: ranks of a secondary partition, ``zero_hpz_partition_size``, or of a MiCS shard group.
        experts: the ranks that experts factor: ``"stage"``, all of a pipeline stage
            (``_create_expert_and_data_parallel(ep)``); ``"lane"``, those of one tensor rank
            (``_create_expert_data_and_model_parallel``); ``"lane_by_lane"``, all of a stage, those of one tensor rank
            after those of another (``_create_expert_and_data_parallel(ep, mp_size=tp, mp_mode="tp")``).
        data_before_expert: the ranks that hold the same experts are neighbours.
        ranks_per_node: as for `ParallelTopology`: ``local`` and ``node`` are DeepSpeed's groups for all-to-all.

    Returns:
        A topology with the axes ``tp, sp, dp, pp, ep, edp, hpz, hpz_replicate``, and ``seq_data`` (``sp, dp``) over
        which ZeRO shards.

    Raises:
        TopologyError: the sizes do not divide the ranks.

    >>> deepspeed(8, tp=2, ep=2, experts="lane").table("ep")
    ((0, 2), (1, 3), (4, 6), (5, 7))
    """
    layouts = ("stage", "lane", "lane_by_lane")
    if experts not in layouts:
        raise TopologyError(f"experts={experts!r} must be one of {', '.join(map(repr, layouts))}")
    topology = ParallelTopology(
        world_size,  # type: ignore[arg-type]
        tp=tp,
        cp=sp,
        pp=pp,
        ep=ep,
        ep_axes={"lane": "dp" if sp == 1 else "cp-dp"}.get(experts, "tp-cp-dp"),
        data_before_expert=data_before_expert,
        by_lane=experts == "lane_by_lane",
        ranks_per_node=ranks_per_node,
        extra_axes={"sp": ("cp",), "seq_data": ("cp", "dp_shard", "dp_replicate")},
    )
    return topology.view(hpz=hpz, hpz_replicate=-1)
