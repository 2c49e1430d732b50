"""What a machine looks like: NUMA nodes, physical cores, GPUs, and which CPUs this process may use.

[Note: words] A *CPU* is what the kernel numbers: one hardware thread. A *core* is a physical core, with one CPU or,
under SMT, several sibling CPUs. A *node* is a NUMA node; its id need not be dense (0, 8), it may have no CPUs
(high-bandwidth memory, GPU memory, memory expanders) and, rarely, no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ds_numa._ranges import format_ranges, parse_range_list
from ds_numa.errors import CoreListError, TopologyError

NodeKind = Literal["cpu", "hbm", "gpu", "empty", "unknown"]


@dataclass(frozen=True)
class Node:
    """One NUMA node.

    Attributes:
        id: the kernel's number of it.
        cpus: its online CPUs, allowed or not.
        memory_bytes: size of its memory, or None when the kernel does not say.
        kind: ``cpu`` has CPUs; of those without, ``hbm`` is high-bandwidth memory, ``gpu`` a GPU's own memory,
            ``empty`` has no memory either, and ``unknown`` is whatever nothing on the machine tells apart.
        distances: the kernel's distance to other nodes by id; 10 is local.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int | None = None
    kind: NodeKind = "cpu"
    distances: Mapping[int, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        pci: its PCI address, ``0000:17:00.0``.
        node: the NUMA node that it hangs on, or None when the kernel does not say.
        uuid: NVIDIA's name of it, or None.
        memory_node: the node that its own memory forms (Grace), or None.
        model: the product's name, or None.
    """

    pci: str
    node: int | None = None
    uuid: str | None = None
    memory_node: int | None = None
    model: str | None = None


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
    """

    nodes: tuple[Node, ...]
    cores: tuple[tuple[int, ...], ...]
    allowed: tuple[int, ...]
    allowed_memory: tuple[int, ...] | None = None
    gpus: tuple[Gpu, ...] = ()
    numa: bool = True

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

    @classmethod
    def here(cls) -> Topology:
        """The machine that this process runs on, limited to what the process may use."""
        from ds_numa._here import read_here

        return read_here()

    @classmethod
    def from_sysfs(
        cls,
        root: str | Path = "/",
        *,
        allowed: Iterable[int] | None = None,
        allowed_memory: Iterable[int] | None = None,
    ) -> Topology:
        """Read a machine from its ``sys`` and ``proc`` trees, alive or copied.

        Args:
            root: the folder that holds ``sys`` and, for NVIDIA GPUs, ``proc``.
            allowed: the CPUs that may be used; all that are online when left out. CPUs that are not online are dropped.
            allowed_memory: the nodes whose memory may be used; all when left out.

        Raises:
            TopologyError: there is no ``sys/devices/system/cpu`` below `root`, or nothing allowed is online.
        """
        from ds_numa._sysfs import read_sysfs

        return read_sysfs(Path(root), allowed=allowed, allowed_memory=allowed_memory)

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
            }
            for node in self.nodes
        }
        return {
            "nodes": nodes,
            "cores": [list(core) for core in self.cores],
            "allowed": format_ranges(self.allowed),
            "allowed_memory": None if self.allowed_memory is None else format_ranges(self.allowed_memory),
            "gpus": [vars(gpu).copy() for gpu in self.gpus],
            "numa": self.numa,
        }

    def node(self, node_id: int) -> Node:
        """The node of this id.

        Raises:
            TopologyError: there is none.
        """
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise TopologyError(f"node_id = {node_id} is no node here: there are {[node.id for node in self.nodes]}")

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
        gpus=tuple(Gpu(**gpu) for gpu in data.get("gpus") or ()),
        numa=bool(data.get("numa", True)),
    )


def _numbers(value: str | Iterable[int] | None) -> tuple[int, ...]:
    if isinstance(value, str):
        return tuple(parse_range_list(value)) if value.strip() else ()
    return tuple(sorted(int(number) for number in value or ()))
