"""Bind this process to its share of the machine, and say what came of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from ds_numa._affinity import read_mask, read_masks, restore_masks, set_mask
from ds_numa._given_mask import find_given_mask
from ds_numa._launcher import find_rank
from ds_numa._mempolicy import read_memory_policy, set_memory_policy
from ds_numa._notes import core_notes, environment_notes, library_notes
from ds_numa._own_share import Options, find_gpus, plan_share
from ds_numa._planning.assign import Mode
from ds_numa._planning.devices import UNSET, Devices
from ds_numa._ranges import format_ranges
from ds_numa._report import BindReport, describe_memory
from ds_numa.errors import BindingError, NotEnoughCoresError, PlanError, RankError, TopologyError
from ds_numa.plan import Binding, MemoryMode, Plan, check_rank
from ds_numa.topology import Topology

__all__ = ["MARK", "BindReport", "apply", "bind", "find_gpus"]

logger = logging.getLogger("ds.numa")

MARK = "DS_NUMA_BOUND"  # "<local rank>/<ranks>:<CPUs>", so that binding twice does not cut the share into shares


def apply(
    target: Plan | Binding, local_rank: int | None = None, *, set_omp: bool = False, strict: bool = False
) -> BindReport:
    """Bind this process: all its threads to the CPUs, this thread and those it starts from now on to the memory.

    What the system refuses (containers often refuse memory policy) is softened or left out and reported; the rest
    holds: ``bind`` becomes ``preferred``, that becomes no policy. The report is read back from the kernel, which
    drops CPUs and nodes that are not there without an error. Call it early: OpenMP counts the CPUs when torch or numpy
    is imported, and memory in use does not move.

    Args:
        target: a binding, or a plan of which this process takes its rank's.
        local_rank: which binding of a plan; the launcher's variable (``LOCAL_RANK``) when left out.
        set_omp: also set ``OMP_NUM_THREADS`` to the advised number, over whatever it is, and torch's number of threads
            if torch was imported before.
        strict: raise if anything is refused, after giving the process back what it had.

    Returns:
        What was done. Every rank calls it for itself; ranks do not wait for each other.

    Raises:
        RankError: the plan has no such rank, or no launcher says which it is.
        BindingError: something was refused under `strict`.
    """
    binding = _choose(target, local_rank) if isinstance(target, Plan) else target
    mask_before = tuple(read_mask())
    masks_before = _read_threads(mask_before)
    policy_before = _read_policy()
    refused: list[str] = []
    notes = environment_notes(os.environ)

    cpus_bound = _set_cpus(binding.cpus, mask_before, masks_before, refused)
    wanted = None
    if binding.memory != "none" and (cpus_bound or not refused):  # a node's memory is worth little without its CPUs
        wanted = _set_memory(binding.memory, binding.memory_nodes, refused)
    cpus = tuple(read_mask())
    threads = _read_threads(cpus)
    refused += _not_granted(binding.cpus, cpus, threads) if cpus_bound else []
    policy = _read_policy()
    if wanted is not None and policy is None:
        notes.append("the memory policy was set, but the system refuses to read it back")
        policy = wanted
    elif policy is not None and wanted is not None and policy != (wanted[0], tuple(sorted(wanted[1]))):
        refused.append(f"memory policy {describe_memory(*wanted)} (the kernel has {describe_memory(*policy)} in force)")
    if wanted is not None and len(threads) > 1:
        notes.append(f"{len(threads) - 1} threads that run already keep the memory policy that they had")

    mode, nodes = policy or ("none", ())
    report = BindReport(
        binding.local_rank,
        cpus,
        cpus_bound,
        wanted is not None,
        tuple(refused),
        tuple(notes),
        binding,
        None if mode == "none" else mode,
        nodes,
    )
    if strict and refused:
        with contextlib.suppress(OSError):
            if cpus_bound and masks_before:
                restore_masks(masks_before)
            elif cpus_bound:
                set_mask(mask_before)
        with contextlib.suppress(OSError, KeyError):  # KeyError: a mode of a newer kernel, that is not known here
            if wanted is not None:
                set_memory_policy(*policy_before or ("none", ()))
        restored = tuple(read_mask()) == mask_before and (wanted is None or _read_policy() == policy_before)
        state = "nothing is bound" if restored else "what was bound could not be taken back"
        raise BindingError(f"strict = True, and not everything was granted, so {state}: {report}", report)
    if set_omp:
        os.environ["OMP_NUM_THREADS"] = str(binding.omp_num_threads)
        notes.append(f"OMP_NUM_THREADS = {binding.omp_num_threads} was set")
    if cpus_bound or set_omp or binding.thread_limit is not None:
        notes += library_notes(binding, os.environ, set_threads=set_omp)
    return replace(report, notes=tuple(notes))


def bind(
    local_rank: int | None = None,
    num_local_procs: int | None = None,
    *,
    mode: Mode = "auto",
    devices: Devices = "auto",
    gpus: Devices | Literal["unset"] = UNSET,
    cores: str | Iterable[int] | None = None,
    smt: bool = True,
    memory: MemoryMode | Literal["prefer"] = "preferred",
    reserve: int = 0,
    set_omp: bool = False,
    strict: bool = False,
    topology: Topology | None = None,
) -> BindReport:
    """Read the machine, make the plan, bind this process: one line at the top of a training script.

    It does not stand in the way of training: with more ranks than CPUs, under a container that refuses, or under a
    launcher that does not say how many ranks there are, the process goes on unbound and the report says so. The report
    is logged, as a warning if something was refused. A second call with the same ranks finds the process bound and
    changes nothing. A CPU mask that the launcher cut for this rank (``srun``, ``mpirun``) is kept.

    Args:
        local_rank: this process's rank on the machine; from the launcher's environment when left out.
        num_local_procs: the number of ranks on the machine, likewise. Without a launcher: rank 0 of 1.
        mode: see `plan_binding`.
        devices: PCI addresses by local rank, None for no devices, or ``"auto"``, the default: rank i uses ``cuda:i``
            where every rank sees the same list with one GPU for each, or the one GPU that it sees.
        gpus: the older name of `devices`.
        cores: see `plan_binding`.
        smt: see `plan_binding`.
        memory: see `plan_binding`.
        reserve: see `plan_binding`.
        set_omp: see `apply`.
        strict: raise if the process cannot be bound as asked, see `apply`.
        topology: this machine where its own description is wrong (corrected output of ``ds-numa show --json``); read
            when left out. CPUs outside this process's mask are not used.

    Returns:
        What was done. Every rank calls it for itself; ranks do not wait for each other.

    Raises:
        NumaError: an argument is wrong.
        BindingError: something was refused under `strict`.
    """
    _check_given(local_rank, num_local_procs)
    if gpus != UNSET:
        if devices != "auto":
            raise PlanError(f"devices = {devices!r} and gpus = {gpus!r} mean the same: give devices= alone")
        devices = gpus
    options = Options(mode, smt, memory, reserve, cores if cores is None or isinstance(cores, str) else list(cores))
    found = find_rank(os.environ, local_rank, num_local_procs)
    rank, ranks = found.local_rank, found.num_local_procs
    mask = tuple(read_mask())
    if found.problem is not None or rank is None or ranks is None:
        return _finish(BindReport(rank, mask, refused=(f"binding: {found.problem}",)), strict)
    check_rank(rank, ranks)
    if os.environ.get(MARK) == _mark(rank, ranks, mask):
        return _finish(BindReport(rank, mask, notes=(f"it was bound before ({MARK} says so)",)), strict)
    try:
        topology = Topology.here() if topology is None else _limit(topology, mask)
        given = find_given_mask(os.environ, topology, mask, rank, ranks)
        binding, notes = plan_share(topology, rank, ranks, devices, options, given)
    except (NotEnoughCoresError, TopologyError) as error:
        return _finish(BindReport(rank, mask, refused=(str(error),)), strict)
    report = apply(binding, set_omp=set_omp, strict=strict)
    notes = (*notes, *topology.notes, *core_notes(topology, binding), *report.notes)
    report = replace(report, notes=tuple(dict.fromkeys(notes)))  # plan and machine may say the same of the GPUs
    if report.cpus == binding.cpus:  # not if the system refused
        os.environ[MARK] = _mark(rank, ranks, report.cpus)
    return _finish(report, strict)


def _limit(topology: Topology, mask: tuple[int, ...]) -> Topology:
    """A machine that the caller described, limited to this process's mask."""
    allowed = tuple(sorted(set(topology.allowed).intersection(mask)))
    if not allowed:
        raise TopologyError(
            f"topology allows CPUs {format_ranges(topology.allowed)}, but this process may use {format_ranges(mask)}: "
            "describe this machine"
        )
    return replace(topology, allowed=allowed)


