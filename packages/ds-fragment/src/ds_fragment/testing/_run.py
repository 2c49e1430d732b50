"""The suite inside a job that runs already: every rank calls it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch.distributed as dist

from ds_fragment.testing._cells import CELLS, Cell
from ds_fragment.testing._engine import Engine
from ds_fragment.testing._judge import Verdict, judge, together
from ds_fragment.testing._table import Record, Table


def run_conformance(engine: Engine, cells: Iterable[Cell] = CELLS) -> Table:
    """Try every cell of an engine. All ranks of the default group must call it.

    Nothing here ends a cell that hangs but the time-outs of the process groups; `conduct` does, in processes of its
    own, and goes on behind it.

    Args:
        engine: what to try; its ``world_size`` must be that of the default group.
        cells: which cells, in which order.

    Returns:
        A record for each cell, the same on every rank.

    Raises:
        ValueError: there is another number of ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != engine.world_size:
        raise ValueError(f"engine {engine.name} takes {engine.world_size} ranks, and there are {ranks}")
    if engine.prepare is not None:
        engine.prepare()
    group = dist.new_group(backend="gloo") if ranks > 1 else None
    table = Table()
    for cell in cells:
        begin = time.monotonic()
        mine = judge(engine, cell)
        found: list[Verdict | None] = [mine] * ranks
        if group is not None:
            dist.all_gather_object(found, mine, group=group)
        verdict = together([one for one in found if one is not None])
        seconds = round(time.monotonic() - begin, 3)
        table.records.append(
            Record(engine.name, engine.layout, cell, verdict.result, verdict.detail, verdict.text, seconds)
        )
    return table
