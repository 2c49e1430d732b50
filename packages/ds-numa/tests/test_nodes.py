"""Distances, initiators, and what memory without CPUs is."""

from __future__ import annotations

from pathlib import Path

import pytest
from ds_numa import Topology
from machine_tree import NODE, MachineTree

KNL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 87\nmodel name\t: Intel Xeon Phi"


def kinds(tree: MachineTree) -> dict[int, str]:
    return {node.id: node.kind for node in Topology.from_sysfs(tree.root).nodes}


def two(root: Path, bandwidth: int | None = None) -> MachineTree:
    tree = MachineTree(root).cpus([(0,), (1,)])
    for number in (0, 1):
        tree.node(number, (number,), near=(number,) if bandwidth else (), bandwidth=bandwidth)
    return tree


@pytest.mark.parametrize(("bandwidth", "kind"), [(700_000, "hbm"), (60_000, "cxl"), (200_000, "ram")])
def test_firmware_tells_memory_by_its_speed(tmp_path: Path, bandwidth: int, kind: str) -> None:
    tree = two(tmp_path, 200_000).node(2, near=(1,), bandwidth=bandwidth)
    found = Topology.from_sysfs(tree.root)
    assert (found.node(2).kind, found.node(2).initiators, found.notes) == (kind, (1,), ())


@pytest.mark.parametrize(("tier", "kind"), [(2, "hbm"), (22, "cxl"), (4, "unknown")])
def test_the_kernels_memory_tiers_tell_it_without_firmware(tmp_path: Path, tier: int, kind: str) -> None:
    tree = two(tmp_path).node(2)
    tiers = "sys/devices/virtual/memory_tiering"
    tree.put(f"{tiers}/memory_tier4/nodelist", "0-2" if tier == 4 else "0-1")
    if tier != 4:
        tree.put(f"{tiers}/memory_tier{tier}/nodelist", "2")
    assert kinds(tree)[2] == kind


def test_a_memory_device_is_an_expander(tmp_path: Path) -> None:
    tree = two(tmp_path).node(2).node(3).put("sys/bus/dax/devices/dax0.0/target_node", 2)
    assert kinds(tree) == {0: "cpu", 1: "cpu", 2: "cxl", 3: "unknown"}


@pytest.mark.parametrize(
    ("cpuinfo", "kind"), [(KNL, "hbm"), (KNL.replace("87", "133"), "hbm"), (KNL.replace("87", "85"), "unknown")]
)
def test_knights_landing_has_no_firmware_table(tmp_path: Path, cpuinfo: str, kind: str) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)])
    tree.node(0, (0, 1), distance="10 31").node(1, gib=16, distance="31 10").put("proc/cpuinfo", cpuinfo)
    assert kinds(tree) == {0: "cpu", 1: kind}


def test_memory_whose_cpus_are_offline_is_ram(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)], offline=[2, 3]).node(0, (0, 1)).node(1)
    assert kinds(tree) == {0: "cpu", 1: "ram"}
    tree.put("sys/devices/system/cpu/smt/control", "off")  # siblings that are off explain nothing
    assert kinds(tree) == {0: "cpu", 1: "unknown"}


def test_what_stays_unknown_is_said_with_its_size(tmp_path: Path) -> None:
    found = Topology.from_sysfs(two(tmp_path).node(2, gib=15.75).root)
    assert found.notes == (
        "node 2 has 15.8 GiB of memory and no CPUs, and nothing tells what it is: no rank is sent there",
    )


def test_grace_hopper(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(cpu,) for cpu in range(72)])
    tree.node(0, range(72), gib=480, near=(0,), bandwidth=300_000)
    tree.node(1, gib=96, near=(0,), bandwidth=400_000).node(2, gib=0).put(f"{NODE}/has_generic_initiator", "1-2")
    assert kinds(tree) == {0: "cpu", 1: "unknown", 2: "empty"}
    tree.pci("0009:01:00.0", klass="0x030200", vendor="0x10de", numa_node=0)
    tree.put("proc/driver/nvidia/gpus/0009:01:00.0/information", "Model: GH200\nGPU UUID: GPU-1")
    tree.put("proc/driver/nvidia/gpus/0009:01:00.0/numa_status", "Node: 1\nStatus: online")
    assert kinds(tree) == {0: "cpu", 1: "gpu", 2: "empty"}
    assert Topology.from_sysfs(tree.root).notes == ()


def test_mi300a_shares_its_node_with_the_cpus(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(cpu,) for cpu in range(4)])
    for number in range(4):
        tree.node(number, (number,), gib=128)
        tree.pci(f"000{number}:01:00.0", klass="0x120000", vendor="0x1002", numa_node=number)
    found = Topology.from_sysfs(tree.root)
    assert [(gpu.node, gpu.vendor) for gpu in found.gpus] == [(number, "amd") for number in range(4)]
    assert {node.kind for node in found.nodes} == {"cpu"}


@pytest.mark.parametrize("row", ["10", "10 20 30 40", "10 x", ""])
def test_a_row_of_the_wrong_length_is_no_distance(tmp_path: Path, row: str) -> None:
    found = Topology.from_sysfs(MachineTree(tmp_path).cpus([(0,), (1,)]).node(0, (0,), distance=row).node(1, (1,)).root)
    assert found.distance(0, 1) == 20
    assert bool(found.notes) == bool(row)
    assert all("node0/distance" in note for note in found.notes)


def test_columns_follow_the_online_nodes_or_else_the_folders(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)]).node(0, (0,), distance="10 40").node(8, (1,), distance="40 10")
    assert Topology.from_sysfs(tree.root).distance(0, 8) == 40
    tree.put(f"{NODE}/online", "0,4,8")  # a copy that lacks a node
    assert Topology.from_sysfs(tree.root).distance(0, 8) == 40
    tree.put(f"{NODE}/node0/distance", "10 20 80")
    assert Topology.from_sysfs(tree.root).distance(0, 8) == 80


def test_one_node_without_a_list_has_all_cpus(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)])
    (tmp_path / f"{NODE}/node0").mkdir(parents=True)
    assert [node.cpus for node in Topology.from_sysfs(tree.root).nodes] == [(0, 1)]
    (tmp_path / f"{NODE}/node1").mkdir()
    found = Topology.from_sysfs(tree.root)
    assert not found.numa
    assert [node.cpus for node in found.nodes] == [(0, 1)]
    assert "has nodes [0, 1] and tells the CPUs of none" in found.notes[0]


def test_cpus_of_an_offline_node_are_not_handed_to_another(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(cpu,) for cpu in range(4, 9)]).node(1, (1, 3, 5, 7, 9))
    found = Topology.from_sysfs(tree.root)
    assert [node.cpus for node in found.nodes] == [(5, 7)]
    assert found.notes == ("CPUs 4,6,8 are online and on no node that is told",)


def test_a_node_without_memory(tmp_path: Path) -> None:
    found = Topology.from_sysfs(two(tmp_path).node(1, (1,), gib=0).root)
    assert (found.node(1).kind, found.node(1).memory_bytes) == ("cpu", 0)
