"""Find GPUs and network cards on the PCI bus, and what their drivers say about them.

Source: PCI class codes (pci.ids, class 02, 03 and 12); kernel Documentation/ABI/testing/sysfs-bus-pci; NVIDIA's
``/proc/driver/nvidia/gpus``; the ``kfd`` topology of the kernel's amdgpu driver (drivers/gpu/drm/amd/amdkfd).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from ds_numa._files import Tree
from ds_numa._gpus import is_pci, normalise_pci, pci_order
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu, Nic, Vendor

BUS = "sys/bus/pci/devices"
NVIDIA_DRIVER = "proc/driver/nvidia/gpus"
_KFD = "sys/class/kfd/kfd/topology/nodes"
_VENDORS: dict[str, Vendor] = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D, display, processing accelerator
Device = TypeVar("Device", Gpu, Nic)
_NIC_CLASSES = {"0x0200": "ethernet", "0x0207": "infiniband", "0x0280": "other"}


@dataclass(frozen=True)
class Bus:
    """The devices of interest, each in order of PCI addresses."""

    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]


def read_bus(tree: Tree) -> Bus:
    """Read GPUs and network cards. Virtual functions are left out beside the physical function that they belong to.

    A board's own display controller (ASPEED, Matrox) has another vendor. Intel's integrated graphics sits on bus 0;
    cards sit behind a bridge.
    """
    gpus: dict[str, Gpu] = {}
    nics = []
    for pci in tree.names(BUS):
        folder = f"{BUS}/{pci}"
        kind = (tree.text(f"{folder}/class") or "")[:6]
        if kind not in _GPU_CLASSES and kind not in _NIC_CLASSES:
            continue
        if not is_pci(pci):
            tree.fault(folder, "is no PCI address")
        elif kind in _GPU_CLASSES:
            vendor = _VENDORS.get(tree.text(f"{folder}/vendor") or "")
            integrated = vendor == "intel" and pci_order(pci)[1] == 0
            if vendor and not integrated and not tree.exists(f"{folder}/physfn"):
                gpus[pci] = Gpu(pci, read_node(tree, pci), vendor=vendor)
        elif not tree.exists(f"{folder}/physfn"):
            nics.append(Nic(pci, read_node(tree, pci), _interfaces(tree, folder), _NIC_CLASSES[kind]))
    _ask_nvidia(tree, gpus)
    _ask_amd(tree, gpus)
    _count_tiles(tree, gpus)
    return Bus(
        tuple(sorted(gpus.values(), key=lambda gpu: pci_order(gpu.pci))),
        tuple(sorted(nics, key=lambda nic: pci_order(nic.pci))),
    )


def read_node(tree: Tree, pci: str) -> int | None:
    """The NUMA node that a PCI device hangs on; None where the kernel does not know it (it writes -1)."""
    node = tree.number(f"{BUS}/{pci}/numa_node")
    return None if node is None or node < 0 else node


def place_alone(bus: Bus, cpu_nodes: Collection[int], all_nodes: Collection[int], notes: list[str]) -> Bus:
    """Where only one node has CPUs, devices of an unknown node hang on it (virtual machines say -1)."""
    alone = next(iter(cpu_nodes)) if len(cpu_nodes) == 1 else None

    def place(device: Device) -> Device:
        if device.node in all_nodes:
            return device
        if device.node is not None:
            notes.append(
                f"device {device.pci} hangs on node {device.node}, which is not shown: its node is taken as unknown"
            )
        return replace(device, node=alone)

    return Bus(tuple(map(place, bus.gpus)), tuple(map(place, bus.nics)))


def _interfaces(tree: Tree, folder: str) -> tuple[str, ...]:
    names = [*tree.names(f"{folder}/infiniband"), *tree.names(f"{folder}/net")]
    if not names:  # paravirtual cards have a device of their own in between
        for part in tree.names(folder):
            if part.startswith("virtio"):
                names += tree.names(f"{folder}/{part}/net")
    return tuple(names)


def _ask_nvidia(tree: Tree, gpus: dict[str, Gpu]) -> None:
    """Add what NVIDIA's driver says; a GPU that it does not list was not given to this container."""
    if not tree.exists(NVIDIA_DRIVER):
        return
    listed = set()
    for name in tree.names(NVIDIA_DRIVER):
        try:
            pci = normalise_pci(name)
        except GpuLookupError:
            continue
        listed.add(pci)
        facts = {}
        for line in (tree.text(f"{NVIDIA_DRIVER}/{name}/information") or "").splitlines():
            key, _, value = line.partition(":")
            facts[key] = value.strip()
        uuid = facts.get("GPU UUID") or ""
        status = re.match(r"Node:\s*(\d{1,9})\b", tree.text(f"{NVIDIA_DRIVER}/{name}/numa_status") or "")
        gpus[pci] = Gpu(
            pci,
            node=gpus[pci].node if pci in gpus else read_node(tree, pci),
            uuid=None if "?" in uuid or not uuid else uuid,  # question marks until the GPU is first used
            memory_node=int(status[1]) if status else None,
            model=facts.get("Model") or None,
            vendor="nvidia",
            usable=facts.get("GPU Excluded") != "Yes",
        )
    for pci, gpu in gpus.items():
        if gpu.vendor == "nvidia" and pci not in listed:
            gpus[pci] = replace(gpu, usable=False)


