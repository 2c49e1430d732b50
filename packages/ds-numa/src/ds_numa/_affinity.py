"""The CPU masks of this process's threads: read them, set them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def read_mask() -> list[int]:
    """The CPUs that the calling thread may run on, ascending; every CPU where the system has no masks (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    import psutil  # only here: Linux needs none

    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return sorted(process.cpu_affinity() or ())
    return list(range(psutil.cpu_count() or 1))


def read_masks() -> dict[int, tuple[int, ...]]:
    """The mask of every thread of this process, by thread id; empty where the system has none for each thread."""
    masks: dict[int, tuple[int, ...]] = {}
    if hasattr(os, "sched_getaffinity"):
        for thread in _threads():
            with contextlib.suppress(OSError):  # it ended meanwhile
                masks[thread] = tuple(sorted(os.sched_getaffinity(thread)))
    return masks


def set_mask(cpus: Iterable[int]) -> int:
    """Let every thread of this process run on these CPUs only.

    New threads inherit the mask of the thread that starts them, so the passes go on until one finds no thread that
    an earlier pass has not seen. Linux drops CPUs that are not there and says nothing: read the masks back.

    Returns:
        The number of threads that were set; a thread that the system refuses to set is left out.

    Raises:
        OSError: the system refuses for the calling thread, or has no masks (``ENOSYS``).
    """
    mask = set(cpus)
    if not hasattr(os, "sched_setaffinity"):
        import psutil

        process = psutil.Process()
        if not hasattr(process, "cpu_affinity"):
            raise OSError(errno.ENOSYS, "this system cannot bind a process to CPUs")
        process.cpu_affinity(sorted(mask))
        return process.num_threads()
    os.sched_setaffinity(0, mask)  # first and alone, so that a refusal changes nothing
    seen: set[int] = set()
    count = 0
    while found := _threads() - seen:
        for thread in found:
            with contextlib.suppress(OSError):  # it ended meanwhile, or is refused: the caller reads the masks back
                os.sched_setaffinity(thread, mask)
                count += 1
        seen |= found
    return count


def restore_masks(masks: Mapping[int, tuple[int, ...]]) -> None:
    """Give threads the masks back that `read_masks` found; threads that ended meanwhile are left out."""
    for thread, mask in masks.items():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread, mask)


def _threads() -> set[int]:
    try:
        return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()