def _choose(plan: Plan, local_rank: int | None) -> Binding:
    found = find_rank(os.environ, local_rank, len(plan))
    if found.local_rank is None:
        raise RankError(f"local_rank is not given, and no launcher says it ({found.problem}): pass local_rank")
    return plan[found.local_rank]


def _check_given(local_rank: int | None, num_local_procs: int | None) -> None:
    """Raise `RankError` for what the caller gave; what the environment says is never an error."""
    if num_local_procs is not None:
        check_rank(0, num_local_procs)
    if local_rank is not None:
        alone = local_rank + 1 if isinstance(local_rank, int) and local_rank >= 0 else 1
        check_rank(local_rank, alone if num_local_procs is None else num_local_procs)


def _set_cpus(
    wanted: tuple[int, ...], mask: tuple[int, ...], masks: dict[int, tuple[int, ...]], refused: list[str]
) -> bool:
    """Set every thread's mask; False where that was not necessary, or refused."""
    if mask == wanted and all(other == wanted for other in masks.values()):
        return False
    try:
        set_mask(wanted)
    except OSError as error:
        refused.append(f"CPUs {format_ranges(wanted)} ({_explain(error)})")
        return False
    return True


def _set_memory(mode: str, nodes: tuple[int, ...], refused: list[str]) -> tuple[str, tuple[int, ...]] | None:
    """Set the policy, or the strictest softer one that is granted; None where none is."""
    mode = "preferred" if mode == "prefer" else mode
    steps = [(mode, nodes)] + ([("preferred", nodes)] if mode == "bind" else [])
    if len(nodes) > 1 and mode in ("bind", "preferred"):
        steps.append(("preferred", nodes[:1]))  # before Linux 5.15 only one node can be preferred
    failures: list[str] = []
    for step in steps:
        try:
            set_memory_policy(*step)
        except OSError as error:
            failures.append(f"memory policy {describe_memory(*step)} ({_explain(error)})")
            continue
        refused += [f"{failure}, so it is {describe_memory(*step)}" for failure in failures]
        return step
    refused += failures[:-1]
    refused.append(f"{failures[-1]}, so memory comes from where it came from before: by default the thread's own node")
    return None


