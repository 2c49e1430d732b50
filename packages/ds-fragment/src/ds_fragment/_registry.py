"""Who optimizes what: parameters do not know their optimizer, so `attach` records it, weakly and by identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# What wrappers put into parameter names.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Registry:
    """Optimizers, fp32 masters and names by parameter; nothing here keeps any of them alive."""

    def __init__(self) -> None:
        self._optimizers: MutableMapping[torch.Tensor, weakref.ref[torch.optim.Optimizer]] = WeakIdKeyDictionary()
        self._masters: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakIdKeyDictionary()
        self._names: MutableMapping[torch.Tensor, str] = WeakIdKeyDictionary()

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the optimizer for every tensor in its parameter groups."""
        reference = weakref.ref(optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                self._optimizers[param] = reference

    def add_names(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Record what the parameters are called, without the prefixes of wrappers."""
        for name, param in named:
            self._names[param] = clean_name(name)

    def add_master(self, param: torch.Tensor, master: torch.Tensor) -> None:
        """Record that ``master`` is the fp32 value of ``param``."""
        self._masters[param] = weakref.ref(master)

    def optimizer_of(self, param: torch.Tensor) -> torch.optim.Optimizer | None:
        """The optimizer that was attached and is still alive."""
        reference = self._optimizers.get(param)
        return None if reference is None else reference()

    def master_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """The fp32 master that was attached and is still alive."""
        reference = self._masters.get(param)
        return None if reference is None else reference()

    def name_of(self, param: torch.Tensor) -> str:
        """The parameter's name for messages: its own where known, else its shape."""
        name = self._names.get(param)
        return f"parameter '{name}'" if name is not None else f"a parameter of shape {tuple(param.shape)}"


registry = Registry()


def clean_name(name: str) -> str:
    """A parameter's name without what FSDP1, activation checkpointing and torch.compile put into it.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def attach(
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    masters: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """Record which optimizer updates which parameters, so that its state can be read and written.

    Everything is recorded by identity and weakly: nothing is kept alive, and calling it again is harmless. No
    communication; every rank that reads state must have called it.

    Args:
        model: gives the parameters their names in messages; None leaves them unnamed.
        optimizer: any `torch.optim` optimizer, over the model's parameters or over the fp32 parameters of
            `FlatPartition`.
        masters: (parameter, fp32 master) pairs of equal shapes, for a mixed-precision scheme of your own: the master
            is then what is read and written as the parameter's value, and what the optimizer is asked about.

    Raises:
        ValueError: a master's shape is not its parameter's.
    """
    pairs = list(masters)
    for param, master in pairs:
        if param.shape != master.shape:
            raise ValueError(
                f"masters: a master of shape {tuple(master.shape)} for {registry.name_of(param)} of shape "
                f"{tuple(param.shape)}; give each parameter the fp32 copy of the same shape"
            )
    if model is not None:
        registry.add_names(model.named_parameters())
    if optimizer is not None:
        registry.add_optimizer(optimizer)
    for param, master in pairs:
        registry.add_master(param, master)
