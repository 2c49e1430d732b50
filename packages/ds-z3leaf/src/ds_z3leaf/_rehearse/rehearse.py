"""`rehearse` chooses leaves from what ranks really call; `check` says whether given leaves are enough."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ds_z3leaf._candidates import find_mixtures
from ds_z3leaf._flags import outermost_leaves
from ds_z3leaf._plan import LeafCandidate, LeafPlan
from ds_z3leaf._rehearse.calls import outermost
from ds_z3leaf._rehearse.checks import Options
from ds_z3leaf._rehearse.passes import Forward
from ds_z3leaf._rehearse.stage import Stage
from ds_z3leaf._select import select_modules
from ds_z3leaf.errors import LeafOrderError, LeafTypeError


def rehearse(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int = 8,
    backward: bool = True,
    repeats: int | None = None,
    across_batches: bool = True,
    group: Any = None,
    device: str | None = None,
) -> LeafPlan:
    """Run a few batches, compare which modules are called in which order, and choose the smallest leaves that hide it.

    Call it on every rank, with batches that the rank would train on, before an engine has the model. In one process
    alone it compares the batches with each other. Afterwards the model, its gradients, its modes and the random streams
    are as before; only what a module changes inside objects of its own, other than tensors, lists, sets and
    dictionaries, stays changed.

    A leaf is the innermost module, called by all, during which forwards go on with different modules: a block that
    calls the experts it routes to, a model that calls its vision tower only for images, a stack that skips layers. A
    mixture that reads values of tensors before it calls its experts one by one becomes a leaf also where these batches
    called the same experts. Backward passes are compared, too: how often the gradient reaches each module.

    Args:
        model: the model as an engine will get it; or on meta; or partitioned by ``deepspeed.zero.Init``, which runs on
            meta.
        batches: as the model takes them: a mapping is passed as keywords, a tuple or list as arguments, anything else
            as one argument. Every rank has batches of its own, and may have another number of them.
        forward: called as ``forward(model, batch)`` instead.
        max_batches: how many batches to take at most.
        backward: go back from the loss in the output (``output.loss`` or ``output["loss"]``), or from the sum of the
            tensors in it.
        repeats: how often to run each batch; unless given, 4 times where the forward draws random numbers on the host,
            as layer drop does, else once.
        across_batches: also take what differs between batches of one rank for what may differ between ranks. Turn it
            off where all ranks see the same kind of batch at the same step.
        group: the ranks that train together; the default process group if there is one.
        device: "meta" to run on meta only; "model" to run where the model is. Unless given, the model runs on meta if
            it can on every rank, which is if no forward reads values of tensors; else where it is.

    Returns:
        The plan, the same on all ranks. Its `rehearsal` says what was tried, its notes what was not seen.

    Raises:
        LeafTypeError, LeafValueError: an argument cannot be used, or `batches` is empty on every rank.
        LeafRehearsalError: the forward fails on a rank, another rank has a wrong argument, ranks have different models
            or devices, or an engine has the model already. If one rank raises, all do.
        LeafOrderError: no leaf can help, for example because ranks call the model itself differently often.

    >>> import torch
    >>> class Choose(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.one(x) if x.sum() > 0 else self.other(x)
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), Choose())
    >>> print(rehearse(model, [torch.ones(1, 2), -torch.ones(1, 2)]).leaves[0].name)  # they go different ways in there
    1
    """
    options = Options(forward, max_batches, backward, repeats, across_batches, group, device)
    stage = Stage(model, batches, options)
    leaves = _hide_partings(stage, {})
    for number in _undecided(stage, leaves):
        leaves[number] = (
            "it reads values of tensors before it calls its experts, so ranks may call different ones; these batches "
            "called the same"
        )
    return _plan(stage, _hide_partings(stage, leaves))


def check(
    model: nn.Module,
    leaves: LeafPlan | nn.Module | str | Iterable[nn.Module | str] | None,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int = 8,
    backward: bool = True,
    repeats: int | None = None,
    across_batches: bool = True,
    group: Any = None,
    device: str | None = None,
) -> LeafPlan:
    """Rehearse a choice of leaves, and raise unless every rank calls the same modules in the same order under it.

    All ranks must call it, with the same leaves.

    Args:
        leaves: a plan, modules of the model, or their names; None stands for those that are flagged.
        model, batches, forward, max_batches, backward, repeats, across_batches, group, device: see `rehearse`.

    Returns:
        The choice as a plan, with what was tried and what was not seen.

    Raises:
        LeafOrderError: ranks part. The message names the first module at which they do, the ranks, and the leaf that
            would help.
        LeafNotFoundError: a leaf is no module of the model.
        LeafTypeError, LeafValueError, LeafRehearsalError: see `rehearse`.
    """
    options = Options(forward, max_batches, backward, repeats, across_batches, group, device)
    stage = Stage(model, batches, options, lambda: _modules(model, leaves))
    given = outermost(dict.fromkeys(stage.given, "given"), stage.index)
    problems = stage.find_problems(given)
    if problems:
        first = problems[0]
        if first.leaf is None:
            raise LeafOrderError(f"{first.text}; no leaf can help")
        count = "no leaves are" if not given else "1 leaf is" if len(given) == 1 else f"{len(given)} leaves are"
        raise LeafOrderError(f"{first.text}; {count} given: add {stage.index.describe(first.leaf)}")
    return _plan(stage, given)


def _hide_partings(stage: Stage, leaves: dict[int, str]) -> dict[int, str]:
    """Add leaves until nothing parts. Each round adds at least one, so it ends."""
    while problems := stage.find_problems(leaves):
        for problem in problems:
            if problem.leaf is None:
                raise LeafOrderError(f"{problem.text}; no leaf can help")
            leaves = {problem.leaf: problem.text, **leaves}
        leaves = outermost(leaves, stage.index)
    return leaves


def _undecided(stage: Stage, leaves: dict[int, str]) -> list[int]:
    """Mixtures outside the leaves that decide by values which experts to call, though these batches called the same."""
    hidden = {inner for leaf in leaves for inner in stage.index.inside(leaf)}
    found = []
    for candidate, experts in find_mixtures(stage.index.modules[0]):
        number = stage.index.number[id(candidate.module)]
        if number in hidden or number not in stage.deciders:
            continue
        parts = {stage.index.number[id(part)] for expert in experts for part in expert.modules()}
        if parts & stage.called:
            found.append(number)
    return found


def _plan(stage: Stage, leaves: dict[int, str]) -> LeafPlan:
    index, rehearsal = stage.index, stage.describe(leaves)
    chosen = [LeafCandidate.of(index.names[number], index.modules[number], why) for number, why in leaves.items()]
    return LeafPlan(index.modules[0], chosen, stage.notes(leaves, rehearsal), rehearsal=rehearsal)


def _modules(model: nn.Module, leaves: object) -> list[nn.Module]:
    if leaves is None:
        return outermost_leaves(model)
    if isinstance(leaves, LeafPlan):
        leaves = leaves.modules
    listed = [leaves] if isinstance(leaves, (str, nn.Module)) else leaves
    if not isinstance(listed, Iterable):
        raise LeafTypeError(f"leaves is a {type(leaves).__name__}: pass a plan, modules or names")
    entries = list(listed)
    for entry in entries:
        if not isinstance(entry, (str, nn.Module)):
            raise LeafTypeError(f"leaves holds a {type(entry).__name__}: pass a plan, modules or names")
    if not entries:
        return []
    names = [entry for entry in entries if isinstance(entry, str)]
    modules = [entry for entry in entries if isinstance(entry, nn.Module)]
    return list(select_modules(model, names=names, modules=modules).modules.values())
