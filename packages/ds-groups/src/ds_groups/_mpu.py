"""Read sizes and groups from what callers assign: Megatron-style ``mpu`` objects and PyTorch device meshes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from ._axis import Partition, TableAxis
from ._launchers import LAUNCHERS
from ._topology import ParallelTopology
from .errors import NotInitializedError

_TENSOR_SIZE = (
    "get_tensor_model_parallel_world_size",
    "get_slice_parallel_world_size",
    "get_model_parallel_world_size",
)
_PIPELINE_SIZE = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def tensor_size(mpu: Any) -> int:
    """Tensor parallel size of ``mpu``, whatever it calls it; 1 without one."""
    return _first(mpu, _TENSOR_SIZE)


def pipeline_size(mpu: Any) -> int:
    """Pipeline parallel size of ``mpu``, whatever it calls it; 1 without one."""
    return _first(mpu, _PIPELINE_SIZE)


def is_sequence_only(mpu: Any) -> bool:
    """Whether ``mpu`` knows sequence parallel groups only, as DeepSpeed's Ulysses module does."""
    return mpu is not None and hasattr(mpu, "initialize_sequence_parallel")


def sequence_layout(world_size: int, sequence: int) -> dict[str, Partition]:
    """Data parallel groups beside sequence parallel ones of neighbouring ranks."""
    return {"data": ParallelTopology(world_size, cp=sequence).axis("dp")}


def mesh_group(mesh: Any, axis: str) -> dist.ProcessGroup | None:
    """The group of ``mesh`` along ``axis``; None without a mesh or such a dimension."""
    names = getattr(mesh, "mesh_dim_names", None)
    if mesh is None or (names is not None and axis not in names):
        return None
    group: dist.ProcessGroup = mesh.get_group(mesh_dim=axis)
    return group


def mesh_data_group(mesh: Any) -> dist.ProcessGroup:
    """The ``data_parallel`` group of ``mesh``."""
    group = mesh_group(mesh, "data_parallel")
    if group is None:
        raise NotInitializedError(
            f"mesh_device has dimensions {mesh.mesh_dim_names}, none is called 'data_parallel'; "
            "name them with init_device_mesh(..., mesh_dim_names=...)"
        )
    return group


def mesh_layout(mesh: Any) -> dict[str, Partition]:
    """Groups over both dimensions, data and sequence parallel, of a device mesh."""
    names = list(mesh.mesh_dim_names)
    both = [names.index("data_parallel"), names.index("sequence_parallel")]
    rest = [dim for dim in range(len(names)) if dim not in both]
    ranks = mesh.mesh.permute(*rest, *both).flatten(len(rest)).reshape(-1, mesh.size(both[0]) * mesh.size(both[1]))
    return {"both": TableAxis([sorted(group) for group in ranks.tolist()])}


def ranks_per_node(world_size: int) -> int:
    """Ranks on this machine: as the launcher says, else the accelerators, else all ranks."""
    for launcher in LAUNCHERS:
        if os.environ.get(launcher.rank) and os.environ.get(launcher.local_size or "", "").isdigit():
            return int(os.environ[launcher.local_size or ""])
    return (torch.accelerator.device_count() if torch.accelerator.is_available() else 0) or world_size


def _first(mpu: Any, names: tuple[str, ...]) -> int:
    getter = next((getattr(mpu, name) for name in names if hasattr(mpu, name)), None)
    return 1 if mpu is None or getter is None else int(getter())
