"""FSDP1 (`FullyShardedDataParallel`) with ``use_orig_params=True``.

FSDP1 concatenates the parameters of a unit with padding between them, pads the end, and cuts evenly: each original
parameter is an interval of that flat parameter, and a rank may hold none of it. The layout follows from the sizes.

[Note: views] SHARD_GRAD_OP and HYBRID_SHARD_ZERO2 leave a unit gathered between the forward and the backward pass. Its
modules' parameters are views of the gathered flat parameter then, and are taken for the original parameters here.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.engines.base import (
    Adapter,
    is_number,
    is_state,
    is_weight,
    missing_gradient,
    number_sharding,
    state_entry,
    state_of,
    value_kind,
)
from ds_fragment.engines.gradient import require_current
from ds_fragment.engines.optimized import Optimized
from ds_fragment.errors import FragmentError, GradientUnavailableError, InvalidValueError, UnlinkedParameterError
from ds_fragment.layout import flat_layout
from ds_fragment.record import note, noted, record_of, registry
from ds_fragment.sharding import Sharding


@dataclass(slots=True, eq=False)
class _Interval:
    """Where one original parameter is in its unit's flat parameter."""

    unit: weakref.ref[Any]  # the FullyShardedDataParallel
    handle: weakref.ref[Any]
    start: int  # in the flat parameter with its padding, in elements
    shape: torch.Size


