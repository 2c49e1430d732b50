"""What the kit has to know of an engine: how to make it, and how it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

import ds_fragment
from ds_fragment.testing._net import Net

_WRAPPERS = {"module", "_fsdp_wrapped_module", "_orig_mod"}


class Training:
    """A model under an engine on this rank; a subclass overrides what the engine does in its own way.

    Args:
        model: as the engine wrapped it.
        optimizer: the engine's.
        data_index: which part of the data is this rank's.
        data_ranks: over how many parts gradients are averaged.
        dtype: what the model is fed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        data_index: int = 0,
        data_ranks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.data_index, self.data_ranks, self.dtype = data_index, data_ranks, dtype
        self._known = self.named()

    def attach(self) -> None:
        """Tell ds-fragment who optimizes what."""
        ds_fragment.attach(self.model, self.optimizer)

    def named(self) -> dict[str, torch.Tensor]:
        """What the model says its parameters are now, by their names in `Net`."""
        names = {name for name, _ in Net().named_parameters()}
        found: dict[str, torch.Tensor] = {}
        for name, param in self.model.named_parameters():
            own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if own in names:
                found[own] = param
        return found

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """The parameters by their names in `Net`: as they were at first, where the model does not show them now."""
        return self._known | self.named()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs in train mode, with a graph."""
        self.model.train()
        out: torch.Tensor = self.model(x.to(self.dtype))
        return out

    def backward(self, loss: torch.Tensor) -> None:
        """From the loss of this rank's data to reduced gradients; under `no_sync`, to unreduced ones."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One optimizer step; it need not clear the gradients."""
        assert self.optimizer is not None
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()

    def eval_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs in eval mode, without a graph."""
        self.model.eval()
        with torch.no_grad():
            out: torch.Tensor = self.model(x.to(self.dtype))
        self.model.train()
        return out

    def no_sync(self) -> AbstractContextManager[None] | None:
        """Where backward passes do not reduce; None where the engine has no such thing."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """The cell is done: take away what would outlive it."""
        return


@dataclass(frozen=True)
class Engine:
    """One engine in one layout.

    Attributes:
        name: what the table calls it.
        build: makes model and optimizer from a seed, alike on every rank, which all call it.
        world_size: how many ranks it takes.
        layout: how the ranks are arranged, in words.
        compute: what the model computes with, for the oracle to round weights to.
        tolerance: for outputs, gradients and state against the oracle, which is fp64; relative and absolute.
        idle_steps: optimizer steps with zero gradients that the engine takes when it is made, which Adam counts.
        cells_per_start: after how many cells `conduct` starts new processes, as the engine leaves groups behind.
        env: environment variables that each process needs from the start.
        prepare: what takes long the first time, such as an import, once in each process.
    """

    name: str
    build: Callable[[int], Training]
    world_size: int = 2
    layout: str = "2 ranks"
    compute: torch.dtype = torch.float32
    tolerance: float = 1e-5
    idle_steps: int = 0
    cells_per_start: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
