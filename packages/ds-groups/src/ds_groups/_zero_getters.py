"""What `ds_groups.parallel_state` says about the groups that share ZeRO parameters."""

from __future__ import annotations

import torch.distributed as dist

from ._state import Made, state

Group = dist.ProcessGroup


def find() -> Made:
    """This rank's group that shares ZeRO parameters."""
    return state.get("zero_param", "shard", "the ZeRO parameter group", "_create_zero_param_parallel_group(size)")


def _get_zero_param_intra_parallel_group() -> Group | None:
    """This rank's group that shares ZeRO parameters; None while there is none, which callers test for."""
    made = state.find("zero_param", "shard")
    return None if made is None else made.group


def _zero_param_parallel_is_initialized() -> bool:
    """Whether groups that share ZeRO parameters exist."""
    return state.find("zero_param", "shard") is not None


def _get_zero_param_intra_parallel_rank_in_mygroup() -> int:
    """This rank's place in the group that shares ZeRO parameters."""
    return dist.get_rank(find().group)


def _get_zero_param_intra_parallel_group_world_size() -> int:
    """Ranks in the group that shares ZeRO parameters."""
    return len(find().ranks)


def _get_zero_param_intra_parallel_group_ranks() -> list[int]:
    """Global ranks of the group that shares ZeRO parameters."""
    return list(find().ranks)
