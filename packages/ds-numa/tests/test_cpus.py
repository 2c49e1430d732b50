"""Cores, sockets, caches and kinds of cores, from lists and from masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from ds_numa import Topology
from machine_tree import CPU, MachineTree

# Two sockets of two nodes of two caches of two cores of two CPUs; siblings far apart.
CORES = [(core, core + 16) for core in range(16)]
CACHES = [tuple(cpu for core in CORES[i : i + 2] for cpu in core) for i in range(0, 16, 2)]
NODES = [tuple(cpu for core in CORES[i : i + 4] for cpu in core) for i in range(0, 16, 4)]
SOCKETS = [tuple(cpu for core in CORES[i : i + 8] for cpu in core) for i in range(0, 16, 8)]


def as_sets(groups: object) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}  # type: ignore[attr-defined]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_everything_is_found_in_lists_and_in_masks(tmp_path: Path, masks: bool, new_names: bool, lists: bool) -> None:
    tree = MachineTree(tmp_path, masks=masks, new_names=new_names)
    tree.cpus(CORES, sockets=SOCKETS, caches={1: CORES, 2: CORES, 3: CACHES}, lists=lists)
    for number, cpus in enumerate(NODES):
        tree.node(number, cpus)
    found = Topology.from_sysfs(tmp_path)
    assert as_sets(found.cores) == as_sets(CORES)
    assert as_sets(found.sockets) == as_sets(SOCKETS)
    assert as_sets(found.l3) == as_sets(CACHES)
    assert [set(node.cpus) for node in found.nodes] == [set(cpus) for cpus in NODES]
    assert (found.core_classes, found.notes) == ((), ())


def test_a_nodes_cpus_are_found_by_its_links_too(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,), (3,)])
    for number, cpus in enumerate(((0, 2), (1, 3))):
        for cpu in cpus:
            (tmp_path / f"sys/devices/system/node/node{number}/cpu{cpu}").mkdir(parents=True)
    assert [node.cpus for node in Topology.from_sysfs(tree.root).nodes] == [(0, 2), (1, 3)]


def test_a_shared_cache_across_sockets_does_not_join_the_sockets(tmp_path: Path) -> None:
    cores = [(0,), (1,), (2,), (3,)]
    tree = MachineTree(tmp_path).cpus(cores, sockets=[(0, 1), (2, 3)], caches={3: [(0, 1, 2, 3)]}, lists=False)
    assert Topology.from_sysfs(tree.root).sockets == ((0, 1), (2, 3))


def test_the_last_cache_may_be_of_another_level(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,)], caches={1: [(0,), (1,), (2,)], 2: [(0, 1)], 4: [(2,)]})
    tree.put(f"{CPU}/cpu0/cache/index5/level", 5).put(f"{CPU}/cpu0/cache/index5/type", "Instruction")
    assert Topology.from_sysfs(tree.root).l3 == ((0, 1), (2,))


@pytest.mark.parametrize("package", ["-1", None])
def test_unknown_packages_are_no_socket(tmp_path: Path, package: str | None) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)])
    if package is not None:
        for cpu in (0, 1):
            tree.put(f"{CPU}/cpu{cpu}/topology/physical_package_id", package)
    found = Topology.from_sysfs(tree.root)
    assert (found.sockets, found.l3, found.notes) == ((), (), ())


def test_one_unreadable_file_does_not_lose_the_sockets(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus(CORES, sockets=SOCKETS)
    tree.put(f"{CPU}/cpu0/topology/physical_package_id", "\0")
    found = Topology.from_sysfs(tree.root)
    assert as_sets(found.sockets) == as_sets(SOCKETS)
    assert [note for note in found.notes if "cpu0/topology/physical_package_id" in note]


def test_sockets_that_are_told_in_part_are_left_out_with_a_note(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)])
    tree.put(f"{CPU}/cpu0/topology/physical_package_id", 0)
    found = Topology.from_sysfs(tree.root)
    assert found.sockets == ()
    assert found.notes == ("sockets are told for some CPUs and not for 1: they are left out",)


@pytest.mark.parametrize("package", ["-1", "0", None])
@pytest.mark.parametrize("masks", [False, True])
def test_siblings_tell_sockets_where_ids_do_not(tmp_path: Path, package: str | None, masks: bool) -> None:
    """POWER and s390 have no ids; on some Itanium machines packages of one node have the same id."""
    tree = MachineTree(tmp_path, masks=masks, new_names=False).cpus(
        [(0, 1), (2, 3), (4, 5)], sockets=[(0, 1, 2, 3), (4, 5)]
    )
    for path in tmp_path.rglob("physical_package_id"):
        path.unlink()
        if package is not None:
            path.write_text(f"{package}\n")
    found = Topology.from_sysfs(tree.root)
    assert (found.sockets, found.notes) == (((0, 1, 2, 3), (4, 5)), ())


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_ids_tell_sockets_where_siblings_contradict_each_other(tmp_path: Path, wrong: int) -> None:
    sockets = [(0, 2, 4), (1, 3, 5)]
    tree = MachineTree(tmp_path).cpus([(cpu,) for cpu in range(6)], sockets=sockets)
    tree.put(f"{CPU}/cpu{wrong}/topology/package_cpus_list", "0-3")
    assert Topology.from_sysfs(tree.root).sockets == tuple(sockets)


def test_a_cache_list_that_contradicts_another_loses_no_cache(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(cpu,) for cpu in range(6)], caches={3: [(0, 2, 4), (1, 3, 5)]})
    tree.put(f"{CPU}/cpu1/cache/index3/shared_cpu_list", "0-1")
    assert as_sets(Topology.from_sysfs(tree.root).l3) == {frozenset((0, 2, 4)), frozenset((1, 3, 5))}


def test_an_empty_cache_list_means_the_core(tmp_path: Path) -> None:
    cores = [(0, 1), (2, 3)]
    tree = MachineTree(tmp_path, masks=True).cpus(cores, caches={3: cores})
    for path in tmp_path.rglob("shared_cpu_map"):
        path.write_text("00000000\n")
    assert Topology.from_sysfs(tree.root).l3 == ((0, 1), (2, 3))


def test_a_cache_list_without_its_own_cpu_yields_to_the_mask(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,), (3,)], caches={3: [(0, 1), (2, 3)]})
    for cpu in (2, 3):
        tree.put(f"{CPU}/cpu{cpu}/cache/index3/shared_cpu_list", "0-1")
        tree.put(f"{CPU}/cpu{cpu}/cache/index3/shared_cpu_map", "0000000c")
    found = Topology.from_sysfs(tree.root)
    assert (found.l3, found.notes) == (((0, 1), (2, 3)), ())


def test_caches_that_are_told_for_some_cpus_stay(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,), (3,)], caches={3: [(1, 0), (2,)]})
    for path in (tmp_path / f"{CPU}/cpu0/cache/index3").iterdir():
        path.unlink()  # another CPU tells of this one
    for path in (tmp_path / f"{CPU}/cpu1/cache/index3").glob("type"):
        path.unlink()
    found = Topology.from_sysfs(tree.root)
    assert found.l3 == ((0, 1), (2,))
    assert found.notes == ("the last-level cache of CPUs 3 is not told",)


@pytest.mark.parametrize(
    ("family", "numbers", "cores"),
    [
        ("21", (0, 1, 2, 3), ((0,), (1,), (2,), (3,))),
        ("21", (0, 0, 1, 1), ((0, 1), (2, 3))),
        ("23", (0, 1, 2, 3), ((0, 1), (2, 3))),  # Zen has SMT
    ],
)
def test_the_cores_of_a_bulldozer_module_are_no_smt(
    tmp_path: Path, family: str, numbers: tuple[int, ...], cores: tuple[tuple[int, ...], ...]
) -> None:
    tree = MachineTree(tmp_path).cpus([(0, 1), (2, 3)])
    for cpu, number in enumerate(numbers):
        tree.put(f"{CPU}/cpu{cpu}/topology/core_id", number)
    tree.put("proc/cpuinfo", f"processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: 1\n")
    assert Topology.from_sysfs(tree.root).cores == cores


def test_p_and_e_cores(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0, 1), (2, 3), (4,), (5,), (6,)])
    tree.put("sys/devices/cpu_core/cpus", "0-3").put("sys/devices/cpu_atom/cpus", "4-5")
    tree.put("sys/devices/cpu_lowpower/cpus", "6")
    assert Topology.from_sysfs(tree.root).core_classes == ((0, 1, 2, 3), (4, 5), (6,))


def test_arm_cores_are_told_apart_by_capacity(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,), (3,)])
    for cpu, capacity in enumerate((430, 1024, 430, 1024)):
        tree.put(f"{CPU}/cpu{cpu}/cpu_capacity", capacity)
    assert Topology.from_sysfs(tree.root).core_classes == ((1, 3), (0, 2))


def test_cores_of_two_kinds_at_once_count_once(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,)])
    tree.put("sys/devices/cpu_core/cpus", "0-1").put("sys/devices/cpu_atom/cpus", "1-2")
    assert Topology.from_sysfs(tree.root).core_classes == ((0, 1), (2,))


def test_offline_cpus_are_known_without_the_list(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,)]).put(f"{CPU}/online", "garbage")
    tree.put(f"{CPU}/cpu1/online", 0).put(f"{CPU}/cpu2/online", 1)
    assert Topology.from_sysfs(tree.root).allowed == (0, 2)


def test_equal_cores_are_one_class_which_is_none(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,)])
    for cpu in (0, 1):
        tree.put(f"{CPU}/cpu{cpu}/cpu_capacity", 1024)
    tree.put("sys/devices/cpu_core/cpus", "0-1")
    assert Topology.from_sysfs(tree.root).core_classes == ()


def test_siblings_on_two_nodes_are_two_cores_and_said(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0, 1), (2, 3)]).node(0, (0, 2)).node(1, (1, 3))
    found = Topology.from_sysfs(tree.root)
    assert found.cores == ((0,), (1,), (2,), (3,))
    assert found.notes == (
        "CPUs 0-1 are siblings that lie on several nodes or sockets (and 1 more cores like it): each part is a core",
    )


def test_fake_nodes_that_share_cpus_split_no_core(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0, 1), (2, 3)]).node(0, (0, 1, 2, 3)).node(1, (0, 1, 2, 3))
    found = Topology.from_sysfs(tree.root)
    assert (found.cores, found.notes) == (((0, 1), (2, 3)), ())


def test_siblings_that_contradict_each_other_lose_no_cpu(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path).cpus([(0,), (1,), (2,)])
    for cpu, siblings in enumerate(("0-1", "1-2", "1-2")):
        tree.put(f"{CPU}/cpu{cpu}/topology/core_cpus_list", siblings)
    assert sorted(cpu for core in Topology.from_sysfs(tree.root).cores for cpu in core) == [0, 1, 2]


@pytest.mark.parametrize("content", [b"\0\0\0", b"garbage", b"\xff", b"0-999999999"])
def test_no_file_of_a_machine_can_end_the_reading(tmp_path: Path, content: bytes) -> None:
    """Each file in turn holds garbage; every CPU stays, and a note names the file."""
    tree = MachineTree(tmp_path).cpus(CORES[:4], sockets=[sum(CORES[:4], ())], caches={3: [sum(CORES[:4], ())]})
    tree.node(0, sum(CORES[:2], ()), distance="10 20").node(1, sum(CORES[2:4], ()), distance="20 10")
    tree.pci("0000:17:00.0", klass="0x030200", vendor="0x10de", numa_node=1).put("sys/fs/cgroup/cpu.max", "max 1")
    tree.put("proc/driver/nvidia/gpus/0000:17:00.0/information", "GPU UUID: GPU-1")
    cpus = sorted(sum(CORES[:4], ()))
    silent = {"present"}  # read only where memory without CPUs has to be explained
    for path in sorted(entry for entry in tmp_path.rglob("*") if entry.is_file()):
        before = path.read_bytes()
        path.write_bytes(content)
        found = Topology.from_sysfs(tmp_path)
        path.write_bytes(before)
        assert sorted(cpu for core in found.cores for cpu in core) == cpus, path
        assert sorted(found.allowed) == cpus, path
        named = any(str(path) in note or path.name in note for note in found.notes)
        told_by_another = path.parent.name in ("topology", "index3")
        assert [len(node.cpus) for node in found.nodes] == [4, 4], path
        text = b"9" in content or b"g" in content
        text = text and path.name in ("class", "vendor", "information", "type")  # any text is legal there
        assert named or told_by_another or text or path.name in silent, (path, found.notes)
