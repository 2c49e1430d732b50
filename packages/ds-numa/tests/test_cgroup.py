"""Cpusets and quotas of control groups, version 1 and 2, of a live and of a copied tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from ds_numa import Topology
from machine_tree import MachineTree

V1 = "3:cpuset:/job\n1:cpu,cpuacct:/job/step\n0::/"
V2 = "0::/slurm/job"


def base(root: Path, group: str = "") -> MachineTree:
    tree = MachineTree(root).cpus([(cpu,) for cpu in range(8)]).node(0, range(4)).node(1, range(4, 8))
    return tree.put("proc/self/cgroup", group) if group else tree


def limits(tree: MachineTree) -> tuple[str, tuple[int, ...] | None]:
    found = Topology.from_sysfs(tree.root)
    return "".join(map(str, found.allowed)), found.allowed_memory


def test_a_tree_without_any_limits_nothing(tmp_path: Path) -> None:
    found = Topology.from_sysfs(base(tmp_path).root)
    assert (found.allowed, found.allowed_memory, found.cpu_quota) == (tuple(range(8)), None, None)


def test_the_process_status_tells_what_control_groups_do_not(tmp_path: Path) -> None:
    """A copy's status is that of the program that copied, which may have had a mask of its own."""
    tree = base(tmp_path).put(
        "proc/self/status", "Name:\tx\nCpus_allowed:\t3c\nCpus_allowed_list:\t2-5\nMems_allowed_list:\t1"
    )
    assert limits(tree) == ("2345", (1,))
    tree.put("sys/fs/cgroup/cpuset.cpus.effective", "0-6")
    assert limits(tree) == ("0123456", (1,))


@pytest.mark.parametrize(
    ("mounts", "files"),
    [
        ("none /cgroup/unified cgroup2 rw 0 0", "cgroup/unified/job/cpuset.{}.effective"),
        ("none /cgroup/c cgroup rw,cpuset,cpu 0 0", "cgroup/c/job/cpuset.{}"),
        ("cpuset /opt/my\\040sets cgroup rw,relatime,cpuset,noprefix 0 0", "opt/my sets/job/{}"),
        ("none /sets cpuset rw 0 0", "sets/job/{}"),
        # The first hierarchy has no cpusets; the second has them.
        ("a /dev/cgroup cgroup2 rw 0 0\nb /sets cgroup rw,cpuset 0 0", "sets/job/cpuset.{}"),
        ("none /sets cgroup rw,cpuset,cpuset_v2_mode 0 0", "sets/job/cpuset.effective_{}"),
    ],
)
@pytest.mark.parametrize("named_by", [("proc/self/cpuset", "/job"), ("proc/self/cgroup", "4:cpuset:/job\n0::/job")])
def test_control_groups_are_found_where_they_are_mounted(
    tmp_path: Path, mounts: str, files: str, named_by: tuple[str, str]
) -> None:
    tree = base(tmp_path).put("proc/mounts", f"garbage\n/dev/sda1 / ext4 rw 0 0\n{mounts}").put(*named_by)
    tree.put(files.format("cpus"), "2-3").put(files.format("mems"), "1")
    assert limits(tree) == ("23", (1,))


def test_version_1_allows_its_own_list_and_not_the_effective_one(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/cpuset/job/cpuset"
    tree = base(tmp_path, V1).put(f"{group}.cpus", "0-5").put(f"{group}.effective_cpus", "0-1")
    assert limits(tree)[0] == "012345"
    tree.put("proc/mounts", "x /sys/fs/cgroup/cpuset cgroup rw,cpuset,cpuset_v2_mode 0 0")
    tree.put(f"{group}.cpus", "")
    assert limits(tree)[0] == "01"


def test_a_quota_is_found_where_the_group_is_mounted(tmp_path: Path) -> None:
    tree = base(tmp_path, V2).put("proc/mounts", "none /cgroup/two cgroup2 rw 0 0")
    tree.put("cgroup/two/slurm/job/cpu.max", "150000 100000")
    assert Topology.from_sysfs(tree.root).cpu_quota == 1.5


@pytest.mark.parametrize(
    ("group", "path"),
    [
        (V2, "sys/fs/cgroup/slurm/job/cpuset.{}.effective"),
        (V2, "sys/fs/cgroup/cpuset.{}.effective"),  # the container's own group is mounted as the top
        (V2, "sys/fs/cgroup/unified/slurm/cpuset.{}.effective"),
        (V1, "sys/fs/cgroup/cpuset/job/cpuset.{}"),
        (V1, "sys/fs/cgroup/cpuset/cpuset.effective_{}"),
        (V1, "dev/cpuset/job/{}"),
        ("", "dev/cpuset/cpuset.{}"),
    ],
)
def test_the_cpuset_of_a_control_group(tmp_path: Path, group: str, path: str) -> None:
    tree = base(tmp_path, group).put(path.format("cpus"), "1-2,6,40").put(path.format("mems"), "0")
    assert limits(tree) == ("126", (0,))


def test_the_old_file_names_the_group_as_well(tmp_path: Path) -> None:
    tree = base(tmp_path).put("proc/self/cpuset", "/a").put("dev/cpuset/a/cpus", "3").put("dev/cpuset/cpus", "0-7")
    assert limits(tree)[0] == "3"


def test_a_group_that_is_not_set_up_limits_nothing(tmp_path: Path) -> None:
    tree = base(tmp_path, V1).put("sys/fs/cgroup/cpuset/job/cpuset.cpus", "")
    assert limits(tree)[0] == "01234567"


def test_a_cpuset_of_another_machine_is_ignored_and_said(tmp_path: Path) -> None:
    tree = base(tmp_path).put("proc/self/status", "Cpus_allowed_list:\t64-127")
    found = Topology.from_sysfs(tree.root)
    assert found.allowed == tuple(range(8))
    assert found.notes == ("the cpuset allows CPUs 64-127, none of which is online: all are used",)


def test_the_callers_mask_counts_alone(tmp_path: Path) -> None:
    tree = base(tmp_path).put("proc/self/status", "Cpus_allowed_list:\t0\nMems_allowed_list:\t1")
    found = Topology.from_sysfs(tree.root, allowed=[5], allowed_memory=[0])
    assert (found.allowed, found.allowed_memory) == ((5,), (0,))


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        (V2, {"slurm/job/cpu.max": "150000 100000"}, 1.5),
        (V2, {"slurm/job/cpu.max": "max 100000"}, None),
        (V2, {"slurm/job/cpu.max": "400000 100000", "slurm/cpu.max": "200000 100000"}, 2.0),  # the least counts
        (V2, {"cpu.max": "50000 100000"}, 0.5),  # a container's top
        ("0::/../other", {"cpu.max": "50000 100000"}, 0.5),
        ("", {"cpu.max": "50000"}, 0.5),
        (V1, {"cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1", "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000"}, None),
        (V1, {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"}, 3.0),
        (V1, {"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "50000"}, 0.5),
    ],
)
def test_the_quota(tmp_path: Path, group: str, files: dict[str, str], quota: float | None) -> None:
    tree = base(tmp_path, group)
    for name, text in files.items():
        tree.put(f"sys/fs/cgroup/{name}", text)
    found = Topology.from_sysfs(tree.root)
    assert (found.cpu_quota, found.notes) == (quota, ())


@pytest.mark.parametrize("text", ["x 100000", "1 0", "0 100000", "1 2 y"])
def test_a_quota_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    found = Topology.from_sysfs(base(tmp_path).put("sys/fs/cgroup/cpu.max", text).root)
    assert found.cpu_quota is None
    assert "cpu.max grants" in found.notes[0]
