"""DeepSpeed ZeRO-1, ZeRO-2 and BF16_Optimizer: flat fp32 partitions that DeepSpeed itself linked to its parameters.

[Note: Muon] Without offload, ZeRO-1 and 2 compute the update of DeepSpeed's Muon from the whole gradient, as soon as it
is reduced, and keep the update in its place. The momentum is not cut like the flat partition: each rank that holds a
part of a parameter keeps the momentum of the whole parameter, for its parameters one after the other.

The optimizer concatenates the trained parameters of each group, pads the end, and cuts evenly over the ranks. Where a
parameter is follows from the optimizer's own lists. `param._hp_mapping` says it as well, but wrongly under
``round_robin_gradients``, and does not know the state of later groups: only its being there is used.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ds_fragment.engines.base import spread, state_entry
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
from ds_fragment.engines.flat import link_of
from ds_fragment.engines.loaded import class_of
from ds_fragment.engines.state import other_shape
from ds_fragment.errors import GradientUnavailableError, UnlinkedParameterError
from ds_fragment.layout import Fragment, Layout, flat_layout, whole
from ds_fragment.record import note, noted, record_of, registry
from ds_fragment.sharding import Sharding

_MOMENTUM = "momentum_buffer"
_ORTHOGONALISED = (
    "DeepSpeed's Muon replaced it by its orthogonalised update when it was reduced; ZeRO-3 and offloaded optimizers "
    "keep it until step()"
)


class FlatSlot(Slot):
    """Where DeepSpeed ZeRO-1, ZeRO-2 or BF16_Optimizer keeps a parameter."""


class DeepSpeedFlatAdapter(DeepSpeedAdapter):
    """Claims parameters that DeepSpeed linked, and those that an attached engine leaves untrained."""

    name = "deepspeed zero-1/2"
    marks = ("_hp_mapping", FlatSlot)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether DeepSpeed linked the parameter, by its own `link_hp_params` or by that of this package."""
        link = link_of(param)
        if link is not None and link.owner is not None:
            return False
        slot = noted(param, FlatSlot)
        if slot is not None and slot.engine is not None:
            return True
        if not hasattr(param, "_hp_mapping"):
            return False
        if link is None or _discovered(param) is not None:
            return True
        if not link.engine_sought:  # once, as it takes a while
            link.engine_sought = True
            self._learn_living()
        return noted(param, FlatSlot) is not None

    def learn(self, model: nn.Module) -> None:
        """Note where the optimizer of a DeepSpeedEngine keeps each parameter."""
        optimizer = getattr(model, "optimizer", None)
        if not _is_flat(optimizer):
            return
        self._learn_optimizer(optimizer)
        for param in model.parameters():
            if not hasattr(param, "_hp_mapping"):
                slot = FlatSlot(param.shape, whole(param.shape), None, weakref.ref(optimizer), untrained=UNTRAINED)
                note(param, slot)

    def _learn_optimizer(self, optimizer: Any) -> None:
        reference = weakref.ref(optimizer)
        groups = optimizer.bf16_groups if _is_bf16(optimizer) else optimizer.round_robin_bit16_groups
        for index, params in enumerate(groups):  # the trained parameters, in the order of the concatenation
            group, size = optimizer.real_dp_process_group[index], self._flat(optimizer, index).numel()
            held = params if _is_bf16(optimizer) else optimizer.params_in_partition[index]
            positions = {id(param): position for position, param in enumerate(held)}
            gaps = end_of_last = 0
            for param, start in zip(params, _starts(optimizer, index, params), strict=True):
                layout = flat_layout(start, param.numel(), size, group.size())
                slot = FlatSlot(param.shape, layout, group, reference, index, position=positions.get(id(param), -1))
                if slot.numel:
                    slot.start = start + slot.offset - group.rank() * size
                    gaps += slot.start > end_of_last
                    slot.gaps, end_of_last = gaps, slot.start + slot.numel
                note(param, slot)
                if getattr(optimizer, "cpu_offload", False):
                    self._watch(param, optimizer)

    def _learn_living(self) -> None:
        """Learn every living BF16_Optimizer: unlike other optimizers it sets no hook on its parameters."""
        kind = class_of("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
        for thing in gc.get_objects():
            if type(thing) is kind and getattr(thing, "fp32_groups_flat_partition", None):
                self._learn_optimizer(thing)

    def _slot(self, param: torch.Tensor) -> Slot:
        slot = noted(param, FlatSlot)
        if slot is None or slot.engine is None:
            optimizer = _discovered(param)
            if optimizer is None:
                self._learn_living()
            else:
                self._learn_optimizer(optimizer)
            slot = noted(param, FlatSlot)
        if slot is None:
            raise UnlinkedParameterError(
                f"{registry.name_of(param)} is held by a DeepSpeed engine that cannot be found, or that is gone: "
                "call attach(engine) on every rank first"
            )
        return slot

    def _flat(self, optimizer: Any, index: int) -> torch.Tensor:
        bf16 = _is_bf16(optimizer)
        flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
        found: torch.Tensor = flats[index]
        return found

    def _lp_part(self, param: torch.Tensor, slot: Slot) -> torch.Tensor:
        return param.detach()

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """As for every stage, but every rank has the whole lp parameter, and of each gradient under BF16_Optimizer."""
        slot = self._slot(param)
        if what == "lp":
            like = (param.shape, param.dtype, param.device)
            return record_of(param).sharding(what, like, lambda: Sharding(*like, whole(param.shape), None))
        if what == "grad" and not slot.untrained and _is_bf16(self._optimizer(param, slot)):
            everything = flat_layout(0, param.numel(), param.numel(), 1)
            like = (slot.shape, torch.float32, param.device)
            return record_of(param).sharding("grad", slot, lambda: Sharding(*like, everything, None))
        if _is_whole_momentum(param, slot, what):
            buffer, _ = self._momentum(param, slot)
            return record_of(param).sharding((what, buffer.dtype), slot, lambda: _momentum_sharding(slot, buffer))
        return super().sharding(param, what)

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As for every stage, but for Muon's momentum."""
        if what != _MOMENTUM:
            return super().pieces(params, what)
        return [
            self._momentum(param, slot)[1]
            if _is_whole_momentum(param, slot, what)
            else DeepSpeedAdapter.pieces(self, [param], what)[0]
            for param, slot in zip(params, map(self._slot, params), strict=True)
        ]

    def _source(self, param: torch.Tensor, slot: Slot, what: str) -> torch.Tensor:
        if _is_whole_momentum(param, slot, what):
            return self._momentum(param, slot)[0]
        return super()._source(param, slot, what)

    def _momentum(self, param: torch.Tensor, slot: Slot) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Muon's momentum on this rank, and the parameter's part of it: see [Note: Muon].

        Raises:
            StateKeyError: it is not laid out so.
        """
        optimizer = self._optimizer(param, slot)
        held = optimizer.params_in_partition[slot.index]
        if not held:
            return torch.empty(0, dtype=optimizer._gradient_reduction_buffer_dtype(), device=param.device), None
        buffer = state_entry(self._state(param, slot), param, _MOMENTUM)
        starts = list(accumulate((other.numel() for other in held), initial=0))
        if buffer.shape != (starts[-1],):
            raise other_shape(buffer, param, _MOMENTUM, torch.Size(starts[-1:]))
        return buffer, buffer.narrow(0, starts[slot.position], param.numel()) if slot.numel else None

    def _gradient(self, param: torch.Tensor, slot: Slot, optimizer: Any) -> torch.Tensor | None:
        if _is_bf16(optimizer):
            return _gradient_bf16(param, slot, optimizer)
        if optimizer.cpu_offload:
            return self._gradient_offloaded(param, slot, optimizer)
        reduced = optimizer.averaged_gradients.get(slot.index)
        if reduced is not None and _is_muon(param, optimizer):
            raise no_gradient(param, _ORTHOGONALISED)
        if reduced is not None:
            found: torch.Tensor | None = reduced[slot.position + slot.gaps] if slot.numel else None
            return found
        summed = getattr(optimizer, "all_grad_tensors", {})  # an older DeepSpeed sums where it averages
        running = summed.get(slot.index) if optimizer.partition_gradients else None
        if running is not None:  # whole tensors, of which only this rank's fragment is reduced
            return running[slot.position].view(-1).narrow(0, slot.offset, slot.numel) if slot.numel else None
        raise _missing(param, optimizer, others=False)

    def _gradient_offloaded(self, param: torch.Tensor, slot: Slot, optimizer: Any) -> torch.Tensor | None:
        if optimizer.use_grad_accum_attribute and slot.group is not None and slot.group.size() > 1:
            raise no_gradient(
                param, "ZeRO-1 with grad_accum_dtype fp32 and CPU offload steps with each rank's own, never averaged"
            )
        if not slot.numel:
            return None  # the ranks that hold it say whether there is one
        identity = optimizer.get_param_id(param)
        summed, reduced = remembered(optimizer, "_offload_accumulated_param_ids"), optimizer.norm_for_param_grads
        if identity not in reduced and identity not in summed:
            raise _missing(param, optimizer, others=bool(reduced or summed))
        if is_mixed(param):
            raise no_gradient(param, MIXED)
        if identity in reduced:
            flat: torch.Tensor = self._flat(optimizer, slot.index).grad  # type: ignore[assignment]
            return flat.narrow(0, slot.start, slot.numel)
        running: torch.Tensor = optimizer.accumulated_grads_in_cpu[identity].view(-1)
        if optimizer.low_precision_master_weights_and_grads:
            return running
        return running.narrow(0, slot.offset, slot.numel)

    def _begins_on(self, param: torch.Tensor, optimizer: Any) -> torch.Tensor | bool | None:
        identity = optimizer.get_param_id(param)
        earlier = optimizer.micro_step_id + (0 if optimizer.ready_for_gradients else 1)  # backward passes in the window
        remains: torch.Tensor | None = optimizer.accumulated_grads_in_cpu.get(identity)
        if earlier <= 0 or remains is None:
            return False
        return None if identity in remembered(optimizer, "_offload_accumulated_param_ids") else remains

    def _after_gradient(self, param: torch.Tensor, slot: Slot, optimizer: Any, stored: torch.Tensor) -> None:
        if getattr(optimizer, "cpu_offload", False):
            identity = optimizer.get_param_id(param)
            if identity in optimizer.norm_for_param_grads:
                optimizer.norm_for_param_grads[identity] = stored.norm()
            optimizer.update_offload_overflow_tracker(stored)

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Round the new values into the lp parameters, in their place in the flat lp tensor."""
        slots = [self._slot(param) for param in params]
        if values is not None:
            for param, value, slot in zip(params, values, slots, strict=True):
                if not slot.untrained:
                    param.data.copy_(value)
            return
        chosen = [(param, slot) for param, slot in zip(params, slots, strict=True) if not slot.untrained]
        shardings = [slot.sharding(param, "lp", param.dtype) for param, slot in chosen]
        spread(
            [param for param, _ in chosen], shardings, lambda items: self.pieces([chosen[i][0] for i in items], "value")
        )


def _is_muon(param: torch.Tensor, optimizer: Any) -> bool:
    """Whether DeepSpeed's Muon updates the parameter; by the test that DeepSpeed makes."""
    return bool(getattr(param, "use_muon", False)) and "muon" in type(optimizer.optimizer).__name__.lower()


def _is_whole_momentum(param: torch.Tensor, slot: Slot, what: str) -> bool:
    """Whether a quantity is a momentum that is not cut like the flat partition: see [Note: Muon]."""
    if what != _MOMENTUM or slot.untrained or slot.engine is None:
        return False
    return not _is_bf16(slot.engine) and not slot.engine.cpu_offload and _is_muon(param, slot.engine)


def _momentum_sharding(slot: Slot, buffer: torch.Tensor) -> Sharding:
    """The whole on each rank that holds a part of the parameter; the first of them sends it."""
    everything = Fragment((0,), (slot.shape.numel(),))
    fragments = tuple(None if fragment is None else everything for fragment in slot.layout.fragments)
    holders = [rank for rank, fragment in enumerate(fragments) if fragment is not None]
    layout = Layout(slot.layout.shape, fragments, frozenset(holders[1:]))
    return Sharding(slot.shape, buffer.dtype, buffer.device, layout, slot.group)


def _is_bf16(optimizer: Any) -> bool:
    return hasattr(optimizer, "bf16_groups")


def _is_flat(optimizer: Any) -> bool:
    return _is_bf16(optimizer) or hasattr(optimizer, "single_partition_of_fp32_groups")


def _starts(optimizer: Any, index: int, params: Sequence[torch.Tensor]) -> list[int]:
    """Where each parameter of a group begins in the concatenation; DeepSpeed 0.19.7 may leave gaps between them."""
    if not _is_bf16(optimizer) and hasattr(optimizer, "round_robin_bit16_offsets"):
        return list(optimizer.round_robin_bit16_offsets[index])
    return list(accumulate((param.numel() for param in params[:-1]), initial=0)) if params else []


def _discovered(param: torch.Tensor) -> Any:
    """The optimizer that put a gradient hook on the parameter (ZeRO-1 and 2 do), or None."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for hook in hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if _is_flat(cell.cell_contents):
                    return cell.cell_contents
    return None


def _gradient_bf16(param: torch.Tensor, slot: Slot, optimizer: Any) -> torch.Tensor:
    if not any(any(used) for used in optimizer.fp32_groups_has_gradients):
        raise no_gradient(param, UNUSED)
    if not at_boundary(optimizer):
        raise no_gradient(param, UNREDUCED)
    found: torch.Tensor = optimizer.fp32_groups_gradients[slot.index][slot.position]
    return found


def _missing(param: torch.Tensor, optimizer: Any, *, others: bool) -> GradientUnavailableError:
    if optimizer.get_param_gradient_attribute(param) is not None:
        return no_gradient(param, UNREDUCED)
    return unused_gradient(param, UNUSED, others=others)
