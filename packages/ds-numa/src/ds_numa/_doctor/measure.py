"""Measure what firmware only claims: copy bandwidth between nodes, and from each node to each GPU.

[Note: what is measured] The threads of a node's cores copy buffers that lie on one memory node (placed there by memory
policy). To a GPU, PyTorch copies a registered (pinned) buffer that lies on that node, with a CPU of the node.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_numa._mempolicy import memory_policy_refusal, set_memory_policy
from ds_numa.topology import Topology

_BUFFER = 32 << 20  # bytes; larger than a core's share of the last-level cache
_TO_GPU = 64 << 20
_MOST_THREADS = 8
_SHORTEST = 0.02  # seconds for a pair
_MOST_NAMED = 6  # pairs in a note
_NODES = Path("/sys/devices/system/node")
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
    """Measure this machine. It takes about `seconds`, and with GPUs as long again and the start of PyTorch.

    Each node's own memory comes first, then the nearest; what the time does not suffice for is left out, and said.

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
    placed = machine.numa and _may_place(notes)
    pairs = [(cpus, memory) for cpus in sources for memory in targets if placed or cpus == memory]
    pairs.sort(key=lambda pair: (pair[0] != pair[1], machine.distance(*pair), pair))
    first = {core[0] for core in machine.cores}
    copy: dict[int, dict[int, float]] = {}
    end, refused = time.monotonic() + seconds, dict.fromkeys(pairs, "")
    for done, (node, memory) in enumerate(pairs):
        left = end - time.monotonic()
        if done and left < _SHORTEST:
            names = ", ".join(f"{cpus} on {other}" for cpus, other in pairs[done:][:_MOST_NAMED])
            more = f" and {len(pairs) - done - _MOST_NAMED} more" if len(pairs) - done > _MOST_NAMED else ""
            notes.append(f"no time was left to measure the copies of node {names}{more}")
            break
        threads = [cpu for cpu in sources[node] if cpu in first][:_MOST_THREADS] or sources[node][:1]
        try:
            rate = _copy(threads, memory if placed else None, max(_SHORTEST, left / (len(pairs) - done)))
        except OSError as error:
            known = {errno.EINVAL: "the kernel has no such node or CPU, or lets this process use none of it"}
            refused[node, memory] = known.get(error.errno or 0) or error.strerror or str(error)
            continue
        copy.setdefault(node, {})[memory] = rate
    for why in dict.fromkeys(filter(None, refused.values())):
        found = [pair for pair, reason in refused.items() if reason == why]
        names = ", ".join(f"{cpus} on {memory}" for cpus, memory in found[:_MOST_NAMED])
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        notes.append(f"copies of node {names}{more} were not measured: {why}")
    to_gpu = _gpus(machine, sources, placed, seconds, notes)
    return Measurement(copy, to_gpu, tuple(notes + _differences(machine, copy, to_gpu)))


def _may_place(notes: list[str]) -> bool:
    """Whether memory may be placed on a node of choice; where it may not, it lies on the node that first touches it."""
    refusal = memory_policy_refusal()
    if refusal is not None:
        notes.append(f"memory policy is refused ({refusal}), so only each node's own memory is measured")
    return refusal is None


def _copy(cpus: Sequence[int], memory: int | None, seconds: float) -> float:
    """GB/s that one thread on each of these CPUs reach together; the placing of the memory counts in `seconds`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    libc.memcpy.restype = ctypes.c_void_p
    _check_room(memory, 2 * _BUFFER * len(cpus))
    ready = threading.Barrier(len(cpus))
    rates: list[float] = []
    errors: list[BaseException] = []
    end = time.perf_counter() + seconds

    def work(cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread alone
            with _memory_on(memory, 2 * _BUFFER) as (_, start):
                ready.wait(timeout=60)
                began, copies = time.perf_counter(), 0
                while not copies or time.perf_counter() < end:
                    libc.memcpy(start + _BUFFER, start, _BUFFER)
                    copies += 1
                rates.append(2 * _BUFFER * copies / (time.perf_counter() - began) / 1e9)
        except threading.BrokenBarrierError:
            pass  # another thread says why
        except BaseException as error:
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(cpu,)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(rates)


def _check_room(node: int | None, size: int) -> None:
    """Raise `OSError` unless a node has room to spare: where it is full, the kernel might end a process of the job."""
    text = ""
    with suppress(OSError):
        text = (_NODES / f"node{node}" / "meminfo").read_text()
    free = re.search(r"MemFree:\s+(\d+) kB", text)
    if free is not None and int(free[1]) * 1024 < 4 * size:
        raise OSError(errno.ENOMEM, f"too little of its memory is free ({int(free[1]) >> 10} MiB)")


@contextmanager
def _memory_on(node: int | None, size: int) -> Iterator[tuple[mmap.mmap, int]]:
    """Fresh memory whose pages lie on a node (None: wherever this thread runs), and its address."""
    if node is not None:
        set_memory_policy("bind", (node,))
    try:
        memory = mmap.mmap(-1, size)
        view = (ctypes.c_char * size).from_buffer(memory)
        ctypes.memset(view, 1, size)  # the first touch places the pages
    finally:
        if node is not None:
            set_memory_policy("none", ())  # of this thread, which ends with the measurement
    try:
        yield memory, ctypes.addressof(view)
    finally:
        del view
        memory.close()


def _gpus(
    machine: Topology, sources: dict[int, list[int]], placed: bool, seconds: float, notes: list[str]
) -> dict[str, dict[int, float]]:
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
    homes = {gpu.pci: gpu.node for gpu in machine.gpus}
    gpus = [(index, _pci(torch, index)) for index in range(torch.cuda.device_count())]
    pairs = [(index, pci, node) for index, pci in gpus for node in sources]
    pairs.sort(key=lambda pair: homes.get(pair[1]) != pair[2])  # what firmware claims comes first
    end: float | None = None  # starts when the first GPU has started
    for done, (index, pci, node) in enumerate(pairs):
        if end is not None and time.monotonic() > end:
            notes.append(f"no time was left for {len(pairs) - done} of {len(pairs)} pairs of a GPU and a node")
            break
        try:
            found.setdefault(pci, {})[node] = _to_gpu(torch, index, sources[node][0], node if placed else None)
        except (OSError, RuntimeError, AttributeError) as error:  # refused, or the job has all of the GPU's memory
            why = (str(error).splitlines() or [repr(error)])[0]
            notes.append(f"copies from node {node} to GPU {pci} were not measured: {why}")
        end = time.monotonic() + seconds if end is None else end
    return {pci: row for pci, row in found.items() if row}


def _pci(torch: Any, index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    return f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"


def _to_gpu(torch: Any, index: int, cpu: int, node: int | None) -> float:
    """GB/s from pinned memory of a node, the best of five copies."""
    rates: list[float] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            os.sched_setaffinity(0, {cpu})
            _check_room(node, _TO_GPU)
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
