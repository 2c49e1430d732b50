"""``ds-numa doctor``: look at the jobs that run here, judge their ranks, and measure where asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ds_numa._doctor.devices import gpus_of_ranks
from ds_numa._doctor.examine import Placement, examine
from ds_numa._doctor.jobs import Job, RankProcess, find_jobs
from ds_numa._doctor.measure import measure
from ds_numa._doctor.verdict import Diagnosis, judge
from ds_numa._ranges import format_ranges
from ds_numa.errors import RankError
from ds_numa.plan import Mode
from ds_numa.topology import Topology


def doctor(machine: Topology, pids: Sequence[int], mode: Mode, *, measured: bool, as_json: bool) -> int:
    """Print a verdict for every rank.

    Returns:
        0 if all ranks sit well, 1 if one does not or if there is no rank and nothing was measured.
    """
    if not Path("/proc/self/status").exists():
        raise RankError("doctor reads /proc, which this system does not have: run it on Linux")
    jobs = find_jobs(pids)
    if not jobs and not measured:
        message = "no rank of any launcher runs here that this user may look at: name a process with --pid"
        if not as_json:
            raise RankError(message)
        sys.stderr.write(f"ds-numa: {message}\n")
    found = [(job, _diagnose(machine, job, mode)) for job in jobs]
    diagnoses = [_add_neighbours(i, found) for i in range(len(found))]
    figures = measure(machine) if measured else None
    if as_json:
        data: dict[str, Any] = {"jobs": [diagnosis.to_dict() for diagnosis in diagnoses]}
        if figures is not None:
            data["measured"] = asdict(figures)
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        parts = [*map(str, diagnoses), *([str(figures)] if figures is not None else [])]
        sys.stdout.write("\n\n".join(parts) + "\n")
    return int(not all(diagnosis.ok for diagnosis in diagnoses) or not (jobs or measured))


def _diagnose(machine: Topology, job: Job, mode: Mode) -> Diagnosis:
    alive: list[RankProcess] = []
    placements: list[Placement] = []
    for rank in job.ranks:
        try:
            placements.append(examine(rank.pid, job.launcher_pid))
        except RankError:
            continue  # it ended since it was found, so it is one of those that are missing
        alive.append(rank)
    size = max([job.size or 0, *(rank.local_rank + 1 for rank in job.ranks)])
    job = replace(job, ranks=tuple(alive), size=size)
    gpus, notes = gpus_of_ranks(machine, job.ranks)
    diagnosis = judge(machine, job, placements, gpus, mode=mode)
    return replace(diagnosis, notes=(*notes, *diagnosis.notes))


def _add_neighbours(index: int, found: Sequence[tuple[Job, Diagnosis]]) -> Diagnosis:
    """The diagnosis with a note on other jobs whose ranks may run on the same CPUs."""
    diagnosis = found[index][1]
    mine = {cpu for verdict in diagnosis.verdicts for cpu in verdict.cpus}
    shared: set[int] = set()
    others = []
    for i, (job, other) in enumerate(found):
        both = mine.intersection(cpu for verdict in other.verdicts for cpu in verdict.cpus)
        if i != index and both:
            shared |= both
            others.append(job.launcher_pid or job.ranks[0].pid)
    if not others:
        return diagnosis
    who = f"{len(others)} other job{'s' if len(others) > 1 else ''} (process {', '.join(map(str, others))})"
    note = f"{who} may use CPUs {format_ranges(shared)} as well: give each job its own --cores"
    return replace(diagnosis, notes=(*diagnosis.notes, note))
