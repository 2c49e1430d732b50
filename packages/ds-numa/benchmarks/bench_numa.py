"""What it costs to import ds-numa, to read a machine and to plan for it, beside DeepSpeed's `get_numa_cores`.

    python packages/ds-numa/benchmarks/bench_numa.py [--quick] [--json PATH]

Import: CPU time of child processes, by turns. Reading: a tree of 224 CPUs, two sockets and eight GPUs as Linux shows
them, written into a folder; DeepSpeed asks the program `numactl`, for which a shell script stands that prints the same
machine, so that its share of the time is the start of one small process. Ways run by turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_numa import Topology, format_ranges, plan_binding

IMPORTS = ("import logging", "import ds_numa", "from ds_numa import bind")
CORES = 112  # two sockets of 56 cores, two CPUs each


def write_tree(root: Path) -> None:
    """A machine such as a DGX H100 shows it."""
    nodes = [[*range(56 * i, 56 * i + 56), *range(CORES + 56 * i, CORES + 56 * i + 56)] for i in range(2)]

    def put(path: str, text: object) -> None:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")

    cpu = "sys/devices/system/cpu"
    for name in ("online", "possible", "present"):
        put(f"{cpu}/{name}", f"0-{2 * CORES - 1}")
    for core in range(CORES):
        socket = core // 56
        for number in (core, core + CORES):
            siblings = f"{core},{core + CORES}"
            for name in ("core_cpus_list", "thread_siblings_list"):
                put(f"{cpu}/cpu{number}/topology/{name}", siblings)
            put(f"{cpu}/cpu{number}/topology/physical_package_id", socket)
            for level, shared in enumerate((siblings, siblings, siblings, format_ranges(nodes[socket]))):
                cache = f"{cpu}/cpu{number}/cache/index{level}"
                put(f"{cache}/level", max(1, level))
                put(f"{cache}/type", "Instruction" if level == 1 else "Data" if level == 0 else "Unified")
                put(f"{cache}/shared_cpu_list", shared)
    for i, cpus in enumerate(nodes):
        node = f"sys/devices/system/node/node{i}"
        put(f"{node}/cpulist", format_ranges(cpus))
        put(f"{node}/meminfo", f"Node {i} MemTotal:       {1 << 30} kB")
        put(f"{node}/distance", "10 21" if i == 0 else "21 10")
    put("sys/devices/system/node/online", "0-1")
    for i, bus in enumerate(("1b", "43", "52", "61", "9d", "c3", "d1", "df")):
        pci = f"0000:{bus}:00.0"
        for name, text in {"numa_node": i // 4, "vendor": "0x10de", "class": "0x030200"}.items():
            put(f"sys/bus/pci/devices/{pci}/{name}", text)
        put(
            f"proc/driver/nvidia/gpus/{pci}/information", f"Model: \t\t X\nGPU UUID: \t GPU-{i}\nBus Location: \t {pci}"
        )


def write_numactl(folder: Path) -> None:
    """A program that prints what ``numactl --hardware`` prints of that machine."""
    lines = ["available: 2 nodes (0-1)"]
    for i in range(2):
        cpus = [*range(56 * i, 56 * i + 56), *range(CORES + 56 * i, CORES + 56 * i + 56)]
        lines.append(f"node {i} cpus: {' '.join(map(str, cpus))}")
    (folder / "text").write_text("\n".join(lines) + "\n")
    script = folder / "numactl"
    script.write_text(f"#!/bin/sh\nexec cat {folder}/text\n")
    script.chmod(0o755)


def cpu_seconds(code: str) -> float:
    """User and system time of a Python that runs this code."""
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{code!r} failed")
    return usage.ru_utime + usage.ru_stime


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def imports(rounds: int) -> dict[str, float]:
    """CPU milliseconds beyond those of a bare Python."""
    codes = {"bare": "pass", **{code: code for code in IMPORTS}}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            times[name].append(cpu_seconds(code))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {code: 1e3 * (medians[code] - medians["bare"]) for code in IMPORTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 40
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_tree(root)
        write_numactl(root)
        machine = Topology.from_sysfs(root)
        gpus = [gpu.pci for gpu in machine.gpus]
        ways: dict[str, Callable[[], Any]] = {
            "read the tree": lambda: Topology.from_sysfs(root),
            "plan for 8 ranks": lambda: plan_binding(machine, 8, devices=gpus),
            "read the tree and plan": lambda: plan_binding(Topology.from_sysfs(root), 8, devices=gpus),
            "read this machine and plan": lambda: plan_binding(Topology.here(), 1),
        }
        os.environ["PATH"] = f"{root}{os.pathsep}{os.environ['PATH']}"
        try:
            from deepspeed.utils.numa import get_numa_cores
        except ImportError:
            print("DeepSpeed is not installed: its figures are left out", file=sys.stderr)
        else:
            assert [len(cores) for cores in get_numa_cores()] == [CORES, CORES]
            ways["DeepSpeed's get_numa_cores"] = get_numa_cores
        times = {what: 1e3 * seconds for what, seconds in by_turns(ways, 5 * rounds).items()}
    found = {
        "command": "python packages/ds-numa/benchmarks/bench_numa.py --json PATH",
        "python": platform.python_version(),
        "cpus": len(machine.allowed),
        "cores_of_this_machine": os.cpu_count(),
        "milliseconds": times,
        "import_cpu_milliseconds": imports(rounds // 2 or 1),
    }
    for what, milliseconds in times.items():
        print(f"{what:32} {milliseconds:8.2f} ms")
    for what, milliseconds in found["import_cpu_milliseconds"].items():
        print(f"{what:32} {milliseconds:8.1f} ms of CPU beyond a bare Python")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
