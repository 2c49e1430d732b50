"""Ranks that each see one GPU, their own: Ray, ``srun --gpus-per-task=1``, containers.

No rank sees the others' GPUs, so no rank can make the plan of all. Each makes one in which its share is disjoint from
whatever the others take.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ds_numa._launcher import agreeing_launchers
from ds_numa._process_tree import find_launcher

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_SLICES = (("CUDA_VISIBLE_DEVICES", "MIG-"), ("NVIDIA_VISIBLE_DEVICES", "MIG-"), ("ZE_AFFINITY_MASK", "."))


def gpu_is_shared(
    env: Mapping[str, str], local_rank: int, num_local_procs: int, *, root: Path = Path("/"), pid: int | None = None
) -> bool:
    """Whether other ranks may use the GPU that this one sees.

    They do where their launcher was started with the choice that this process has, and may where the choice is a part
    of a GPU (MIG, a tile).
    """
    if any(mark in env.get(name, "") for name, mark in _SLICES):
        return True
    for row in agreeing_launchers(env, local_rank, num_local_procs):
        launcher = find_launcher(root, [row.local_rank or row.rank], pid)
        if launcher is not None and launcher.env is not None:
            chosen = {name: env[name] for name in _VISIBLE if name in env}
            return bool(chosen) and all(launcher.env.get(name) == value for name, value in chosen.items())
    return False
