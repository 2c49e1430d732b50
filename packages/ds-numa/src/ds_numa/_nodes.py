"""Read NUMA nodes from ``sys/devices/system/node``: CPUs, memory, distances, and what memory without CPUs is.

Source: kernel Documentation/ABI/stable/sysfs-devices-node and Documentation/admin-guide/mm/numaperf.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ds_numa._cpus import read_processor
from ds_numa._files import Tree
from ds_numa._ranges import format_ranges
from ds_numa.topology import Node, NodeKind

FOLDER = "sys/devices/system/node"
_TIERS = "sys/devices/virtual/memory_tiering"
_KNIGHTS = ("87", "133")  # models of family 6: Knights Landing, Knights Mill


def read_nodes(tree: Tree, online: Iterable[int], notes: list[str]) -> tuple[Node, ...]:
    """The nodes by ascending id, sparse ids included; those without CPUs are of kind ``unknown`` or ``empty`` so far.

    Empty where the kernel shows no nodes, or shows several and tells the CPUs of none.
    """
    cpus_online = set(online)
    ids = tree.ids(FOLDER, "node")
    # The file `distance` has one column for each online node, in order of their ids, which may be sparse.
    columns = tree.numbers(f"{FOLDER}/online") or ids
    nodes: list[Node] = []
    untold = []
    for node_id in ids:
        folder = f"{FOLDER}/node{node_id}"
        cpus = tree.cpus((f"{folder}/cpulist", f"{folder}/cpumap"))
        if cpus is None:
            cpus = tree.ids(folder, "cpu")  # links to the CPUs
            untold += [] if cpus else [len(nodes)]
        memory = _read_memory(tree, f"{folder}/meminfo")
        nodes.append(
            Node(
                id=node_id,
                cpus=tuple(cpu for cpu in cpus if cpu in cpus_online),
                memory_bytes=memory,
                distances=_read_distances(tree, f"{folder}/distance", columns, ids),
                initiators=_read_initiators(tree, folder),
            )
        )
    left = cpus_online.difference(*(node.cpus for node in nodes))
    if nodes and left == cpus_online and len(nodes) > 1:
        notes.append(f"{FOLDER} has nodes {ids} and tells the CPUs of none: they are taken as one node")
        return ()
    if nodes and left and (len(untold) == 1 or left == cpus_online):
        # Every CPU is on some node, and of one alone the CPUs are not told.
        where = untold[0] if untold else 0
        nodes[where] = replace(nodes[where], cpus=tuple(sorted(left)))
    elif left and nodes:
        notes.append(f"CPUs {format_ranges(left)} are online and on no node that is told")
    return tuple(replace(node, kind=_plain_kind(node)) for node in nodes)


def _plain_kind(node: Node) -> NodeKind:
    if node.cpus:
        return "cpu"
    return "empty" if node.memory_bytes == 0 else "unknown"


def _read_memory(tree: Tree, path: str) -> int | None:
    text = tree.text(path)
    match = re.search(r"MemTotal:\s+(\d{1,18}) kB", text or "")
    if text and not match:
        tree.fault(path, "names no MemTotal")
    return int(match[1]) * 1024 if match else None


def _read_distances(tree: Tree, path: str, columns: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
    words = (tree.text(path) or "").split()
    if not words:
        return {}
    try:
        row = [int(word) for word in words]
    except ValueError:
        tree.fault(path, "holds no row of distances")
        return {}
    for order in (columns, ids):
        if len(order) == len(row):
            return dict(zip(order, row, strict=True))
    tree.fault(path, f"holds {len(row)} distances for {len(ids)} nodes")
    return {}


def _read_initiators(tree: Tree, folder: str) -> tuple[int, ...]:
    """The nodes that firmware names as nearest: among CPUs (access1), else among CPUs and devices (access0)."""
    for access in ("access1", "access0"):
        found = tree.ids(f"{folder}/{access}/initiators", "node")
        if found:
            return tuple(found)
    return ()


def classify_memory(
    tree: Tree, nodes: Sequence[Node], gpu_nodes: Iterable[int], offline_cpus: Sequence[int], notes: list[str]
) -> tuple[Node, ...]:
    """Say what each node without CPUs is, as far as the machine itself tells; a note names what stays unknown."""
    owned = set(gpu_nodes)
    unknown = [node for node in nodes if node.kind == "unknown" and node.id not in owned]
    known: dict[int, NodeKind] = {node.id: "gpu" for node in nodes if node.kind == "unknown" and node.id in owned}
    if unknown:
        devices = set(tree.numbers(f"{FOLDER}/has_generic_initiator") or ())
        tiers = _read_tiers(tree)
        expanders = _read_expanders(tree)
        knights = _is_knights(tree)
        for node in unknown:
            kind = None
            # A node that initiates accesses itself belongs to a device, so its speed proves nothing (Grace).
            if node.id not in devices:
                kind = _by_speed(tree, node, nodes, tiers)
                if kind is None and node.id in expanders:
                    kind = "cxl"
                if kind is None and knights and not {31, 41}.isdisjoint(node.distances.values()):
                    kind = "hbm"
                if kind is None and offline_cpus:
                    kind = "ram"
            if kind is not None:
                known[node.id] = kind
            elif node.memory_bytes != 0:
                size = "memory" if node.memory_bytes is None else f"{node.memory_bytes / 2**30:.1f} GiB of memory"
                notes.append(
                    f"node {node.id} has {size} and no CPUs, and nothing tells what it is: no rank is sent there"
                )
    return tuple(replace(node, kind=known.get(node.id, node.kind)) for node in nodes)


def _by_speed(tree: Tree, node: Node, nodes: Sequence[Node], tiers: dict[int, int]) -> NodeKind | None:
    """What the node is by its speed beside the DRAM of its initiators (ACPI HMAT), or by the kernel's memory tiers."""
    for access in ("access1", "access0"):  # access1: as seen from CPUs alone
        own = _read_bandwidth(tree, node.id, access)
        neighbours = tree.ids(f"{FOLDER}/node{node.id}/{access}/initiators", "node")
        theirs = [_read_bandwidth(tree, neighbour, access) for neighbour in neighbours if neighbour != node.id]
        if own and theirs and all(theirs):
            if own > max(theirs):
                return "hbm"
            return "cxl" if own < min(theirs) else "ram"
    dram = [tiers[other.id] for other in nodes if other.cpus and other.id in tiers]
    if node.id in tiers and dram and tiers[node.id] != dram[0]:
        return "hbm" if tiers[node.id] < min(dram) else "cxl" if tiers[node.id] > max(dram) else None
    return None


