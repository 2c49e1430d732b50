"""Parameters that every rank holds whole: plain PyTorch and DistributedDataParallel."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_fragment._adapters._base import Adapter, state_entry, state_of, value_kind
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

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The tensor itself."""
        owned = _master(param)
        if what == "value":
            return owned.detach()
        if what == "grad":
            ddp = self._ddp.get(param)
            wrapper = None if ddp is None else ddp()
            if wrapper is not None and not wrapper.require_forward_param_sync:
                raise GradientUnavailableError(
                    f"{registry.name_of(param)} has a gradient of this rank alone: the last backward pass ran under "
                    "DistributedDataParallel.no_sync(); read it after one that reduces"
                )
            grad = owned.grad if owned.grad is not None else param.grad
            if grad is None:
                raise GradientUnavailableError(
                    f"{registry.name_of(param)} has no gradient: no backward pass used it since its gradient was "
                    "cleared"
                )
            return grad.detach()
        return state_entry(state_of(owned, param), param, what)

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return list(state_of(_master(param), param))

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a low-precision parameter without a master that was attached."""
        return value_kind(_master(param).dtype)

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Copy attached masters to their parameters."""
        for param in params:
            master = registry.master_of(param)
            if master is not None:
                param.data.copy_(master.data)


def _master(param: torch.Tensor) -> torch.Tensor:
    master = registry.master_of(param)
    return param if master is None else master
