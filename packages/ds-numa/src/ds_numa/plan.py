"""Which CPUs and which memory each rank of a machine gets. Pure: nothing here touches the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ds_numa._gpus import normalise_pci
from ds_numa._placement import Core, place_by_gpu, place_equally
from ds_numa._ranges import format_ranges, read_core_list
from ds_numa.errors import CoreListError, GpuLookupError, NotEnoughCoresError, PlanError, RankError
from ds_numa.topology import Topology

MemoryMode = Literal["prefer", "bind", "none"]


@dataclass(frozen=True)
class Binding:
    """What one rank gets.

    Attributes:
        local_rank: the rank on this machine.
        cpus: its CPUs, ascending.
        num_cores: how many physical cores these are.
        nodes: the nodes of these CPUs.
        memory: ``bind`` takes memory from `memory_nodes` only, ``prefer`` from them first, ``none`` leaves it alone.
        memory_nodes: see `memory`; empty for ``none``.
        gpu: PCI address of the rank's GPU, or None.
    """

    local_rank: int
    cpus: tuple[int, ...]
    num_cores: int
    nodes: tuple[int, ...]
    memory: MemoryMode = "none"
    memory_nodes: tuple[int, ...] = ()
    gpu: str | None = None

    @property
    def omp_num_threads(self) -> int:
        """The advised ``OMP_NUM_THREADS``: one thread for each physical core."""
        return self.num_cores

    def __str__(self) -> str:
        where = f"CPUs {format_ranges(self.cpus)} ({_count(self.num_cores, 'core')}, {_nodes(self.nodes)})"
        memory = "" if self.memory == "none" else f"; memory: {self.memory} {_nodes(self.memory_nodes)}"
        return where + memory + (f"; GPU {self.gpu}" if self.gpu else "")


@dataclass(frozen=True)
class Plan:
    """A binding for every local rank, and what a reader of the plan should know.

    Attributes:
        bindings: by local rank.
        notes: what is out of the ordinary, in words.
    """

    bindings: tuple[Binding, ...]
    notes: tuple[str, ...] = ()

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
        return {"bindings": bindings, "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [f"rank {binding.local_rank}: {binding}" for binding in self.bindings]
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
    cores: str | Iterable[int] | None = None,
    smt: bool = True,
    gpus: Sequence[str | None] | None = None,
    memory: MemoryMode = "prefer",
) -> Plan:
    """Deal out the CPUs of a machine to its ranks.

    Every CPU that may be used goes to exactly one rank, sibling CPUs of a core together. Without `gpus` the ranks'
    shares differ by at most one core, and as few node boundaries as possible fall inside a share. With `gpus` a rank
    gets cores of the node that its GPU hangs on (shares on one node differ by at most one core), and the cores of nodes
    without a GPU go to the ranks nearest to them.

    Args:
        topology: the machine.
        num_local_procs: how many ranks run on it.
        cores: the CPUs to deal out, as ``"0-7,16-23"`` or numbers; all that are allowed when left out.
        smt: with False a rank gets one CPU of each of its cores, and the siblings stay idle.
        gpus: PCI address of each rank's GPU, by local rank; None for a rank without.
        memory: see `Binding`. High-bandwidth memory next to a rank's CPUs is always preferred, never bound. Where
            there is nothing to choose (one node, or all of them) the binding says ``none``.

    Returns:
        The plan. The same arguments give the same plan, so every rank can make it for itself.

    Raises:
        CoreListError: `cores` cannot be read, or names CPUs that are not there or not allowed.
        GpuLookupError: `gpus` has the wrong length or names a GPU that the machine does not have.
        NotEnoughCoresError: there are more ranks than CPUs.
        PlanError: `memory` is none of the modes.
        RankError: `num_local_procs` is no number of ranks.

    >>> machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-6"}}})
    >>> print(plan_binding(machine, 2))
    rank 0: CPUs 0-3 (4 cores, node 0); memory: prefer node 0
    rank 1: CPUs 4-6 (3 cores, node 1); memory: prefer node 1
    """
    check_rank(0, num_local_procs)
    if memory not in get_args(MemoryMode):
        raise PlanError(f"memory = {memory!r} must be one of {get_args(MemoryMode)}")
    selected = select_cpus(topology, cores, "cores")
    gpu_addresses = _check_gpus(topology, num_local_procs, gpus)
    notes: list[str] = []
    units = _units(topology, selected, num_local_procs, smt, notes)
    shares = None
    if any(gpu_addresses):
        nodes_of_gpus = {gpu.pci: gpu.node for gpu in topology.gpus}
        homes = [None if pci is None else nodes_of_gpus[pci] for pci in gpu_addresses]
        shares = place_by_gpu(topology, units, homes)
        if shares is None:
            notes.append(
                "the GPUs' nodes are unknown or have too few allowed cores: cores are dealt out equally instead"
            )
    if shares is None:
        shares = place_equally(topology, units, num_local_procs)
    bindings = []
    for rank, share in enumerate(shares):
        cpus = tuple(sorted(cpu for core in share for cpu in core.cpus))
        nodes = tuple(node.id for node in topology.nodes if not set(cpus).isdisjoint(node.cpus))
        mode, memory_nodes = _choose_memory(topology, nodes, memory)
        bindings.append(Binding(rank, cpus, len(share), nodes, mode, memory_nodes, gpu_addresses[rank]))
    return Plan(tuple(bindings), tuple(notes))


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


def _check_gpus(topology: Topology, ranks: int, gpus: Sequence[str | None] | None) -> list[str | None]:
    if gpus is None:
        return [None] * ranks
    if isinstance(gpus, str) or len(gpus) != ranks:
        raise GpuLookupError(f"gpus = {gpus!r} must list one PCI address (or None) for each of the {ranks} ranks")
    known = {gpu.pci for gpu in topology.gpus}
    addresses = [None if pci is None else normalise_pci(pci) for pci in gpus]
    strays = [pci for pci in addresses if pci is not None and pci not in known]
    if strays:
        raise GpuLookupError(f"gpus names {strays}, which this machine does not have: choose from {sorted(known)}")
    return addresses


def _units(topology: Topology, selected: list[int], ranks: int, smt: bool, notes: list[str]) -> list[Core]:
    """The cores to deal out; single CPUs where there are fewer cores than ranks."""
    wanted = set(selected)
    homes = {cpu: node.id for node in reversed(topology.nodes) for cpu in node.cpus}
    groups = [tuple(cpu for cpu in core if cpu in wanted) for core in topology.cores]
    groups = [group for group in groups if group]
    if smt and len(groups) < ranks <= len(selected):
        notes.append(
            f"{_count(ranks, 'rank')} share {_count(len(groups), 'core')}: sibling CPUs are dealt out one by one"
        )
        groups = [(cpu,) for cpu in selected]
    if not smt:
        idle = [cpu for group in groups for cpu in group[1:]]
        if idle:
            notes.append(f"one CPU of each core is used: the sibling CPUs {format_ranges(idle)} stay idle")
        groups = [group[:1] for group in groups]
    if len(groups) < ranks:
        raise NotEnoughCoresError(
            f"num_local_procs = {ranks} ranks need {ranks} CPUs, but {len(groups)} may be used "
            f"({format_ranges(cpu for group in groups for cpu in group)}): start fewer ranks or allow more CPUs"
        )
    return [Core(group, homes.get(group[0])) for group in sorted(groups)]


def _choose_memory(topology: Topology, nodes: tuple[int, ...], mode: MemoryMode) -> tuple[MemoryMode, tuple[int, ...]]:
    """The memory of a rank whose CPUs are on `nodes`."""
    may = topology.allowed_memory
    usable = [
        node
        for node in topology.nodes
        if node.memory_bytes != 0 and node.kind != "empty" and (may is None or node.id in may)
    ]
    if mode == "none" or not topology.numa or not nodes:
        return "none", ()

    def nearest(node_id: int, kind: str) -> list[int]:
        found = [node.id for node in usable if node.kind == kind]
        reach = min((topology.distance(node_id, other) for other in found), default=0)
        return [other for other in found if topology.distance(node_id, other) == reach]

    fast = sorted({other for node_id in nodes for other in nearest(node_id, "hbm")})
    if fast:
        return "prefer", tuple(fast)
    # A node without memory of its own, or whose memory is not allowed, uses the nearest that has some.
    own = sorted({other for node_id in nodes for other in nearest(node_id, "cpu")})
    if not own or {node.id for node in usable} <= set(own):
        return "none", ()
    return mode, tuple(own)


def _nodes(nodes: Sequence[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {format_ranges(nodes) or '?'}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
