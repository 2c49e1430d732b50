"""Choose modules of a model: by class, name, dotted suffix, glob, regular expression, predicate or the module itself.

A module is found by its name and by its short one (see `_walk`, [Note: names]). A module that is registered twice is
found by either name, and counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from ds_z3leaf._matchers import Matcher, matchers_of
from ds_z3leaf._suggest import explain_missing
from ds_z3leaf._walk import Entry, check_model, is_wrapped, walk
from ds_z3leaf.errors import LeafNotFoundError, LeafValueError

__all__ = ["Predicate", "Selection", "check_model", "select_modules"]

Predicate = Callable[[str, nn.Module], bool]
# No model has a module of these names: a pattern that matches them matches anything.
_ANY_NAME = ("zq", "zq.0.wj", "0.1.2")


@dataclass(frozen=True)
class Selection:
    """What selectors found.

    Attributes:
        modules: by name, in the order of ``named_modules()``; each module once.
        missing: the selectors that matched nothing, in words.
        missing_values: the same selectors as they were given.
        reasons: by the same names as `modules`, the first selector that matched, in words.
    """

    modules: dict[str, nn.Module]
    missing: tuple[str, ...]
    missing_values: tuple[object, ...]
    reasons: dict[str, str] = field(default_factory=dict)


def select_modules(
    model: nn.Module,
    *,
    classes: type[nn.Module] | str | Iterable[type[nn.Module] | str] = (),
    names: str | Iterable[str] = (),
    suffixes: str | Iterable[str] = (),
    globs: str | Iterable[str] = (),
    regexes: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = (),
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
        regexes: regular expressions, as strings or compiled, that match a full name from end to end (`re.fullmatch`).
        where: called with every name and module; true for those to choose.
        modules: modules of the model themselves.
        raise_if_not_found: raise if any selector matches nothing, even if others match.

    Returns:
        What was found, and which selectors found nothing.

    Raises:
        LeafTypeError: an argument has the wrong type.
        LeafValueError: a selector is empty, would match everything, or is no regular expression.
        LeafNotFoundError: a selector matches nothing.

    >>> model = nn.ModuleDict({"1": nn.ModuleDict({"mlp": nn.Linear(1, 1)}), "11": nn.ModuleDict({"mlp": nn.GELU()})})
    >>> list(select_modules(model, suffixes="1.mlp").modules)
    ['1.mlp']
    >>> list(select_modules(model, regexes=r"\\d\\d\\.mlp").modules)
    ['11.mlp']
    >>> select_modules(model, classes="Linaer")
    Traceback (most recent call last):
    ds_z3leaf.errors.LeafNotFoundError: 1 of 1 selectors matches nothing in ModuleDict: class 'Linaer' (near: 'Linear')
    """
    check_model(model)
    matchers = matchers_of(classes, names, suffixes, globs, regexes, where, modules)
    if not matchers:
        raise LeafValueError("no selector is given: pass classes, names, suffixes, globs, regexes, where or modules")
    entries = walk(model)
    found, hit = _match(entries, matchers)
    _refuse_all(entries, matchers)
    missing = [matcher for index, matcher in enumerate(matchers) if index not in hit]
    if missing and raise_if_not_found:
        raise LeafNotFoundError(explain_missing(model, entries, missing, len(matchers)))
    return Selection(
        {name: module for name, module, _ in found.values()},
        tuple(matcher.text for matcher in missing),
        tuple(matcher.value for matcher in missing),
        {name: matchers[index].text for name, _, index in found.values()},
    )


def _match(entries: list[Entry], matchers: list[Matcher]) -> tuple[dict[int, tuple[str, nn.Module, int]], set[int]]:
    """The modules found, by id, each with its name and its first matcher; and which matchers matched.

    Names, suffixes and modules are looked up rather than tried in turn, classes are tried once for each type: the time
    hardly depends on how many there are.
    """
    of_kind: dict[str, list[int]] = {}
    by_name: dict[str, list[int]] = {}
    by_tail: dict[str, list[tuple[str, int]]] = {}  # by their last part: suffixes with a dot in front
    by_id: dict[int, list[int]] = {}
    for index, matcher in enumerate(matchers):
        if matcher.kind == "name":
            by_name.setdefault(str(matcher.value), []).append(index)
        elif matcher.kind == "suffix":
            suffix = "." + str(matcher.value).lstrip(".")
            by_tail.setdefault(suffix.rpartition(".")[2], []).append((suffix, index))
        elif matcher.kind == "module":
            by_id.setdefault(id(matcher.value), []).append(index)
        else:
            of_kind.setdefault("class" if matcher.kind == "class" else "called", []).append(index)
    class_matchers = of_kind.get("class", [])
    called = [(index, matchers[index].matches) for index in of_kind.get("called", [])]
    of_type: dict[type, list[int]] = {}
    found: dict[int, tuple[str, nn.Module, int]] = {}
    hit: set[int] = set()
    for name, short, module in entries:
        hits: list[int] = []
        if class_matchers:
            kind = type(module)
            indices = of_type.get(kind)
            if indices is None:
                indices = of_type[kind] = [i for i in class_matchers if matchers[i].matches("", module)]
            if indices:
                hits += indices
        if by_id and id(module) in by_id:
            hits += by_id[id(module)]
        for spelling in (name,) if short == name or is_wrapped(name) else (name, short):
            if by_name and spelling in by_name:
                hits += by_name[spelling]
            if by_tail:
                for suffix, index in by_tail.get(spelling[spelling.rfind(".") + 1 :], ()):
                    if f".{spelling}".endswith(suffix):
                        hits.append(index)
            for index, matches in called:
                if matches(spelling, module):
                    hits.append(index)
        if hits:
            hit.update(hits)
            found.setdefault(id(module), (name, module, min(hits)))
    return found, hit


def _refuse_all(entries: list[Entry], matchers: list[Matcher]) -> None:
    """Raise if a regular expression matches the name of every module, at every depth."""
    named = entries[1:]
    deep = any("." in name for name, _, _ in named)
    for matcher in matchers:
        if matcher.kind != "regex" or not all(matcher.matches(name, module) for name, _, module in named):
            continue
        if deep or all(matcher.matches(name, entries[0][2]) for name in _ANY_NAME):
            shown = getattr(matcher.value, "pattern", matcher.value)
            raise LeafValueError(f"regexes holds {shown!r}, which every name matches: name a part, as .*mlp")
