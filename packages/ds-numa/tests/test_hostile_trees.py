"""Trees that no kernel writes: the reader takes what can be true, names the rest, and ends only without a machine."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa.errors import TopologyError
from machine_tree import CPU, NODE, MachineTree

DIGITS = "9" * 5000  # more than Python turns into a number
PCI = "sys/bus/pci/devices"
NVIDIA = "proc/driver/nvidia/gpus/0000:17:00.0"
KFD = "sys/class/kfd/kfd/topology/nodes/1/properties"


def base(root: Path) -> MachineTree:
    tree = MachineTree(root).cpus([(cpu,) for cpu in range(8)], sockets=[range(4), range(4, 8)])
    return tree.node(0, range(4), distance="10 20").node(1, range(4, 8), distance="20 10")


def read(root: Path) -> Topology:
    found = Topology.from_sysfs(root)
    assert Topology.from_dict(found.to_dict()) == found
    found.show(file=io.StringIO())
    return found


@pytest.mark.parametrize(
    ("path", "text", "note"),
    [
        (f"{NODE}/node0/meminfo", f"Node 0 MemTotal: {DIGITS} kB", "names no MemTotal"),
        (f"{NODE}/node0/distance", f"{DIGITS} 10", "holds no row of distances"),
        (f"{NODE}/online", DIGITS, "holds no list"),
        (f"{NODE}/node{'9' * 30}/cpulist", "4-7", "has a number above"),
        (f"{NODE}/node01/cpulist", "4-7", ""),  # the kernel pads no number
        (f"{CPU}/cpu0/topology/physical_package_id", DIGITS, "holds no whole number"),
        (f"{CPU}/cpu0/cache/index{'9' * 30}/level", "3", "has a number above"),
        ("sys/fs/cgroup/cpu.max", f"{DIGITS} 100000", "is no quota"),
        ("sys/fs/cgroup/cpu.max", f"1{'0' * 400} 1", "is no quota"),
        ("sys/fs/cgroup/cpu.max", f"1 {'9' * 400}", "is no quota"),
        ("proc/mounts", "a / cgroup2 rw\nb  cgroup2\nc \\777\\000 cgroup rw,cpuset 0 0\n" + "x " * 9999, ""),
        ("proc/self/cgroup", "::::\n:\n0::\n1:cpuset:" + "/a" * 999, ""),
        ("proc/self/cpuset", "/../../..", ""),
        ("proc/self/status", f"Cpus_allowed_list:\t9-1\nMems_allowed_list:\t{DIGITS}", ""),
        (f"{PCI}/0000:zz:00.0/class", "0x030200", "is no PCI address"),
        (f"{PCI}/a.b.c:d/class", "0x020000", "is no PCI address"),
        ("proc/driver/nvidia/gpus/oops/information", "Model: H200", ""),
        (KFD, f"simd_count {DIGITS}", ""),
        (KFD, f"simd_count 8\ndomain {'9' * 20}", "which is none"),
    ],
)
def test_what_cannot_be_true_is_left_out(tmp_path: Path, path: str, text: str, note: str) -> None:
    found = read(base(tmp_path).put(path, text).root)
    assert [(node.id, node.cpus) for node in found.nodes] == [(0, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]
    assert (set(found.sockets), found.allowed) == ({(0, 1, 2, 3), (4, 5, 6, 7)}, tuple(range(8)))
    assert (found.gpus, found.nics, found.cpu_quota) == ((), (), None)
    assert [note in said for said in found.notes] == ([True] if note else [])


def test_a_nonsensical_node_of_a_gpu(tmp_path: Path) -> None:
    tree = (
        base(tmp_path).put(f"{NVIDIA}/information", "GPU UUID: GPU-1").put(f"{NVIDIA}/numa_status", f"Node: {DIGITS}")
    )
    found = read(tree.pci("0000:17:00.0", klass="0x030200", vendor="0x10de", numa_node=10**30).root)
    assert [(gpu.pci, gpu.node, gpu.memory_node) for gpu in found.gpus] == [("0000:17:00.0", None, None)]
    assert "which is not shown" in found.notes[0]


def test_virtual_functions_are_no_cards_of_their_own(tmp_path: Path) -> None:
    tree = base(tmp_path).pci("10000:18:00.0", klass="0x020000", numa_node=1)
    tree.pci("10000:18:00.1", klass="0x020000", numa_node=1, physfn="")
    assert [(nic.pci, nic.node) for nic in read(tree.root).nics] == [("10000:18:00.0", 1)]


def test_a_gpu_on_a_node_without_cpus_beside_one_of_another_vendor(tmp_path: Path) -> None:
    tree = base(tmp_path).node(5, gib=0).pci("0000:17:00.0", klass="0x030200", vendor="0x10de", numa_node=5)
    found = read(tree.pci("0000:03:00.0", klass="0x038000", vendor="0x1002", numa_node=0).root)
    assert [(gpu.vendor, gpu.node) for gpu in found.gpus] == [("amd", 0), ("nvidia", 5)]
    assert found.node(5).kind == "empty"


def test_sparse_numbers_far_apart(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (8191,), (60000,)], sockets=[(0,), (8191, 60000)])
    found = read(tree.node(0, (0,)).node(9999, (8191, 60000)).root)
    assert [(node.id, node.cpus) for node in found.nodes] == [(0, (0,)), (9999, (8191, 60000))]
    assert found.sockets == ((0,), (8191, 60000))


def test_a_node_whose_cpus_are_all_offline_is_ordinary_memory(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)], offline=[2, 3]).node(0, (0, 1)).node(1, (2, 3))
    assert [(node.cpus, node.kind) for node in read(tree.root).nodes] == [((0, 1), "cpu"), ((), "ram")]


def test_one_node_that_lists_no_cpu_has_them_all(tmp_path: Path) -> None:
    found = read(MachineTree(tmp_path).cpus([(0,), (1,)]).node(0).root)
    assert ([node.cpus for node in found.nodes], found.notes) == ([(0, 1)], ())


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 34)  # a hole: it takes no room on the disk


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(endless, "does not end"), (huge, "does not end"), (loop, "(ELOOP)"), (folder, "(EISDIR)")],
)
@pytest.mark.parametrize("path", [f"{CPU}/online", f"{NODE}/node1/meminfo", f"{CPU}/cpu0/topology/core_cpus_list"])
def test_files_that_are_none(tmp_path: Path, spoil: Callable[[Path], None], reason: str, path: str) -> None:
    tree = base(tmp_path)
    spoil(tmp_path / path)
    found = read(tree.root)
    assert found.allowed == tuple(range(8))
    assert [len(node.cpus) for node in found.nodes] == [4, 4]
    assert path in found.notes[0]
    assert reason in found.notes[0]


def test_folders_that_are_none(tmp_path: Path) -> None:
    tree = base(tmp_path)
    shutil.rmtree(tmp_path / NODE)
    (tmp_path / NODE).symlink_to(tmp_path / NODE)
    os.symlink(tmp_path, tmp_path / "sys/bus")  # a tree that holds itself
    found = read(tree.root)
    assert (found.numa, found.allowed) == (False, tuple(range(8)))
    assert f"{NODE} cannot be listed (ELOOP)" in found.notes[0]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    tree = base(tmp_path)
    for parent, name in ((NODE, b"node\xff"), (PCI, b"0000:\xff")):
        (tmp_path / parent).mkdir(parents=True, exist_ok=True)
        (Path(os.fsdecode(os.fsencode(tmp_path / parent) + b"/" + name))).mkdir()
    assert len(read(tree.root).nodes) == 2


def test_a_file_in_the_place_of_all_cpus_is_no_machine(tmp_path: Path) -> None:
    (tmp_path / CPU).parent.mkdir(parents=True)
    (tmp_path / CPU).write_text("0-7")
    with pytest.raises(TopologyError, match="has no sys/devices/system/cpu"):
        Topology.from_sysfs(tmp_path)


def test_a_tree_of_empty_files_has_the_cpus_of_its_folders(tmp_path: Path) -> None:
    tree = base(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_text("")
    found = read(tree.root)
    assert (found.allowed, found.sockets, found.numa) == (tuple(range(8)), (), False)
    assert "tells the CPUs of none" in found.notes[0]
