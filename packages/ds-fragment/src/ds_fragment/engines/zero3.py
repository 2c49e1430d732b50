"""DeepSpeed ZeRO-3: each parameter is cut alone, in equal parts rounded up.

The ends of the last parts are padding, which DeepSpeed never initialises, neither in the low-precision parts
(`param.ds_tensor`) nor in the flat fp32 tensors: nothing here reads past the end of a parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.engines import nvme
from ds_fragment.engines.base import spread
from ds_fragment.engines.deepspeed import (
    MIXED,
    UNREDUCED,
    UNTRAINED,
    UNUSED,
    DeepSpeedAdapter,
    Slot,
    at_boundary,
    is_mixed,
    no_gradient,
    remembered,
    unused_gradient,
)
from ds_fragment.errors import FragmentError
from ds_fragment.layout import even_layout
from ds_fragment.record import note, noted, registry

# By ds_id, this rank's part of the reduced gradient, padding included; a private name of the class.
_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_NO_ENGINE = "it was partitioned by zero.Init, and deepspeed.initialize has made no optimizer for it"


class Zero3Slot(Slot):
    """Where DeepSpeed ZeRO-3 keeps a parameter."""


class Zero3Adapter(DeepSpeedAdapter):
    """Claims partitioned parameters, which know their optimizer."""

    name = "deepspeed zero-3"
    marks = ("ds_id",)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether ZeRO-3 partitioned the parameter."""
        return hasattr(param, "ds_id")

    def learn(self, model: nn.Module) -> None:
        """Watch for gradients that are added to an earlier step's; parameters know the rest themselves."""
        for param in model.parameters():
            if self.claims(param):
                slot = self._slot(param)
                if slot.engine is not None and not slot.untrained and slot.numel:
                    self._watch(param, slot.engine)

    def _slot(self, param: torch.Tensor) -> Slot:
        optimizer = getattr(param, "_z3_optimizer", None)
        slot = noted(param, Zero3Slot)
        if slot is None or slot.engine is not optimizer:
            slot = _slot_of(param, optimizer)
            note(param, slot)
        return slot

    def _flat(self, optimizer: Any, index: int) -> torch.Tensor:
        found: torch.Tensor = optimizer.fp32_partitioned_groups_flat[index]
        return found

    def _readable(self, optimizer: Any, index: int, tensor: torch.Tensor) -> torch.Tensor:
        if not nvme.is_swapped(optimizer, index):
            return tensor
        if tensor is self._flat(optimizer, index):
            return nvme.flat_of(optimizer, index)
        return nvme.entry_of(optimizer, index, tensor)

    def _dtype(self, optimizer: Any, index: int) -> torch.dtype:
        swapped = nvme.is_swapped(optimizer, index)
        return nvme.dtype_of(optimizer, index) if swapped else super()._dtype(optimizer, index)

    def _base_optimizer(self, optimizer: Any, index: int) -> torch.optim.Optimizer:
        devices = getattr(optimizer, "subgroup_to_device", {})  # some stay on the device where ratio < 1
        kept = optimizer.offload_optimizer and devices.get(index, "cpu") != "cpu"
        found: torch.optim.Optimizer = optimizer.backup_optimizer if kept else optimizer.optimizer
        return found

    def _group_index(self, optimizer: Any, index: int) -> int:
        found: int = optimizer.sub_group_to_group_id[index]
        return found

    def _lp_part(self, param: Any, slot: Slot) -> torch.Tensor:
        """Without its padding."""
        part: torch.Tensor = param.ds_tensor
        name, status = registry.name_of(param), _status(part)
        if hasattr(part, "ds_quant_scale"):
            raise FragmentError(f"{name} is quantised (zero_quantized_nontrainable_weights): it has no readable value")
        if status == "NOT_AVAILABLE":
            in_file = nvme.part_of(param)
            if in_file is not None:
                part, status = in_file, "AVAILABLE"
        if part.numel() < slot.numel or status != "AVAILABLE":
            raise FragmentError(f"{name} is offloaded, or on its way from NVMe: bring it back first")
        return part.detach().narrow(0, 0, slot.numel)

    def _gradient(self, param: Any, slot: Slot, optimizer: Any) -> torch.Tensor | None:
        if not slot.numel:
            return None  # the ranks that hold it say whether there is one
        reduced = remembered(optimizer, "_offload_boundary_param_ids")
        if param.ds_id not in reduced:
            if param.grad is not None:
                raise no_gradient(param, UNREDUCED)
            raise unused_gradient(param, UNUSED, others=bool(reduced))
        if is_mixed(param):
            raise no_gradient(param, MIXED)
        if _in_fp32_tensors(optimizer) and not nvme.is_swapped(optimizer, slot.index):
            # An optimizer that is offloaded to the CPU steps with this.
            gradient: torch.Tensor = self._flat(optimizer, slot.index).grad  # type: ignore[assignment]
            return gradient.narrow(0, slot.start, slot.numel)
        return self._running(param, slot, optimizer)

    def _running(self, param: Any, slot: Slot, optimizer: Any) -> torch.Tensor:
        """The sum over the window so far, with which an optimizer on the device or on NVMe steps."""
        found: torch.Tensor = getattr(optimizer, _GRADIENTS)[param.ds_id]
        return found.narrow(0, 0, slot.numel)

    def _begins_on(self, param: Any, optimizer: Any) -> torch.Tensor | bool | None:
        if optimizer.micro_step_id == 0:
            return False
        if param.ds_id in remembered(optimizer, "_offload_boundary_param_ids"):
            return None
        return self._running(param, self._slot(param), optimizer)

    def _after_gradient(self, param: Any, slot: Slot, optimizer: Any, stored: torch.Tensor) -> None:
        if _in_fp32_tensors(optimizer):
            if nvme.is_swapped(optimizer, slot.index):
                nvme.put_gradient(optimizer, slot.index, slot.start, stored)
            else:
                self._running(param, slot, optimizer).copy_(stored)  # where DeepSpeed looks for overflows
            optimizer.norm_for_param_grads[param.ds_id] = stored.norm()

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Round the new values into the low-precision parts, and into parameters that are gathered right now."""
        gathered = []
        for item, param in enumerate(params):
            slot, handle = self._slot(param), cast(Any, param)
            part, master = self._lp_part(param, slot), self.local(param, "value")
            if master is not None and not slot.untrained:
                part.copy_(master)
            in_file = nvme.part_of(param) if _status(handle.ds_tensor) == "AVAILABLE" else None
            if in_file is not None:  # which does not follow what is in memory
                in_file[: slot.numel].copy_(part)
            handle.ds_secondary_tensor = None  # a second copy of the part, within a node
            if handle.ds_status.name == "AVAILABLE":
                gathered.append(item)
        if values is not None:
            for item in gathered:
                params[item].data.copy_(values[item])
            return
        slots = [self._slot(params[item]) for item in gathered]
        chosen = [params[item] for item in gathered]
        shardings = [slot.sharding(param, "lp", param.dtype) for param, slot in zip(chosen, slots, strict=True)]
        spread(chosen, shardings, lambda items: self.pieces([chosen[i] for i in items], "value"))


def _slot_of(param: Any, optimizer: Any) -> Zero3Slot:
    group: dist.ProcessGroup = param.ds_process_group
    slot = Zero3Slot(torch.Size(param.ds_shape), even_layout(param.ds_numel, group.size()), group, None)
    if optimizer is None:
        slot.untrained = _NO_ENGINE
        return slot
    slot.optimizer = weakref.ref(optimizer)
    if param.ds_id in optimizer.grad_position:
        slot.index, slot.start, _ = optimizer.grad_position[param.ds_id]
    else:
        slot.untrained = UNTRAINED
    return slot


def _in_fp32_tensors(optimizer: Any) -> bool:
    """Whether the gradients are in the fp32 tensors of an offloaded optimizer already."""
    return bool(optimizer.offload_optimizer and at_boundary(optimizer))


def _status(part: Any) -> str:
    """Whether a part is in memory: DeepSpeed's `PartitionedParamStatus`, by name."""
    return getattr(getattr(part, "status", None), "name", "AVAILABLE")
