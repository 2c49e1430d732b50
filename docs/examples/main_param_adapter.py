"""An adapter for an engine that keeps fp32 masters beside its parameters, as Megatron-LM's Float16Optimizer does.

Each bf16 parameter has a ``main_param``, its fp32 master, which is what the optimizer updates, and a ``main_grad``, the
fp32 gradient, which the engine reduces over the data-parallel ranks. Every rank holds all of both. The adapter says
where they are; gathering, checking and agreeing over the ranks is ds-fragment's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ds_fragment import (
    Adapter,
    Fragment,
    GradientUnavailableError,
    Layout,
    Sharding,
    StateKeyError,
    StateNotReadyError,
    register_adapter,
)


class MainParamAdapter(Adapter):
    """Claims parameters that have a ``main_param``."""

    name = "main_param"

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the engine has made a master for it."""
        return isinstance(getattr(param, "main_param", None), torch.Tensor)

    def sharding(self, param: Any, what: str) -> Sharding:
        """The whole of it is on every rank."""
        found = self.local(param, what)
        assert found is not None
        shape = tuple(found.shape)
        everything = Layout(shape, (Fragment((0,) * len(shape), shape),))
        return Sharding(found.shape, found.dtype, found.device, everything, None)

    def local(self, param: Any, what: str) -> torch.Tensor | None:
        """The master, its gradient, or what the optimizer keeps for it."""
        main: torch.Tensor = param.main_param.detach()
        if what == "value":
            return main
        if what == "lp":  # what the model computes with
            own: torch.Tensor = param.detach()
            return own
        if what == "grad":
            if not getattr(param, "main_grad_reduced", False):
                raise GradientUnavailableError(f"a parameter of shape {tuple(param.shape)} has no reduced main_grad")
            gradient: torch.Tensor = param.main_grad
            return gradient
        state = self._state(param)
        if what not in state:
            raise StateKeyError(f"optim_state_key '{what}' is not kept; the optimizer keeps {sorted(state)}")
        entry = state[what]
        return entry if isinstance(entry, torch.Tensor) else torch.tensor(entry)

    def _state(self, param: Any) -> dict[str, Any]:
        state: dict[str, Any] = param.main_optimizer.state.get(param.main_param, {})
        if not state:
            raise StateNotReadyError(f"a parameter of shape {tuple(param.shape)} has no optimizer state yet")
        return state

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """What the optimizer keeps for the master."""
        return list(self._state(param))

    def master(self, param: torch.Tensor) -> str:
        """A true master."""
        return "fp32"

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Copy masters to the parameters that the model computes with."""
        for param in params:
            param.data.copy_(param.main_param.detach())  # type: ignore[attr-defined]


def register() -> None:
    """Have ds-fragment ask this adapter first."""
    register_adapter(MainParamAdapter())