def _read_bandwidth(tree: Tree, node_id: int, access: str) -> int:
    """Read bandwidth in MB/s from the node's nearest initiators; 0 where firmware does not tell it."""
    return tree.number(f"{FOLDER}/node{node_id}/{access}/initiators/read_bandwidth") or 0


def _read_tiers(tree: Tree) -> dict[int, int]:
    """The kernel's memory tier of each node: the lower, the faster.

    Source: kernel Documentation/ABI/testing/sysfs-kernel-mm-memory-tiers.
    """
    return {
        node_id: tier
        for tier in tree.ids(_TIERS, "memory_tier")
        for node_id in tree.numbers(f"{_TIERS}/memory_tier{tier}/nodelist") or ()
    }


def _read_expanders(tree: Tree) -> set[int]:
    """The nodes made of memory devices: CXL regions and persistent memory, which the kernel shows as DAX devices."""
    devices = tree.names("sys/bus/dax/devices")
    targets = [tree.number(f"sys/bus/dax/devices/{name}/target_node") for name in devices]
    return {target for target in targets if target is not None}


def _is_knights(tree: Tree) -> bool:
    """Whether this is a Knights Landing or Mill, whose on-package memory no firmware table tells apart."""
    facts = read_processor(tree)
    return facts.get("cpu family") == "6" and facts.get("model") in _KNIGHTS
