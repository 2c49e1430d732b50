"""Choose modules of a model: by class, name, dotted suffix, glob, predicate or by the module itself.

[Note: names] A module's name is the one that ``model.named_modules()`` gives it. Wrappers (`torch.compile`, activation
checkpointing, FSDP1) put words of their own into it; a module is found with and without these words. A module that is
registered twice is found by either name, and counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ds_z3leaf._matchers import matchers_of
from ds_z3leaf._suggest import explain_missing
from ds_z3leaf.errors import LeafNotFoundError, LeafTypeError

Predicate = Callable[[str, nn.Module], bool]
_WRAPPER_WORDS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Selection:
    """What selectors found.

    Attributes:
        modules: by name, in the order of ``named_modules()``; each module once.
        missing: the selectors that matched nothing, in words.
        missing_values: the same selectors as they were given.
    """

    modules: dict[str, nn.Module]
    missing: tuple[str, ...]
    missing_values: tuple[object, ...]


def select_modules(
    model: nn.Module,
    *,
    classes: type[nn.Module] | str | Iterable[type[nn.Module] | str] = (),
    names: str | Iterable[str] = (),
    suffixes: str | Iterable[str] = (),
    globs: str | Iterable[str] = (),
    where: Predicate | None = None,
    modules: nn.Module | Iterable[nn.Module] = (),
    raise_if_not_found: bool = True,
) -> Selection:
    """Find the modules that any of the selectors matches. Changes nothing.

    Args:
        model: where to look; the model itself can be found as well.
        classes: classes, or their names with or without the module they are defined in. Subclasses match.
        names: full names.
        suffixes: ends of names, of whole dotted parts: ``1.mlp`` matches ``layers.1.mlp``, never ``layers.11.mlp``.
        globs: patterns of full names: ``*`` stands for (a piece of) one dotted part, ``**`` for any number of parts.
        where: called with every name and module; true for those to choose.
        modules: modules of the model themselves.
        raise_if_not_found: raise if any selector matches nothing, even if others match.

    Returns:
        What was found, and which selectors found nothing.

    Raises:
        LeafTypeError: an argument has the wrong type.
        LeafValueError: a selector is empty or would match everything.
        LeafNotFoundError: a selector matches nothing.

    >>> model = nn.ModuleDict({"1": nn.ModuleDict({"mlp": nn.Linear(1, 1)}), "11": nn.ModuleDict({"mlp": nn.GELU()})})
    >>> list(select_modules(model, suffixes="1.mlp").modules)
    ['1.mlp']
    >>> select_modules(model, classes="Linaer")
    Traceback (most recent call last):
    ds_z3leaf.errors.LeafNotFoundError: 1 of 1 selectors matches nothing in ModuleDict: class 'Linaer' (near: 'Linear')
    """
    check_model(model)
    matchers = matchers_of(classes, names, suffixes, globs, where, modules)
    found: dict[int, tuple[str, nn.Module]] = {}
    hit: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        spellings = _spellings(name)
        for index, matcher in enumerate(matchers):
            if any(matcher.matches(spelling, module) for spelling in spellings):
                hit.add(index)
                found.setdefault(id(module), (name, module))
    missing = [matcher for index, matcher in enumerate(matchers) if index not in hit]
    if missing and raise_if_not_found:
        raise LeafNotFoundError(explain_missing(model, missing, len(matchers)))
    return Selection(
        dict(found.values()), tuple(matcher.text for matcher in missing), tuple(matcher.value for matcher in missing)
    )


def check_model(model: object) -> None:
    """Raise `LeafTypeError` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise LeafTypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


def _spellings(name: str) -> list[str]:
    """A name as it is, and without the wrappers' words unless it ends in one (then the wrapper has the short name)."""
    parts = name.split(".")
    if parts[-1] in _WRAPPER_WORDS or not _WRAPPER_WORDS.intersection(parts):
        return [name]
    return [name, ".".join(part for part in parts if part not in _WRAPPER_WORDS)]
