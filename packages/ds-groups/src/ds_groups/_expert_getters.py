"""What `ds_groups.parallel_state` says about expert groups that have been made."""

from __future__ import annotations

import torch.distributed as dist

from ._state import Made, state
from ._variables import EXPERT
from .errors import NotInitializedError

Group = dist.ProcessGroup


def find(name: str, kind: str) -> Made:
    """The group of this kind, ``expert`` or ``expert_data``, called ``name``, which is ``ep_size_<size>``."""
    how = "_create_expert_and_data_parallel(size)"
    known = ", ".join(sorted(_get_expert_parallel_group_dict())) or "none yet"
    return state.get(name, kind, f"the expert parallel group {name!r}", how, f"; there are: {known}")


def _get_max_expert_size() -> int | None:
    """The largest expert group size that has been made; None when none has."""
    names = [name for name in _get_expert_parallel_group_dict() if state.find(name, "expert")]
    return max((int(name.removeprefix("ep_size_")) for name in names), default=None)


def _get_max_expert_size_name() -> str:
    """Name of the expert groups of the largest size."""
    size = _get_max_expert_size()
    if size is None:
        raise NotInitializedError("no expert parallel group is initialized: make one first, on every rank")
    return f"ep_size_{size}"


def _get_max_expert_parallel_group() -> Group:
    """This rank's expert group of the largest size."""
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_parallel_group(group_name: str) -> Group:
    """This rank's expert group of this name: ``ep_size_4``."""
    return find(group_name, "expert").group


def _get_expert_parallel_group_ranks(group_name: str) -> list[int]:
    """Global ranks of this rank's expert group, as the group numbers them."""
    return list(find(group_name, "expert").ranks)


def _get_expert_parallel_group_dict() -> dict[str, Group]:
    """Name -> this rank's expert group; DeepSpeed's own dict where it is the engine. Kept up to date."""
    found: dict[str, Group] = state.variable(EXPERT["expert"])
    return found


def _get_expert_data_parallel_group(group_name: str) -> Group:
    """The group of the ranks that hold the same experts as this one."""
    return find(group_name, "expert_data").group


def _get_expert_data_parallel_group_ranks(group_name: str) -> list[int]:
    """Global ranks that hold the same experts as this one, as the group numbers them."""
    return list(find(group_name, "expert_data").ranks)


def _get_expert_data_parallel_group_dict() -> dict[str, Group]:
    """Name -> this rank's expert-data group; DeepSpeed's own dict where it is the engine. Kept up to date."""
    found: dict[str, Group] = state.variable(EXPERT["expert_data"])
    return found


def _get_expert_broadcast_src_rank(group_name: str) -> int:
    """Global rank of the first member of the expert-data group."""
    return find(group_name, "expert_data").ranks[0]


def _get_expert_parallel_world_size(group_name: str) -> int:
    """Ranks in the expert group."""
    return len(find(group_name, "expert").ranks)


def _get_expert_data_parallel_world_size(group_name: str) -> int:
    """Ranks in the expert-data group."""
    return len(find(group_name, "expert_data").ranks)


def _get_expert_parallel_rank(group_name: str) -> int:
    """This rank's place in the expert group."""
    return dist.get_rank(_get_expert_parallel_group(group_name))


def _get_expert_parallel_src_rank(group_name: str) -> int:
    """Global rank of the first member of the expert group."""
    return find(group_name, "expert").ranks[0]


def _get_expert_data_parallel_rank(group_name: str) -> int:
    """This rank's place in the expert-data group."""
    return dist.get_rank(_get_expert_data_parallel_group(group_name))
