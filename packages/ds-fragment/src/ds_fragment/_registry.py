"""What is known of parameters beside themselves: their optimizer, fp32 master and name, weakly and by identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain

import torch

from ds_fragment._identity import IdentityMap

# What wrappers put into parameter names, wherever they are in a model. What only wraps whole models, and calls them
# "module" as a user may call a part of a model, is taken off by `_read.unwrapped`.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"}


class Registry:
    """Optimizers, fp32 masters and names by parameter; nothing here keeps any of them alive."""

    def __init__(self) -> None:
        self._optimizers = IdentityMap[weakref.ref[torch.optim.Optimizer]]()
        self._masters = IdentityMap[weakref.ref[torch.Tensor]]()
        self._names = IdentityMap[str]()
        self._attached: list[weakref.ref[torch.optim.Optimizer]] = []
        self.generation = 0  # what was found out of parameters in an earlier one may be wrong by now

    def changed(self) -> None:
        """Have everything that was found out of parameters be found out anew."""
        self.generation += 1

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the optimizer for every tensor in its parameter groups."""
        reference = weakref.ref(optimizer)
        self._attached = [other for other in self._attached if other() not in (None, optimizer)] + [reference]
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

    def only_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that was attached and is still alive, if it is one."""
        alive = [optimizer for reference in self._attached if (optimizer := reference()) is not None]
        return alive[0] if len(alive) == 1 else None

    def master_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """The fp32 master that was attached and is still alive."""
        reference = self._masters.get(param)
        return None if reference is None else reference()

    def any_has_gradient(self) -> bool:
        """Whether a parameter of an attached model, or a master, has a gradient now."""
        masters = (master for reference in self._masters.values() if (master := reference()) is not None)
        return any(tensor.grad is not None for tensor in chain(self._names.tensors(), masters))

    def is_named(self, param: torch.Tensor) -> bool:
        """Whether the parameter is in an attached model."""
        return param in self._names

    def name_of(self, param: torch.Tensor) -> str:
        """The parameter's name for messages: its own where known, else its shape."""
        name = self._names.get(param)
        return (
            f"parameter '{name}'"
            if name is not None
            else f"a parameter of shape {tuple(getattr(param, 'ds_shape', param.shape))}"
        )


registry = Registry()


def clean_name(name: str) -> str:
    """A parameter's name without what FSDP1, activation checkpointing, torch.compile and Fabric put into it.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    >>> clean_name("_forward_module.layers.module.weight")
    'layers.module.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
