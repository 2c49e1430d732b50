"""The tensors that ZeRO-3 has swapped out to NVMe, mapped from its files.

Each swapped tensor has a file of its own. It is mapped into memory: a read touches only the piece that is asked for,
and DeepSpeed next reads the values written there. DeepSpeed's own functions are not used, since they bring in a
parameter's whole group each time, gradients included, and drop gradients that were in no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ds_fragment.errors import FragmentError


def is_swapped(optimizer: Any, index: int) -> bool:
    """Whether one of DeepSpeed's groups is in files between the steps."""
    return bool(getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(index))


def dtype_of(optimizer: Any, index: int) -> torch.dtype:
    """Of a group that is swapped out, whether or not it can be read now."""
    found: torch.dtype = _info(optimizer, index).dtype()
    return found


def flat_of(optimizer: Any, index: int) -> torch.Tensor:
    """The flat fp32 tensor of a group that is swapped out.

    Raises:
        FragmentError: DeepSpeed is at work on it.
    """
    info = _at_rest(optimizer, index)
    return _mapped(info.tensors[0].swap_path, info.numel(), info.dtype())


def entry_of(optimizer: Any, index: int, entry: torch.Tensor) -> torch.Tensor:
    """A state of a group that is swapped out: in its file, if it has one."""
    info = _at_rest(optimizer, index)
    path = next((context.swap_path for context in info.tensors if context.compute_tensor is entry), None)
    return entry if path is None else _mapped(path, info.numel(), entry.dtype)


def put_gradient(optimizer: Any, index: int, start: int, gradient: torch.Tensor) -> None:
    """Write a part of a group's gradient, from an element on, to where it was swapped out; 1-D."""
    info = _at_rest(optimizer, index)
    optimizer.optimizer_swapper.flush_gradients()
    for at, kept in {**info.swapped_gradients, **info.unswapped_gradients}.items():  # the small ones stay in memory
        in_memory = isinstance(kept, torch.Tensor)
        begin, end = max(at, start), min(at + (kept.numel() if in_memory else kept.length), start + gradient.numel())
        if begin < end:
            part = kept if in_memory else _mapped(kept.path, kept.length, info.dtype())
            part[begin - at : end - at].copy_(gradient[begin - start : end - start])


def part_of(param: Any) -> torch.Tensor | None:
    """This rank's low-precision part in its file, padding included; None where the parameter has none."""
    swapper: Any = getattr(param, "nvme_swapper", None)
    if swapper is None or param.ds_id not in swapper.id_to_path:
        return None
    swapper.synchronize_writes()
    return _mapped(swapper.id_to_path[param.ds_id], param.ds_tensor.ds_numel, param.dtype)


def _info(optimizer: Any, index: int) -> Any:
    return optimizer.optimizer_swapper.swap_params_info[optimizer.fp32_partitioned_groups_flat[index].ds_id]


def _at_rest(optimizer: Any, index: int) -> Any:
    under_way = getattr(optimizer.optimizer_swapper, "swap_ops", None)  # where it moves groups beside the one in use
    in_memory = optimizer.fp32_partitioned_groups_flat[index].numel()
    if any(under_way.values()) if under_way is not None else in_memory:
        raise FragmentError("DeepSpeed is moving its fp32 tensors from or to NVMe: call this between optimizer steps")
    return _info(optimizer, index)


def _mapped(path: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    there = Path(path).stat().st_size if Path(path).exists() else 0
    if there < numel * dtype.itemsize:
        raise FragmentError(
            f"DeepSpeed's swap file {path} has {there} bytes where {numel * dtype.itemsize} are needed: was its folder "
            "(nvme_path) cleared, or is it shared by several runs?"
        )
    return torch.from_file(path, shared=True, size=numel, dtype=dtype)
