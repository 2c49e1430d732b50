"""Choose leaves by selectors, by evidence (``"auto"``), by granularity, or by all of them: what `mark_leaves` flags."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ds_z3leaf._candidates import find_leaf_candidates
from ds_z3leaf._fine_grained import search_fine_grained
from ds_z3leaf._mark import check_containers
from ds_z3leaf._plan import LeafCandidate, LeafPlan
from ds_z3leaf._select import Predicate, select_in
from ds_z3leaf._walk import Tree, check_model, walk
from ds_z3leaf.errors import LeafNotFoundError, LeafTypeError, LeafValueError

logger = logging.getLogger("ds.z3leaf")
Select = Literal["auto"] | None


@dataclass(frozen=True)
class Choice:
    """Modules by name, why each was chosen, and what found nothing.

    Attributes:
        modules: by name, in the order of ``named_modules()``.
        reasons: by the same names.
        missing: the selectors that matched nothing, in words.
        tree: the modules of the model.
    """

    modules: dict[str, nn.Module]
    reasons: dict[str, str]
    missing: tuple[str, ...]
    tree: Tree


def choose(
    model: nn.Module,
    select: object,
    fine_grained: object,
    raise_if_not_found: bool,
    selectors: dict[str, Any],
) -> Choice:
    """The union of everything that is asked for; each module once, with its best reason.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `ds_z3leaf.mark_leaves`.
    """
    check_model(model)
    if select is not None and select != "auto":
        wrong = LeafValueError if isinstance(select, str) else LeafTypeError
        raise wrong(f'select is {select!r}: pass "auto", or classes=, names=, suffixes=, globs=, ...')
    empty = (tuple, list, set, frozenset)
    given = any(value is not None and (value or not isinstance(value, empty)) for value in selectors.values())
    computed = any(isinstance(value, (list, set, frozenset)) for value in selectors.values())  # such as no candidates
    if not given and select is None and fine_grained is None and not computed:
        raise LeafValueError(
            'no selector is given: pass "auto", classes, names, suffixes, globs, regexes, where, modules, fine_grained'
        )
    modules: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    missing: list[str] = []
    tree = walk(model)
    if select == "auto":
        candidates = find_leaf_candidates(model)
        if not candidates:
            logger.info("%s has no mixture-of-experts block: nothing to flag", type(model).__name__)
        _add(modules, reasons, candidates)
    if given:
        selection = select_in(tree, raise_if_not_found, **selectors)
        known = {id(module) for module in modules.values()}
        fresh = {name: module for name, module in selection.modules.items() if id(module) not in known}
        modules |= fresh
        reasons |= {name: f"selected by {selection.reasons[name]}" for name in fresh}
        missing += selection.missing
    if fine_grained is not None:
        found = search_fine_grained(model, fine_grained)
        if not found.leaves:
            nearest = (
                f"the smallest is {found.smallest}, of {found.smallest_name!r}" if found.smallest else "none has any"
            )
            text = f"fine_grained {fine_grained} ({nearest})"
            if raise_if_not_found:
                raise LeafNotFoundError(f"no module of {type(model).__name__} has so few elements a module: {text}")
            missing.append(text)
        _add(modules, reasons, found.leaves)
    if len([part for part in (select, given or None, fine_grained) if part is not None]) > 1:
        modules = {name: modules[name] for name in tree.names if name in modules}
    return Choice(modules, reasons, tuple(missing), tree)


def _add(modules: dict[str, nn.Module], reasons: dict[str, str], candidates: Iterable[LeafCandidate]) -> None:
    known = {id(module) for module in modules.values()}
    for candidate in candidates:
        if id(candidate.module) not in known:
            modules[candidate.name] = candidate.module
            reasons[candidate.name] = candidate.reason


def plan_leaves(
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
) -> LeafPlan:
    """Choose leaves as `mark_leaves` does, and change nothing: the plan prints, saves, compares and applies them.

    Args:
        select, classes, names, suffixes, globs, regexes, where, modules, fine_grained, raise_if_not_found: as in
            `mark_leaves`. What matches nothing is a note of the plan if it raises nothing.

    Returns:
        The outermost of the modules found, each with the reason.

    Raises:
        LeafNotFoundError, LeafTypeError, LeafValueError: see `mark_leaves`.

    >>> print(plan_leaves(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), names="1"))
    leaf  class       parameters  bytes  why
    1     Sequential           6     24  selected by name '1'
    """
    choice = choose(
        model,
        select,
        fine_grained,
        raise_if_not_found,
        {
            "classes": classes,
            "names": names,
            "suffixes": suffixes,
            "globs": globs,
            "regexes": regexes,
            "where": where,
            "modules": modules,
        },
    )
    check_containers(model, choice.modules)
    notes = [f"nothing matches {text}" for text in choice.missing]
    inside: dict[int, str] = {}  # modules of leaves, and the leaf's name
    leaves = []
    for name, module in choice.modules.items():
        if id(module) in inside:
            notes.append(f"{name!r} is in the leaf {inside[id(module)]!r}, which is gathered whole")
            continue
        leaves.append(LeafCandidate.of(name, module, choice.reasons[name]))
        for part in module.modules():
            inside.setdefault(id(part), name)
    return LeafPlan(model, leaves, notes)
