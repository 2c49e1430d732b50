"""`deepspeed.utils.z3_leaf_module` under its own names, and `mark_leaves`, which takes every kind of selector.

Nothing is flagged before all selectors are known to be good: a call that raises has changed nothing. Flags are local;
every rank must flag the same modules, and does so when it runs the same code. Of leaves inside leaves only the
outermost one is flagged, and a warning says so; the functions return what was found all the same.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ds_z3leaf._calls import adapt_calls, restore_calls
from ds_z3leaf._choose import Select, choose
from ds_z3leaf._config import read_config
from ds_z3leaf._flags import FLAG, OWNER, REASON, is_leaf, set_flag
from ds_z3leaf._mark import check_containers, mark
from ds_z3leaf._matchers import split_classes
from ds_z3leaf._select import Predicate, select_in
from ds_z3leaf._walk import check_model, walk
from ds_z3leaf.errors import LeafTypeError

logger = logging.getLogger("ds.z3leaf")


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether a module is flagged as a leaf."""
    return is_leaf(model)


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether a parameter belongs to a leaf."""
    return hasattr(model, OWNER)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The flagged modules of a model, in the order of ``model.modules()``.

    Raises:
        LeafTypeError: `model` is no module.
    """
    check_model(model)
    return [module for module in model.modules() if is_leaf(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Flag one module as a leaf, or take its flag away.

    A flag inside or around it stays: DeepSpeed reads the outermost one and never comes to those inside. The other
    functions take the model and leave no leaf inside another.

    Raises:
        LeafTypeError: `model` is no module.
        LeafValueError: it is a container that is never called, so that no engine can gather it.

    >>> block = nn.Sequential(nn.Linear(1, 1))
    >>> set_z3_leaf_module(block, True)
    >>> z3_leaf_module(block), z3_leaf_parameter(block[0].weight)
    (True, True)
    """
    check_model(model)
    if flag:
        check_containers(model, {"": model})
    set_flag(model, bool(flag), "flagged by set_z3_leaf_module()")


def set_z3_leaf_modules_by_name(
    model: nn.Module,
    module_names: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Flag modules by their full names.

    Args:
        model: where to look.
        module_names: names as ``model.named_modules()`` gives them.
        flag: False takes the flags away.
        raise_if_not_found: raise, and change nothing, if any name is missing; otherwise a warning is logged.

    Returns:
        The modules found, and the names not found.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `select_modules`.
    """
    return _set_by_text(model, "names", module_names, flag, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Flag modules by the ends of their names, in whole dotted parts: ``1.mlp`` is not the end of ``layers.11.mlp``.

    Args, returns and raises as `set_z3_leaf_modules_by_name`.
    """
    return _set_by_text(model, "suffixes", module_name_suffixes, flag, raise_if_not_found)


def set_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: list[type[nn.Module] | str | nn.Module],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Flag modules by their class.

    Args:
        model: where to look.
        leaf_module_classes: classes, or their names with or without the module they are defined in; subclasses match.
            Modules of the model may stand among them.
        raise_if_not_found: raise, and change nothing, if any entry matches nothing, even if others match; otherwise
            a warning is logged.

    Returns:
        The modules found.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `select_modules`.
    """
    return _set_by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: list[type[nn.Module] | str | nn.Module],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Take away the flags that `set_z3_leaf_modules` with the same arguments would set."""
    return _set_by_class(model, leaf_module_classes, False, raise_if_not_found)


def mark_leaves(
    model: nn.Module,
    select: Select = None,
    *,
    classes: type[nn.Module] | str | Iterable[type[nn.Module] | str] = (),
    names: str | Iterable[str] = (),
    suffixes: str | Iterable[str] = (),
    globs: str | Iterable[str] = (),
    regexes: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = (),
    where: Predicate | None = None,
    modules: nn.Module | Iterable[nn.Module] = (),
    fine_grained: int | None = None,
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Flag modules by any mixture of selectors; `select_modules` says what each means.

    Args:
        select: ``"auto"`` takes the mixture-of-experts blocks that `find_leaf_candidates` finds. A dense model has
            none: one line is logged, at INFO, and nothing is flagged.
        classes, names, suffixes, globs, regexes, where, modules: an empty list flags nothing.
        fine_grained: also take the modules that `find_fine_grained` finds with this ``max_elements_per_module``.
        flag: False takes the flags away.
        raise_if_not_found: raise, and change nothing, if any selector matches nothing, even if others match; otherwise
            a warning is logged.

    Returns:
        The modules found, in the order of ``named_modules()``; those inside others among them, which are not flagged
        themselves.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `select_modules`. A container that is never called is a
            LeafValueError as well.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.GELU())
    >>> [type(leaf).__name__ for leaf in mark_leaves(model, globs="0.*", classes="GELU")]
    ['Linear', 'GELU']
    """
    selectors = {
        "classes": classes,
        "names": names,
        "suffixes": suffixes,
        "globs": globs,
        "regexes": regexes,
        "where": where,
        "modules": modules,
    }
    choice = choose(model, select, fine_grained, raise_if_not_found, selectors)
    if flag:
        mark(choice.tree, choice.modules, choice.reasons)
    else:
        _unmark(choice.modules.values())
    _say_missing(model, choice.missing)
    return list(choice.modules.values())


@contextlib.contextmanager
def z3_leaves(
    model: nn.Module,
    select: Select = None,
    *,
    classes: type[nn.Module] | str | Iterable[type[nn.Module] | str] = (),
    names: str | Iterable[str] = (),
    suffixes: str | Iterable[str] = (),
    globs: str | Iterable[str] = (),
    regexes: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = (),
    where: Predicate | None = None,
    modules: nn.Module | Iterable[nn.Module] = (),
    fine_grained: int | None = None,
    raise_if_not_found: bool = True,
) -> Iterator[list[nn.Module]]:
    """Flag modules for the length of a ``with`` block, and then make the flags what they were, also on exceptions.

    A ZeRO-3 engine that is built inside keeps its leaves: it reads the flags in every step. Blocks can be nested.

    Args:
        as in `mark_leaves`.

    Raises:
        as `mark_leaves`, with nothing changed.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.GELU())
    >>> with z3_leaves(model, names="0") as leaves:
    ...     print(get_z3_leaf_modules(model) == leaves)
    True
    >>> get_z3_leaf_modules(model)
    []
    """
    check_model(model)
    flags = {id(module): (module, _own_flags(module)) for module in model.modules()}
    owners = {id(param): (param, getattr(param, OWNER, None)) for param in model.parameters()}
    try:
        yield mark_leaves(
            model,
            select,
            classes=classes,
            names=names,
            suffixes=suffixes,
            globs=globs,
            regexes=regexes,
            where=where,
            modules=modules,
            fine_grained=fine_grained,
            raise_if_not_found=raise_if_not_found,
        )
    finally:
        _restore(model, flags, owners)


def apply_zero_leaf_module_config(model: nn.Module, leaf_cfg: object) -> list[nn.Module]:
    """Flag what the ``leaf_module`` section of a ZeRO configuration names.

    Args:
        model: where to look.
        leaf_cfg: an object or a mapping with ``classes``, ``names`` and ``name_suffixes``; None flags nothing. A
            mapping without ``classes`` has DeepSpeed's default ones.

    Returns:
        The modules found. What matches nothing is logged as a warning, save for the default classes.

    Raises:
        LeafTypeError: the configuration cannot be used; nothing is changed.
    """
    check_model(model)
    if leaf_cfg is None:
        return []
    config = read_config(leaf_cfg)
    if not (config.classes or config.names or config.name_suffixes):
        return []
    selectors = {"classes": config.classes, "names": config.names, "suffixes": config.name_suffixes}
    found, _ = _set(model, selectors, True, raise_if_not_found=False, quiet=config.default_classes)
    return found


def _set_by_class(model: nn.Module, entries: object, flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    check_model(model)
    classes, modules = split_classes(entries)
    if not classes and not modules and not raise_if_not_found:
        return []
    found, _ = _set(model, {"classes": classes, "modules": modules}, flag, raise_if_not_found)
    return found


def _set_by_text(
    model: nn.Module, argument: str, entries: object, flag: bool, raise_if_not_found: bool
) -> tuple[list[nn.Module], list[str]]:
    if entries is None:
        raise LeafTypeError("module names are None: pass a list of strings")
    check_model(model)
    if isinstance(entries, (list, tuple, set, frozenset)) and not entries:
        return [], []
    found, missing = _set(model, {argument: entries}, flag, raise_if_not_found)
    return found, [str(value) for value in missing]


def _set(
    model: nn.Module,
    selectors: dict[str, Any],
    flag: bool,
    raise_if_not_found: bool,
    quiet: frozenset[str] = frozenset(),
) -> tuple[list[nn.Module], tuple[object, ...]]:
    """Flag what selectors find; say what they do not, except for the values that may be missing.

    Returns:
        The modules found, and the values that found nothing.
    """
    tree = walk(model)
    selection = select_in(tree, raise_if_not_found, **selectors)
    if flag:
        reasons = {name: f"selected by {text}" for name, text in selection.reasons.items()}
        # DeepSpeed's callers who want no exception get none for a container either.
        mark(tree, selection.modules, reasons, containers="raise" if raise_if_not_found else "warn")
    else:
        _unmark(selection.modules.values())
    values = zip(selection.missing, selection.missing_values, strict=True)
    _say_missing(model, [text for text, value in values if value not in quiet])
    return list(selection.modules.values()), selection.missing_values


def _unmark(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        set_flag(module, False)


def _say_missing(model: nn.Module, missing: Iterable[str]) -> None:
    told = ", ".join(missing)
    if told:
        logger.warning("nothing in %s matches %s", type(model).__name__, told)


def _own_flags(module: nn.Module) -> dict[str, Any]:
    """What a module itself, not its class, says about being a leaf."""
    return {name: module.__dict__[name] for name in (FLAG, REASON) if name in module.__dict__}


def _restore(
    model: nn.Module, flags: dict[int, tuple[nn.Module, dict[str, Any]]], owners: dict[int, tuple[nn.Parameter, Any]]
) -> None:
    """Give back the flags that modules and parameters had; those that came since have none, unless an engine has them.

    A ZeRO-3 engine reads the flags in every step.
    """
    current: dict[int, tuple[nn.Module, dict[str, Any]]] = {id(module): (module, {}) for module in model.modules()}
    in_use = [
        module for module, known in (current | flags).values() if is_leaf(module) and not known and _in_use(module)
    ]
    kept = {id(param) for leaf in in_use for param in leaf.parameters()}
    for module, known in (current | flags).values():
        if any(module is leaf for leaf in in_use):
            continue
        for name in (FLAG, REASON):
            module.__dict__.pop(name, None)
        module.__dict__.update(known)
        if is_leaf(module):
            adapt_calls(module)
        else:
            restore_calls(module)
    params: dict[int, tuple[nn.Parameter, Any]] = {id(param): (param, None) for param in model.parameters()}
    for param, owner in (params | owners).values():
        if id(param) in kept:
            continue
        if owner is not None:
            setattr(param, OWNER, owner)
        elif hasattr(param, OWNER):
            delattr(param, OWNER)
    if in_use:
        logger.info("z3_leaves() leaves %d flags in place: a ZeRO-3 engine reads them in every step", len(in_use))


def _in_use(module: nn.Module) -> bool:
    """Whether DeepSpeed has registered its hooks on a module."""
    return hasattr(module, "ds_id")
