"""The functions of ``deepspeed.utils.groups``, over one default object.

``mpu``, ``mesh_device`` and ``expert_tensor_parallel_world_size`` are attributes of this module: assign them, every
function sees it. All state is in one object that notices when the process group is destroyed: groups of an earlier
world are never returned, and creating them again makes new ones. Where DeepSpeed is the engine, its module keeps the
state: what it was given and the groups that it made are found here, and what is assigned or made here is its own too.

Functions named ``create`` or ``init`` must be called by every rank: sizes are checked first (`TopologyError`), then
ranks compare plans (`PlanMismatchError`), then groups are made; a second call with the same layout returns the same
groups, one with another layout raises `LayoutConflictError`. Getters of groups raise `NotInitializedError`. In a
single process without a process group, sizes are 1, ranks are 0 and rank lists ``[0]``.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch.distributed as dist

from . import _expert_getters, _expert_tables as tables, _mpu, _zero_getters
from ._axis import Partition
from ._c10d import default_group
from ._module import ParallelStateModule
from ._presets import deepspeed
from ._state import alone, state as _state
from ._tensor_getters import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_src_rank,
    get_tensor_model_parallel_world_size,
    set_tensor_model_parallel_rank,
    set_tensor_model_parallel_world_size,
)
from ._topology import ParallelTopology
from ._variables import ALL_TO_ALL
from .errors import DivisibilityError, NoSequenceGroupError, TopologyError

__all__ = [
    "destroy_groups",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size",
    "initialize",
    "set_tensor_model_parallel_rank",
    "set_tensor_model_parallel_world_size",
]

Group = dist.ProcessGroup

_DEVICE_MESH_SPLIT_UNSUPPORTED = "No backend for the parent process group or its backend does not support splitting"
"""What torch says where a group cannot be split; DeepSpeed looks for it, nothing here does."""

# Declared here, kept by the class of the module: functions have to read them from `_here`.
mpu: Any  # a Megatron-style object; its groups and sizes are used where it has them
mesh_device: Any  # a DeviceMesh with dimensions "data_parallel" and, perhaps, "sequence_parallel"
expert_tensor_parallel_world_size: int

sys.modules[__name__].__class__ = ParallelStateModule
_here = cast(ParallelStateModule, sys.modules[__name__])

_get_max_expert_size = _expert_getters._get_max_expert_size
_get_max_expert_size_name = _expert_getters._get_max_expert_size_name
_get_max_expert_parallel_group = _expert_getters._get_max_expert_parallel_group
_get_expert_parallel_group = _expert_getters._get_expert_parallel_group
_get_expert_parallel_group_ranks = _expert_getters._get_expert_parallel_group_ranks
_get_expert_parallel_group_dict = _expert_getters._get_expert_parallel_group_dict
_get_expert_data_parallel_group = _expert_getters._get_expert_data_parallel_group
_get_expert_data_parallel_group_ranks = _expert_getters._get_expert_data_parallel_group_ranks
_get_expert_data_parallel_group_dict = _expert_getters._get_expert_data_parallel_group_dict
_get_expert_broadcast_src_rank = _expert_getters._get_expert_broadcast_src_rank
_get_expert_parallel_world_size = _expert_getters._get_expert_parallel_world_size
_get_expert_data_parallel_world_size = _expert_getters._get_expert_data_parallel_world_size
_get_expert_parallel_rank = _expert_getters._get_expert_parallel_rank
_get_expert_parallel_src_rank = _expert_getters._get_expert_parallel_src_rank
_get_expert_data_parallel_rank = _expert_getters._get_expert_data_parallel_rank
_get_zero_param_intra_parallel_group = _zero_getters._get_zero_param_intra_parallel_group
_zero_param_parallel_is_initialized = _zero_getters._zero_param_parallel_is_initialized
_get_zero_param_intra_parallel_rank_in_mygroup = _zero_getters._get_zero_param_intra_parallel_rank_in_mygroup
_get_zero_param_intra_parallel_group_world_size = _zero_getters._get_zero_param_intra_parallel_group_world_size
_get_zero_param_intra_parallel_group_ranks = _zero_getters._get_zero_param_intra_parallel_group_ranks


# Creating and destroying


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Make expert groups called ``ep_size_<ep_size>``. Every rank must call.

    Args:
        ep_size: ranks an expert group has.
        mpu: lays them out inside its tensor parallel lanes, and becomes ``parallel_state.mpu``.

    Raises:
        DivisibilityError: ``ep_size`` does not divide the ranks; on every rank, before any group is made.
        LayoutConflictError: groups of this size exist with another layout.
        PlanMismatchError: ranks called with different sizes.
    """
    if mpu is None:
        _create_expert_and_data_parallel(ep_size)
    else:
        _create_expert_data_and_model_parallel(ep_size, mpu)
        _here.mpu = mpu


