"""What a machine looks like: sockets, NUMA nodes, caches, cores, devices, and which CPUs this process may use.

[Note: words] A *CPU* is what the kernel numbers: one hardware thread. A *core* is a physical core, with one CPU or,
under SMT, several sibling CPUs. A *node* is a NUMA node; its id need not be dense (0, 8), it may have no CPUs
(high-bandwidth memory, GPU memory, memory expanders) and, rarely, no memory. A *socket* is a physical package; it holds
one node or several, and a node may hold several sockets. An *L3* is the set of CPUs that share one last-level cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from ds_numa._ranges import format_ranges, parse_range_list
from ds_numa.errors import CoreListError, TopologyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ds_numa.plan import Plan

NodeKind = Literal["cpu", "hbm", "gpu", "cxl", "ram", "empty", "unknown"]
Vendor = Literal["nvidia", "amd", "intel"]


@dataclass(frozen=True)
class Node:
    """One NUMA node.

    Attributes:
        id: the kernel's number of it.
        cpus: its online CPUs, allowed or not.
        memory_bytes: size of its memory, or None when the kernel does not say.
        kind: ``cpu`` has CPUs; of those without, ``hbm`` is high-bandwidth memory, ``gpu`` a GPU's own memory, ``cxl``
            a memory expander, ``ram`` ordinary memory whose CPUs are offline or absent, ``empty`` has no memory either,
            and ``unknown`` is whatever nothing on the machine tells apart.
        distances: the kernel's distance to other nodes by id; 10 is local.
        initiators: the nodes that firmware names as nearest to this node's memory; empty where it names none.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int | None = None
    kind: NodeKind = "cpu"
    distances: Mapping[int, int] = field(default_factory=dict, hash=False)
    initiators: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        pci: its PCI address, ``0000:17:00.0``.
        node: the NUMA node that it hangs on, or None when the kernel does not say.
        uuid: the name that its vendor's runtime knows it by (NVIDIA: ``GPU-...``, AMD: ``GPU-<unique id>``), or None.
        memory_node: the node that its own memory forms (Grace), or None.
        model: the product's name, or None.
        vendor: who made it; None stands for NVIDIA where there is a uuid, and is unknown where there is none.
        usable: False for a GPU that is on the bus but that this process was not given (containers, Slurm).
        ordinals: the numbers by which its vendor's runtime knows it before any environment variable chooses, one for
            each part that it is cut into (AMD: partitions, Intel: tiles); empty where the order of addresses is all
            that is known.
    """

    pci: str
    node: int | None = None
    uuid: str | None = None
    memory_node: int | None = None
    model: str | None = None
    vendor: Vendor | None = None
    usable: bool = True
    ordinals: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.vendor is None and self.uuid is not None:
            object.__setattr__(self, "vendor", "nvidia")


@dataclass(frozen=True)
class Nic:
    """One network card.

    Attributes:
        pci: its PCI address.
        node: the NUMA node that it hangs on, or None when the kernel does not say.
        names: its RDMA devices and network interfaces, such as ``("mlx5_0", "ib0")``.
        kind: ``infiniband``, ``ethernet``, or what else the PCI class says.
    """

    pci: str
    node: int | None = None
    names: tuple[str, ...] = ()
    kind: str = "ethernet"


@dataclass(frozen=True)
class Topology:
    """A machine, and what this process may use of it. Plain data: make one for any machine to test a plan for it.

    Attributes:
        nodes: by ascending id. Nodes that list the same CPUs are legal (``numa=fake=``).
        cores: the physical cores, each the tuple of its online CPUs.
        allowed: the CPUs that this process may use, ascending.
        allowed_memory: the nodes whose memory this process may use, or None for all.
        gpus: in order of their PCI address, which is the order of NVML.
        numa: False where the kernel shows no NUMA nodes; then `nodes` holds one that stands for the machine.
        sockets: the CPUs of each physical package; empty where the machine does not say.
        l3: the CPUs that share each last-level cache; empty where the machine does not say.
        core_classes: the CPUs of each kind of core, the fastest first (P cores, E cores); empty where all are alike.
        nics: network cards in order of their PCI address.
        visible: PCI addresses of the GPUs that this process's environment shows, in the order of ``cuda:0``, ``cuda:1``
            and so on; None where no environment was read (a described machine): then `gpus` that are usable, in order.
        cpu_quota: how many CPUs' worth of time the cgroup grants this process, such as 1.5; None without a quota.
        notes: what could not be read or told, each naming the file or the part of the machine, in words.
    """

    nodes: tuple[Node, ...]
    cores: tuple[tuple[int, ...], ...]
    allowed: tuple[int, ...]
    allowed_memory: tuple[int, ...] | None = None
    gpus: tuple[Gpu, ...] = ()
    numa: bool = True
    sockets: tuple[tuple[int, ...], ...] = ()
    l3: tuple[tuple[int, ...], ...] = ()
    core_classes: tuple[tuple[int, ...], ...] = ()
    nics: tuple[Nic, ...] = ()
    visible: tuple[str, ...] | None = None
    cpu_quota: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cpus = [cpu for core in self.cores for cpu in core]
        if len(cpus) != len(set(cpus)):
            raise TopologyError(f"cores = {self.cores} lists a CPU twice: each CPU belongs to one physical core")
        if list(self.allowed) != sorted(set(self.allowed)):
            raise TopologyError(f"allowed = {self.allowed} must ascend and hold each CPU once: sort it")
        strays = set(self.allowed).difference(cpus)
        if strays or not self.allowed:
            what = f"CPUs {format_ranges(strays)}, which are in no core" if strays else "nothing"
            raise TopologyError(f"allowed = {self.allowed} holds {what}: allow some of CPUs {format_ranges(cpus)}")
        ids = [node.id for node in self.nodes]
        if not ids or ids != sorted(set(ids)):
            raise TopologyError(f"nodes have ids {ids}: give at least one, ascending, each once")
        for node in self.nodes:
            strays = set(node.cpus).difference(cpus)
            if strays:
                raise TopologyError(
                    f"node {node.id} has CPUs {format_ranges(strays)}, which are in no core: add them to cores"
                )
            if node.kind not in get_args(NodeKind) or (node.kind == "cpu") != bool(node.cpus):
                raise TopologyError(
                    f"node {node.id} is of kind {node.kind!r} and has CPUs ({format_ranges(node.cpus)}): "
                    f"kind is 'cpu' with CPUs and one of {get_args(NodeKind)[1:]} without"
                )
        for name, groups in (("sockets", self.sockets), ("l3", self.l3), ("core_classes", self.core_classes)):
            grouped = [cpu for group in groups for cpu in group]
            if len(grouped) != len(set(grouped)) or not set(grouped) <= set(cpus):
                raise TopologyError(f"{name} = {groups} must hold CPUs of cores, each at most once")

    @classmethod
    def here(cls) -> Topology:
        """The machine that this process runs on, limited to what the process may use."""
        from ds_numa._here import read_here

        return read_here()

    @classmethod
    def from_sysfs(
        cls,
        root: str | os.PathLike[str] = "/",
        *,
        allowed: Iterable[int] | None = None,
        allowed_memory: Iterable[int] | None = None,
    ) -> Topology:
        """Read a machine from its ``sys`` and ``proc`` trees, alive or copied.

        A file that is missing or holds garbage ends nothing: what it would tell stays unknown, and `notes` names it.

        Args:
            root: the folder that holds ``sys`` and, for NVIDIA GPUs, cpusets and quotas, ``proc``.
            allowed: the CPUs that may be used; when left out those of the tree's cpuset (the control group's files,
                else ``proc/self/status``), else all that are online. CPUs that are not online are dropped.
            allowed_memory: the nodes whose memory may be used; when left out those of the cpuset, else all.

        Raises:
            TopologyError: there is no ``sys/devices/system/cpu`` below `root`, or nothing allowed is online.
        """
        from ds_numa._sysfs import read_sysfs

        return read_sysfs(root, allowed=allowed, allowed_memory=allowed_memory)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Topology:
        """Make one from plain data, as `to_dict` writes it; only ``nodes`` is required.

        Raises:
            TopologyError: something is missing, of a wrong type or contradictory.

        >>> machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "8": {"cpus": "4-7"}}, "allowed": "2-5"})
        >>> machine.allowed, [node.id for node in machine.nodes]
        ((2, 3, 4, 5), [0, 8])
        """
        try:
            return _from_dict(data)
        except TopologyError:
            raise
        except (CoreListError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise TopologyError(
                f"data is no description of a machine ({error!r}): write it as to_dict() does"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back and ``json`` can write."""
        nodes = {
            str(node.id): {
                "cpus": format_ranges(node.cpus),
                "memory_bytes": node.memory_bytes,
                "kind": node.kind,
                "distances": {str(other): distance for other, distance in node.distances.items()},
                "initiators": list(node.initiators),
            }
            for node in self.nodes
        }
        return {
            "nodes": nodes,
            "cores": [list(core) for core in self.cores],
            "allowed": format_ranges(self.allowed),
            "allowed_memory": None if self.allowed_memory is None else format_ranges(self.allowed_memory),
            "gpus": [vars(gpu) | {"ordinals": list(gpu.ordinals)} for gpu in self.gpus],
            "numa": self.numa,
            "sockets": [format_ranges(group) for group in self.sockets],
            "l3": [format_ranges(group) for group in self.l3],
            "core_classes": [format_ranges(group) for group in self.core_classes],
            "nics": [vars(nic) | {"names": list(nic.names)} for nic in self.nics],
            "visible": None if self.visible is None else list(self.visible),
            "cpu_quota": self.cpu_quota,
            "notes": list(self.notes),
        }

    def show(self, plan: Plan | None = None, *, file: TextIO | None = None) -> None:
        """Print the machine as a drawing of characters, a character for each core; in colour on a terminal with rich.

        Args:
            plan: a plan for this machine: a core shows the rank that has it, and the ranks' bindings stand below.
            file: where to; standard output when left out.

        >>> Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}}}).show()
        2 nodes, 8 cores, 8 CPUs; allowed: CPUs 0-7
        node 0: CPUs 0-3
          cores ####
        node 1: CPUs 4-7
          cores ####
        # a core
        """
        from ds_numa._drawing.draw import show

        show(self, plan, file=file)

    def plot(self, plan: Plan | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the machine with matplotlib: sockets, nodes, caches, cores, GPUs, cards, and the ranks of a plan.

        Args:
            plan: a plan for this machine: each rank has a colour.
            path: a file to save it to as well; its ending says the format.

        Returns:
            The figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from ds_numa._drawing.plot import plot

        return plot(self, plan, path)

    def node(self, node_id: int) -> Node:
        """The node of this id.

        Raises:
            TopologyError: there is none.
        """
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise TopologyError(f"node_id = {node_id} is no node here: there are {[node.id for node in self.nodes]}")

    def sockets_of(self, node_id: int) -> tuple[int, ...]:
        """Which `sockets` (by index) hold CPUs of this node; for a node without CPUs, those of its nearest nodes.

        Empty where the machine does not tell its sockets.
        """
        cpus = set(self.node(node_id).cpus)
        if not cpus:
            others = [node for node in self.nodes if node.cpus]
            reach = min((self.distance(node_id, node.id) for node in others), default=0)
            cpus = {cpu for node in others if self.distance(node_id, node.id) == reach for cpu in node.cpus}
        return tuple(i for i, socket in enumerate(self.sockets) if not cpus.isdisjoint(socket))

    def distance(self, a: int, b: int) -> int:
        """The kernel's distance between two nodes: 10 for a node to itself, and 20 where the kernel gives none."""
        return self.node(a).distances.get(b, 10 if a == b else 20)


def _from_dict(data: Mapping[str, Any]) -> Topology:
    nodes = []
    for key, entry in data["nodes"].items():
        cpus = _numbers(entry.get("cpus"))
        nodes.append(
            Node(
                id=int(key),
                cpus=cpus,
                memory_bytes=entry.get("memory_bytes"),
                kind=entry.get("kind") or ("cpu" if cpus else "unknown"),
                distances={int(other): int(distance) for other, distance in (entry.get("distances") or {}).items()},
                initiators=_numbers(entry.get("initiators")),
            )
        )
    nodes.sort(key=lambda node: node.id)
    everything = sorted({cpu for node in nodes for cpu in node.cpus})
    cores = data.get("cores")
    allowed, allowed_memory = data.get("allowed"), data.get("allowed_memory")
    return Topology(
        nodes=tuple(nodes),
        cores=tuple((cpu,) for cpu in everything) if cores is None else tuple(sorted(_numbers(core) for core in cores)),
        allowed=tuple(everything) if allowed is None else _numbers(allowed),
        allowed_memory=None if allowed_memory is None else _numbers(allowed_memory),
        gpus=tuple(Gpu(**gpu | {"ordinals": _numbers(gpu.get("ordinals"))}) for gpu in data.get("gpus") or ()),
        numa=bool(data.get("numa", True)),
        sockets=_groups(data, "sockets"),
        l3=_groups(data, "l3"),
        core_classes=_groups(data, "core_classes"),
        nics=tuple(Nic(**nic | {"names": tuple(nic.get("names") or ())}) for nic in data.get("nics") or ()),
        visible=None if data.get("visible") is None else tuple(data["visible"]),
        cpu_quota=data.get("cpu_quota"),
        notes=tuple(data.get("notes") or ()),
    )


def _groups(data: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in data.get(name) or ())


def _numbers(value: str | Iterable[int] | None) -> tuple[int, ...]:
    if isinstance(value, str):
        return tuple(parse_range_list(value)) if value.strip() else ()
    return tuple(sorted(int(number) for number in value or ()))


def probe(root: str | os.PathLike[str] = "/") -> Topology:
    """Read a machine: the one that this process runs on, or one whose ``sys`` and ``proc`` trees were copied.

    Args:
        root: ``"/"`` for this machine, limited to what this process may use; else the folder that holds the trees.

    Raises:
        TopologyError: there is no ``sys/devices/system/cpu`` below `root`, or nothing allowed is online.
    """
    return Topology.here() if os.fspath(root) == "/" else Topology.from_sysfs(root)
