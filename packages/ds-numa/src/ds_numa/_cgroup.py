"""Read what control groups leave to a process: the CPUs and nodes of its cpuset, and its quota of CPU time.

Source: kernel Documentation/admin-guide/cgroup-v2.rst (cpu.max, cpuset.cpus.effective), cgroup-v1/cpusets.rst and
Documentation/scheduler/sched-bwc.rst (cpu.cfs_quota_us).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_numa._files import Tree, parse_list

# Where control groups are usually mounted, by what the hierarchy controls; version 2 has one hierarchy for everything.
_V2, _CPUSET, _CPUSET_V2_MODE, _CPU = "version 2", "cpuset", "cpuset with cpuset_v2_mode", "cpu"
_USUAL = {
    _V2: ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    _CPUSET: ("sys/fs/cgroup/cpuset", "dev/cpuset"),
    _CPUSET_V2_MODE: (),
    _CPU: ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu"),
}
# Version 1 allows what a group's own list says unless it is mounted with cpuset_v2_mode; `noprefix` drops the prefix.
_LISTS = {
    _V2: ("cpuset.{}.effective",),
    _CPUSET: ("cpuset.{}", "{}", "cpuset.effective_{}"),
    _CPUSET_V2_MODE: ("cpuset.effective_{}", "effective_{}"),
}


@dataclass(frozen=True)
class ControlGroups:
    """Where control groups are mounted, and the process's own group, by kind of hierarchy."""

    mounts: dict[str, tuple[str, ...]]
    own: dict[str, str]

    @classmethod
    def read(cls, tree: Tree) -> ControlGroups:
        """Read them from ``proc/mounts``, ``proc/self/cgroup`` and ``proc/self/cpuset``."""
        return cls(_read_mounts(tree), _read_groups(tree))

    def folders(self, kind: str) -> list[str]:
        """The group's folder and those above it, in each place where the hierarchy is mounted."""
        controller = _CPUSET if kind == _CPUSET_V2_MODE else kind
        return [folder for mount in self.mounts[kind] for folder in _upwards(mount, self.own.get(controller, "/"))]


def read_cpuset(tree: Tree, groups: ControlGroups) -> tuple[list[int] | None, list[int] | None]:
    """The CPUs and the memory nodes that the process may use; None for what the tree does not tell.

    The control groups' files come first: in a copied tree ``proc/self/status`` is that of the program that copied it,
    which may have had a mask of its own.
    """
    cpus, mems = _first(tree, groups, "cpus"), _first(tree, groups, "mems")
    status = "" if cpus is not None and mems is not None else tree.text("proc/self/status") or ""
    return (
        _status_list(status, "Cpus_allowed_list") if cpus is None else cpus,
        _status_list(status, "Mems_allowed_list") if mems is None else mems,
    )


def read_group_cpus(tree: Tree) -> tuple[int, ...] | None:
    """The CPUs that the process's control group allows, whatever its own mask is; None where no group has a list."""
    found = _first(tree, ControlGroups.read(tree), "cpus")
    return None if found is None else tuple(found)


def read_own_memory(tree: Tree) -> list[int] | None:
    """The memory nodes that this very process may use, of the live tree; None where the kernel does not tell."""
    return _status_list(tree.text("proc/self/status") or "", "Mems_allowed_list")


def read_quota(tree: Tree, groups: ControlGroups) -> float | None:
    """How many CPUs' worth of time the process gets: the least that any group above it grants; None without a limit."""
    found = []
    for folder in groups.folders(_V2):
        words = (tree.text(f"{folder}/cpu.max") or "").split()
        if words and words[0] != "max":
            found.append(_ratio(tree, f"{folder}/cpu.max", words[0], words[-1] if len(words) > 1 else "100000"))
    for folder in groups.folders(_CPU):
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


def _read_mounts(tree: Tree) -> dict[str, tuple[str, ...]]:
    """Folders where control groups are mounted, by kind of hierarchy: those that the kernel names, and usual ones.

    Only those that are there, so that nothing is looked for in a tree without control groups.
    """
    found: dict[str, dict[str, None]] = {kind: {} for kind in _USUAL}
    for line in (tree.text("proc/mounts") or "").splitlines():
        words = line.split(" ")
        if len(words) < 4 or words[2] not in ("cgroup", "cgroup2", "cpuset"):
            continue
        folder = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1]).strip("/")
        options = words[3].split(",")
        if words[2] == "cgroup2":
            found[_V2][folder] = None
        elif words[2] == "cpuset" or "cpuset" in options:
            found[_CPUSET_V2_MODE if "cpuset_v2_mode" in options else _CPUSET][folder] = None
        if words[2] == "cgroup" and "cpu" in options:
            found[_CPU][folder] = None
    return {
        kind: tuple(folder for folder in dict.fromkeys((*found[kind], *usual)) if tree.exists(folder))
        for kind, usual in _USUAL.items()
    }


def _read_groups(tree: Tree) -> dict[str, str]:
    """The process's group by kind of hierarchy."""
    legacy = tree.text("proc/self/cpuset")
    groups = dict.fromkeys((_V2, _CPUSET), legacy) if legacy else {}
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            groups |= dict.fromkeys(parts[1].split(",") if parts[1] else (_V2,), parts[2])
    return groups


def _upwards(mount: str, group: str) -> list[str]:
    """The folders of a group and of those above it.

    A container may mount its own group as the top while the kernel still names the path on the host. Folders of that
    path are missing then, and the top is the group.
    """
    parts = [part for part in group.split("/") if part]
    if ".." in parts:  # outside of what this cgroup namespace shows
        parts = []
    return ["/".join([mount, *parts[:length]]) for length in range(len(parts), -1, -1)]


def _first(tree: Tree, groups: ControlGroups, what: str) -> list[int] | None:
    """The list of the nearest group that has one; an empty one (a group not yet set up) limits nothing."""
    for kind, names in _LISTS.items():
        for folder in groups.folders(kind):
            for name in names:
                found = tree.numbers(f"{folder}/{name.format(what)}")
                if found:
                    return found
    return None


def _ratio(tree: Tree, path: str, quota: str, period: str) -> float | None:
    try:
        value = int(quota) / int(period)
    except (ValueError, ArithmeticError):
        value = 0.0
    if value <= 0:
        tree.fault(path, f"grants {quota[:30]!r} of {period[:30]!r} microseconds, which is no quota")
        return None
    return value