def destroy_groups() -> None:
    """Destroy every group made by this module and forget it; assigned attributes stay. Every rank must call.

    Groups that DeepSpeed made stay; DeepSpeed forgets those that are destroyed here.
    """
    _state.close()


def _release_process_group_references(group: Group | None = None) -> None:
    """Forget a group that has just been destroyed, or with None all state, because the world was.

    Assigned attributes are reset with the world. ``deepspeed.comm.destroy_process_group`` calls this.
    """
    if group is None:
        ulysses = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
        getattr(ulysses, "_release_sequence_parallel_groups", lambda: None)()
        _here.mpu = _here.mesh_device = None
        _here.expert_tensor_parallel_world_size = 1
    _state.release(group)


def _ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise `DivisibilityError` unless ``denominator`` divides ``numerator``."""
    if denominator == 0 or numerator % denominator:
        raise DivisibilityError(f"{numerator} is not divisible by {denominator}")


def _init_tp_groups_with_new_group(
    tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None
) -> tuple[Group, Group]:
    """Make tensor parallel groups of neighbouring ranks and data parallel ones. Every rank must call.

    Args:
        tensor_model_parallel_size: ranks a tensor parallel group has.
        data_parallel_size: ranks a data parallel group has; None is computed.

    Returns:
        This rank's data parallel and model parallel group, at every call.

    Raises:
        DivisibilityError: the sizes do not multiply to the world size; on every rank, before any group is made.
        LayoutConflictError: the groups exist with other sizes.
        PlanMismatchError: ranks called with different sizes.
    """
    tp, dp = tensor_model_parallel_size, -1 if data_parallel_size is None else data_parallel_size
    topology = ParallelTopology(default_group().size(), tp=tp, dp=dp)
    layout = {"data": topology.axis("dp"), "tensor": topology.axis("tp")}
    made = _state.make("tensor_parallel", layout, {"call": "init_tp", "tp": topology.tp, "dp": topology.dp})
    return made["data"].group, made["tensor"].group


def _init_tp_mesh_device(
    tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None
) -> tuple[Group, Group]:
    """The same as `_init_tp_groups_with_new_group`."""
    return _init_tp_groups_with_new_group(tensor_model_parallel_size, data_parallel_size)


def _create_model_parallel(model_parallel_size_: int) -> tuple[Group, Group]:
    """Make groups of neighbouring ranks; returns (data, model) and keeps nothing. Every rank must call."""
    size = min(model_parallel_size_, default_group().size())
    topology = ParallelTopology(default_group().size(), tp=size)
    layout = {"data": topology.axis("dp"), "model": topology.axis("tp")}
    made = _state.make(f"model_parallel_{size}", layout, {"call": "create_model_parallel", "size": size})
    return made["data"].group, made["model"].group


def _create_expert_and_data_parallel(
    expert_parallel_size_: int,
    mp_size: int | None = None,
    pp_size: int | None = None,
    mp_mode: str = "tp",
    use_data_before_expert_parallel_: bool = False,
    folding_spec: Any = None,
) -> None:
    """Make expert and expert-data groups called ``ep_size_<size>`` over whole pipeline stages. Every rank must call.

    Args:
        expert_parallel_size_: ranks an expert group has.
        mp_size: tensor (or sequence) parallel size; None is 1.
        pp_size: pipeline parallel size; None asks ``mpu``.
        mp_mode: ``"tp"`` takes the ranks lane by lane, ``"sp"`` in their own order.
        use_data_before_expert_parallel_: replicas of an expert are neighbours, not the ranks of an expert group.
        folding_spec: sizes made elsewhere, checked against these; consecutive ranks of a stage form a group.

    Raises:
        TopologyError: sizes that do not divide, an unknown mode, a spec of other sizes; before any group is made.
        LayoutConflictError: groups of this size exist with another layout, such as the other order.
        PlanMismatchError: ranks called with different sizes.
    """
    if mp_mode not in ("tp", "sp"):
        raise TopologyError(f"mp_mode={mp_mode!r} must be 'tp' or 'sp'")
    world_size, ep, tp = default_group().size(), expert_parallel_size_, mp_size or 1
    pp = _mpu.pipeline_size(_here.mpu) if pp_size is None else pp_size
    before = bool(use_data_before_expert_parallel_)
    if folding_spec is not None:
        found: tuple[Partition, Partition] = tables.from_spec(folding_spec, world_size, ep, tp, pp)
    elif tp > 1 and mp_mode == "tp":
        found = tables.strided(world_size, tp, ep, pp, data_before_expert=before)
    else:
        ParallelTopology(world_size, tp=tp, pp=pp)  # refuses sizes that do not divide
        found = tables.folded(world_size, ep, pp, data_before_expert=before)
    plan = {"call": "create_expert_and_data_parallel", "ep": ep, "mp": tp, "pp": pp, "mp_mode": mp_mode}
    _state.make_expert(ep, found, {**plan, "data_before_expert": before, "folding": folding_spec is not None})


def _create_expert_data_and_model_parallel(
    expert_parallel_size_: int, mpu: Any, use_data_before_expert_parallel_: bool = False
) -> None:
    """Make expert and expert-data groups inside the tensor parallel lanes of ``mpu``. Every rank must call."""
    ep, tp, pp = expert_parallel_size_, _mpu.tensor_size(mpu), _mpu.pipeline_size(mpu)
    before = bool(use_data_before_expert_parallel_)
    found = tables.lanes(default_group().size(), tp, ep, pp, data_before_expert=before)
    plan = {"call": "create_expert_data_and_model_parallel", "ep": ep, "tp": tp, "pp": pp}
    _state.make_expert(ep, found, {**plan, "data_before_expert": before})
    _here.expert_tensor_parallel_world_size = tp


def _get_expert_parallel_ranks(
    world_size: int,
    tensor_parallel_size_: int,
    expert_parallel_size_: int,
    pipeline_parallel_size_: int = 1,
    use_data_before_expert_parallel_: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Rank lists of all expert and all expert-data groups inside tensor parallel lanes; makes nothing.

    >>> _get_expert_parallel_ranks(8, 2, 2)
    ([[0, 2], [4, 6], [1, 3], [5, 7]], [[0, 4], [2, 6], [1, 5], [3, 7]])
    """
    expert, data = tables.lane_tables(
        world_size,
        tensor_parallel_size_,
        expert_parallel_size_,
        pipeline_parallel_size_,
        data_before_expert=bool(use_data_before_expert_parallel_),
    )
    return [list(group) for group in expert], [list(group) for group in data]


