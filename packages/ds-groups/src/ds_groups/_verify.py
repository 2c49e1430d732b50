"""Do all ranks hold the same plan? Asked through the store, so that a difference is an error and not a hang."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from ._meeting import NotMetError, Verdict, spell
from .errors import PlanMismatchError, PlanTimeoutError, StoreError

if TYPE_CHECKING:
    from ._registry import Registry

Plan = Mapping[str, object]


def agree(registry: Registry, topic: str, plan: Plan, timeout: timedelta) -> None:
    """Return when every rank of the world has called with the same plan. Every rank must call.

    Args:
        registry: of the world. Where its default group is PyTorch's fake one there are no other ranks to ask.
        topic: what the plan is about; separates calls for different purposes.
        plan: field -> value, JSON-serialisable.
        timeout: how long to wait for the others.

    Raises:
        PlanMismatchError: on every rank, naming the fields and the ranks.
        PlanTimeoutError: some ranks did not call in time; names them. They can all call again.
        DeadlockError: ranks that did not call wait for this one elsewhere.
        StoreError: there is no store to compare plans in, or it cannot be used.
    """
    if registry.is_alone:
        return
    if not registry.meets:
        raise StoreError("the backend of the default process group has no store to compare plans in")
    seconds = timeout.total_seconds()
    text = json.dumps(plan, sort_keys=True)
    try:
        registry.meet(f"plan/{topic}", range(registry.world_size), "the comparison of plans", text, seconds)
    except NotMetError as error:
        raise PlanTimeoutError(
            f"no plan from {error.spelled} within {seconds:g} s; "
            f"every rank must call, and a rank that failed earlier cannot\n{error.picture}",
            error.missing,
        ) from None


def mismatch(verdict: Verdict, ranks: Sequence[int]) -> PlanMismatchError:
    """The error for members of a round who hold different texts.

    Args:
        verdict: ``differences`` is text -> runs of places, ``others`` the text at all other places.
        ranks: the members in their places.
    """
    text_at = dict.fromkeys(range(len(ranks)), verdict["others"])
    for text, runs in verdict["differences"].items():
        for first, last in runs:
            text_at.update(dict.fromkeys(range(first, last + 1), text))
    plans = {text: json.loads(text) if text else None for text in {*text_at.values()}}
    fields = sorted({field for plan in plans.values() if plan is not None for field in plan})
    held: dict[str, dict[str, list[int]]] = {field: defaultdict(list) for field in fields}
    for place, text in text_at.items():
        plan = plans[text]
        for field in fields:
            held[field]["others" if plan is None else json.dumps(plan.get(field))].append(ranks[place])
    differences = {field: values for field, values in held.items() if len(values) > 1}
    lines = []
    for field, values in differences.items():
        by_ranks = sorted(values.items(), key=lambda item: (-len(item[1]), item[1]))
        lines.append(f"{field}: " + "; ".join(f"{value} on {spell(sorted(found))}" for value, found in by_ranks))
    return PlanMismatchError(
        "ranks hold different plans; give every rank the same sizes\n" + "\n".join(lines),
        {field: {value: tuple(found) for value, found in values.items()} for field, values in differences.items()},
    )
