"""What ``fully_shard`` after the block made of recorded parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from ds_ondevice._modules import ORIGINS, Origin
from ds_ondevice._ops import is_recorded, mark_as
from ds_ondevice._recording import Recorder
from ds_ondevice._slots import Slot


def resharded(parts: Iterable[torch.nn.Module], slots: list[Slot]) -> Iterator[tuple[DTensor, torch.Tensor]]:
    """The DTensors that FSDP2 put into the place of recorded parameters, and the local part of each, recorded on meta.

    FSDP2 makes a DTensor of the same shape and values, and so the local part is cut out of the parameter that stood
    there when its block ended. DTensors of other origin are passed over.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in parts):
        return
    for slot in slots:
        origin = ORIGINS.get(slot.owner, {}).get(slot.attribute)
        tensor = slot.held[0]
        if origin is None or not isinstance(tensor, DTensor) or is_recorded(tensor.to_local()):
            continue
        local = _cut(origin, tensor)
        if local is not None:
            yield tensor, local


def _cut(origin: Origin, tensor: DTensor) -> torch.Tensor | None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    view, mark = origin.view, origin.mark
    placements = tensor.placements
    if view.size != tuple(tensor.shape) or view.dtype is not tensor.dtype or mark.written_outside:
        return None
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        return None
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    box = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
    whole = torch.empty(view.extent, dtype=view.dtype, device="meta").as_strided(view.size, view.stride, view.offset)
    mark_as(whole, mark)
    with Recorder(watch=False):
        local = whole[box].clone(memory_format=torch.contiguous_format)
    return local if local.shape == tensor.to_local().shape else None