def _ask_amd(tree: Tree, gpus: dict[str, Gpu]) -> None:
    """Add what AMD's compute driver says. Its order is the runtime's; a partitioned GPU has an entry for each part.

    A GPU without an entry that can be read was not given to this container.
    """
    numbers = tree.ids(_KFD, "")
    if not numbers:
        return
    entries: dict[str, list[tuple[int, int]]] = {}  # (ordinal, unique id) by PCI address
    ordinal = 0
    for number in numbers:
        facts = dict(re.findall(r"^(\w+) (\d{1,20})$", tree.text(f"{_KFD}/{number}/properties") or "", re.MULTILINE))
        if int(facts.get("simd_count", 0)) == 0:  # a CPU, or a GPU of another container
            continue
        where = int(facts.get("location_id", 0)) & 0xFFFF  # the highest bits number the partitions
        pci = f"{int(facts.get('domain', 0)):04x}:{where >> 8:02x}:{where >> 3 & 31:02x}.{where & 7}"
        if not is_pci(pci):
            tree.fault(f"{_KFD}/{number}/properties", f"names the PCI address {pci[:30]}, which is none")
            continue
        entries.setdefault(pci, []).append((ordinal, int(facts.get("unique_id", 0))))
        ordinal += 1
    for pci, parts in entries.items():
        gpu = gpus.get(pci) or Gpu(pci, read_node(tree, pci), vendor="amd")
        unique = parts[0][1]
        gpus[pci] = replace(
            gpu, uuid=f"GPU-{unique:016x}" if unique else None, ordinals=tuple(number for number, _ in parts)
        )
    for pci, gpu in gpus.items():
        if gpu.vendor == "amd" and pci not in entries:
            gpus[pci] = replace(gpu, usable=False)


def _count_tiles(tree: Tree, gpus: dict[str, Gpu]) -> None:
    """Number the tiles of Intel's GPUs: Level Zero shows each as a device of its own unless told otherwise."""
    first = 0
    for pci in sorted((pci for pci, gpu in gpus.items() if gpu.vendor == "intel"), key=pci_order):
        folder = f"{BUS}/{pci}"
        tiles = len(tree.ids(folder, "tile"))  # the xe driver
        for card in tree.names(f"{folder}/drm"):
            tiles = tiles or len(tree.ids(f"{folder}/drm/{card}/gt", "gt"))  # the i915 driver
        tiles = tiles or 1
        gpus[pci] = replace(gpus[pci], ordinals=tuple(range(first, first + tiles)))
        first += tiles
