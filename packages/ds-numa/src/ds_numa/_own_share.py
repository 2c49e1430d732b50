"""The share of this process: the plan that its rank can make, from what it sees of the job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ds_numa._given_mask import GivenMask
from ds_numa._gpus import hidden_notes, visible_gpus
from ds_numa._notes import gpu_notes
from ds_numa._nvml import nvml_mig_parent
from ds_numa._one_gpu import gpu_is_shared
from ds_numa._planning.assign import Mode
from ds_numa._planning.devices import Devices
from ds_numa._planning.memory import read_memory_mode
from ds_numa._ranges import read_core_list
from ds_numa._words import count
from ds_numa.errors import GpuLookupError, NotEnoughCoresError, PlanError
from ds_numa.plan import Binding, MemoryMode, Plan, plan_binding
from ds_numa.topology import Gpu, Topology


@dataclass(frozen=True)
class Options:
    """What the caller of `ds_numa.bind` chose, see `plan_binding`."""

    mode: Mode
    smt: bool
    memory: MemoryMode | Literal["prefer"]
    reserve: int
    cores: str | Iterable[int] | None

    def __post_init__(self) -> None:
        read_memory_mode(self.memory)
        if self.mode not in get_args(Mode):
            raise PlanError(f"mode = {self.mode!r} must be one of {get_args(Mode)}")

    def plan(self, topology: Topology, ranks: int, devices: Devices) -> Plan:
        """Make the plan."""
        return plan_binding(topology, ranks, devices=devices, **vars(self))


def plan_share(
    topology: Topology, rank: int, ranks: int, devices: Devices, options: Options, given: GivenMask | None
) -> tuple[Binding, tuple[str, ...]]:
    """This rank's binding, and what to note about it.

    Raises:
        NumaError: as `plan_binding` does.
    """
    notes: tuple[str, ...] = ()
    visible: list[Gpu] = []
    automatic = isinstance(devices, str) and devices == "auto"
    if automatic:
        devices, notes = find_gpus(topology, ranks, rank)
        visible = _visible(topology) if devices is not None else []
    if given is not None:
        return _keep_mask(topology, rank, ranks, devices, options, given, notes)
    all_gpus = [gpu.pci for gpu in topology.gpus]
    sees_one = automatic and devices is not None and len(visible) == 1 < ranks <= len(all_gpus)
    if sees_one and not gpu_is_shared(os.environ, rank, ranks):
        try:
            plan = options.plan(replace(topology, cpu_quota=None), len(all_gpus), all_gpus)
        except NotEnoughCoresError:
            pass  # fewer CPUs than GPUs: the ranks divide their GPU's node by local rank instead
        else:
            mine = next(binding for binding in plan.bindings if binding.gpu == visible[0].pci)
            binding, limits = _limit_threads(topology, replace(mine, local_rank=rank), ranks)
            shared = f"the machine is divided among its {len(all_gpus)} GPUs; no other rank is taken to use this one"
            return binding, (*plan.notes, *notes, shared, *limits)
    plan = options.plan(topology, ranks, devices)
    return plan[rank], plan.notes + notes


def find_gpus(
    topology: Topology, num_local_procs: int, local_rank: int | None = None
) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """The GPU of each local rank, if rank i uses ``cuda:i``; else None and a note that says why not.

    Where this process sees one GPU of a job of several ranks, that GPU stands at every rank's place: the ranks' own
    shares of plans made so are disjoint, whichever GPUs the others see.
    """
    try:
        visible = _visible(topology)
    except GpuLookupError as error:
        return None, (f"GPUs are left out: {error}",)
    if not visible:
        return None, hidden_notes(topology.gpus, os.environ)
    if len(visible) == 1 < num_local_procs:
        who = "this rank" if local_rank is None else f"rank {local_rank}"
        return [visible[0].pci] * num_local_procs, (
            f"{who} of {num_local_procs} sees one GPU, {visible[0].pci}, and is placed by it",
        )
    if len(visible) < num_local_procs:
        return None, (
            f"GPUs are left out: {num_local_procs} ranks see {len(visible)}, so the others' are unknown: pass devices=",
        )
    return [gpu.pci for gpu in visible[:num_local_procs]], ()


def _visible(topology: Topology) -> list[Gpu]:
    return visible_gpus(topology.gpus, os.environ, mig_parent=nvml_mig_parent)


def _keep_mask(
    topology: Topology,
    rank: int,
    ranks: int,
    devices: Devices,
    options: Options,
    given: GivenMask,
    notes: tuple[str, ...],
) -> tuple[Binding, tuple[str, ...]]:
    """The mask that the launcher cut, or this rank's part of it where several ranks share it."""
    unused = [
        f"{name} = {getattr(options, name)!r} is not used: the launcher bound the ranks"
        for name, usual in (("mode", "auto"), ("reserve", 0))
        if getattr(options, name) != usual
    ]
    options = replace(options, mode="auto", reserve=0)
    if options.cores is not None:
        named = read_core_list(options.cores, "cores") if isinstance(options.cores, str) else map(int, options.cores)
        mine = sorted(set(named).intersection(topology.allowed))
        if not mine:
            raise NotEnoughCoresError(f"cores = {options.cores!r} holds none of this rank's CPUs; {given.note}")
        options = replace(options, cores=mine)
    sharers, index = (1, 0) if given.sharers is None or given.index is None else (given.sharers, given.index)
    unlimited = replace(topology, cpu_quota=None)
    plan = options.plan(unlimited, sharers, None)
    binding, limits = _limit_threads(topology, replace(plan[index], local_rank=rank), ranks)
    if devices is not None:
        if isinstance(devices, str) or len(devices) != ranks:
            raise GpuLookupError(f"devices = {devices!r} must list one PCI address (or None) for each of {ranks} ranks")
        # Planned alone so that its address is checked; the CPUs are the launcher's choice, wherever the GPU hangs.
        binding = replace(binding, gpu=options.plan(unlimited, 1, [devices[rank]])[0].gpu)
    return binding, (given.note, *plan.notes, *notes, *limits, *gpu_notes(topology, binding), *unused)


def _limit_threads(topology: Topology, binding: Binding, ranks: int) -> tuple[Binding, tuple[str, ...]]:
    """The binding with its part of the CPU quota, which all ranks share; for plans that were not made for all ranks."""
    quota = topology.cpu_quota
    if quota is None or quota / ranks >= len(binding.cpus):
        return binding, ()
    limit = max(1, int(quota / ranks))
    return replace(binding, thread_limit=limit), (
        f"the cgroup grants {quota:g} CPUs of time to {count(ranks, 'rank')}: "
        f"run at most {count(limit, 'thread')} in each",
    )
