"""What `ds_groups.parallel_state` says about tensor parallel groups, and the data parallel ones beside them.

`NotInitializedError` is raised by every function here until ``_init_tp_mesh_device`` has been called.
"""

from __future__ import annotations

import torch.distributed as dist

from ._c10d import default_group
from ._state import Made, state

Group = dist.ProcessGroup


def find(kind: str) -> Made:
    """The ``tensor`` parallel group, or the ``data`` parallel one beside it."""
    return state.get("tensor_parallel", kind, "the tensor parallel group", "_init_tp_mesh_device(tp_size)")


def get_tensor_model_parallel_group() -> Group:
    """This rank's tensor parallel group."""
    return find("tensor").group


def get_model_parallel_group() -> Group:
    """This rank's model parallel group: the tensor parallel one."""
    return get_tensor_model_parallel_group()


def get_data_parallel_group() -> Group:
    """This rank's data parallel group beside tensor parallelism."""
    return find("data").group


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Report ``world_size`` instead of the tensor parallel group's; None undoes it."""
    state.refresh()
    state.tensor_size = world_size


def get_tensor_model_parallel_world_size() -> int:
    """Ranks in the tensor parallel group."""
    state.refresh()
    return state.tensor_size if state.tensor_size is not None else find("tensor").group.size()


def get_model_parallel_world_size() -> int:
    """Ranks in the model parallel group: the tensor parallel one."""
    return get_tensor_model_parallel_world_size()


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Report ``rank`` instead of this rank's place in the tensor parallel group; None undoes it."""
    state.refresh()
    state.tensor_rank = rank


def get_tensor_model_parallel_rank() -> int:
    """This rank's place in the tensor parallel group."""
    state.refresh()
    return state.tensor_rank if state.tensor_rank is not None else find("tensor").group.rank()


def get_model_parallel_rank() -> int:
    """This rank's place in the model parallel group: the tensor parallel one."""
    return get_tensor_model_parallel_rank()


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor parallel group."""
    made = state.find("tensor_parallel", "tensor")
    if made is None and state.tensor_size is not None:
        return default_group().rank() // state.tensor_size * state.tensor_size
    return find("tensor").ranks[0]


def get_data_parallel_world_size() -> int:
    """Ranks in the data parallel group beside tensor parallelism."""
    return get_data_parallel_group().size()


def get_data_parallel_rank() -> int:
    """This rank's place in the data parallel group beside tensor parallelism."""
    return get_data_parallel_group().rank()
