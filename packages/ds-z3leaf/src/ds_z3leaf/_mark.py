"""Flag many modules of a model at once: no leaf inside another, no container that is never called."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_z3leaf._flags import FLAG, OWNER, REASON, drop_flag, flag_home, is_leaf, never_called, outermost_leaves
from ds_z3leaf.errors import LeafValueError

logger = logging.getLogger("ds.z3leaf")
_SHOWN = 4  # containers in an error


def mark(
    model: nn.Module, chosen: Mapping[str, nn.Module], reasons: Mapping[str, str], *, containers: str = "raise"
) -> list[nn.Module]:
    """Flag modules of a model. Leaves inside leaves are none: only the outermost one is flagged, and a warning says so.

    Args:
        chosen: the modules by name.
        reasons: why, by the same names.
        containers: ``raise``, or ``warn`` and flag them nevertheless as DeepSpeed does, where a container is chosen
            that is never called.

    Returns:
        Those of the chosen that are leaves now.

    Raises:
        LeafValueError: a container is never called; nothing is changed.
    """
    check_containers(model, chosen, containers)
    names = {id(module): name for name, module in chosen.items()}
    outermost = outermost_leaves(model, frozenset(names))
    marked = [leaf for leaf in outermost if id(leaf) in names]
    for leaf in marked:
        setattr(leaf, FLAG, True)
        if names[id(leaf)] in reasons:
            setattr(leaf, REASON, reasons[names[id(leaf)]])
    inner = {id(part): (part, leaf) for leaf in marked for part in _claim(leaf)}
    kept = {id(leaf) for leaf in marked}
    unflagged = [part for part, _ in inner.values() if id(part) not in kept]
    for part in unflagged:
        drop_flag(part)
    passed = [module for key, module in names.items() if key not in kept]
    if passed or unflagged:
        _say_nested(model, [chosen[name] for name in passed], unflagged, outermost)
    return marked


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
    return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)) and never_called(
        module
    )


def _called_parent(model: nn.Module, name: str) -> str:
    """The name of the nearest module around one that is no container."""
    while name:
        name = name.rpartition(".")[0]
        if not _is_container(model.get_submodule(name)):
            break
    return name


def _claim(leaf: nn.Module) -> list[nn.Module]:
    """Make a leaf the owner of all its parameters; return the flagged modules inside."""
    home = flag_home(leaf)
    flagged, stack = [], [leaf]
    plain: dict[type, bool] = {}  # by type: only the module's own attribute can say that it is a leaf
    while stack:
        module = stack.pop()
        for param in module._parameters.values():
            if param is not None:
                setattr(param, OWNER, leaf)
        for child in module._modules.values():
            if child is None:
                continue
            stack.append(child)
            kind: Any = type(child)
            if kind not in plain:
                plain[kind] = kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, FLAG)
            if (not plain[kind] or FLAG in child.__dict__) and is_leaf(child) and flag_home(child) is not home:
                flagged.append(child)
    return flagged


def _say_nested(
    model: nn.Module, passed: list[nn.Module], unflagged: list[nn.Module], outermost: list[nn.Module]
) -> None:
    """One warning for all the leaves inside leaves."""
    example = (passed or unflagged)[0]
    around = next(leaf for leaf in outermost if any(part is example for part in leaf.modules()))
    names = {id(module): name for name, module in model.named_modules()}
    count = len({id(module) for module in (*passed, *unflagged)})
    logger.warning(
        "%d %s of other leaves and not flagged by %s: %r (%s) is in %r, which is gathered whole",
        count,
        "module is a part" if count == 1 else "modules are parts",
        "itself" if count == 1 else "themselves",
        names.get(id(example), "?"),
        type(example).__name__,
        names.get(id(around), "?"),
    )
