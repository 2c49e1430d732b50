"""GPUs of three vendors and network cards, as the PCI bus and the drivers show them."""

from __future__ import annotations

from pathlib import Path

import pytest
from ds_numa import Gpu, Nic, Topology
from machine_tree import MachineTree

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"


def base(root: Path, nodes: int = 2) -> MachineTree:
    tree = MachineTree(root).cpus([(cpu,) for cpu in range(nodes)])
    for number in range(nodes):
        tree.node(number, (number,))
    return tree


def nvidia_driver(tree: MachineTree, address: str, uuid: str, more: str = "") -> None:
    tree.put(f"proc/driver/nvidia/gpus/{address}/information", f"Model: \t H200\nGPU UUID: \t {uuid}\n{more}")


def kfd(tree: MachineTree, number: int, *, where: int = 0, unique: int = 0, simd: int = 304, domain: int = 0) -> None:
    text = f"cpu_cores_count 0\nsimd_count {simd}\nlocation_id {where}\ndomain {domain}\nunique_id {unique}"
    tree.put(f"sys/class/kfd/kfd/topology/nodes/{number}/properties", text)


def test_the_bus_shows_every_gpu_and_the_driver_those_that_were_given(tmp_path: Path) -> None:
    tree = base(tmp_path)
    for bus, node in (("17", 0), ("3d", 0), ("9a", 1)):
        tree.pci(f"0000:{bus}:00.0", klass="0x030200", vendor=NVIDIA, numa_node=node)
    tree.pci("0000:9b:00.0", klass="0x068000", vendor=NVIDIA, numa_node=1)  # an NVSwitch
    assert [gpu.usable for gpu in Topology.from_sysfs(tmp_path).gpus] == [True] * 3  # a copy without proc
    nvidia_driver(tree, "0000:3d:00.0", "GPU-2")
    assert Topology.from_sysfs(tmp_path).gpus == (
        Gpu("0000:17:00.0", 0, vendor="nvidia", usable=False),
        Gpu("0000:3d:00.0", 0, "GPU-2", None, "H200", "nvidia"),
        Gpu("0000:9a:00.0", 1, vendor="nvidia", usable=False),
    )


def test_a_gpu_that_was_not_used_yet_has_no_name(tmp_path: Path) -> None:
    tree = base(tmp_path)
    nvidia_driver(tree, "0000:17:00.0", "GPU-????????-????-????-????-????????????")
    nvidia_driver(tree, "0000:3d:00.0", "GPU-2", "GPU Excluded:\t Yes")
    found = Topology.from_sysfs(tmp_path).gpus
    assert [(gpu.uuid, gpu.vendor, gpu.usable) for gpu in found] == [
        (None, "nvidia", True),
        ("GPU-2", "nvidia", False),
    ]


@pytest.mark.parametrize(
    ("klass", "vendor", "address"),
    [
        ("0x030000", "0x1a03", "0000:03:00.0"),  # ASPEED: the board's own display
        ("0x030000", "0x102b", "0000:03:00.0"),  # Matrox, likewise
        ("0x030000", INTEL, "0000:00:02.0"),  # integrated graphics
        ("0x040300", NVIDIA, "0000:17:00.1"),  # a GPU's sound
    ],
)
def test_what_is_no_gpu_to_compute_on(tmp_path: Path, klass: str, vendor: str, address: str) -> None:
    base(tmp_path).pci(address, klass=klass, vendor=vendor, numa_node=0)
    assert Topology.from_sysfs(tmp_path).gpus == ()


