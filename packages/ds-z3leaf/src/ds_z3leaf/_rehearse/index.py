"""The modules of a model under numbers, which are the same on every rank that built the same model."""

from __future__ import annotations

import hashlib

from torch import nn

from ds_z3leaf._sizes import full_shape
from ds_z3leaf._walk import class_name


class ModuleIndex:
    """Numbers the modules of a model in the order of ``named_modules()``; a module with two names counts once.

    Attributes:
        modules: by number.
        names: by number; a module with two names has its first.
        number: the number of a module by its ``id``.
        owns: by number, whether the module has parameters of its own, which an engine gathers when it is called.
        holds: by number, whether it or a module below it has parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self.modules = [module for _, module in named]
        self.names = [name for name, _ in named]
        self.number = {id(module): number for number, module in enumerate(self.modules)}
        self.owns = [any(param is not None for param in module._parameters.values()) for module in self.modules]
        self.holds = [next(module.parameters(), None) is not None for module in self.modules]
        self._inside: dict[int, frozenset[int]] = {}

    def inside(self, number: int) -> frozenset[int]:
        """The numbers of a module and of all below it."""
        if number not in self._inside:
            self._inside[number] = frozenset(self.number[id(part)] for part in self.modules[number].modules())
        return self._inside[number]

    def describe(self, number: int) -> str:
        """Name and class, as messages have them."""
        name = repr(self.names[number]) if self.names[number] else "the model itself"
        return f"{name} ({class_name(self.modules[number])})"

    def lines(self) -> list[str]:
        """One line for each module: name, class and the shapes of its own parameters."""
        return [
            f"{name or 'the model itself'} {type(module).__name__} "
            f"{[(key, full_shape(param)) for key, param in module._parameters.items() if param is not None]}"
            for name, module in zip(self.names, self.modules, strict=True)
        ]

    def digest(self) -> str:
        """Equal on two ranks if names, classes and shapes are."""
        return hashlib.blake2b("\n".join(self.lines()).encode(), digest_size=16).hexdigest()
