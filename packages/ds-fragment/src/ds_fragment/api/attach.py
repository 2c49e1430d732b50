"""Parameters do not know their optimizer, and often not their engine: `attach` records both."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_fragment.engines import adapters
from ds_fragment.engines.gradient import watch_scalers
from ds_fragment.engines.model import own_parameters, unwrapping
from ds_fragment.engines.optimized import Optimizers, unwrapped_optimizers
from ds_fragment.engines.versions import check_wrappers, known_engine
from ds_fragment.errors import InvalidValueError
from ds_fragment.record import registry


def attach(
    model: nn.Module | None,
    optimizer: Optimizers | None = None,
    *,
    masters: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """Record which optimizer updates which parameters, and which engine holds them.

    What is recorded keeps neither the model nor an optimizer alive, and calling it again is harmless. No
    communication; every rank that reads must have called it. The model may be moved afterwards (``model.to()``).
    Values and gradients of FSDP2 and of plain parameters on one rank can be read without it.

    Args:
        model: the model as the engine wrapped it (DDP, FSDP1, FSDP2, a DeepSpeedEngine): it gives the parameters their
            names and says what their gradients are worth; None leaves them unnamed.
        optimizer: any `torch.optim` optimizer, over the model's parameters or over the fp32 parameters of
            `FlatPartition`; wrapped, as Accelerate and Fabric do, or several of them in a list or as the values of a
            dict. Optimizers that step in the backward pass (``torch.distributed.optim._apply_optimizer_in_backward``)
            are found on the parameters.
        masters: (parameter, fp32 master) pairs of equal shapes, for a mixed-precision scheme of your own: the master
            is then what is read and written as the parameter's value, and what the optimizer is asked about.

    Raises:
        TypeError: ``optimizer`` is, or holds, something else.
        InvalidValueError: a master's shape is not its parameter's; nothing is recorded.
        EngineChangedError: the installed version of an engine lacks what ds-fragment asks it for.
    """
    pairs = list(masters)
    for param, master in pairs:
        if param.shape != master.shape:
            raise InvalidValueError(
                f"masters: a master of shape {tuple(master.shape)} for {registry.name_of(param)} of shape "
                f"{tuple(param.shape)}; give each parameter the fp32 copy of the same shape"
            )
    optimizers = unwrapped_optimizers(optimizer)
    watch_scalers()
    if model is not None:
        model = next(unwrapping(model))  # of a pipeline's stage, its module
        optimizers = [*(each for param in model.parameters() for each in _in_backward(param)), *optimizers]
    registry.attach(_Attachment(model, list(dict.fromkeys(optimizers)), pairs))


class _Attachment:
    """One call of `attach`, which is made again for parameters that have lost their record."""

    def __init__(
        self,
        model: nn.Module | None,
        optimizers: Sequence[torch.optim.Optimizer],
        masters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._optimizers: list[weakref.ref[Any]] = list(map(weakref.ref, optimizers))
        self._pairs = [(param, weakref.ref(master)) for param, master in masters]  # until the first time
        self._masters: dict[str, weakref.ref[torch.Tensor]] = {}  # by the parameter's name

    def model(self) -> nn.Module | None:
        """The model, while it is there."""
        return None if self._model is None else self._model()

    def key(self) -> tuple[int, ...] | None:
        """The ids of what was attached and is still there; None once everything is gone."""
        references = [*self._optimizers, *self._masters.values(), *(reference for _, reference in self._pairs)]
        if self._model is not None:
            references.append(self._model)
        there = [id(thing) for reference in references if (thing := reference()) is not None]
        return tuple(there) or None

    def learn(self) -> Iterator[torch.Tensor]:
        """Note what was attached; the parameters that were noted."""
        found: dict[int, torch.Tensor] = {}
        model = self.model()
        if model is not None:
            with known_engine():
                check_wrappers(model)
                for module in unwrapping(model):
                    for adapter in adapters():
                        adapter.learn(module)
            named = dict(own_parameters(model))
            registry.add_names(model, named.items())
            found.update((id(param), param) for param in named.values())
            names = {id(param): name for name, param in named.items()}
            for param, reference in self._pairs:
                if id(param) in names:
                    self._masters[names[id(param)]] = reference
            for name, param in named.items():
                master = self._masters.get(name, lambda: None)()
                if master is not None:
                    registry.add_master(param, master)
        for param, reference in self._pairs:
            master = reference()
            if master is not None:
                registry.add_master(param, master)
                found[id(param)] = param
        self._pairs = []
        for optimizer in (optimizer for reference in self._optimizers if (optimizer := reference()) is not None):
            registry.add_optimizer(optimizer)
            found.update((id(param), param) for group in optimizer.param_groups for param in group["params"])
        return iter(found.values())


def _in_backward(param: torch.Tensor) -> Sequence[torch.optim.Optimizer]:
    """The optimizers that step with the parameter's gradient as soon as it is there."""
    found: Sequence[torch.optim.Optimizer] = getattr(param, "_in_backward_optimizers", ())
    return found
