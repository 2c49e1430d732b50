"""Flag many modules of a model at once: no leaf inside another, no container that is never called."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_z3leaf._flags import FLAG, REASON, drop_flag, flag_home, is_leaf, never_called
from ds_z3leaf._walk import Tree
from ds_z3leaf.errors import LeafValueError

logger = logging.getLogger("ds.z3leaf")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_SHOWN = 4  # containers in an error


def mark(tree: Tree, chosen: Mapping[str, nn.Module], reasons: Mapping[str, str], *, containers: str = "raise") -> None:
    """Flag modules of a model. Leaves inside leaves are none: only the outermost one is flagged, and a warning says so.

    A module that is a part of a leaf and has another place outside of it stays a leaf.

    Args:
        tree: the model's modules.
        chosen: the modules to flag, by name.
        reasons: why, by the same names.
        containers: ``raise``, or ``warn`` and flag them nevertheless as DeepSpeed does, where a container is chosen
            that is never called.

    Raises:
        LeafValueError: a container is never called; nothing is changed.
    """
    check_containers(tree.modules[0], chosen, containers)
    names = {id(module): name for name, module in chosen.items()}
    special = {kind for kind in set(map(type, tree.modules)) if not _is_plain(kind)}
    marked: set[int] = set()
    inner: dict[int, tuple[int, int]] = {}  # by id: the index of a leaf inside a leaf, and that of the leaf around
    at, count = 0, len(tree.modules)
    while at < count:
        module = tree.modules[at]
        if id(module) in names:
            setattr(module, FLAG, True)
            if names[id(module)] in reasons:
                setattr(module, REASON, reasons[names[id(module)]])
            marked.add(id(module))
            end = tree.ends.get(at, at + 1)
            inner.update((id(tree.modules[index]), (index, at)) for index in _claim(tree, at, end, special, names))
        elif is_leaf(module):
            end = tree.ends.get(at, at + 1)
            inner.update((id(tree.modules[i]), (i, at)) for i in range(at + 1, end) if id(tree.modules[i]) in names)
        else:
            end = at + 1
        at = end
    nested = {key: places for key, places in inner.items() if key not in marked}
    for index, around in nested.values():
        part = tree.modules[index]
        if id(tree.modules[around]) in marked and is_leaf(part):
            drop_flag(part)
    if nested:
        index, around = next(iter(nested.values()))
        logger.warning(
            "%d %s of other leaves and not flagged by %s: %r (%s) is in %r, which is gathered whole",
            len(nested),
            "module is a part" if len(nested) == 1 else "modules are parts",
            "itself" if len(nested) == 1 else "themselves",
            tree.name(index),
            type(tree.modules[index]).__name__,
            tree.name(around),
        )


def check_containers(model: nn.Module, chosen: Mapping[str, nn.Module], containers: str = "raise") -> None:
    """Refuse the containers among the chosen modules, or warn of them; warn of other modules without a ``forward``.

    Raises:
        LeafValueError: a ``ModuleList`` or ``ModuleDict`` is chosen; the message names what to flag instead.
    """
    silent = {name: module for name, module in chosen.items() if never_called(module)}
    refused = [name for name, module in silent.items() if containers == "raise" and _is_container(module)]
    if not refused:
        for name, module in silent.items():
            logger.warning(
                "leaf %r is a %s, which is never called itself, so ZeRO-3 would not gather it: flag its parent",
                name,
                type(module).__name__,
            )
        return
    parents = list(dict.fromkeys(_called_parent(model, name) for name in refused))
    shown = [repr(parent) for parent in parents[:_SHOWN]]
    names = shown[0] if len(parents) == 1 else f"[{', '.join(shown)}{', ...' if len(parents) > _SHOWN else ''}]"
    if chosen[refused[0]] is model:
        fix = "the module that holds it"
    elif "" in parents:
        fix = f"the {type(model).__name__} itself, modules=model"
    else:
        fix = f"what holds it, names={names}"
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    raise LeafValueError(
        f"leaf {refused[0]!r}{more} is a {type(chosen[refused[0]]).__name__}, which is never called itself, so that no "
        f"engine can gather it: flag {fix}"
    )


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and never_called(module)


def _called_parent(model: nn.Module, name: str) -> str:
    """The name of the nearest module around one that is no container."""
    while name:
        name = name.rpartition(".")[0]
        if not _is_container(model.get_submodule(name)):
            break
    return name


def _claim(tree: Tree, at: int, end: int, special: set[type], names: Mapping[int, str]) -> list[int]:
    """Make a leaf the owner of all its parameters; return the indices of the leaves inside."""
    leaf = tree.modules[at]
    inside = []
    for index, module in enumerate(tree.modules[at:end], at):
        own = module.__dict__
        for param in own["_parameters"].values():
            if param is not None:
                param.ds_z3_leaf_module = leaf
        if FLAG in own or id(module) in names or (special and type(module) in special and is_leaf(module)):
            inside.append(index)
    home = flag_home(leaf)
    return [index for index in inside if index > at and flag_home(tree.modules[index]) is not home]


def _is_plain(kind: Any) -> bool:
    """Whether only a module's own attribute can say that it is a leaf: not its class, nor a module that it wraps."""
    return kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, FLAG)
