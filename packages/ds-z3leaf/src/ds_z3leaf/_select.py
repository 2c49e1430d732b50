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
from ds_z3leaf._walk import Tree, check_model, is_wrapped, short_name, walk
from ds_z3leaf.errors import LeafNotFoundError, LeafValueError

Predicate = Callable[[str, nn.Module], bool]
# No model has a module of these names: a pattern that matches them matches anything.
_WILD = frozenset("*?[")
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
    return select_in(
        walk(model),
        raise_if_not_found,
        classes=classes,
        names=names,
        suffixes=suffixes,
        globs=globs,
        regexes=regexes,
        where=where,
        modules=modules,
    )


def select_in(tree: Tree, raise_if_not_found: bool, **selectors: object) -> Selection:
    """`select_modules` in the modules of a model."""
    matchers = matchers_of(**selectors)
    if not matchers:
        raise LeafValueError("no selector is given: pass classes, names, suffixes, globs, regexes, where or modules")
    found, hit = _match(tree, matchers)
    _refuse_all(tree, matchers)
    missing = [matcher for index, matcher in enumerate(matchers) if index not in hit]
    if missing and raise_if_not_found:
        raise LeafNotFoundError(explain_missing(tree, missing, len(matchers)))
    return Selection(
        {name: module for name, module, _ in found.values()},
        tuple(matcher.text for matcher in missing),
        tuple(matcher.value for matcher in missing),
        {name: matchers[index].text for name, _, index in found.values()},
    )


def _match(tree: Tree, matchers: list[Matcher]) -> tuple[dict[int, tuple[str, nn.Module, int]], set[int]]:
    """The modules found, by id, each with its name and its first matcher; and which matchers matched.

    Classes are tried once for each type, names, suffixes and globs where the last part is theirs, modules looked up by
    id: the time hardly depends on how many there are, and few names are put together.
    """
    hits: dict[int, list[int]] = {}  # by index of the module: matchers
    by_kind: dict[str, list[int]] = {}
    for index, matcher in enumerate(matchers):
        by_kind.setdefault(matcher.kind, []).append(index)
    if classes := by_kind.get("class"):
        of_type: dict[type, list[int]] = {}
        for at, module in enumerate(tree.modules):
            kind = type(module)
            if kind not in of_type:
                of_type[kind] = [index for index in classes if matchers[index].matches("", module)]
            if of_type[kind]:
                hits.setdefault(at, []).extend(of_type[kind])
    if given := by_kind.get("module"):
        by_id = {id(matchers[index].value): index for index in given}
        for at, module in enumerate(tree.modules):
            if id(module) in by_id:
                hits.setdefault(at, []).append(by_id[id(module)])
    exact = {str(matchers[index].value): index for index in by_kind.get("name", [])}
    by_tail: dict[str, list[int]] = {name.rpartition(".")[2]: [] for name in exact}
    called = [*by_kind.get("where", [])]
    for index in by_kind.get("regex", []):
        if tree.wrapped:
            called.append(index)
            continue
        fullmatch = re.compile(matchers[index].value).fullmatch  # type: ignore[call-overload]
        for at, name in enumerate(tree.names):
            if fullmatch(name):
                hits.setdefault(at, []).append(index)
    for index in (*by_kind.get("suffix", []), *by_kind.get("glob", [])):
        tail = str(matchers[index].value).rpartition(".")[2]
        if matchers[index].kind == "glob" and not _WILD.isdisjoint(tail):
            called.append(index)
        else:
            by_tail.setdefault(tail, []).append(index)
    if by_tail:
        for at, part in enumerate(tree.parts):
            if part in by_tail:
                for name in _spellings(tree, at):
                    here = [exact[name]] if name in exact else []
                    here += [index for index in by_tail[part] if matchers[index].matches(name, tree.modules[at])]
                    if here:
                        hits.setdefault(at, []).extend(here)
    if called:
        names = tree.names
        for at, module in enumerate(tree.modules):
            for name in _spellings(tree, at) if tree.wrapped else (names[at],):
                here = [index for index in called if matchers[index].matches(name, module)]
                if here:
                    hits.setdefault(at, []).extend(here)
    found: dict[int, tuple[str, nn.Module, int]] = {}
    for at in sorted(hits):
        found.setdefault(id(tree.modules[at]), (tree.name(at), tree.modules[at], min(hits[at])))
    return found, {index for indices in hits.values() for index in indices}


def _spellings(tree: Tree, at: int) -> tuple[str, ...]:
    """A name as it is, and without the wrappers' words unless it ends in one (then the wrapper has the short name)."""
    name = tree.name(at)
    if not tree.wrapped or is_wrapped(name):
        return (name,)
    short = short_name(name)
    return (name,) if short == name else (name, short)


def _refuse_all(tree: Tree, matchers: list[Matcher]) -> None:
    """Raise if a regular expression matches the name of every module, at every depth."""
    for matcher in matchers:
        if matcher.kind != "regex" or not all(matcher.matches(name, module) for name, module in tree if name):
            continue
        if any(parent > 0 for parent in tree.parents) or all(
            matcher.matches(name, tree.modules[0]) for name in _ANY_NAME
        ):
            shown = getattr(matcher.value, "pattern", matcher.value)
            raise LeafValueError(f"regexes holds {shown!r}, which every name matches: name a part, as .*mlp")
