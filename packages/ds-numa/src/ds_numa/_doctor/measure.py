"""Measure what firmware only claims: copy bandwidth between nodes, and from each node to each GPU.

[Note: what is measured] The threads of a node's cores copy buffers that lie on one memory node (placed there by memory
policy). To a GPU, PyTorch copies a registered (pinned) buffer that lies on that node, with a CPU of the node.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ds_numa._mempolicy import read_memory_policy, set_memory_policy
from ds_numa.topology import Topology

_BUFFER = 32 << 20  # bytes; larger than a core's share of the last-level cache
_TO_GPU = 64 << 20
_MOST_THREADS = 8
_CLEARLY = 1.1  # a difference below 10 % is noise


@dataclass(frozen=True)
class Measurement:
    """Bandwidths in GB/s (10^9 bytes a second).

    Attributes:
        copy: by node of the CPUs and node of the memory: bytes read plus bytes written.
        to_gpu: by PCI address of the GPU and node of the memory.
        notes: where the figures and the firmware differ, and what could not be measured.
    """

    copy: dict[int, dict[int, float]] = field(default_factory=dict)
    to_gpu: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"CPUs of node {cpus}: copies {', '.join(f'{rate:.1f} GB/s on node {node}' for node, rate in row.items())}"
            for cpus, row in self.copy.items()
        ]
        lines += [
            f"GPU {pci}: {', '.join(f'{rate:.1f} GB/s from node {node}' for node, rate in row.items())}"
            for pci, row in self.to_gpu.items()
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def measure(machine: Topology, seconds: float = 2.0) -> Measurement:
    """Measure this machine. It takes about `seconds`, and the start of PyTorch where there is a GPU.

    Args:
        machine: this machine; only CPUs that the caller may use take part, and memory that it may use.
        seconds: for all pairs of nodes together.
    """
    allowed = set(machine.allowed)
    sources = {node.id: sorted(allowed.intersection(node.cpus)) for node in machine.nodes}
    sources = {node: cpus for node, cpus in sources.items() if cpus}
    may = machine.allowed_memory
    targets = [
        node.id for node in machine.nodes if node.kind not in ("empty", "gpu") and (may is None or node.id in may)
    ]
    notes: list[str] = []
    pairs = [(cpus, memory) for cpus in sources for memory in targets]
    first = {core[0] for core in machine.cores}
    copy: dict[int, dict[int, float]] = {}
    for node, memory in pairs:
        threads = [cpu for cpu in sources[node] if cpu in first][:_MOST_THREADS] or sources[node][:1]
        try:
            rate = _copy(threads, memory if machine.numa else None, seconds / len(pairs))
        except OSError as error:
            notes.append(f"memory of node {memory} was not measured from node {node}: {error.strerror}")
            continue
        copy.setdefault(node, {})[memory] = rate
    to_gpu = _gpus(machine, sources, notes)
    return Measurement(copy, to_gpu, tuple(notes + _differences(machine, copy, to_gpu)))


def _copy(cpus: Sequence[int], memory: int | None, seconds: float) -> float:
    """GB/s that one thread on each of these CPUs reach together."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    libc.memcpy.restype = ctypes.c_void_p
    ready = threading.Barrier(len(cpus))
    rates: list[float] = []
    errors: list[OSError] = []

    def work(cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread alone
            with _memory_on(memory, 2 * _BUFFER) as (_, start):
                ready.wait(timeout=60)
                began, copies = time.perf_counter(), 0
                while time.perf_counter() - began < seconds:
                    libc.memcpy(start + _BUFFER, start, _BUFFER)
                    copies += 1
                rates.append(2 * _BUFFER * copies / (time.perf_counter() - began) / 1e9)
        except OSError as error:
            errors.append(error)
            ready.abort()
        except threading.BrokenBarrierError:
            pass  # another thread says why

    threads = [threading.Thread(target=work, args=(cpu,)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(rates)


@contextmanager
def _memory_on(node: int | None, size: int) -> Iterator[tuple[mmap.mmap, int]]:
    """Fresh memory whose pages lie on a node (None: wherever this thread runs), and its address."""
    before = read_memory_policy() if node is not None else None
    if node is not None:
        set_memory_policy("bind", (node,))
    try:
        memory = mmap.mmap(-1, size)
        view = (ctypes.c_char * size).from_buffer(memory)
        ctypes.memset(view, 1, size)  # the first touch places the pages
    finally:
        if before is not None:
            set_memory_policy(*before)
    try:
        yield memory, ctypes.addressof(view)
    finally:
        del view
        memory.close()


def _gpus(machine: Topology, sources: dict[int, list[int]], notes: list[str]) -> dict[str, dict[int, float]]:
    if not any(gpu.usable for gpu in machine.gpus):
        return {}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        notes.append("copies to the GPUs were not measured: PyTorch is not installed")
        return {}
    if not torch.cuda.is_available():
        notes.append("copies to the GPUs were not measured: this PyTorch finds none")
        return {}
    found: dict[str, dict[int, float]] = {}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        pci = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
        for node, cpus in sources.items():
            try:
                found.setdefault(pci, {})[node] = _to_gpu(torch, index, cpus[0], node if machine.numa else None)
            except OSError as error:
                notes.append(f"copies from node {node} to GPU {pci} were not measured: {error.strerror}")
    return found


def _to_gpu(torch: Any, index: int, cpu: int, node: int | None) -> float:
    """GB/s from pinned memory of a node, the best of five copies."""
    rates: list[float] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            os.sched_setaffinity(0, {cpu})
            with _memory_on(node, _TO_GPU) as (memory, start):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(start, _TO_GPU, 0))
                source = torch.frombuffer(memory, dtype=torch.uint8)
                try:
                    target = torch.empty(_TO_GPU, dtype=torch.uint8, device=f"cuda:{index}")
                    with torch.cuda.device(index):
                        for _ in range(6):
                            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                            begin.record()
                            target.copy_(source, non_blocking=True)
                            end.record()
                            end.synchronize()
                            rates.append(_TO_GPU / begin.elapsed_time(end) / 1e6)
                finally:
                    torch.cuda.cudart().cudaHostUnregister(start)
                    del source
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)  # so that this thread keeps its CPUs
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return max(rates[1:])


def _differences(
    machine: Topology, copy: dict[int, dict[int, float]], to_gpu: dict[str, dict[int, float]]
) -> list[str]:
    """Where firmware's claims and the figures disagree."""
    notes = []
    for node, row in copy.items():
        best = max(row, key=lambda other: row[other])
        own = row.get(node)
        if own is not None and best != node and row[best] > _CLEARLY * own:
            kind = machine.node(best).kind
            what = "is faster, as high-bandwidth memory is" if kind in ("hbm", "unknown", "ram") else "is faster"
            notes.append(
                f"memory of node {best} ({kind}) {what}, from the CPUs of node {node}: "
                f"{row[best]:.1f} against {own:.1f} GB/s of its own"
            )
    homes = {gpu.pci: gpu.node for gpu in machine.gpus}
    for pci, row in to_gpu.items():
        best, home = max(row, key=lambda other: row[other]), homes.get(pci)
        if home is None:
            notes.append(f"GPU {pci}: firmware names no node; copies are fastest from node {best}")
        elif home in row and row[best] > _CLEARLY * row[home]:
            notes.append(
                f"GPU {pci}: firmware says node {home} ({row[home]:.1f} GB/s), but node {best} is faster "
                f"({row[best]:.1f} GB/s): correct it in the output of ds-numa show --json and pass that as --topology"
            )
    return notes
