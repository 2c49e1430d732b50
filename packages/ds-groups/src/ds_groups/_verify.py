"""Do all ranks hold the same plan? Asked through the store, so that a difference is an error and not a hang.

[Note: agreement] Every rank writes its plan and counts itself in, once for its plan and once for the world. The
one that completes the world gives the verdict: if its plan was counted as often as there are ranks, all is well;
otherwise it reads all plans. A handful of store operations a rank, whatever the size of the world.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from .errors import PlanMismatchError, PlanTimeoutError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Plan = Mapping[str, object]
_Differences = dict[str, dict[str, list[int]]]


def agree(store: Store, rank: int, world_size: int, topic: str, plan: Plan, timeout: timedelta) -> None:
    """Return when every rank has called with the same plan. Every rank must call.

    Args:
        store: shared by all ranks.
        rank: of this process.
        world_size: how many ranks call.
        topic: what the plan is about; separates calls for different purposes.
        plan: field -> value, JSON-serialisable.
        timeout: how long to wait for the others.

    Raises:
        PlanMismatchError: on every rank, naming the fields and the ranks.
        PlanTimeoutError: some ranks did not call in time; names them.
    """
    turn = store.add(f"ds-groups/plan/{topic}/calls/{rank}", 1)
    base = f"ds-groups/plan/{topic}/{turn}"
    text = json.dumps(plan, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    store.set(f"{base}/{rank}", text)
    same = f"{base}/same/{digest}"
    store.add(same, 1)
    verdict = f"{base}/verdict"
    if store.add(f"{base}/ranks", 1) == world_size and not store.check([verdict]):
        agreed = store.add(same, 0) == world_size  # asked again: others may have counted since
        store.set(verdict, json.dumps({} if agreed else _judge(store, base, world_size)))
    try:
        store.wait([verdict], timeout)
    except RuntimeError:
        missing = [other for other in range(world_size) if not store.check([f"{base}/{other}"])]
        if missing and not store.check([verdict]):
            store.set(verdict, json.dumps({"missing": missing}))
        store.wait([verdict], timeout)
    found = json.loads(store.get(verdict))
    if "missing" in found:
        raise PlanTimeoutError(
            f"no plan from {_ranks(found['missing'])} within {timeout.total_seconds():g} s; "
            "every rank must call, and a rank that failed earlier cannot",
            tuple(found["missing"]),
        )
    if found:
        raise _mismatch(found["differences"])


def _judge(store: Store, base: str, world_size: int) -> dict[str, _Differences]:
    held: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    plans = [json.loads(store.get(f"{base}/{rank}")) for rank in range(world_size)]
    fields = sorted({field for plan in plans for field in plan})
    for rank, plan in enumerate(plans):
        for field in fields:
            held[field][json.dumps(plan.get(field))].append(rank)
    return {"differences": {field: dict(values) for field, values in held.items() if len(values) > 1}}


def _mismatch(differences: _Differences) -> PlanMismatchError:
    lines = []
    for field, values in differences.items():
        by_ranks = sorted(values.items(), key=lambda item: (-len(item[1]), item[1]))
        lines.append(f"{field}: " + "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_ranks))
    return PlanMismatchError(
        "ranks hold different plans; give every rank the same sizes\n" + "\n".join(lines),
        {field: {value: tuple(ranks) for value, ranks in values.items()} for field, values in differences.items()},
    )


def _ranks(ranks: list[int]) -> str:
    """Spell ranks, runs as intervals: ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    spelled = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {spelled}" if len(ranks) == 1 else f"ranks {spelled}"
