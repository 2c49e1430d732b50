"""The repeated blocks of a model, which are what FSDP2 shards as one unit each around the leaves."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ds_z3leaf._flags import never_called


def repeated_blocks(model: nn.Module, leaves: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The members of each outermost ``ModuleList`` or ``ModuleDict`` outside the leaves that are called and hold
    parameters of their own, that is, some that are in no leaf; by name, in the order of ``named_modules()``."""
    inside = {id(part) for leaf in leaves for part in leaf.modules()}
    blocks: dict[str, nn.Module] = {}
    stack: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    seen: set[int] = set()
    while stack:
        name, module, member = stack.pop()
        if id(module) in inside or id(module) in seen:
            continue
        seen.add(id(module))
        if member and not never_called(module):
            if has_parameters_outside(module, inside):
                blocks[name] = module
            continue
        # Members of a list within a list are members too: nobody calls the list.
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and never_called(module)
        for part, child in reversed(list(module.named_children())):
            stack.append((f"{name}.{part}" if name else part, child, listed))
    return blocks


def has_parameters_outside(module: nn.Module, inside: set[int]) -> bool:
    """Whether a module holds a parameter that is held by none of the modules with these ids."""
    return any(
        param is not None for part in module.modules() if id(part) not in inside for param in part._parameters.values()
    )
