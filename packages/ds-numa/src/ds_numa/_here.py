"""The machine that this process runs on, limited to what the process may use."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import psutil

from ds_numa._affinity import read_mask
from ds_numa._files import read_text
from ds_numa._gpus import pci_node, pci_order
from ds_numa._nvml import nvml_gpus
from ds_numa._ranges import parse_range_list
from ds_numa._sysfs import read_sysfs
from ds_numa.topology import Gpu, Node, Topology

_ROOT = Path("/")


def read_here() -> Topology:
    """See `Topology.here`."""
    mask = read_mask()
    if not (_ROOT / "sys/devices/system/cpu").is_dir():
        # No Linux, or one that hides sysfs: CPUs without nodes or siblings are all that is known.
        cpus = sorted({*range(psutil.cpu_count() or 1), *mask})
        return Topology(
            nodes=(Node(0, tuple(cpus)),), cores=tuple((cpu,) for cpu in cpus), allowed=tuple(mask), numa=False
        )
    machine = read_sysfs(_ROOT, allowed=mask, allowed_memory=_memory_nodes())
    listed = nvml_gpus()
    if listed is None:
        return machine
    # A container may see every GPU of the host in sysfs, and in NVML only those that it was given.
    known = {gpu.pci: gpu for gpu in machine.gpus}
    gpus: list[Gpu] = [gpu for gpu in machine.gpus if gpu.uuid is None]
    for gpu in listed:
        seen = known.get(gpu.pci, gpu)
        memory_node = seen.memory_node if gpu.memory_node is None else gpu.memory_node
        gpus.append(replace(gpu, node=pci_node(_ROOT, gpu.pci), memory_node=memory_node))
    gpus.sort(key=lambda gpu: pci_order(gpu.pci))
    memory_nodes = {gpu.memory_node for gpu in gpus}
    nodes = tuple(
        replace(node, kind="gpu") if node.kind in ("unknown", "hbm") and node.id in memory_nodes else node
        for node in machine.nodes
    )
    return replace(machine, gpus=tuple(gpus), nodes=nodes)


def _memory_nodes() -> list[int] | None:
    """The nodes whose memory the cpuset allows; None where the kernel does not say."""
    match = re.search(r"^Mems_allowed_list:\s*(\S+)", read_text(_ROOT / "proc/self/status"), re.MULTILINE)
    return parse_range_list(match[1]) if match else None
