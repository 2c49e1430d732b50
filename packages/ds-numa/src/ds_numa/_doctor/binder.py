"""Who bound a running rank, as far as that can be told from outside."""

from __future__ import annotations

from pathlib import Path

from ds_numa._doctor.examine import Placement
from ds_numa._doctor.jobs import Job, RankProcess
from ds_numa._given_mask import find_given_mask
from ds_numa.binding import MARK
from ds_numa.topology import Topology

_RUN = "DS_NUMA_RUN"
_NO_PROC = Path("/nonexistent")  # /proc/self is the doctor's, and says nothing of the rank


def bound_by(machine: Topology, job: Job, rank: RankProcess, here: Placement) -> str:
    """Who bound a rank; empty where nobody did, so that it has the CPUs of its launcher.

    Args:
        machine: the machine, whose `allowed` are the CPUs of the job.
        job: the job of the rank.
        rank: the rank, with the environment that it was started with.
        here: where it sits.
    """
    before = here.parent_cpus or machine.allowed
    if set(here.cpus) >= set(before):
        return ""
    if MARK in rank.environ or _RUN in rank.environ:
        return "bound by ds-numa run"
    size = job.size or len(job.ranks)
    given = find_given_mask(rank.environ, machine, here.cpus, rank.local_rank, size, root=_NO_PROC)
    if given is not None:
        return f"bound by {given.launcher}, or later by itself"
    return "bound by a program around it, or by itself"