def _not_granted(wanted: tuple[int, ...], cpus: tuple[int, ...], threads: dict[int, tuple[int, ...]]) -> list[str]:
    """How what the kernel has differs from what was set."""
    found = []
    if missing := set(wanted).difference(cpus):
        found.append(f"CPUs {format_ranges(missing)} (they are not online, or outside this process's cpuset)")
    if extra := set(cpus).difference(wanted):
        found.append(f"leaving CPUs {format_ranges(extra)} (they are still in the mask)")
    strays = {thread: mask for thread, mask in threads.items() if mask != cpus}
    found += [
        f"CPUs of thread {thread} (it runs on {format_ranges(mask)})" for thread, mask in list(strays.items())[:3]
    ]
    if len(strays) > 3:
        found.append(f"CPUs of {len(strays) - 3} more threads")
    return found


def _read_threads(mask: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Every thread's mask; empty where the system does not tell, or tells another mask of this thread than `mask`."""
    masks = read_masks()
    return masks if masks.get(threading.get_native_id()) == mask else {}


def _read_policy() -> tuple[str, tuple[int, ...]] | None:
    try:
        return read_memory_policy()
    except OSError:
        return None


def _finish(report: BindReport, strict: bool) -> BindReport:
    """Log the report of `bind`."""
    if strict and not report.complete:
        raise BindingError(f"strict = True, and this process is not bound as asked: {report}", report)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def _mark(rank: int, ranks: int, cpus: Sequence[int]) -> str:
    return f"{rank}/{ranks}:{format_ranges(cpus)}"


def _explain(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "?")
    hint = {errno.EPERM: ": the container lacks CAP_SYS_NICE", errno.ENOSYS: ": the system has no such call"}
    return f"{name}, {error.strerror}{hint.get(error.errno or 0, '')}"
