"""Read a `Topology` from the ``sys`` and ``proc`` trees of a Linux machine."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ds_numa._cgroup import ControlGroups, read_cpuset, read_quota
from ds_numa._cpus import (
    FOLDER,
    read_core_classes,
    read_cores,
    read_l3,
    read_offline,
    read_online,
    read_sockets,
    split_cores,
)
from ds_numa._files import Tree
from ds_numa._nodes import classify_memory, read_nodes
from ds_numa._pci import place_alone, read_bus
from ds_numa._ranges import format_ranges
from ds_numa.errors import TopologyError
from ds_numa.topology import Node, Topology


def read_sysfs(
    root: str | os.PathLike[str],
    *,
    allowed: Iterable[int] | None,
    allowed_memory: Iterable[int] | None,
    gpu_memory: Iterable[int] = (),
) -> Topology:
    """See `Topology.from_sysfs`. `gpu_memory` are nodes that are known to be memory of GPUs."""
    if not os.path.isdir(os.path.join(root, FOLDER)):
        raise TopologyError(f"root = '{root}' has no {FOLDER}: give the folder that holds sys and proc")
    tree = Tree(root)
    notes: list[str] = []
    mask = None if allowed is None else sorted(set(allowed))
    # Some sandboxes show the folder and little in it: then the mask is all that is known.
    online = read_online(tree) or mask or []
    groups = ControlGroups.read(tree)
    cpuset, memory = read_cpuset(tree, groups) if allowed is None or allowed_memory is None else (None, None)
    usable = _choose_allowed(mask, online, cpuset, notes)
    nodes = read_nodes(tree, online, notes)
    shown = nodes or (Node(0, tuple(online)),)
    cores = read_cores(tree, online)
    l3 = read_l3(tree, cores, notes)
    sockets = read_sockets(tree, cores, l3, notes)
    cores = split_cores(cores, [*(node.cpus for node in shown), *sockets], notes)
    with_cpus = [node.id for node in shown if node.cpus]
    bus = place_alone(read_bus(tree), with_cpus, {node.id for node in shown}, notes)
    owned = {*gpu_memory, *(gpu.memory_node for gpu in bus.gpus if gpu.memory_node is not None)}
    offline = read_offline(tree, online) if any(node.kind == "unknown" for node in nodes) else []
    nodes = classify_memory(tree, nodes, owned, offline, notes)
    classes = read_core_classes(tree, cores, notes)
    quota = read_quota(tree, groups)
    allowed_memory = memory if allowed_memory is None else allowed_memory
    return Topology(
        nodes=nodes or shown,
        cores=cores,
        allowed=tuple(usable),
        allowed_memory=None if allowed_memory is None else tuple(sorted(set(allowed_memory))),
        gpus=bus.gpus,
        numa=bool(nodes),
        sockets=sockets,
        l3=l3,
        core_classes=classes,
        nics=bus.nics,
        cpu_quota=quota,
        notes=tree.notes + tuple(notes),
    )


def _choose_allowed(mask: list[int] | None, online: list[int], cpuset: list[int] | None, notes: list[str]) -> list[int]:
    """The online CPUs of the caller's mask, else of the process's cpuset, else all."""
    if mask is None:
        usable = online if cpuset is None else sorted(set(online).intersection(cpuset))
        if online and not usable:
            notes.append(f"the cpuset allows CPUs {format_ranges(cpuset or ())}, none of which is online: all are used")
            usable = online
        if not usable:
            raise TopologyError("the tree names no online CPU: copy sys/devices/system/cpu/online, or pass allowed=")
        return usable
    usable = sorted(set(online).intersection(mask))
    if not usable:
        wanted = format_ranges(mask)
        raise TopologyError(f"allowed = {wanted!r} holds no online CPU: allow some of {format_ranges(online)}")
    return usable
