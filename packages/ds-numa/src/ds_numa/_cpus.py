"""Read physical cores, sockets, last-level caches and kinds of cores from ``sys/devices/system/cpu``.

Source: kernel Documentation/admin-guide/cputopology.rst and Documentation/ABI/testing/sysfs-devices-system-cpu.
"""

from __future__ import annotations

import re
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
        core = left.intersection(siblings or ())
        core.add(cpu)
        left -= core
        cores.append(tuple(sorted(core)))
    if _are_modules(tree, next((core for core in cores if len(core) > 1), ())):
        return tuple((cpu,) for cpu in online)
    return tuple(cores)


def _are_modules(tree: Tree, siblings: Sequence[int]) -> bool:
    """Whether siblings are the cores of a module: AMD's families 15h and 16h list those, and number each core."""
    numbers = {tree.number(f"{FOLDER}/cpu{cpu}/topology/core_id") for cpu in siblings[:2]}
    if len(numbers) < 2 or None in numbers:
        return False
    facts = read_processor(tree)
    return facts.get("vendor_id") == "AuthenticAMD" and facts.get("cpu family") in ("21", "22")


def read_processor(tree: Tree) -> dict[str, str]:
    """What ``proc/cpuinfo`` says about the first CPU: vendor, family and model of an x86 processor."""
    text = tree.text("proc/cpuinfo", start=2000) or ""
    return dict(re.findall(r"^(vendor_id|cpu family|model)\t*: (\S+)", text.partition("\n\n")[0], re.MULTILINE))


def split_cores(cores: Groups, groups: Iterable[Iterable[int]], notes: list[str]) -> Groups:
    """Take apart cores whose CPUs are in different groups (nodes and sockets), which no real core is."""
    places: dict[int, int] = {}  # a bit for each group
    for number, group in enumerate(groups):
        for cpu in group:
            places[cpu] = places.get(cpu, 0) | 1 << number
    kept: list[tuple[int, ...]] = []
    wrong = []
    for core in cores:
        if len(core) == 1 or len(set(map(places.get, core))) == 1:
            kept.append(core)
            continue
        parts = {places.get(cpu) for cpu in core}
        kept += [tuple(cpu for cpu in core if places.get(cpu) == place) for place in parts]
        wrong.append(format_ranges(core))
    if wrong:
        more = f" (and {len(wrong) - 1} more cores like it)" if len(wrong) > 1 else ""
        notes.append(f"CPUs {wrong[0]} are siblings that lie on several nodes or sockets{more}: each part is a core")
    return tuple(sorted(kept))


def read_sockets(tree: Tree, cores: Groups, l3: Groups, notes: list[str]) -> Groups:
    """The online CPUs of each physical package, in order of their ids; none where the kernel does not tell them all.

    The kernel's lists of siblings come first: some machines (s390, POWER) have no ids, and on some (Itanium) several
    packages have the same one. Lists that contradict each other are not used.
    """
    packages = _by_siblings(tree, cores) or _by_id(tree, cores, l3)
    return _complete(packages, cores, "sockets", notes)


def _by_siblings(tree: Tree, cores: Groups) -> list[set[int]] | None:
    """The packages by the lists of the CPUs in them; None where a list is missing or contradicts another."""
    online = {cpu for core in cores for cpu in core}
    found: list[tuple[int, set[int]]] = []
    told: set[int] = set()
    for core in cores:
        if core[0] in told:
            continue
        topology = f"{FOLDER}/cpu{core[0]}/topology/"
        mates = tree.cpus(
            (topology + "package_cpus_list", topology + "package_cpus"),
            (topology + "core_siblings_list", topology + "core_siblings"),
        )
        if not mates:
            return None
        members = online.intersection(mates).union(core)
        if not told.isdisjoint(members):
            return None
        package = _package(tree, core[0])
        found.append((len(online) if package is None else package, members))
        told |= members
    return [members for _, members in sorted(found, key=lambda entry: entry[0])]


def _by_id(tree: Tree, cores: Groups, l3: Groups) -> list[set[int]]:
    """The packages by their ids.

    Reading one file for each core would take most of the time on a large machine. So a whole cache's CPUs are taken to
    be in one package where its first and its last CPU are.
    """
    caches = {cpu: group for group in l3 for cpu in group}
    packages: dict[int, set[int]] = {}
    told: set[int] = set()
    for core in cores:
        if core[0] in told:
            continue
        found = next(((cpu, package) for cpu in core if (package := _package(tree, cpu)) is not None), None)
        if found is None:
            continue
        cpu, package = found
        members = {*core}
        cache = caches.get(cpu, core)
        if len(cache) > len(core) and _package(tree, cache[-1]) == package:
            members.update(cache)
        members -= told
        packages.setdefault(package, set()).update(members)
        told |= members
    return [packages[key] for key in sorted(packages)]


def _package(tree: Tree, cpu: int) -> int | None:
    package = tree.number(f"{FOLDER}/cpu{cpu}/topology/physical_package_id")
    return None if package is None or package < 0 else package


def read_l3(tree: Tree, cores: Groups, notes: list[str]) -> Groups:
    """The online CPUs that share each last-level cache; a note names those whose cache is not told."""
    online = {cpu for core in cores for cpu in core}
    groups: list[tuple[int, ...]] = []
    told: set[int] = set()
    for core in cores:
        for cpu in core:
            if cpu in told:
                continue
            folder = _last_cache(tree, f"{FOLDER}/cpu{cpu}/cache/")
            if folder is None:
                continue
            # Of list and mask one may be wrong (edited copies); then another CPU's files may still tell of this one.
            for read, name in ((tree.numbers, "shared_cpu_list"), (tree.mask, "shared_cpu_map")):
                shared = read(folder + name)
                # Itanium's kernel leaves the list of a cache that one core has for itself empty.
                group = online.intersection(core if shared == [] else shared or ())
                if cpu in group and told.isdisjoint(group):
                    groups.append(tuple(sorted(group)))
                    told |= group
                    break
    if groups and told != online:
        notes.append(f"the last-level cache of CPUs {format_ranges(online - told)} is not told")
    return tuple(groups)


def _last_cache(tree: Tree, folder: str) -> str | None:
    """The folder of the highest cache that holds data, whatever its level is called."""
    best, where = 0, None
    for index in reversed(tree.ids(folder, "index")):
        path = f"{folder}index{index}/"
        level = tree.number(path + "level") or 0
        if level > best and tree.text(path + "type") != "Instruction":
            best, where = level, path
    return where


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