def _create_zero_param_parallel_group(group_size: int) -> None:
    """Make groups of ``group_size`` neighbouring ranks that share ZeRO parameters. Every rank must call."""
    size = min(group_size, default_group().size())
    layout = {"shard": deepspeed(default_group().size(), hpz=size).axis("hpz")}
    _state.make("zero_param", layout, {"call": "create_zero_param", "size": size})


def _clone_world_group() -> Group:
    """A group of all ranks that is not the default one; the same at every call. First every rank must call."""
    size = default_group().size()
    return _state.share("world", "world", lambda: {"world": ParallelTopology(size).axis("dp")})


def _get_local_all_to_all_group(*, ranks_per_node: int | None = None) -> dict[str, Group | None]:
    """Groups ``local_<node>`` and ``global_<local rank>``, made once; None for those of others. Every rank must call.

    Args:
        ranks_per_node: default as the groups are, if there are any, else ``LOCAL_WORLD_SIZE``, else the number of
            accelerators. More than there are ranks means all of them; otherwise it must divide the world. With one
            node there are no global groups.
    """
    found: dict[str, Group | None] = _state.variable(ALL_TO_ALL)
    if ranks_per_node is None and _state.find("all_to_all", "local") is not None:
        return found
    world_size = default_group().size()
    size = min(_mpu.ranks_per_node(world_size) if ranks_per_node is None else ranks_per_node, world_size)
    topology = ParallelTopology(world_size, ranks_per_node=size)
    layout = {"local": topology.axis("local")}
    if size < world_size:
        layout["global"] = topology.axis("node")
    _state.make("all_to_all", layout, {"call": "all_to_all", "ranks_per_node": size})
    return found


# Sizes and groups


def _get_expert_model_parallel_world_size() -> int:
    """Tensor parallel size of the experts."""
    return _here.expert_tensor_parallel_world_size


# Data and sequence parallel, from mesh_device, else mpu, else all ranks


