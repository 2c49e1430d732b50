"""hwloc reads the same trees: nodes, cores, sockets, last-level caches and cpusets must agree.

hwloc reads a copied tree with HWLOC_FSROOT; its ``lstopo`` writes what it found as XML. The machines are made at random
with the files of old and new kernels, lists or masks.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa._files import parse_mask

sys.path.insert(0, str(Path(__file__).parents[2] / "packages/ds-numa/tests"))
from machine_tree import MachineTree

LSTOPO = shutil.which("lstopo-no-graphics")
pytestmark = pytest.mark.skipif(LSTOPO is None, reason="hwloc's lstopo-no-graphics is not installed")
Sets = set[frozenset[int]]


@dataclass
class Seen:
    nodes: dict[int, tuple[frozenset[int], int]] = field(default_factory=dict)
    cores: Sets = field(default_factory=set)
    sockets: Sets = field(default_factory=set)
    l3: Sets = field(default_factory=set)
    allowed: frozenset[int] = frozenset()


def ask_hwloc(root: Path) -> Seen:
    env = os.environ | {"HWLOC_FSROOT": str(root), "HWLOC_COMPONENTS": "linux,stop", "HWLOC_THISSYSTEM": "0"}
    command = [str(LSTOPO), "--of", "xml", "--disallowed"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    seen = Seen()
    for item in ET.fromstring(done.stdout[done.stdout.index("<topology") :]).iter("object"):
        kind, text = item.get("type"), (item.get("cpuset") or "0x0")
        cpus = frozenset(parse_mask(",".join(word or "0" for word in text.split(","))))
        if kind == "Machine":
            seen.allowed = frozenset(parse_mask(item.get("allowed_cpuset") or "0"))
        elif kind == "NUMANode":
            seen.nodes[int(item.get("os_index") or 0)] = (cpus, int(item.get("local_memory") or 0))
        elif kind == "Core":
            seen.cores.add(cpus)
        elif kind == "Package":
            seen.sockets.add(cpus)
        elif kind == "L3Cache":
            seen.l3.add(cpus)
    return seen


def as_sets(groups: Sequence[Sequence[int]]) -> Sets:
    return {frozenset(group) for group in groups}


def make(root: Path, choose: random.Random, *, masks: bool) -> MachineTree:
    """A machine of sockets of nodes of caches of cores, numbered in one of the ways that firmware does."""
    shape = [choose.randint(1, 3) for _ in range(4)]
    smt = choose.choice([1, 2, 2, 4])
    total = shape[0] * shape[1] * shape[2] * shape[3]
    order = list(range(total))
    if choose.random() < 0.3:
        choose.shuffle(order)
    near = choose.random() < 0.5
    cores = [[core * smt + t if near else core + t * total for t in range(smt)] for core in order]
    offline = sorted(choose.sample(range(1, total * smt), choose.randint(0, total * smt // 4)))
    cores = [[cpu for cpu in core if cpu not in offline] for core in cores]

    def gather(size: int) -> list[list[int]]:
        parts = [sorted(cpu for core in cores[i : i + size] for cpu in core) for i in range(0, total, size)]
        return [part for part in parts if part]

    size = shape[3]
    tree = MachineTree(root, masks=masks, new_names=choose.random() < 0.7)
    tree.cpus(
        [core for core in cores if core],
        sockets=gather(size * shape[2] * shape[1]),
        caches={1: [core for core in cores if core], 3: gather(size)},
        offline=offline,
    )
    for group in gather(1):
        for cpu in group:
            tree.put(
                f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", order[cores.index(group)] if group in cores else 0
            )
    ids = sorted(choose.sample(range(12), len(gather(size * shape[2])) + 1))
    for number, cpus in zip(ids, gather(size * shape[2]), strict=False):
        tree.node(number, cpus, gib=choose.choice([1, 64]))
    tree.node(ids[-1], gib=16)
    tree.put("sys/devices/system/node/online", ",".join(map(str, ids)))
    return tree


def limit(tree: MachineTree, choose: random.Random, cpus: frozenset[int]) -> None:
    """Put the process into a cpuset, in one of the ways that kernels have had, mounted in some place."""
    way, place = (
        choose.choice(["version 2", "version 1", "noprefix", "cpuset"]),
        choose.choice(["sys/fs/cgroup", "sets"]),
    )
    if choose.random() < 0.5:
        tree.put("proc/self/cpuset", "/job")
    else:
        tree.put("proc/self/cgroup", "0::/job" if way == "version 2" else "7:cpuset:/job")
    kind, options, name = {
        "version 2": ("cgroup2", "rw", "cpuset.{}.effective"),
        "version 1": ("cgroup", "rw,cpuset", "cpuset.{}"),
        "noprefix": ("cgroup", "rw,cpuset,noprefix", "{}"),
        "cpuset": ("cpuset", "rw", "{}"),
    }[way]
    tree.put("proc/mounts", f"none /proc proc rw 0 0\nnone /{place} {kind} {options} 0 0")
    tree.put(f"{place}/cgroup.controllers", "cpuset cpu")
    tree.put(f"{place}/job/{name.format('cpus')}", ",".join(map(str, sorted(cpus))))
    tree.put(f"{place}/job/{name.format('mems')}", "0-15")


def end_with_nul(root: Path) -> None:
    for path in root.glob("sys/devices/system/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("seed", range(60))
def test_random_machines(tmp_path: Path, seed: int) -> None:
    # hwloc reads masks; lists say the same in a second tree.
    trees = [make(tmp_path / name, random.Random(seed), masks=name == "masks") for name in ("masks", "lists")]
    online = sorted(cpu for group in Topology.from_sysfs(trees[0].root).cores for cpu in group)
    choose = random.Random(seed)
    limited = frozenset(choose.sample(online, choose.randint(1, len(online))))
    for tree in trees if seed % 3 == 0 else ():
        limit(tree, random.Random(seed), limited)
    if seed % 4 == 0:  # some tools copy the NUL that ends the kernel's buffer
        for tree in trees:
            end_with_nul(tree.root)
    theirs = ask_hwloc(trees[0].root)
    assert theirs.allowed == (limited if seed % 3 == 0 else frozenset(online))
    assert theirs.cores
    assert theirs.sockets
    assert theirs.l3
    for tree in trees:
        found = Topology.from_sysfs(tree.root)
        assert as_sets(found.cores) == theirs.cores
        assert as_sets(found.sockets) == theirs.sockets
        assert as_sets(found.l3) == theirs.l3
        with_cpus = {node.id: (frozenset(node.cpus), node.memory_bytes) for node in found.nodes if node.cpus}
        assert with_cpus == {number: theirs.nodes[number] for number in with_cpus}
        assert {node.id for node in found.nodes} == set(theirs.nodes)
        assert frozenset(found.allowed) == theirs.allowed
