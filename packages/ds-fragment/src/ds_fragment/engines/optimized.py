"""How a parameter is optimized: by which optimizer, on which tensor, with which hyperparameters, and fresh state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | Mapping[Any, torch.optim.Optimizer]


@dataclass(frozen=True)
class Optimized:
    """What an optimizer keeps of one parameter.

    Attributes:
        optimizer: of torch's kind, that keeps the state; None on a rank that keeps none of the parameter.
        owned: what it updates on behalf of the parameter: the parameter itself, its master, or a flat tensor, which
            is that of other parameters too.
        group: its parameter group, live: the next step goes by what is set there.
        kind: the name of the optimizer's class, on every rank.
    """

    optimizer: torch.optim.Optimizer | None
    owned: torch.Tensor
    group: dict[str, Any]
    kind: str

    @property
    def state(self) -> dict[str, Any]:
        """The live state; an empty dict where there is none."""
        found: dict[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(self.owned, {})
        return found

    @property
    def keys(self) -> set[str]:
        """The keys of the state that there is."""
        return {key for key, entry in self.state.items() if entry is not None}

    @property
    def counts_for_group(self) -> bool:
        """Whether the optimizer counts its steps in the group, as apex's and DeepSpeed's FusedAdam do."""
        return bool(self.keys) and "step" not in self.keys and isinstance(self.group.get("step"), int)

    def make_state(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Have the optimizer make its state for the tensor, by a step that changes nothing else.

        The step is that of the optimizer's class, so that neither hooks nor learning-rate schedules see it, with a
        gradient of zeros and a learning rate of zero. Weights are put back, since ``-0.0 + 0.0`` is ``0.0``.

        Args:
            hyperparameters: which take the place of the group's.

        Returns:
            Whether it counts its steps in the group: see `counts_for_group`.

        Raises:
            Exception: what the optimizer raises.
        """
        optimizer, owned = self.optimizer, self.owned
        assert optimizer is not None
        trial = {**self.group, **hyperparameters, "params": [owned]}
        if "lr" in trial:
            trial["lr"] = torch.zeros_like(trial["lr"]) if isinstance(trial["lr"], torch.Tensor) else 0.0
        step: Any = type(optimizer).step
        if getattr(step, "hooked", False):  # torch wraps it to call hooks
            step = step.__wrapped__
        groups, grad, weights = optimizer.param_groups, owned.grad, owned.detach().clone()
        on_device = owned.device.type != "cpu"
        try:
            with torch.random.fork_rng([owned.device] if on_device else [], device_type=owned.device.type):
                owned.grad = torch.zeros_like(owned)
                optimizer.param_groups = [trial]
                step(optimizer)
        finally:
            optimizer.param_groups, owned.grad = groups, grad
            with torch.no_grad():
                owned.copy_(weights)
        return replace(self, group=trial).counts_for_group


def optimized_by(
    optimizers: Sequence[torch.optim.Optimizer | None], owned: Sequence[torch.Tensor]
) -> list[Optimized | None]:
    """For each tensor what its optimizer keeps of it; None where there is no optimizer, or not for this tensor."""
    groups: dict[int, dict[int, dict[str, Any]]] = {}
    found: list[Optimized | None] = []
    for optimizer, tensor in zip(optimizers, owned, strict=True):
        if optimizer is None:
            found.append(None)
            continue
        if id(optimizer) not in groups:
            groups[id(optimizer)] = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        group = groups[id(optimizer)].get(id(tensor))
        found.append(None if group is None else Optimized(optimizer, tensor, group, type(optimizer).__name__))
    return found


def unwrapped_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    """The optimizers that a user gave, each taken out of what wraps it.

    Raises:
        TypeError: it is, or holds, something else.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, Mapping):
        return [each for value in optimizer.values() for each in unwrapped_optimizers(value)]
    if isinstance(optimizer, Iterable) and not isinstance(optimizer, str) and not hasattr(optimizer, "param_groups"):
        return [each for value in optimizer for each in unwrapped_optimizers(value)]
    inner = getattr(optimizer, "optimizer", None)  # as Accelerate and Fabric name it
    if hasattr(inner, "param_groups"):
        return unwrapped_optimizers(inner)
    if not (isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "param_groups")):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected torch.optim optimizers")
    return [optimizer]  # type: ignore[list-item]
