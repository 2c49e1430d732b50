"""Read physical cores, sockets, last-level caches and kinds of cores from ``sys/devices/system/cpu``.

Source: kernel Documentation/admin-guide/cputopology.rst and Documentation/ABI/testing/sysfs-devices-system-cpu.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_numa._files import Tree
from ds_numa._ranges import format_ranges

FOLDER = "sys/devices/system/cpu"
Groups = tuple[tuple[int, ...], ...]


def read_online(tree: Tree) -> list[int]:
    """The CPUs that are online; those that have a folder where the kernel does not list them."""
    listed = tree.numbers(f"{FOLDER}/online")
    if listed:
        return listed
    return [cpu for cpu in tree.ids(FOLDER, "cpu") if tree.text(f"{FOLDER}/cpu{cpu}/online") != "0"]


def read_offline(tree: Tree, online: Iterable[int]) -> list[int]:
    """The CPUs that are in the machine and not online, apart from SMT siblings that were switched off."""
    if tree.text(f"{FOLDER}/smt/control") in ("off", "forceoff"):
        return []
    present = tree.numbers(f"{FOLDER}/present") or tree.ids(FOLDER, "cpu")
    return sorted(set(present).difference(online))


def read_cores(tree: Tree, online: Sequence[int]) -> Groups:
    """Group online CPUs into physical cores; a CPU whose siblings are not told is a core of its own."""
    cores, left = [], set(online)
    for cpu in online:
        if cpu not in left:
            continue
        topology = f"{FOLDER}/cpu{cpu}/topology/"
        siblings = tree.numbers(topology + "core_cpus_list") or tree.cpus(
            (topology + "thread_siblings_list", topology + "thread_siblings"),
            (topology + "core_cpus_list", topology + "core_cpus"),
        )
        core = [sibling for sibling in siblings or () if sibling in left]
        if cpu not in core:
            core = sorted([*core, cpu])
        left.difference_update(core)
        cores.append(tuple(core))
    return tuple(cores)


def split_cores(cores: Groups, groups: Iterable[Iterable[int]], notes: list[str]) -> Groups:
    """Take apart cores whose CPUs are in different groups (nodes and sockets), which no real core is."""
    places: dict[int, tuple[int, ...]] = {}
    for number, group in enumerate(groups):
        for cpu in group:
            places[cpu] = (*places.get(cpu, ()), number)
    kept: list[tuple[int, ...]] = []
    wrong = []
    for core in cores:
        where = [places.get(cpu) for cpu in core]
        if where.count(where[0]) == len(where):
            kept.append(core)
            continue
        kept += [tuple(cpu for cpu in core if places.get(cpu) == place) for place in set(where)]
        wrong.append(format_ranges(core))
    if wrong:
        more = f" (and {len(wrong) - 1} more cores like it)" if len(wrong) > 1 else ""
        notes.append(f"CPUs {wrong[0]} are siblings that lie on several nodes or sockets{more}: each part is a core")
    return tuple(sorted(kept))


def read_sockets(tree: Tree, cores: Groups, l3: Groups, notes: list[str]) -> Groups:
    """The online CPUs of each physical package; none where the kernel does not tell them all.

    Reading one file for each core would take most of the time on a large machine. So a whole package is taken from the
    kernel's list of it or, in a copy without these lists, a whole cache's CPUs where its first and its last CPU agree.
    """
    caches = {cpu: group for group in l3 for cpu in group}
    packages: dict[int, set[int]] = {}
    told: set[int] = set()
    lists = True
    for core in cores:
        if core[0] in told:
            continue
        found = next(((cpu, package) for cpu in core if (package := _package(tree, cpu)) is not None), None)
        if found is None:
            continue
        cpu, package = found
        members = {*core}
        if lists:
            topology = f"{FOLDER}/cpu{cpu}/topology/"
            mates = tree.cpus(
                (topology + "package_cpus_list", topology + "package_cpus"),
                (topology + "core_siblings_list", topology + "core_siblings"),
            )
            lists = mates is not None
            members.update(mates or ())
        cache = caches.get(cpu, core)
        if not lists and len(cache) > len(core) and _package(tree, cache[-1]) == package:
            members.update(cache)
        members -= told
        packages.setdefault(package, set()).update(members)
        told |= members
    return _complete([packages[key] for key in sorted(packages)], cores, "sockets", notes)


def _package(tree: Tree, cpu: int) -> int | None:
    package = tree.number(f"{FOLDER}/cpu{cpu}/topology/physical_package_id")
    return None if package is None or package < 0 else package


def read_l3(tree: Tree, cores: Groups, notes: list[str]) -> Groups:
    """The online CPUs that share each last-level cache; none where the kernel does not tell them all."""
    groups: list[set[int]] = []
    told: set[int] = set()
    for core in cores:
        for cpu in core:
            if cpu in told:
                continue
            shared = _last_cache(tree, f"{FOLDER}/cpu{cpu}/cache/")
            if shared is not None and cpu in shared:
                group = set(shared) - told
                groups.append(group)
                told |= group
    return _complete(groups, cores, "last-level caches", notes)


def _last_cache(tree: Tree, folder: str) -> list[int] | None:
    """The CPUs of the highest cache that holds data, whatever its level is called."""
    best, where = 0, ""
    for index in reversed(tree.ids(folder, "index")):
        path = f"{folder}index{index}/"
        level = tree.number(path + "level") or 0
        if level > best and tree.text(path + "type") in ("Unified", "Data"):
            best, where = level, path
    return tree.cpus((where + "shared_cpu_list", where + "shared_cpu_map")) if where else None


def read_core_classes(tree: Tree, cores: Groups, notes: list[str]) -> Groups:
    """The online CPUs of each kind of core, the fastest first; none where all are alike or nothing tells them apart.

    Intel's hybrid processors list P and E cores (``cpu_core``, ``cpu_atom``, ``cpu_lowpower``); ARM and RISC-V give
    each CPU a capacity. Highest clock rates are not read: they differ among equal cores (favoured cores).
    """
    kinds = [tree.numbers(f"sys/devices/{name}/cpus") for name in ("cpu_core", "cpu_atom", "cpu_lowpower")]
    groups = [set(kind) for kind in kinds if kind]
    if not groups:
        groups = _by_capacity(tree, cores)
    if len(groups) < 2:
        return ()
    return _complete(groups, cores, "kinds of cores", notes)


def _by_capacity(tree: Tree, cores: Groups) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for core in cores:
        capacity = tree.number(f"{FOLDER}/cpu{core[0]}/cpu_capacity")
        if capacity is None:
            break  # of most machines the first CPU has no such file, nor do the others
        found.setdefault(capacity, set()).update(core)
    return [found[capacity] for capacity in sorted(found, reverse=True)]


def _complete(groups: Iterable[set[int]], cores: Groups, what: str, notes: list[str]) -> Groups:
    """The groups cut to online CPUs, or none of them, with a note, where some CPU is in no group."""
    missing = {cpu for core in cores for cpu in core}
    kept = []
    for group in groups:
        part = missing & group
        missing -= part
        if part:
            kept.append(tuple(sorted(part)))
    if kept and missing:
        notes.append(f"{what} are told for some CPUs and not for {format_ranges(missing)}: they are left out")
        return ()
    return tuple(kept)