def _get_data_parallel_group() -> Group:
    """This rank's data parallel group. Without mesh or mpu a group of all ranks, made by all at the first call."""
    mpu, mesh_device = _here.mpu, _here.mesh_device
    if mesh_device is not None:
        return _mpu.mesh_data_group(mesh_device)
    if _mpu.is_sequence_only(mpu):
        size, sequence = default_group().size(), int(mpu.get_sequence_parallel_world_size())
        return _state.share(("data", sequence), "data", lambda: _mpu.sequence_layout(size, sequence))
    group: Group = _clone_world_group() if mpu is None else mpu.get_data_parallel_group()
    return group


def _get_data_parallel_group_ranks() -> list[int]:
    """Global ranks of this rank's data parallel group."""
    if _here.mesh_device is None and hasattr(_here.mpu, "get_data_parallel_group_ranks"):
        return list(_here.mpu.get_data_parallel_group_ranks())
    return [0] if _unassigned() and alone() else dist.get_process_group_ranks(_get_data_parallel_group())


def _get_data_parallel_world_size() -> int:
    """Ranks in the data parallel group."""
    mpu = _here.mpu
    if _here.mesh_device is None and hasattr(mpu, "get_data_parallel_world_size") and not _mpu.is_sequence_only(mpu):
        return int(mpu.get_data_parallel_world_size())
    return 1 if _unassigned() and alone() else dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank() -> int:
    """This rank's place in the data parallel group."""
    return 0 if _unassigned() and alone() else dist.get_rank(_get_data_parallel_group())


def _get_model_parallel_world_size() -> int:
    """Ranks that hold one copy of the model together, as ``mpu`` says; 1 without one."""
    mpu = _here.mpu
    return 1 if mpu is None or _mpu.is_sequence_only(mpu) else int(mpu.get_model_parallel_world_size())


def _get_sequence_parallel_world_size() -> int:
    """Ranks in the sequence parallel group; 1 without one."""
    group = _mpu.mesh_group(_here.mesh_device, "sequence_parallel")
    if group is not None:
        return dist.get_world_size(group)
    size = getattr(_here.mpu, "get_sequence_parallel_world_size", None)
    return 1 if size is None else int(size())


def _get_sequence_parallel_rank() -> int:
    """This rank's place in the sequence parallel group; 0 without one."""
    group = _mpu.mesh_group(_here.mesh_device, "sequence_parallel")
    if group is not None:
        return dist.get_rank(group)
    rank = getattr(_here.mpu, "get_sequence_parallel_rank", None)
    return 0 if rank is None else int(rank())


def _get_sequence_parallel_group() -> Group:
    """This rank's sequence parallel group; `NoSequenceGroupError`, a `KeyError` too, where there is none."""
    group = _mpu.mesh_group(_here.mesh_device, "sequence_parallel")
    if group is None and hasattr(_here.mpu, "get_sequence_parallel_group"):
        group = _here.mpu.get_sequence_parallel_group()
    if group is None:
        raise NoSequenceGroupError("no sequence parallel group: assign groups.mpu or groups.mesh_device that has one")
    return group


def _get_sequence_data_parallel_group() -> Group:
    """The group over data and sequence parallel ranks, over which ZeRO shards and gradients are reduced."""
    mpu, mesh_device = _here.mpu, _here.mesh_device
    if _mpu.mesh_group(mesh_device, "sequence_parallel") is not None:
        return _state.share(("mesh", mesh_device), "both", lambda: _mpu.mesh_layout(mesh_device))
    if mesh_device is None and hasattr(mpu, "get_sequence_data_parallel_group"):
        group: Group = mpu.get_sequence_data_parallel_group()
        return group
    return _get_data_parallel_group()


def _get_sequence_data_parallel_world_size() -> int:
    """Ranks in the data and sequence parallel group."""
    return 1 if _unassigned() and alone() else dist.get_world_size(_get_sequence_data_parallel_group())


def _get_sequence_data_parallel_rank() -> int:
    """This rank's place in the data and sequence parallel group."""
    return 0 if _unassigned() and alone() else dist.get_rank(_get_sequence_data_parallel_group())


def _get_broadcast_src_rank() -> int:
    """Global rank of the first member of the data and sequence parallel group."""
    if _unassigned() and alone():
        return 0
    return dist.get_global_rank(_get_sequence_data_parallel_group(), 0)


def _unassigned() -> bool:
    return _here.mpu is None and _here.mesh_device is None
