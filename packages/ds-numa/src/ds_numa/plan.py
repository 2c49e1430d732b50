"""Which CPUs and which memory each rank of a machine gets. Pure: nothing here touches the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal, get_args

from ds_numa._planning.assign import Mode as Mode, assign
from ds_numa._planning.devices import UNSET, Devices, resolve_devices
from ds_numa._planning.layout import Core, Layout, read_cores
from ds_numa._planning.memory import MemoryChooser, MemoryMode as MemoryMode, read_memory_mode
from ds_numa._planning.spare import keep_free, one_cpu_each, split_siblings
from ds_numa._ranges import format_ranges, read_core_list
from ds_numa._words import count, listed
from ds_numa.errors import CoreListError, PlanError, RankError
from ds_numa.topology import Topology


@dataclass(frozen=True)
class Binding:
    """What one rank gets.

    Attributes:
        local_rank: the rank on this machine.
        cpus: its CPUs, ascending.
        num_cores: how many physical cores these are.
        nodes: the nodes of these CPUs.
        memory: ``bind`` takes memory from `memory_nodes` only, ``preferred`` from them first, ``interleave`` from
            each in turn, ``none`` leaves it alone.
        memory_nodes: see `memory`; empty for ``none``.
        gpu: PCI address of the rank's GPU, or None.
        thread_limit: the most threads that the rank should run, because the cgroup limits CPU time or because ranks
            share these CPUs (its part of them); None without such a limit.
    """

    local_rank: int
    cpus: tuple[int, ...]
    num_cores: int
    nodes: tuple[int, ...]
    memory: MemoryMode = "none"
    memory_nodes: tuple[int, ...] = ()
    gpu: str | None = None
    thread_limit: int | None = None

    @property
    def omp_num_threads(self) -> int:
        """The advised ``OMP_NUM_THREADS``: one thread for each physical core, and no more than `thread_limit`."""
        return max(1, self.num_cores if self.thread_limit is None else min(self.num_cores, self.thread_limit))

    def __str__(self) -> str:
        where = f"CPUs {format_ranges(self.cpus)} ({count(self.num_cores, 'core')}, {listed('node', self.nodes)})"
        memory = "" if self.memory == "none" else f"; memory: {self.memory} {listed('node', self.memory_nodes)}"
        return where + memory + (f"; GPU {self.gpu}" if self.gpu else "")


@dataclass(frozen=True)
class Plan:
    """A binding for every local rank, and what a reader of the plan should know.

    Attributes:
        bindings: by local rank.
        notes: what is out of the ordinary, in words.
        idle: CPUs that this process may use and no rank gets, ascending.
    """

    bindings: tuple[Binding, ...]
    notes: tuple[str, ...] = ()
    idle: tuple[int, ...] = ()

    def __getitem__(self, local_rank: int) -> Binding:
        check_rank(local_rank, len(self.bindings))
        return self.bindings[local_rank]

    def __len__(self) -> int:
        return len(self.bindings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json`` can write."""
        bindings = [
            asdict(binding)
            | {"cpus": format_ranges(binding.cpus), "nodes": list(binding.nodes)}
            | {"memory_nodes": list(binding.memory_nodes), "omp_num_threads": binding.omp_num_threads}
            for binding in self.bindings
        ]
        return {"bindings": bindings, "notes": list(self.notes), "idle": format_ranges(self.idle)}

    def __str__(self) -> str:
        lines = [f"rank {binding.local_rank}: {binding}" for binding in self.bindings]
        if self.idle:
            lines.append(f"idle: CPUs {format_ranges(self.idle)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def check_rank(local_rank: int, num_local_procs: int) -> None:
    """Raise `RankError` unless ``0 <= local_rank < num_local_procs``."""
    if isinstance(num_local_procs, bool) or not isinstance(num_local_procs, int) or num_local_procs < 1:
        raise RankError(f"num_local_procs = {num_local_procs!r} must be a whole number of ranks, at least 1")
    if isinstance(local_rank, bool) or not isinstance(local_rank, int) or not 0 <= local_rank < num_local_procs:
        raise RankError(
            f"local_rank = {local_rank!r} must lie in 0..{num_local_procs - 1} (num_local_procs = {num_local_procs})"
        )


def plan_binding(
    topology: Topology,
    num_local_procs: int,
    *,
    mode: Mode = "auto",
    devices: Devices = "auto",
    gpus: Devices | Literal["unset"] = UNSET,
    smt: bool = True,
    memory: MemoryMode | Literal["prefer"] = "preferred",
    reserve: int = 0,
    cores: str | Iterable[int] | None = None,
) -> Plan:
    """Deal out the CPUs of a machine to its ranks.

    Sibling CPUs of a core stay together, unless there are more ranks than cores. Under ``auto``, ``cores`` and
    ``exclusive`` no CPU goes to two ranks. ``node``, ``socket``, ``l3`` and ``exclusive`` give a rank the CPUs that
    ``torchrun --numa-binding`` gives it (``l3`` is torch's ``core-complex``).

    ======================  ============================================================================================
    `mode`                  what a rank gets
    ======================  ============================================================================================
    ``auto``                With devices: a share of the cores of its device's node, and of nodes without devices on the
                            same socket; other sockets stay idle. Without: an equal share of all cores.
    ``cores``               An equal share of all cores, as near to its device as possible.
    ``node``                All cores of its device's node, together with the other ranks there.
    ``socket``              All cores of the socket of its device's node, likewise.
    ``l3``                  One last-level cache of its device's node; the ranks there take the caches in turn.
    ``exclusive``           A slice of its device's node, which is divided among all visible devices there, used or not.
    ======================  ============================================================================================

    Equal shares differ by at most one core, also of each kind (P cores, E cores), and as few edges of sockets, nodes
    and caches as possible fall inside a share. Under ``node``, ``socket``, ``l3`` and ``exclusive`` ranks without a
    device are spread evenly over the nodes, sockets or caches. What stays idle is in `Plan.idle`.

    Args:
        topology: the machine.
        num_local_procs: how many ranks run on it.
        mode: see above.
        devices: PCI address of each rank's GPU, by local rank, None for a rank without; None where no rank uses one;
            ``"auto"``: rank i uses ``cuda:i``, the i-th of ``topology.visible`` (or, where that is None, the i-th
            usable GPU). Ranks that name the same GPU share its node.
        gpus: the older name of `devices`.
        smt: with False a rank gets one CPU of each of its cores, and the siblings stay idle.
        memory: see `Binding`. High-bandwidth memory next to a rank's CPUs is always preferred, never bound. ``bind``
            becomes ``preferred`` where it would shut out memory of unknown kind. Where there is nothing to choose (one
            node, or all of them) the binding says ``none``. ``"prefer"`` is an older spelling of ``"preferred"``.
        reserve: how many physical cores stay free, for the system or for data loader workers: the lowest of each node
            in turn.
        cores: the CPUs to deal out, as ``"0-7,16-23"`` or numbers; all that are allowed when left out.

    Returns:
        The plan. The same arguments give the same plan, so every rank can make it for itself.

    Raises:
        CoreListError: `cores` cannot be read, or names CPUs that are not there or not allowed.
        GpuLookupError: `devices` has the wrong length or names a GPU that the machine does not have.
        NotEnoughCoresError: there are more ranks than CPUs, or too few are left beside the `reserve`, or a node has
            fewer cores than devices (``exclusive``).
        PlanError: `mode`, `memory` or `reserve` is none that there is, or both `devices` and `gpus` are given.
        RankError: `num_local_procs` is no number of ranks.

    >>> machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-6"}}})
    >>> print(plan_binding(machine, 2))
    rank 0: CPUs 0-3 (4 cores, node 0); memory: preferred node 0
    rank 1: CPUs 4-6 (3 cores, node 1); memory: preferred node 1
    """
    check_rank(0, num_local_procs)
    if mode not in get_args(Mode):
        raise PlanError(f"mode = {mode!r} must be one of {get_args(Mode)}")
    chooser = MemoryChooser(topology, read_memory_mode(memory))
    notes: list[str] = []
    addresses = resolve_devices(topology, num_local_procs, devices, gpus, notes)
    units = read_cores(topology, select_cpus(topology, cores, "cores"))
    needed = num_local_procs if mode in ("auto", "cores") else 1
    units = keep_free(units, reserve, needed, notes)
    if mode in ("auto", "cores"):
        units = split_siblings(units, num_local_procs, smt, notes)
    if not smt:
        units = one_cpu_each(units, notes)
    layout = Layout(topology, units)
    shares = assign(topology, layout, mode, addresses, notes)
    limits = _thread_limits(topology, mode, shares, notes)
    cpus_of = {node.id: frozenset(node.cpus) for node in topology.nodes}
    bindings = []
    for rank, share in enumerate(shares):
        cpus = tuple(sorted(chain.from_iterable([core.cpus for core in share])))
        mine = set(cpus)
        num_cores = len({core.number for core in share})
        nodes = tuple([node for node, its in cpus_of.items() if not mine.isdisjoint(its)])
        bindings.append(Binding(rank, cpus, num_cores, nodes, *chooser.choose(nodes), addresses[rank], limits[rank]))
    idle = set(topology.allowed).difference(*(binding.cpus for binding in bindings))
    return Plan(tuple(bindings), (*notes, *chooser.notes()), tuple(sorted(idle)))


def select_cpus(topology: Topology, cores: str | Iterable[int] | None, argument: str) -> list[int]:
    """The CPUs that may be dealt out, ascending; errors speak of the caller's own argument."""
    if cores is None:
        return list(topology.allowed)
    numbers = read_core_list(cores, argument) if isinstance(cores, str) else [int(core) for core in cores]
    shown = cores if isinstance(cores, str) else numbers
    if not numbers or len(numbers) != len(set(numbers)):
        raise CoreListError(f"{argument} = {shown!r} must name each CPU once, and at least one")
    absent = set(numbers).difference(cpu for core in topology.cores for cpu in core)
    denied = set(numbers).difference(topology.allowed) - absent
    if absent or denied:
        reasons = [f"CPUs {format_ranges(absent)} are not online here"] if absent else []
        if denied:
            reasons.append(
                f"CPUs {format_ranges(denied)} are outside this process's CPU mask (container, Slurm, taskset)"
            )
        raise CoreListError(
            f"{argument} = {shown!r}: {' and '.join(reasons)}: choose from {format_ranges(topology.allowed)}"
        )
    return sorted(numbers)


def _thread_limits(
    topology: Topology, mode: Mode, shares: Sequence[Sequence[Core]], notes: list[str]
) -> list[int | None]:
    """See `Binding.thread_limit`."""
    limits: list[int | None] = [None] * len(shares)
    if mode in ("node", "socket", "l3"):
        sharers = Counter([core.number for share in shares for core in share])
        if len(shares) > 1 and max(sharers.values()) > 1:
            parts = [sum([1 / sharers[core.number] for core in share]) for share in shares]
            limits = [max(1, int(part + 1e-9)) for part in parts]
    quota = topology.cpu_quota
    if quota is not None and quota < len(topology.allowed):
        limit = max(1, int(quota / len(shares)))
        granted = f"{quota:g} {'CPU' if quota == 1 else 'CPUs'} of time"
        notes.append(
            f"the cgroup grants {granted}; the mask has {count(len(topology.allowed), 'CPU')}: "
            f"run at most {count(limit, 'thread')} in each rank"
        )
        limits = [limit if other is None else min(limit, other) for other in limits]
    return limits
