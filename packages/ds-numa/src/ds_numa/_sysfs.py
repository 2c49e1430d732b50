"""Read a `Topology` from the ``sys`` and ``proc`` trees of a Linux machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ds_numa._files import read_list, read_text
from ds_numa._gpus import read_gpus
from ds_numa._ranges import format_ranges
from ds_numa.errors import TopologyError
from ds_numa.topology import Node, NodeKind, Topology


def read_sysfs(root: Path, *, allowed: Iterable[int] | None, allowed_memory: Iterable[int] | None) -> Topology:
    """See `Topology.from_sysfs`."""
    cpu_folder = root / "sys/devices/system/cpu"
    if not cpu_folder.is_dir():
        raise TopologyError(f"root = '{root}' has no sys/devices/system/cpu: give the folder that holds sys and proc")
    mask = None if allowed is None else sorted(set(allowed))
    # Some sandboxes show the folder and little in it: then the mask is all that is known.
    online = read_list(cpu_folder / "online") or _numbered(cpu_folder, "cpu") or mask or []
    usable = online if mask is None else [cpu for cpu in mask if cpu in set(online)]
    if not usable:
        wanted = format_ranges(mask or ())
        raise TopologyError(f"allowed = {wanted!r} holds no online CPU: allow some of {format_ranges(online)}")
    gpus = read_gpus(root)
    nodes = _read_nodes(root, set(online), {gpu.memory_node for gpu in gpus if gpu.memory_node is not None})
    return Topology(
        nodes=nodes or (Node(0, tuple(online)),),
        cores=_read_cores(cpu_folder, online),
        allowed=tuple(usable),
        allowed_memory=None if allowed_memory is None else tuple(sorted(set(allowed_memory))),
        gpus=gpus,
        numa=bool(nodes),
    )


def _numbered(folder: Path, prefix: str) -> list[int]:
    """The ids in the names ``<prefix><id>`` of a folder's entries."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"{prefix}(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _read_cores(cpu_folder: Path, online: list[int]) -> tuple[tuple[int, ...], ...]:
    """Group online CPUs into physical cores; a CPU whose siblings are not told is a core of its own."""
    cores, left = [], set(online)
    for cpu in online:
        if cpu not in left:
            continue
        topology = cpu_folder / f"cpu{cpu}/topology"
        siblings = read_list(topology / "core_cpus_list") or read_list(topology / "thread_siblings_list")
        core = left.intersection(siblings) | {cpu}
        left -= core
        cores.append(tuple(sorted(core)))
    return tuple(cores)


def _read_nodes(root: Path, online: set[int], gpu_nodes: set[int]) -> tuple[Node, ...]:
    """The nodes by ascending id, sparse ids included; empty where the kernel shows none."""
    folder = root / "sys/devices/system/node"
    ids = _numbered(folder, "node")
    # The file `distance` has one column for each online node, in order of their ids, which may be sparse.
    columns = read_list(folder / "online") or ids
    initiators = set(read_list(folder / "has_generic_initiator"))
    nodes = []
    for node_id in ids:
        cpus = tuple(cpu for cpu in read_list(folder / f"node{node_id}/cpulist") if cpu in online)
        memory = _read_memory(folder / f"node{node_id}/meminfo")
        distances = [int(word) for word in read_text(folder / f"node{node_id}/distance").split()]
        kind: NodeKind = "cpu"
        if not cpus:
            kind = _kind_without_cpus(folder, node_id, memory, gpu_nodes, initiators)
        matrix = dict(zip(columns, distances, strict=True)) if len(columns) == len(distances) else {}
        nodes.append(Node(node_id, cpus, memory, kind, matrix))
    return tuple(nodes)


def _read_memory(path: Path) -> int | None:
    match = re.search(r"MemTotal:\s+(\d+) kB", read_text(path))
    return int(match[1]) * 1024 if match else None


def _kind_without_cpus(
    folder: Path, node_id: int, memory: int | None, gpu_nodes: set[int], initiators: set[int]
) -> NodeKind:
    """What a node without CPUs is; ``unknown`` unless the machine itself says it.

    Source: the NVIDIA driver names the node of a GPU's memory (``numa_status``); firmware gives bandwidths in the ACPI
    HMAT table (kernel: Documentation/admin-guide/mm/numaperf.rst). Memory faster than the DRAM of the CPUs next to it
    is high-bandwidth memory; slower memory may be a CXL expander or a thing not yet thought of. A node that is itself
    a generic initiator belongs to a device, so its speed proves nothing.
    """
    if memory == 0:
        return "empty"
    if node_id in gpu_nodes:
        return "gpu"
    if node_id in initiators:
        return "unknown"
    for access in ("access1", "access0"):  # access1: as seen from CPUs alone
        own = _read_bandwidth(folder, node_id, access)
        neighbours = _numbered(folder / f"node{node_id}/{access}/initiators", "node")
        theirs = [_read_bandwidth(folder, neighbour, access) for neighbour in neighbours if neighbour != node_id]
        if own and theirs and all(theirs):
            return "hbm" if own > max(theirs) else "unknown"
    return "unknown"


def _read_bandwidth(folder: Path, node_id: int, access: str) -> int:
    """Read bandwidth in MB/s from the node's nearest initiators; 0 where firmware does not tell it."""
    text = read_text(folder / f"node{node_id}/{access}/initiators/read_bandwidth")
    return int(text) if text.isdecimal() else 0
