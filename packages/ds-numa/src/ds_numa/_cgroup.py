"""Read what control groups leave to a process: the CPUs and nodes of its cpuset, and its quota of CPU time.

Source: kernel Documentation/admin-guide/cgroup-v2.rst (cpu.max, cpuset.cpus.effective), cgroup-v1/cpusets.rst and
Documentation/scheduler/sched-bwc.rst (cpu.cfs_quota_us).
"""

from __future__ import annotations

import re

from ds_numa._files import Tree, parse_list

_V2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_V1 = ("sys/fs/cgroup/cpuset", "dev/cpuset")
_V1_CPU = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu")


def read_cpuset(tree: Tree) -> tuple[list[int] | None, list[int] | None]:
    """The CPUs and the memory nodes that the process may use; None for what the tree does not tell."""
    status = tree.text("proc/self/status") or ""
    cpus, mems = _status_list(status, "Cpus_allowed_list"), _status_list(status, "Mems_allowed_list")
    groups = _read_groups(tree) if cpus is None or mems is None else {}
    if cpus is None:
        cpus = _first(tree, groups, ("cpuset.cpus.effective",), ("cpuset.effective_cpus", "cpuset.cpus", "cpus"))
    if mems is None:
        mems = _first(tree, groups, ("cpuset.mems.effective",), ("cpuset.effective_mems", "cpuset.mems", "mems"))
    return cpus, mems


def read_quota(tree: Tree) -> float | None:
    """How many CPUs' worth of time the process gets: the least that any group above it grants; None without a limit."""
    if not tree.exists("sys/fs/cgroup"):
        return None
    groups = _read_groups(tree)
    found = []
    for mount in _V2:
        for folder in _upwards(mount, groups.get("", "/")):
            words = (tree.text(f"{folder}/cpu.max") or "").split()
            if words and words[0] != "max":
                found.append(_ratio(tree, f"{folder}/cpu.max", words[0], words[-1] if len(words) > 1 else "100000"))
    for mount in _V1_CPU:
        for folder in _upwards(mount, groups.get("cpu", "/")):
            quota = tree.text(f"{folder}/cpu.cfs_quota_us")
            if quota and not quota.startswith("-"):
                path = f"{folder}/cpu.cfs_quota_us"
                found.append(_ratio(tree, path, quota, tree.text(f"{folder}/cpu.cfs_period_us") or ""))
    return min((value for value in found if value is not None), default=None)


def _status_list(status: str, key: str) -> list[int] | None:
    match = re.search(rf"^{key}:\s*(\S+)", status, re.MULTILINE)
    try:
        return parse_list(match[1]) if match else None
    except ValueError:
        return None


def _read_groups(tree: Tree) -> dict[str, str]:
    """The process's group by controller; the key of version 2, which has no controllers here, is empty."""
    groups: dict[str, str] = {}
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            groups |= dict.fromkeys(parts[1].split(","), parts[2])
    legacy = tree.text("proc/self/cpuset")
    return {"cpuset": legacy} | groups if legacy else groups


def _upwards(mount: str, group: str) -> list[str]:
    """The folders of a group and of those above it.

    A container may mount its own group as the top while the kernel still names the path on the host. Folders of that
    path are missing then, and the top is the group.
    """
    parts = [part for part in group.split("/") if part]
    if ".." in parts:  # outside of what this cgroup namespace shows
        parts = []
    return ["/".join([mount, *parts[:length]]) for length in range(len(parts), -1, -1)]


def _first(tree: Tree, groups: dict[str, str], v2: tuple[str, ...], v1: tuple[str, ...]) -> list[int] | None:
    """The list of the nearest group that has one; an empty one (a group not yet set up) limits nothing."""
    if not tree.exists("sys/fs/cgroup") and not tree.exists("dev/cpuset"):
        return None
    for mounts, group, names in ((_V2, groups.get("", "/"), v2), (_V1, groups.get("cpuset", "/"), v1)):
        for mount in mounts:
            for folder in _upwards(mount, group):
                for name in names:
                    found = tree.numbers(f"{folder}/{name}")
                    if found:
                        return found
    return None


def _ratio(tree: Tree, path: str, quota: str, period: str) -> float | None:
    try:
        value = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if value <= 0:
        tree.fault(path, f"grants {quota!r} of {period!r} microseconds, which is no quota")
        return None
    return value
