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
from ds_fragment.engines.links import link_of
from ds_fragment.engines.loaded import class_of
from ds_fragment.engines.state import other_shape
from ds_fragment.errors import GradientUnavailableError, UnlinkedParameterError
from ds_fragment.layout import Fragment, Layout, flat_layout, whole
from ds_fragment.record import note, noted, registry
from ds_fragment.sharding import Sharding

_MOMENTUM = "momentum_buffer"
_ORTHOGONALISED = (
    "DeepSpeed's Muon replaced it by its orthogonalised update when it was reduced; ZeRO-3 and offloaded optimizers "
    "keep it until step()"
)


class FlatSlot(Slot):
    """Where DeepSpeed ZeRO-1, ZeRO-2 or BF16_Optimizer keeps a parameter."""


class DeepSpeedFlatAdapter(DeepSpeedAdapter):
    """Claims what DeepSpeed linked, and what an attached engine leaves untrained beside it."""

    name = "deepspeed zero-1/2"

    def claims(self, param: torch.Tensor) -> bool:
        """Whether DeepSpeed linked the parameter, by its own `link_hp_params` or by that of this package."""
        link = link_of(param)
        if link is not None and link.owner is not None:
            return False
        slot = noted(param, FlatSlot)
        if slot is not None and slot.optimizer is not None and slot.optimizer() is not None:
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
        """The optimizer of a DeepSpeedEngine."""
        optimizer = getattr(model, "optimizer", None)
        if not _is_flat(optimizer):
            return
        self._learn_optimizer(optimizer)
        for param in model.parameters():
            if not hasattr(param, "_hp_mapping"):
                note(
                    param, FlatSlot(param.shape, whole(param.shape), None, weakref.ref(optimizer), untrained=UNTRAINED)
                )

    def _learn_optimizer(self, optimizer: Any) -> None:
        reference = weakref.ref(optimizer)
        for index, params in enumerate(_params(optimizer)):
            group, size = optimizer.real_dp_process_group[index], self._flat(optimizer, index).numel()
            held = params if _is_bf16(optimizer) else optimizer.params_in_partition[index]
            positions = {id(param): position for position, param in enumerate(held)}
            gaps = end_of_last = 0
            for param, start in zip(params, _starts(optimizer, index, params), strict=True):
                layout = flat_layout(start, param.numel(), size, group.size())
                slot = FlatSlot(param.shape, layout, group, reference, index, position=positions.get(id(param), -1))
                fragment = layout.fragments[group.rank()]
                if fragment is not None:
                    slot.start = start + fragment.offset[0] - group.rank() * size
                    gaps += slot.start > end_of_last
                    slot.gaps, end_of_last = gaps, slot.start + slot.numel
                note(param, slot)
                if getattr(optimizer, "cpu_offload", False):
                    self._watch(param, optimizer, self._begins_on)

    def _learn_living(self) -> None:
        """Learn every BF16_Optimizer that there is: unlike other optimizers it leaves no trace on its parameters."""
        kind = class_of("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
        for thing in gc.get_objects():
            if type(thing) is kind and getattr(thing, "fp32_groups_flat_partition", None):
                self._learn_optimizer(thing)

    def _slot(self, param: torch.Tensor) -> Slot:
        slot = noted(param, FlatSlot)
        if slot is None or slot.optimizer is None or slot.optimizer() is None:
            optimizer = _discovered(param)
            if optimizer is not None:
                self._learn_optimizer(optimizer)
            else:
                self._learn_living()
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

    def _untrained(self, param: torch.Tensor, slot: Slot) -> torch.Tensor:
        return param.detach()

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """As for every stage, but every rank has the whole lp parameter, and of each gradient under BF16_Optimizer."""
        slot = self._slot(param)
        if what == "lp":
            return _whole(param, slot)
        if what == "grad" and not slot.untrained and _is_bf16(self._optimizer(param, slot)):
            if what not in slot.shardings:
                everything = flat_layout(0, param.numel(), param.numel(), 1)
                slot.shardings[what] = Sharding(slot.shape, torch.float32, param.device, everything, None)
            return slot.shardings[what]
        if _is_whole_momentum(param, slot, what):
            return _momentum_sharding(slot, self._momentum(param, slot)[0])
        return super().sharding(param, what)

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As for every stage, but for Muon's momentum; an lp parameter is the whole."""
        if what == "lp":
            return [param.detach() for param in params]
        if what != _MOMENTUM:
            return super().pieces(params, what)
        return [self._momentum_piece(param, self._slot(param)) for param in params]

    def _momentum_piece(self, param: torch.Tensor, slot: Slot) -> torch.Tensor | None:
        if _is_whole_momentum(param, slot, _MOMENTUM):
            return self._momentum(param, slot)[1]
        return super().pieces([param], _MOMENTUM)[0]

    def _entry(self, param: torch.Tensor, slot: Slot, key: str) -> torch.Tensor:
        return (
            self._momentum(param, slot)[0] if _is_whole_momentum(param, slot, key) else super()._entry(param, slot, key)
        )

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
        offset = _offset(slot)
        reduced = optimizer.averaged_gradients.get(slot.index)
        if reduced is not None and _is_muon(param, optimizer):
            raise no_gradient(param, _ORTHOGONALISED)
        if reduced is not None:
            found: torch.Tensor | None = reduced[slot.position + slot.gaps] if slot.numel else None
            return found
        summed = getattr(optimizer, "all_grad_tensors", {})  # an older DeepSpeed sums where it averages
        running = summed.get(slot.index) if optimizer.partition_gradients else None
        if running is not None:  # whole tensors, of which only this rank's fragment is reduced
            return running[slot.position].view(-1).narrow(0, offset, slot.numel) if slot.numel else None
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
        return running.narrow(0, _offset(slot), slot.numel)

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
        shardings = [slot.sharding("lp", param.dtype, param.device) for param, slot in chosen]
        spread(
            [param for param, _ in chosen], shardings, lambda items: self.pieces([chosen[i][0] for i in items], "value")
        )


def _is_muon(param: torch.Tensor, optimizer: Any) -> bool:
    """Whether DeepSpeed's Muon updates the parameter; told as DeepSpeed tells it."""
    return bool(getattr(param, "use_muon", False)) and "muon" in type(optimizer.optimizer).__name__.lower()


def _is_whole_momentum(param: torch.Tensor, slot: Slot, what: str) -> bool:
    """Whether a quantity is a momentum that is not cut like the flat partition: see [Note: Muon]."""
    if what != _MOMENTUM or slot.untrained or slot.optimizer is None:
        return False
    optimizer: Any = slot.optimizer()
    if optimizer is None or _is_bf16(optimizer) or optimizer.cpu_offload:
        return False
    return _is_muon(param, optimizer)


def _momentum_sharding(slot: Slot, buffer: torch.Tensor) -> Sharding:
    """The whole on each rank that holds a part of the parameter; the first of them sends it."""
    key = (_MOMENTUM, buffer.dtype)
    if key not in slot.shardings:
        everything = Fragment((0,), (slot.shape.numel(),))
        fragments = tuple(None if fragment is None else everything for fragment in slot.layout.fragments)
        holders = [rank for rank, fragment in enumerate(fragments) if fragment is not None]
        layout = Layout(slot.layout.shape, fragments, frozenset(holders[1:]))
        slot.shardings[key] = Sharding(slot.shape, buffer.dtype, buffer.device, layout, slot.group)
    return slot.shardings[key]


def _whole(param: torch.Tensor, slot: Slot) -> Sharding:
    """The place of what every rank has whole, as the lp parameter is."""
    key = ("whole", param.dtype)
    if key not in slot.shardings:
        slot.shardings[key] = Sharding(param.shape, param.dtype, param.device, whole(param.shape), None)
    return slot.shardings[key]


def _is_bf16(optimizer: Any) -> bool:
    return hasattr(optimizer, "bf16_groups")


def _is_flat(optimizer: Any) -> bool:
    return _is_bf16(optimizer) or hasattr(optimizer, "single_partition_of_fp32_groups")


def _params(optimizer: Any) -> list[list[torch.Tensor]]:
    """The trained parameters of each group, in the order in which they are concatenated."""
    found: list[list[torch.Tensor]]
    found = optimizer.bf16_groups if _is_bf16(optimizer) else optimizer.round_robin_bit16_groups
    return found


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


def _offset(slot: Slot) -> int:
    """Where this rank's fragment begins in the flattened parameter."""
    fragment = slot.layout.fragments[0 if slot.group is None else slot.group.rank()]
    return 0 if fragment is None else fragment.offset[0]


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
