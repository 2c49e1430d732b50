"""The CPU mask of this process: read it, set it for every thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import psutil


def read_mask() -> list[int]:
    """The CPUs that the calling thread may run on, ascending; every CPU where the system has no masks (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return sorted(process.cpu_affinity() or ())
    return list(range(psutil.cpu_count() or 1))


def set_mask(cpus: Iterable[int]) -> int:
    """Let every thread of this process run on these CPUs only.

    New threads inherit the mask of the thread that starts them, so the passes go on until one finds no thread that
    an earlier pass has not seen.

    Returns:
        The number of threads that were set.

    Raises:
        OSError: the system refuses, or has no masks (``ENOSYS``).
    """
    mask = set(cpus)
    if not hasattr(os, "sched_setaffinity"):
        process = psutil.Process()
        if not hasattr(process, "cpu_affinity"):
            raise OSError(errno.ENOSYS, "this system cannot bind a process to CPUs")
        process.cpu_affinity(sorted(mask))
        return process.num_threads()
    os.sched_setaffinity(0, mask)  # first and alone, so that a refusal changes nothing
    done: set[int] = set()
    while found := _threads() - done:
        for thread in found:
            try:
                os.sched_setaffinity(thread, mask)
            except ProcessLookupError:  # it ended meanwhile
                continue
        done |= found
    return len(done)


def _threads() -> set[int]:
    try:
        return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()
