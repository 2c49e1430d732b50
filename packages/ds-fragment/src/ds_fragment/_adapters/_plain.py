"""Parameters that every rank holds whole: plain PyTorch and DistributedDataParallel."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_fragment._adapters._base import Adapter, missing_gradient, state_entry, state_of, value_kind
from ds_fragment._identity import IdentityMap
from ds_fragment._layout import whole
from ds_fragment._place import Place
from ds_fragment._registry import registry
from ds_fragment.errors import GradientUnavailableError


class PlainAdapter(Adapter):
    """Claims every tensor that nobody else does: nothing to communicate, the whole is here."""

    name = "plain"

    def __init__(self) -> None:
        self._ddp = IdentityMap[weakref.ref[DistributedDataParallel]]()
        # By tensor, and by what a quantity of it looks like.
        self._places = IdentityMap[dict[tuple[torch.Size, torch.dtype, torch.device], Place]]()

    def learn(self, model: nn.Module) -> None:
        """Which parameters a DistributedDataParallel reduces the gradients of."""
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                reference = weakref.ref(module)
                for param in module.parameters():
                    self._ddp[param] = reference

    def claims(self, param: torch.Tensor) -> bool:
        """Every tensor."""
        return True

    def place(self, param: torch.Tensor, what: str) -> Place:
        """All of it is here."""
        found = self.local(param, what)
        key = (found.shape, found.dtype, found.device)
        places = self._places.get(param)
        if places is None:
            places = self._places[param] = {}
        if key not in places:
            places[key] = Place(*key, whole(found.shape), None)
        return places[key]

    def writers(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The ranks of the DistributedDataParallel that was attached."""
        wrapper = self._wrapper(param)
        return () if wrapper is None else (wrapper.process_group,)

    def _wrapper(self, param: torch.Tensor) -> DistributedDataParallel | None:
        reference = self._ddp.get(param)
        return None if reference is None else reference()

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The tensor itself."""
        if what == "value":
            owned = self._owned(param)
            if owned is param and param.requires_grad and value_kind(param.dtype) == "upcast":
                _warn_of_masters(param)
            return self._part(param, owned.detach(), what)
        if what == "grad":
            wrapper = self._wrapper(param) if param.requires_grad else None
            if wrapper is not None and not wrapper.require_forward_param_sync:
                raise GradientUnavailableError(
                    f"{registry.name_of(param)} has a gradient of this rank alone: the last backward pass ran under "
                    "DistributedDataParallel.no_sync(); read it after one that reduces"
                )
            master = registry.master_of(param)
            grad = param.grad if master is None or master.grad is None else master.grad
            if grad is None:
                raise missing_gradient(param)
            return grad.detach()
        owned = self._owned(param)
        entry = state_entry(state_of(owned, param), param, what, quantised=owned is param)
        return self._part(param, entry, what)

    def _owned(self, param: torch.Tensor) -> torch.Tensor:
        """What the optimizer updates: the attached master, or the parameter itself."""
        master = registry.master_of(param)
        return param if master is None else master

    def _part(self, param: torch.Tensor, found: torch.Tensor, what: str) -> torch.Tensor:
        """The parameter's own, of what the optimizer updates or keeps beside that."""
        return found

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return list(state_of(self._owned(param), param))

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a low-precision parameter without a master."""
        return value_kind(self._owned(param).dtype)

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Copy masters to their parameters."""
        for param in params:
            owned = self._owned(param)
            if owned is not param:
                param.data.copy_(self._part(param, owned.data, "value"))


def _warn_of_masters(param: torch.Tensor) -> None:
    """Say that a value is upcast where an engine may keep its fp32 master unseen."""
    if "deepspeed.runtime.engine" in sys.modules and not registry.is_named(param):
        warnings.warn(
            f"the value of {registry.name_of(param)} is its {param.dtype} weight, upcast: if a DeepSpeed engine "
            "without ZeRO trains it, call attach(engine) to have its fp32 master",
            stacklevel=2,
        )
