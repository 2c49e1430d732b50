"""All modules of a model by name, in one fast pass.

[Note: names] A module's name is the one that ``model.named_modules()`` gives it. Wrappers (`torch.compile`, activation
checkpointing, FSDP1) put words of their own into it; its *short* name is without these words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ds_z3leaf.errors import LeafTypeError, LeafValueError

WRAPPER_WORDS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def check_model(model: object) -> None:
    """Raise `LeafTypeError` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise LeafTypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


@dataclass(frozen=True)
class Tree:
    """All modules, under every name that they have, in the order of ``named_modules()``.

    A name is put together when it is asked for: most selectors need few of them.

    Attributes:
        modules: the modules.
        parents: by index, the index of the module that holds this one; -1 for the model itself.
        parts: by index, the last part of the name.
        ends: by index, for modules with children, the index behind the last module below.
    """

    modules: list[nn.Module]
    parents: list[int]
    parts: list[str]
    ends: dict[int, int]

    def name(self, index: int) -> str:
        """The name of a module."""
        found = self.parts[index]
        index = self.parents[index]
        while index > 0:
            found = f"{self.parts[index]}.{found}"
            index = self.parents[index]
        return found

    @cached_property
    def names(self) -> list[str]:
        """All names, by index."""
        names = [""] * len(self.parts)
        for index, (parent, part) in enumerate(zip(self.parents, self.parts, strict=True)):
            names[index] = f"{names[parent]}.{part}" if parent > 0 else part
        return names

    @cached_property
    def wrapped(self) -> bool:
        """Whether there are any wrappers, so that short names differ from names."""
        return not WRAPPER_WORDS.isdisjoint(self.parts)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(zip(self.names, self.modules, strict=True))


def walk(model: nn.Module) -> Tree:
    """The modules of a model. It takes a third of the time of ``named_modules()``, whose generators are nested.

    Raises:
        LeafValueError: a module holds itself.
    """
    modules, parents, parts, ends = [model], [-1], [""], {0: 1}

    def visit(module: nn.Module, index: int) -> None:
        for part, child in module._modules.items():
            if child is not None:
                modules.append(child)
                parents.append(index)
                parts.append(part)
                if child._modules:
                    visit(child, len(modules) - 1)
        ends[index] = len(modules)

    try:
        visit(model, 0)
    except RecursionError:
        raise LeafValueError(f"{type(model).__name__} holds a module that holds itself: name its parts once") from None
    return Tree(modules, parents, parts, ends)


def is_wrapped(name: str) -> bool:
    """Whether a name ends in a wrapper's word: then the wrapper itself has the short name."""
    return name.rpartition(".")[2] in WRAPPER_WORDS


def short_name(name: str) -> str:
    """A name without the wrappers' words."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_WORDS)


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; None for other modules."""
    inner = (child for part, child in module._modules.items() if part in WRAPPER_WORDS)
    return next(inner, None)


def class_name(module: nn.Module) -> str:
    """The name of a module's class as its author wrote it: without wrappers around it and FSDP2's prefix."""
    while True:
        inner = wrapped_module(module)
        if inner is None:
            break
        module = inner
    kind = type(module)
    if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
        kind = kind.__mro__[2]
    return kind.__name__