def test_amds_driver_gives_order_names_and_parts(tmp_path: Path) -> None:
    tree = base(tmp_path)
    for address, node in (("0000:05:00.0", 0), ("0000:c1:00.0", 1), ("0001:01:00.0", 1), ("0000:e0:00.0", 1)):
        tree.pci(address, klass="0x038000", vendor=AMD, numa_node=node)
    kfd(tree, 0, simd=0)
    kfd(tree, 1, where=0xC100, unique=0xABC)
    kfd(tree, 2, where=0x0100, unique=7, domain=1)
    kfd(tree, 10, where=0x0500, unique=0xDEF)
    kfd(tree, 11, where=0x1000_0500, unique=0xDE0)  # the second part of the GPU before
    assert Topology.from_sysfs(tmp_path).gpus == (
        Gpu("0000:05:00.0", 0, "GPU-0000000000000def", vendor="amd", ordinals=(2, 3)),
        Gpu("0000:c1:00.0", 1, "GPU-0000000000000abc", vendor="amd", ordinals=(0,)),
        Gpu("0000:e0:00.0", 1, vendor="amd", usable=False),  # on the bus, and not given
        Gpu("0001:01:00.0", 1, "GPU-0000000000000007", vendor="amd", ordinals=(1,)),
    )


def test_a_container_without_amds_gpus(tmp_path: Path) -> None:
    tree = base(tmp_path).pci("0000:05:00.0", klass="0x038000", vendor=AMD, numa_node=0)
    assert Topology.from_sysfs(tmp_path).gpus[0].usable  # the driver is not asked in a copy without it
    kfd(tree, 0, simd=0)
    tree.put("sys/class/kfd/kfd/topology/nodes/1/properties", "")
    assert not Topology.from_sysfs(tmp_path).gpus[0].usable


def test_intels_tiles_are_numbered(tmp_path: Path) -> None:
    tree = base(tmp_path)
    for address in ("0000:18:00.0", "0000:2a:00.0", "0000:9a:00.0"):
        tree.pci(address, klass="0x038000", vendor=INTEL, numa_node=0)
    for tile in (0, 1):
        (tmp_path / f"sys/bus/pci/devices/0000:18:00.0/drm/card1/gt/gt{tile}").mkdir(parents=True)  # i915
        (tmp_path / f"sys/bus/pci/devices/0000:9a:00.0/tile{tile}").mkdir()  # xe
    assert [gpu.ordinals for gpu in Topology.from_sysfs(tmp_path).gpus] == [(0, 1), (2,), (3, 4)]


def test_network_cards(tmp_path: Path) -> None:
    tree = base(tmp_path)
    tree.pci("0000:c2:00.0", klass="0x020700", numa_node=1).pci("0000:19:00.0", klass="0x020000", numa_node=0)
    tree.pci("0000:19:00.2", klass="0x020000", numa_node=0, physfn="x")  # a virtual function
    tree.pci("0000:00:04.0", klass="0x020000", numa_node=-1).pci("0000:1a:00.0", klass="0x028000", numa_node=0)
    for path in ("c2:00.0/infiniband/mlx5_0", "c2:00.0/net/ib0", "19:00.0/net/eth0", "00:04.0/virtio1/net/eth1"):
        (tmp_path / f"sys/bus/pci/devices/0000:{path}").mkdir(parents=True)
    assert Topology.from_sysfs(tmp_path).nics == (
        Nic("0000:00:04.0", None, ("eth1",)),
        Nic("0000:19:00.0", 0, ("eth0",)),
        Nic("0000:1a:00.0", 0, (), "other"),
        Nic("0000:c2:00.0", 1, ("mlx5_0", "ib0"), "infiniband"),
    )


def test_devices_of_unknown_nodes_hang_on_the_only_one_with_cpus(tmp_path: Path) -> None:
    tree = base(tmp_path, 1).node(1)
    tree.pci("0000:17:00.0", klass="0x030200", vendor=NVIDIA, numa_node=-1).pci("0000:19:00.0", klass="0x020000")
    found = Topology.from_sysfs(tmp_path)
    assert (found.gpus[0].node, found.nics[0].node) == (0, 0)
    base(tmp_path, 2)
    assert Topology.from_sysfs(tmp_path).gpus[0].node is None


def test_a_node_that_is_not_shown_is_unknown_and_said(tmp_path: Path) -> None:
    base(tmp_path).pci("0000:17:00.0", klass="0x030200", vendor=NVIDIA, numa_node=5)
    found = Topology.from_sysfs(tmp_path)
    assert found.gpus[0].node is None
    assert found.notes == ("device 0000:17:00.0 hangs on node 5, which is not shown: its node is taken as unknown",)
