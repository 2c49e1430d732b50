"""The machine that this process runs on, limited to what the process may use."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ds_numa._affinity import read_mask
from ds_numa._cgroup import read_own_memory
from ds_numa._cpus import FOLDER
from ds_numa._files import Tree
from ds_numa._gpus import hidden_notes, pci_order, visible_gpus
from ds_numa._nvml import nvml_gpus, nvml_mig_parent
from ds_numa._pci import NVIDIA_DRIVER, read_node
from ds_numa._sysfs import read_sysfs
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu, Node, Topology

_ROOT = Path("/")


def read_here() -> Topology:
    """See `Topology.here`."""
    mask = read_mask()
    if not os.path.isdir(_ROOT / FOLDER):
        # No Linux, or one that hides sysfs: CPUs without nodes or siblings are all that is known.
        cpus = sorted({*range(os.cpu_count() or 1), *mask})
        return Topology(
            nodes=(Node(0, tuple(cpus)),),
            cores=tuple((cpu,) for cpu in cpus),
            allowed=tuple(mask),
            numa=False,
            visible=(),
            notes=(f"{_ROOT / FOLDER} is not there: nodes, cores and GPUs are unknown",),
        )
    listed = nvml_gpus()
    gpu_memory = [gpu.memory_node for gpu in listed or () if gpu.memory_node is not None]
    memory = read_own_memory(Tree(_ROOT))
    machine = _add_nvml(read_sysfs(_ROOT, allowed=mask, allowed_memory=memory, gpu_memory=gpu_memory), listed)
    try:
        found = visible_gpus(machine.gpus, os.environ, mig_parent=nvml_mig_parent)
    except GpuLookupError as error:
        return replace(machine, visible=None, notes=(*machine.notes, f"GPUs are left out: {error}"))
    notes = machine.notes if found else (*machine.notes, *hidden_notes(machine.gpus, os.environ))
    return replace(machine, visible=tuple(gpu.pci for gpu in found), notes=notes)


def _add_nvml(machine: Topology, listed: list[Gpu] | None) -> Topology:
    """Add what NVML says. A container may see every GPU of the host on the bus, and in NVML only those it was given."""
    tree = Tree(_ROOT)
    if listed is None:
        if tree.exists(NVIDIA_DRIVER):
            return machine
        gpus = tuple(replace(gpu, usable=False) if gpu.vendor == "nvidia" else gpu for gpu in machine.gpus)
        return replace(machine, gpus=gpus)  # no driver, so CUDA shows none
    known = {gpu.pci: gpu for gpu in machine.gpus}
    for pci, gpu in known.items():
        if gpu.vendor == "nvidia":
            known[pci] = replace(gpu, usable=False)
    with_cpus = [node.id for node in machine.nodes if node.cpus]
    for gpu in listed:
        seen = known.get(gpu.pci)
        node = seen.node if seen else read_node(tree, gpu.pci)
        if node is None and len(with_cpus) == 1:
            node = with_cpus[0]
        memory_node = seen.memory_node if seen and gpu.memory_node is None else gpu.memory_node
        known[gpu.pci] = replace(gpu, node=node, memory_node=memory_node)
    return replace(machine, gpus=tuple(sorted(known.values(), key=lambda gpu: pci_order(gpu.pci))))
