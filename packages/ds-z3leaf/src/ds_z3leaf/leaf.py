"""`deepspeed.utils.z3_leaf_module` under its own names, and `mark_leaves`, which takes every kind of selector.

Nothing is flagged before all selectors are known to be good: a call that raises has changed nothing. Flags are local;
every rank must flag the same modules, and does so when it runs the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from ds_z3leaf._config import read_config
from ds_z3leaf._flags import OWNER, is_leaf, never_called, set_flag
from ds_z3leaf._matchers import split_classes
from ds_z3leaf._select import Predicate, Selection, check_model, select_modules
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

    Raises:
        LeafTypeError: `model` is no module.

    >>> block = nn.Sequential(nn.Linear(1, 1))
    >>> set_z3_leaf_module(block, True)
    >>> z3_leaf_module(block), z3_leaf_parameter(block[0].weight)
    (True, True)
    """
    check_model(model)
    _mark([model], flag)


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
    if not _given(module_names):
        return [], []
    selection = select_modules(model, names=module_names, raise_if_not_found=raise_if_not_found)
    return _finish(model, selection, flag), [str(value) for value in selection.missing_values]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Flag modules by the ends of their names, in whole dotted parts: ``1.mlp`` is not the end of ``layers.11.mlp``.

    Args, returns and raises as `set_z3_leaf_modules_by_name`.
    """
    if not _given(module_name_suffixes):
        return [], []
    selection = select_modules(model, suffixes=module_name_suffixes, raise_if_not_found=raise_if_not_found)
    return _finish(model, selection, flag), [str(value) for value in selection.missing_values]


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
    *,
    classes: type[nn.Module] | str | Iterable[type[nn.Module] | str] = (),
    names: str | Iterable[str] = (),
    suffixes: str | Iterable[str] = (),
    globs: str | Iterable[str] = (),
    where: Predicate | None = None,
    modules: nn.Module | Iterable[nn.Module] = (),
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Flag modules by any mixture of selectors; `select_modules` says what each means.

    Args:
        flag: False takes the flags away.
        raise_if_not_found: raise, and change nothing, if any selector matches nothing, even if others match; otherwise
            a warning is logged.

    Returns:
        The modules found.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `select_modules`.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.GELU())
    >>> [type(leaf).__name__ for leaf in mark_leaves(model, globs="0.*", classes="GELU")]
    ['Linear', 'GELU']
    """
    selection = select_modules(
        model,
        classes=classes,
        names=names,
        suffixes=suffixes,
        globs=globs,
        where=where,
        modules=modules,
        raise_if_not_found=raise_if_not_found,
    )
    return _finish(model, selection, flag)


def apply_zero_leaf_module_config(model: nn.Module, leaf_cfg: object) -> list[nn.Module]:
    """Flag what the ``leaf_module`` section of a ZeRO configuration names.

    Args:
        model: where to look.
        leaf_cfg: an object or a mapping with ``classes``, ``names`` and ``name_suffixes``; None flags nothing. A
            mapping without ``classes`` has DeepSpeed's default ones.

    Returns:
        The modules found. What matches nothing is logged as a warning, save for the default classes.

    Raises:
        LeafTypeError, LeafValueError: the configuration cannot be used; nothing is changed.
    """
    check_model(model)
    if leaf_cfg is None:
        return []
    config = read_config(leaf_cfg)
    if not (config.classes or config.names or config.name_suffixes):
        return []
    selection = select_modules(
        model,
        classes=config.classes,
        names=config.names,
        suffixes=config.name_suffixes,
        raise_if_not_found=False,
    )
    return _finish(model, selection, True, quiet=config.default_classes)


def _set_by_class(model: nn.Module, entries: object, flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    check_model(model)
    classes, modules = split_classes(entries)
    if not classes and not modules and not raise_if_not_found:
        return []
    selection = select_modules(
        model,
        classes=classes,  # type: ignore[arg-type]  # checked there
        modules=modules,
        raise_if_not_found=raise_if_not_found,
    )
    return _finish(model, selection, flag)


def _given(entries: object) -> bool:
    """Whether there is anything in a list; what is no list is for `select_modules` to refuse."""
    if entries is None:
        raise LeafTypeError("module names are None: pass a list of strings")
    return not (isinstance(entries, (list, tuple, set, frozenset)) and not entries)


def _finish(model: nn.Module, selection: Selection, flag: bool, quiet: frozenset[str] = frozenset()) -> list[nn.Module]:
    """Flag what was found; say what was not, except for the values that may be missing."""
    found = list(selection.modules.values())
    _mark(found, flag, list(selection.modules))
    told = [text for text, value in zip(selection.missing, selection.missing_values, strict=True) if value not in quiet]
    if told:
        logger.warning("nothing in %s matches %s", type(model).__name__, ", ".join(told))
    return found


def _mark(modules: list[nn.Module], flag: bool, names: list[str] | None = None) -> None:
    for index, module in enumerate(modules):
        set_flag(module, bool(flag))
        if flag and never_called(module):
            where = repr(names[index]) if names else "module"
            logger.warning(
                "leaf %s is a %s, which is never called itself, so ZeRO-3 would not gather it: flag its parent",
                where,
                type(module).__name__,
            )
