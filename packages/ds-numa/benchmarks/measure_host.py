"""This machine as found, a plan for it, the plan applied and read back, and what its memory and GPUs really do.

    python packages/ds-numa/benchmarks/measure_host.py [--ranks N] [--json PATH]

It binds itself as each rank in turn, in a process of its own, and says what the kernel made of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_numa import Topology, apply, plan_binding
from ds_numa._doctor.measure import measure
from ds_numa._mempolicy import memory_policy_refusal


def apply_one(rank: int, ranks: int) -> dict[str, Any]:
    """Bind this process as one rank; its report."""
    report = apply(plan_binding(Topology.here(), ranks), rank)
    print(report, file=sys.stderr)
    return report.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="ranks to plan for; the number of GPUs, or one, when left out")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything here")
    arguments = parser.parse_args()
    machine = Topology.here()
    ranks = arguments.ranks or max(1, sum(gpu.usable for gpu in machine.gpus))
    if arguments.rank is not None:
        print(json.dumps(apply_one(arguments.rank, ranks)))
        return
    plan = plan_binding(machine, ranks)
    machine.show(plan)
    refusal = memory_policy_refusal()
    reports = []
    for rank in range(ranks):
        again = [sys.executable, __file__, "--ranks", str(ranks), "--rank", str(rank)]
        reports.append(json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout))
    figures = measure(machine, seconds=4.0)
    print(figures)
    found = {
        "command": "python packages/ds-numa/benchmarks/measure_host.py --json PATH",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "memory_policy": "may be set" if refusal is None else str(refusal),
        "machine": machine.to_dict(),
        "plan": plan.to_dict(),
        "reports": reports,
        "measured": asdict(figures),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
