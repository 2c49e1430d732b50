"""FSDP2 (`fully_shard`): DTensors, of which FSDP2 gathers copies, and whose gradients it may not have reduced.

Between a forward and a backward pass the module's parameters may be copies of low precision, gathered or sharded over
fewer ranks; the sharded parameter is read and written in their place. A write frees copies of old values. torch keeps
a list of all such modules, so that `attach` is not needed to find them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_fragment.engines.dtensor import DTensorAdapter, mesh_sharding
from ds_fragment.engines.loaded import composable_state, composable_states, fsdp2_groups, is_a, is_dtensor
from ds_fragment.errors import GradientUnavailableError
from ds_fragment.record import note, record_of, records_of, registry
from ds_fragment.sharding import Sharding


@dataclass(frozen=True)
class _Unit:
    """FSDP2's objects for a parameter, weakly: its own, and that of the group which is gathered together."""

    param: weakref.ref[Any]  # an FSDPParam
    group: weakref.ref[Any]  # an FSDPParamGroup
    copy: bool  # whether the note is on a gathered copy


class _NoUnit:
    """A note on a plain tensor: it is no gathered copy of FSDP2's."""


class Fsdp2Adapter(DTensorAdapter):
    """Claims the parameters of FSDP2 modules, sharded or gathered."""

    name = "fsdp2"

    def learn(self, model: nn.Module) -> None:
        """Note FSDP2's objects for each parameter."""
        for module in model.modules():
            if is_a(module, "torch.distributed.fsdp", "FSDPModule"):
                _note_units(composable_state(module))

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter, or what it is a gathered copy of, is in an FSDP2 module."""
        unit = _unit_of(param)
        return unit is not None and (not unit.copy or unit.param() is not None)

    def own(self, param: torch.Tensor) -> torch.Tensor:
        """The sharded parameter."""
        unit = _unit_of(param)
        assert unit is not None
        record: Any = unit.param()
        found: torch.Tensor = record.sharded_param if unit.copy else param
        return found

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """As for any DTensor; what the module computes with has the dtype of its MixedPrecisionPolicy."""
        if what != "lp":
            return super().sharding(param, what)
        tensor: Any = param
        dtype = _lp_dtype(param)
        return record_of(param).sharding(("like", dtype), tensor._spec, lambda: mesh_sharding(tensor, dtype))

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As for any DTensor; ``"lp"`` cast to what the module gathers it in."""
        found = super().pieces(params, what)
        if what != "lp":
            return found
        pairs = zip(params, found, strict=True)
        return [None if piece is None else piece.to(_lp_dtype(param)) for param, piece in pairs]

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """As for any DTensor; ``"lp"`` cast to what the module gathers it in."""
        found = super().local(param, what)
        return found.to(_lp_dtype(param)) if what == "lp" else found

    def _require_reduced(self, params: Sequence[torch.Tensor]) -> None:
        for param in params:
            unit = _unit_of(param)
            record, group = (None, None) if unit is None else (unit.param(), unit.group())
            if record is None or group is None:  # the module is gone, and with it what it had not reduced
                continue
            copy = getattr(record, "_unsharded_param", None)  # there from the first gather on
            if record.unsharded_accumulated_grad is not None or (copy is not None and copy.grad is not None):
                scope = "set_requires_gradient_sync(False) and are kept unreduced on each rank"
            elif group._partial_reduce_output is not None:
                scope = "set_requires_all_reduce(False) and are reduced within the shard group only"
            else:
                continue
            raise GradientUnavailableError(
                f"{registry.name_of(param)} has no reduced gradient: backward passes ran under {scope}; read it after "
                "one that reduces"
            )

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Free the gathered copies of old values: the next forward, or backward, gathers again."""
        pairs = zip(params, records_of(params), strict=True)
        units = [record.notes.get(_Unit) or _unit_of(param) for param, record in pairs]
        for group in dict.fromkeys(unit.group() for unit in units if unit is not None):
            if group is not None and not group.is_sharded:
                group.reshard()


def _lp_dtype(param: torch.Tensor) -> torch.dtype:
    """What the module gathers the parameter in: ``MixedPrecisionPolicy(param_dtype=...)``, else the parameter's own."""
    unit = _unit_of(param)
    group = None if unit is None else unit.group()
    wanted: torch.dtype | None = None if group is None else group.mp_policy.param_dtype
    return wanted if wanted is not None and param.dtype.is_floating_point else param.dtype


def _unit_of(param: torch.Tensor) -> _Unit | None:
    """FSDP2's objects for the parameter, or for the one that it is a gathered copy of; None if FSDP2 has none."""
    notes = record_of(param).notes
    if _Unit not in notes and _NoUnit not in notes:
        for reference in list(composable_states().values()):
            _note_units(reference())
        if _Unit not in notes and not is_dtensor(param):
            note(param, _NoUnit())
    found: _Unit | None = notes.get(_Unit)
    return found


def _note_units(state: Any) -> None:
    """Note the parameters of an FSDP2 module, given by FSDP2's state of it, and their gathered copies."""
    for group in fsdp2_groups(state):
        for record in group.fsdp_params:
            # There from the first gather on, and new after each forward.
            copies = [getattr(record, name, None) for name in ("_unsharded_param", "_sharded_post_forward_param")]
            # What load_state_dict(assign=True) has put into the module FSDP2 takes over at the next forward.
            shown = record._module_info.module._parameters.get(record._module_info.param_name)
            owned = [record.sharded_param, *(() if any(shown is copy for copy in copies) else (shown,))]
            for tensors, are_copies in ((copies, True), (owned, False)):
                unit = _Unit(weakref.ref(record), weakref.ref(group), are_copies)
                for tensor in tensors:
                    if tensor is not None:
                        note(tensor, unit)
