"""The questions that an adapter answers, the list of adapters, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ds_fragment._attach import registry
from ds_fragment._exchange import Place
from ds_fragment.errors import StateKeyError, StateNotReadyError, UnlinkedParameterError


class Adapter(Protocol):
    """Reads and writes the pieces of one engine's parameters."""

    name: str

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter is held by this engine."""

    def place(self, param: torch.Tensor, what: str) -> Place:
        """Where a quantity is, the same answer on every rank; the same object as long as it does not move."""

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's piece of a quantity as a view, of its fragment's size; None where this rank holds nothing.

        Raises:
            FragmentError: it cannot be had here, now; the exchange tells every rank.
        """

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The optimizer states of the parameter that this rank knows of."""

    def master(self, param: torch.Tensor) -> str:
        """Where the fp32 value comes from: ``"fp32"``, or ``"upcast"`` where only a low-precision one exists."""

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Bring the low-precision weights up to date with the fp32 pieces.

        Args:
            params: all of this engine's.
            values: the whole values where the caller has them, the same on every rank; without them the ranks tell
                each other, and all must call.
        """


_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Ask ``adapter`` about parameters from now on, before those that were registered earlier."""
    _adapters.insert(0, adapter)


def adapter_of(param: Any) -> Adapter:
    """The adapter that claims the parameter.

    Raises:
        TypeError: it is not a tensor.
    """
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"param is a {type(param).__name__}, expected a parameter of the model (a torch.Tensor)")
    return next(adapter for adapter in _adapters if adapter.claims(param))


def state_of(owned: torch.Tensor, param: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state for the tensor that it optimizes on behalf of a parameter.

    Raises:
        UnlinkedParameterError: no optimizer was attached for it.
        StateNotReadyError: the optimizer has not stepped yet.
    """
    optimizer = registry.optimizer_of(owned)
    if optimizer is None:
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} has no optimizer: call attach(model, optimizer) on every rank first"
        )
    state: dict[str, Any] = optimizer.state.get(owned, {})
    if not state:
        raise StateNotReadyError(
            f"{registry.name_of(param)} has no optimizer state yet: {type(optimizer).__name__} makes it at its first "
            "step"
        )
    return state


def state_entry(state: dict[str, Any], param: torch.Tensor, key: str) -> torch.Tensor:
    """One optimizer state as a tensor; Python numbers become 0-dimensional ones.

    Raises:
        StateKeyError: the optimizer keeps no such state.
    """
    if key not in state:
        raise StateKeyError(
            f"optim_state_key '{key}' is not kept for {registry.name_of(param)}; its optimizer keeps {sorted(state)}"
        )
    entry = state[key]
    return entry if isinstance(entry, torch.Tensor) else torch.tensor(entry)


def value_kind(dtype: torch.dtype) -> str:
    """What the value of a tensor that is its own master is."""
    return "upcast" if dtype.itemsize < 4 else "fp32"