class Fsdp1Adapter(Adapter):
    """Claims the original parameters of FSDP1 modules; the model must be attached."""

    name = "fsdp1"
    marks = ("_fsdp_flattened", "_base")  # a view of a gathered flat parameter has a base

    def learn(self, model: nn.Module) -> None:
        """Note where each original parameter is."""
        for module in model.modules():
            handle = getattr(module, "_handle", None)
            flat = getattr(handle, "flat_param", None)
            if handle is None or flat is None or getattr(flat, "_params", None) is None:
                continue
            starts, position = [], 0
            for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
                if not padding:
                    starts.append(position)
                position += numel
            for param, start, shape in zip(flat._params, starts, flat._shapes, strict=True):
                if noted(param, _Interval) is None:
                    note(param, _Interval(weakref.ref(module), weakref.ref(handle), start, torch.Size(shape)))

    def claims(self, param: torch.Tensor) -> bool:
        """Whether FSDP1 flattened it."""
        return bool(getattr(param, "_fsdp_flattened", False)) or _original(param) is not param

    def own(self, param: torch.Tensor) -> torch.Tensor:
        """The original parameter."""
        return _original(param)

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """An interval of the flattened parameter on each rank of the shard group."""
        interval, handle = self._known(param)
        kind = what if not is_state(what) or is_number(what) else "state"
        return record_of(param).sharding(kind, interval, lambda: _sharding(interval, handle, kind))

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's interval."""
        interval, handle = self._known(param)
        sharding = self.sharding(param, "value")
        fragment = sharding.layout.fragments[sharding.rank]
        if what == "grad":
            self._check_reduced(param, handle)
        if fragment is None:
            return None
        if is_weight(what):
            begin = interval.start + fragment.offset[0] - sharding.rank * handle.flat_param._sharded_size.numel()
            held = _shard(handle).detach().narrow(0, begin if sharding.group else interval.start, fragment.numel)
            return held if what == "value" else held.to(_lp_dtype(handle))
        if what == "grad":
            if param.grad is None:
                raise missing_gradient(param)
            require_current(param, param)
            return param.grad.detach().reshape(-1)
        entry = state_entry(state_of(param, param), param, what)
        if entry.numel() != (1 if is_number(what) else fragment.numel) or (not entry.dim() and not is_number(what)):
            raise InvalidValueError(
                f"optim_state_key '{what}' of {registry.name_of(param)} has shape {tuple(entry.shape)} for the "
                f"{fragment.numel} elements here: only state that is one number an element can be read under FSDP1, "
                "and 'step'; read it in optimizer.state"
            )
        return entry if is_number(what) else entry.reshape(-1)

    def _check_reduced(self, param: torch.Tensor, handle: Any) -> None:
        flat = handle.flat_param
        unreduced = flat.grad is not None and flat.grad.numel() != flat._sharded_size.numel()
        if handle.uses_sharded_strategy and unreduced:
            raise GradientUnavailableError(
                f"{registry.name_of(param)} has no reduced gradient: the last backward pass ran under no_sync() and is "
                "kept unreduced on each rank; read it after one that reduces"
            )

    def require_writable(self, param: torch.Tensor) -> None:
        """Refuse while `summon_full_params` holds the whole parameters, which it writes back at its end."""
        _, handle = self._known(param)
        if handle._training_state.name == "SUMMON_FULL_PARAMS":
            raise FragmentError(
                f"{registry.name_of(param)} is gathered by summon_full_params(), which would write over the new value "
                "at its end: write after it"
            )

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Free the gathered copies of old values: the next forward, or backward, gathers again."""
        intervals = {id(handle): interval for interval, handle in map(self._known, params)}
        for interval in intervals.values():
            _reshard(interval.unit())

    def _known(self, param: torch.Tensor) -> tuple[_Interval, Any]:
        if hasattr(param, "_numels_with_padding"):
            raise UnlinkedParameterError(
                f"{registry.name_of(param)} is a flat parameter of FSDP1, which is several parameters with padding "
                "between them: make the FullyShardedDataParallel with use_orig_params=True to read and write each"
            )
        interval = noted(param, _Interval)
        handle = None if interval is None else interval.handle()
        if interval is None or handle is None:
            raise UnlinkedParameterError(
                f"{registry.name_of(param)} is held by FSDP1, which parameters do not know: call attach(model, "
                "optimizer) with the FSDP module on every rank first"
            )
        return interval, handle

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state; none on a rank that holds nothing."""
        sharding = self.sharding(param, "value")
        return [] if sharding.layout.fragments[sharding.rank] is None else list(state_of(param, param))

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """No state on a rank that holds nothing of the parameter."""
        shardings = [self.sharding(param, "value") for param in params]
        here = [sharding.layout.fragments[sharding.rank] is not None for sharding in shardings]
        found = zip(super().optimized(params), here, strict=True)
        return [replace(each, optimizer=None) if each and not held else each for each, held in found]

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a flat parameter of low precision."""
        return value_kind(_shard(self._known(param)[1]).dtype)


def _sharding(interval: _Interval, handle: Any, kind: str) -> Sharding:
    """Where a quantity of the parameter is: a number on each rank that holds a part of it, others cut like it."""
    group, numel, shard = handle.process_group, interval.shape.numel(), _shard(handle)
    if handle.uses_sharded_strategy:
        layout = flat_layout(interval.start, numel, handle.flat_param._sharded_size.numel(), group.size())
    else:
        layout, group = flat_layout(0, numel, numel, 1), None
    if is_number(kind):
        return number_sharding(kind, group, [fragment is not None for fragment in layout.fragments], shard.device)
    replicas = _replicas(interval.unit(), handle)
    dtype = _lp_dtype(handle) if kind == "lp" else shard.dtype
    return Sharding(interval.shape, dtype, shard.device, layout, group, replicas)


def _lp_dtype(handle: Any) -> torch.dtype:
    """What a unit computes in: ``MixedPrecision(param_dtype=...)``, else its own dtype."""
    found: torch.dtype = handle._fwd_bwd_param_dtype
    return found


def _original(param: torch.Tensor) -> torch.Tensor:
    """The parameter that a view stands for; see [Note: views]."""
    flat: Any = param._base
    tensors = getattr(flat, "_tensors", None)
    if not tensors:
        return param
    return next((own for own, view in zip(flat._params, tensors, strict=False) if view is param), param)


def _reshard(unit: Any) -> None:
    """Free the copy that an idle unit has gathered; no communication. A unit in use, or summoned, is left as it is."""
    handle = unit._handle
    if handle is None or handle._training_state.name != "IDLE":
        return
    gathers = hasattr(handle.flat_param, "_full_param_padded")  # from the first forward on
    if gathers and handle.uses_sharded_strategy and not handle.needs_unshard():
        sys.modules["torch.distributed.fsdp._runtime_utils"]._reshard(unit, handle, True)


def _replicas(unit: Any, handle: Any) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold the same as this one."""
    if not handle.uses_sharded_strategy:
        return (handle.process_group,)
    group = getattr(unit, "_inter_node_pg", None)  # of HYBRID_SHARD
    return () if group is None else (group,)


def _shard(handle: Any) -> torch.Tensor:
    """This rank's part of the flat parameter, whatever state the unit is in."""
    flat = handle.flat_param
    found: torch.Tensor = getattr(flat, "_local_shard", flat)
    return found
