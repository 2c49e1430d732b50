"""FSDP2 (`fully_shard`), as far as it is more than DTensors: an attached model tells what its gradients are worth.

Between a forward and a backward pass the module's parameters are gathered low-precision copies; through `attach`
they are known for what they are, and the sharded parameter is read in their place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_fragment._adapters._dtensor import DTensorAdapter
from ds_fragment._identity import IdentityMap
from ds_fragment._loaded import are_dtensors, is_a, is_dtensor
from ds_fragment._place import Place
from ds_fragment._registry import registry
from ds_fragment.errors import GradientUnavailableError


class Fsdp2Adapter(DTensorAdapter):
    """Claims the parameters of attached FSDP2 modules, sharded or gathered."""

    name = "fsdp2"

    def __init__(self) -> None:
        super().__init__()
        # By the sharded parameter: FSDP2's record of it, and the group that reduces its gradient.
        self._records = IdentityMap[tuple[weakref.ref[Any], weakref.ref[Any]]]()
        self._gathered = IdentityMap[weakref.ref[Any]]()

    def learn(self, model: nn.Module) -> None:
        """FSDP2's records of the parameters."""
        for group in _groups(model):
            for record in group.fsdp_params:
                self._records[record.sharded_param] = (weakref.ref(record), weakref.ref(group))

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter, or what it is a gathered copy of, is in an attached module."""
        if is_dtensor(param):
            return param in self._records
        return bool(self._records) and self._record_of_gathered(param) is not None

    def _record_of_gathered(self, param: torch.Tensor) -> Any:
        if param not in self._gathered:
            for reference, _ in self._records.values():
                record = reference()
                copy = getattr(record, "_unsharded_param", None)  # there from the first gather on
                if copy is not None:
                    self._gathered[copy] = reference
        found = self._gathered.get(param)
        return None if found is None else found()

    def _sharded(self, param: torch.Tensor) -> torch.Tensor:
        if is_dtensor(param):
            return param
        found: torch.Tensor = self._record_of_gathered(param).sharded_param
        return found

    def place(self, param: torch.Tensor, what: str) -> Place:
        """As for any DTensor."""
        return super().place(self._sharded(param), what)

    def stamps(self, params: Sequence[torch.Tensor], what: str) -> Sequence[object]:
        """As for any DTensor."""
        return super().stamps(self._all_sharded(params), what)

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As for any DTensor, if they are gradients that are reduced."""
        sharded = self._all_sharded(params)
        if what == "grad":
            self._require_reduced(sharded)
        return super().pieces(sharded, what)

    def _all_sharded(self, params: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if are_dtensors(params):
            return params
        return [self._sharded(param) for param in params]

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """As for any DTensor, if it is a gradient that is reduced."""
        param = self._sharded(param)
        if what == "grad":
            self._require_reduced([param])
        return super().local(param, what)

    def _require_reduced(self, params: Sequence[torch.Tensor]) -> None:
        for param in params:
            known = self._records.get(param)
            if known is None:
                continue
            record, group = known[0](), known[1]()
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

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return super().state_keys(self._sharded(param))

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a sharded parameter of low precision."""
        return super().master(self._sharded(param))


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None)
            one = getattr(state, "_fsdp_param_group", None) if groups is None else None
            yield from (group for group in (groups if groups is not None else [one]) if group is not None)
