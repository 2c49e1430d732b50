"""Parameters do not know their optimizer, and often not their engine: `attach` records both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ds_fragment._adapters import adapters
from ds_fragment._adapters._engine import check_wrappers, known_engine
from ds_fragment._read import sharded
from ds_fragment._registry import registry
from ds_fragment.errors import InvalidValueError


def attach(
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    masters: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """Record which optimizer updates which parameters, and which engine holds them.

    Everything is recorded by identity and weakly: nothing is kept alive, and calling it again is harmless. No
    communication; every rank that reads must have called it. Values and gradients of FSDP2 and plain parameters can be
    read without it, except that only an attached model can say that its gradients are not reduced yet.

    Args:
        model: the model as the engine wrapped it (DDP, FSDP1, FSDP2, a DeepSpeedEngine): it gives the parameters their
            names and says what their gradients are worth; None leaves them unnamed.
        optimizer: any `torch.optim` optimizer, over the model's parameters or over the fp32 parameters of
            `FlatPartition`.
        masters: (parameter, fp32 master) pairs of equal shapes, for a mixed-precision scheme of your own: the master
            is then what is read and written as the parameter's value, and what the optimizer is asked about.

    Raises:
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
    registry.changed()
    if model is not None:
        with known_engine():
            check_wrappers(model)
            for adapter in adapters():
                adapter.learn(model)
        registry.add_names(sharded(model).named_parameters())
    if optimizer is not None:
        registry.add_optimizer(optimizer)
    for param, master in pairs:
        registry.add_master(param, master)
