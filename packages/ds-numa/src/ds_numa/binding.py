"""Bind this process to its share of the machine, and say what came of it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_numa._affinity import read_mask, set_mask
from ds_numa._gpus import visible_gpus
from ds_numa._launcher import find_rank
from ds_numa._mempolicy import set_memory_policy
from ds_numa._nvml import nvml_mig_parent
from ds_numa._ranges import format_ranges
from ds_numa.errors import GpuLookupError, NotEnoughCoresError
from ds_numa.plan import Binding, MemoryMode, Plan, check_rank, plan_binding
from ds_numa.topology import Topology

logger = logging.getLogger("ds.numa")

MARK = "DS_NUMA_BOUND"  # "<local rank>/<ranks>:<CPUs>", so that binding twice does not cut the share into shares
_PINNING = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY")


@dataclass(frozen=True)
class BindReport:
    """What binding did. ``str(report)`` says it in words.

    Attributes:
        local_rank: the rank.
        cpus: the CPUs that the process may run on now.
        cpus_bound: whether its CPU mask was narrowed.
        memory_bound: whether a memory policy was set.
        refused: what the system refused, each with its reason; the rest is in force.
        notes: what else a reader should know.
        binding: what was asked for; None when no plan was possible.
    """

    local_rank: int
    cpus: tuple[int, ...]
    cpus_bound: bool = False
    memory_bound: bool = False
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    binding: Binding | None = None

    @property
    def complete(self) -> bool:
        """Nothing was refused."""
        return not self.refused

    def __str__(self) -> str:
        done = [f"bound to CPUs {format_ranges(self.cpus)}"] if self.cpus_bound else []
        if self.memory_bound and self.binding:
            done.append(f"memory: {self.binding.memory} node {format_ranges(self.binding.memory_nodes)}")
        if not done:
            state = "not bound" if self.refused else "nothing to bind"
            done = [f"{state}, running on CPUs {format_ranges(self.cpus)}"]
        parts = ["; ".join(done)]
        parts += [f"refused: {refusal}" for refusal in self.refused]
        parts += [f"note: {note}" for note in self.notes]
        return f"local rank {self.local_rank}: " + "; ".join(parts)


def apply(target: Plan | Binding, local_rank: int | None = None, *, set_omp: bool = False) -> BindReport:
    """Bind this process: all its threads to the CPUs, this thread and those it starts from now on to the memory.

    What the system refuses (containers often refuse memory policy) is left out and reported; the rest holds. Call it
    early: OpenMP counts the CPUs when torch or numpy is imported, and memory in use does not move.

    Args:
        target: a binding, or a plan of which this process takes its rank's.
        local_rank: which binding of a plan; the launcher's variable (``LOCAL_RANK``) when left out.
        set_omp: also set ``OMP_NUM_THREADS`` to the advised number, over whatever it is.

    Returns:
        What was done. Every rank calls it for itself; ranks do not wait for each other.

    Raises:
        RankError: the plan has no such rank, or no launcher says which it is.
    """
    if isinstance(target, Plan):
        rank, _ = find_rank(os.environ, local_rank, len(target))
        binding = target[rank]
    else:
        binding = target
    notes = [
        f"{name} is set: OpenMP pins its threads by it, maybe elsewhere" for name in _PINNING if name in os.environ
    ]
    refused = []
    cpus_bound = memory_bound = False
    before = tuple(read_mask())
    if before != binding.cpus:
        try:
            set_mask(binding.cpus)
            cpus_bound = True
        except OSError as error:
            refused.append(f"CPUs {format_ranges(binding.cpus)} ({_explain(error)})")
    if binding.memory != "none" and not refused:  # memory of a node is worth nothing without its CPUs
        try:
            set_memory_policy(binding.memory, binding.memory_nodes)
            memory_bound = True
        except OSError as error:
            what = f"memory policy {binding.memory} node {format_ranges(binding.memory_nodes)}"
            refused.append(f"{what} ({_explain(error)}), so memory comes from the node that a thread runs on")
    if set_omp:
        os.environ["OMP_NUM_THREADS"] = str(binding.omp_num_threads)
        notes.append(f"OMP_NUM_THREADS = {binding.omp_num_threads} was set")
    return BindReport(
        binding.local_rank,
        binding.cpus if cpus_bound else before,
        cpus_bound,
        memory_bound,
        tuple(refused),
        tuple(notes),
        binding,
    )


def bind(
    local_rank: int | None = None,
    num_local_procs: int | None = None,
    *,
    cores: str | Iterable[int] | None = None,
    smt: bool = True,
    gpus: Sequence[str | None] | Literal["auto"] | None = "auto",
    memory: MemoryMode = "prefer",
    set_omp: bool = False,
) -> BindReport:
    """Read the machine, make the plan, bind this process: one line at the top of a training script.

    It does not stand in the way of training: with more ranks than CPUs, or under a container that refuses, the process
    goes on unbound and the report says so. The report is logged, as a warning if something was refused. A second
    call with the same ranks finds the process bound and changes nothing.

    Every rank must start with the same CPU mask, as under torchrun. Where the launcher gives each rank a mask of its
    own (``srun --cpu-bind=cores``) the ranks are bound already: call ``bind(0, 1)``.

    Args:
        local_rank: this process's rank on the machine; from the launcher's environment when left out.
        num_local_procs: the number of ranks on the machine, likewise. Without a launcher: rank 0 of 1.
        cores: see `plan_binding`.
        smt: see `plan_binding`.
        gpus: PCI addresses by local rank, None for no GPUs, or ``"auto"``: rank i uses ``cuda:i``, where
            CUDA shows every rank the same list with one GPU for each.
        memory: see `plan_binding`.
        set_omp: see `apply`.

    Returns:
        What was done. Every rank calls it for itself; ranks do not wait for each other.

    Raises:
        NumaError: an argument or a launcher's variable is wrong.
    """
    rank, ranks = find_rank(os.environ, local_rank, num_local_procs)
    check_rank(rank, ranks)
    mask = tuple(read_mask())
    if os.environ.get(MARK) == _mark(rank, ranks, mask):
        report = BindReport(rank, mask, notes=(f"it was bound before ({MARK} says so)",))
        logger.info("%s", report)
        return report
    topology = Topology.here()
    notes: tuple[str, ...] = ()
    if gpus == "auto":
        gpus, notes = find_gpus(topology, ranks)
    try:
        plan = plan_binding(topology, ranks, cores=cores, smt=smt, gpus=gpus, memory=memory)
    except NotEnoughCoresError as error:
        report = BindReport(rank, mask, refused=(str(error),), notes=notes)
    else:
        done = apply(plan, rank, set_omp=set_omp)
        report = BindReport(**vars(done) | {"notes": plan.notes + notes + done.notes})
        if report.cpus == plan[rank].cpus:  # not if the system refused
            os.environ[MARK] = _mark(rank, ranks, report.cpus)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def find_gpus(topology: Topology, num_local_procs: int) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """The GPU of each local rank, if rank i uses ``cuda:i``; else None and a note that says why not."""
    try:
        visible = visible_gpus(topology.gpus, os.environ, mig_parent=nvml_mig_parent)
    except GpuLookupError as error:
        return None, (f"GPUs are left out: {error}",)
    if not visible:
        return None, ()
    if len(visible) < num_local_procs:
        return None, (
            f"GPUs are left out: {num_local_procs} ranks see {len(visible)}, so the others' are unknown: pass gpus=",
        )
    return [gpu.pci for gpu in visible[:num_local_procs]], ()


def _mark(rank: int, ranks: int, cpus: Sequence[int]) -> str:
    return f"{rank}/{ranks}:{format_ranges(cpus)}"


def _explain(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "?")
    hint = {errno.EPERM: ": the container lacks CAP_SYS_NICE", errno.ENOSYS: ": the system has no such call"}
    return f"{name}, {error.strerror}{hint.get(error.errno or 0, '')}"
