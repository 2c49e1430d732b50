"""Machines written into a folder the way Linux shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for modules that tests share
Machine = Callable[..., Path]
# What launchers, OpenMP libraries and GPU runtimes call their variables.
_SURROUNDINGS = (
    *(
        "RANK",
        "WORLD_SIZE",
        "NODE_RANK",
        "LOCAL_",
        "OMPI_",
        "MPI_",
        "PMI",
        "MV2_",
        "PALS_",
        "JSM_",
        "FLUX_",
        "HOROVOD_",
    ),
    *("ALPS_", "SLURM_", "OMP_", "KMP_", "GOMP_", "CUDA_", "HIP_", "ROCR_", "HSA_", "GPU_DEVICE", "ZE_", "ONEAPI_"),
    "DS_NUMA_",
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no pinning, no GPU choice from the surroundings reaches a test."""
    for name in list(os.environ):
        if name.startswith(_SURROUNDINGS):
            monkeypatch.delenv(name)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Write a ``sys`` and ``proc`` tree and return its root.

    ``siblings`` maps a CPU to its kernel list; ``nodes`` an id to its kernel list of CPUs, or to a mapping with
    ``cpus``, ``kb``, ``distance``, ``bandwidth`` (and ``near``, the node of its initiators); ``pci`` an address to its
    files; ``nvidia`` an address to ``(uuid, model, memory node or None)``.
    """

    def write(
        online: str,
        *,
        siblings: Mapping[int, str] | None = None,
        nodes: Mapping[int, Any] | None = None,
        pci: Mapping[str, Mapping[str, str]] | None = None,
        nvidia: Mapping[str, tuple[str, str, int | None]] | None = None,
        initiators: str = "",
    ) -> Path:
        def put(path: str, text: object) -> None:
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"{text}\n")

        put("sys/devices/system/cpu/online", online)
        for cpu, text in (siblings or {}).items():
            put(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)
        folder = "sys/devices/system/node"
        for number, entry in (nodes or {}).items():
            facts = {"cpus": entry} if isinstance(entry, str) else dict(entry)
            put(f"{folder}/node{number}/cpulist", facts.get("cpus", ""))
            if "kb" in facts:
                put(f"{folder}/node{number}/meminfo", f"Node {number} MemTotal:       {facts['kb']} kB")
            if "distance" in facts:
                put(f"{folder}/node{number}/distance", facts["distance"])
            if "bandwidth" in facts:
                access = f"{folder}/node{number}/access1/initiators"
                put(f"{access}/read_bandwidth", facts["bandwidth"])
                (tmp_path / access / f"node{facts.get('near', number)}").mkdir()
        if nodes:
            put(f"{folder}/online", ",".join(str(number) for number in nodes))
        if initiators:
            put(f"{folder}/has_generic_initiator", initiators)
        for address, files in (pci or {}).items():
            for name, text in files.items():
                put(f"sys/bus/pci/devices/{address}/{name}", text)
        for address, (uuid, model, node) in (nvidia or {}).items():
            put(
                f"proc/driver/nvidia/gpus/{address}/information",
                f"Model: \t\t {model}\nIRQ:   \t\t 0\nGPU UUID: \t {uuid}\nBus Location: \t {address}",
            )
            if node is not None:
                put(f"proc/driver/nvidia/gpus/{address}/numa_status", f"Node: {node}\nStatus: online")
        return tmp_path

    return write


@pytest.fixture
def put_process(tmp_path: Path) -> Callable[..., None]:
    """Write a process into ``tmp_path/proc`` as proc(5) shows it; no environment where it may not be read."""

    def put(pid: int, parent: int, cpus: str, env: Mapping[str, str] | None) -> None:
        folder = tmp_path / f"proc/{pid}"
        folder.mkdir(parents=True)
        (folder / "status").write_text(f"Name:\tx\nPPid:\t{parent}\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n")
        if env is not None:
            (folder / "environ").write_bytes(b"".join(f"{name}={value}\0".encode() for name, value in env.items()))

    return put
