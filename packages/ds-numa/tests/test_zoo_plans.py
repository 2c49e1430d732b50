"""Plans for real machines: 1 to 16 ranks, in every mode."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from check_plan import check_plan
from ds_numa import Topology, plan_binding
from ds_numa.errors import NotEnoughCoresError

MACHINES = sorted((Path(__file__).parent / "machines").glob("*.json"))
MODES = ["auto", "node", "socket", "l3", "cores", "exclusive"]
MEMORY = ["preferred", "bind", "interleave", "none"]


def test_the_machines_are_there() -> None:
    assert len(MACHINES) >= 50


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_plan_keeps_its_promises(path: Path) -> None:
    box = Topology.from_dict(json.loads(path.read_text()))
    core_of = {cpu: core for core in box.cores for cpu in core}
    usable = len({core_of[cpu] for cpu in box.allowed})
    made = 0
    for ranks in range(1, 17):
        for number, mode in enumerate(MODES):
            smt = (ranks + number) % 3 != 0
            reserve = (0, 0, 2)[(ranks + number) % 3]
            arguments: dict[str, Any] = {
                "mode": mode,
                "smt": smt,
                "reserve": reserve,
                "memory": MEMORY[(ranks * 5 + number) % 4],
                "devices": devices(box, ranks, number),
            }
            try:
                plan = plan_binding(box, ranks, **arguments)
            except NotEnoughCoresError:
                room = len(box.allowed) if smt else usable
                width = max(map(len, box.cores)) if smt else 1
                reserved_too_much = usable - reserve < ranks <= usable
                assert mode == "exclusive" or reserved_too_much or ranks > room - reserve * width, (ranks, arguments)
                continue
            assert len(plan) == ranks
            assert plan == plan_binding(box, ranks, **arguments), "every rank makes the same plan"
            check_plan(box, plan, mode=mode, smt=smt, reserve=reserve)
            made += 1
    assert made >= 3


def devices(box: Topology, ranks: int, number: int) -> Any:
    """By turns what the job sees, none, all GPUs from the last to the first, and one for all."""
    pcis = [gpu.pci for gpu in box.gpus]
    if not pcis or (ranks + number) % 4 == 0:
        return "auto"
    if (ranks + number) % 4 == 1:
        return None
    if (ranks + number) % 4 == 2:
        return [pcis[-1 - rank % len(pcis)] for rank in range(ranks)]
    return [pcis[0]] * ranks
