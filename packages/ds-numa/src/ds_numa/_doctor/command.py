"""``ds-numa doctor``: look at the jobs that run here, judge their ranks, and measure where asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ds_numa._doctor.devices import gpus_of_ranks
from ds_numa._doctor.examine import examine
from ds_numa._doctor.jobs import Job, find_jobs
from ds_numa._doctor.measure import measure
from ds_numa._doctor.verdict import Diagnosis, judge
from ds_numa.errors import RankError
from ds_numa.plan import Mode
from ds_numa.topology import Topology


def doctor(machine: Topology, pids: Sequence[int], mode: Mode, *, measured: bool, as_json: bool) -> int:
    """Print a verdict for every rank.

    Returns:
        0 if all ranks sit well, 1 if one does not or if there is no rank and nothing was measured.
    """
    jobs = find_jobs(pids)
    if not jobs and not measured:
        raise RankError("no rank of any launcher runs here that this user may look at: name a process with --pid")
    diagnoses = [_diagnose(machine, job, mode) for job in jobs]
    figures = measure(machine) if measured else None
    if as_json:
        data: dict[str, Any] = {"jobs": [diagnosis.to_dict() for diagnosis in diagnoses]}
        if figures is not None:
            data["measured"] = asdict(figures)
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        parts = [*map(str, diagnoses), *([str(figures)] if figures is not None else [])]
        sys.stdout.write("\n\n".join(parts) + "\n")
    return int(not all(diagnosis.ok for diagnosis in diagnoses))


def _diagnose(machine: Topology, job: Job, mode: Mode) -> Diagnosis:
    placements = [examine(rank.pid, job.launcher_pid) for rank in job.ranks]
    gpus, notes = gpus_of_ranks(machine, job.ranks)
    diagnosis = judge(machine, job, placements, gpus, mode=mode)
    return Diagnosis(diagnosis.launcher, diagnosis.launcher_pid, diagnosis.verdicts, (*notes, *diagnosis.notes))
