"""What Linux says of a running rank: the CPUs of its threads, and the nodes on which its memory lies."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_numa.errors import RankError

_PROC = Path("/proc")


@dataclass(frozen=True)
class Placement:
    """Where a process sits.

    Attributes:
        cpus: the CPUs that its main thread may use.
        threads: how many threads it has.
        stray_threads: threads that may use CPUs which the main thread may not, by their CPUs.
        memory: bytes by node, without what it maps from files; None where the kernel does not show it.
        policy: the memory policy of most of this memory, such as ``default`` or ``prefer:0``; None likewise.
        parent_cpus: the CPUs that the launcher may use; None where it cannot be seen.
    """

    cpus: tuple[int, ...]
    threads: int
    stray_threads: Mapping[tuple[int, ...], int]
    memory: Mapping[int, int] | None
    policy: str | None
    parent_cpus: tuple[int, ...] | None


def examine(pid: int, launcher_pid: int | None) -> Placement:
    """Look at a process.

    Raises:
        RankError: it has ended.
    """
    try:
        cpus = tuple(sorted(os.sched_getaffinity(pid)))
        threads = [thread.id for thread in psutil.Process(pid).threads()]
    except (ProcessLookupError, psutil.Error) as error:
        raise RankError(f"process {pid} cannot be looked at ({error}): it has ended, or is another user's") from None
    stray: Counter[tuple[int, ...]] = Counter()
    for thread in threads:
        mask = _mask(thread)
        if mask is not None and not set(mask) <= set(cpus):
            stray[mask] += 1
    memory, policy = _memory(pid)
    return Placement(
        cpus, len(threads), dict(stray), memory, policy, None if launcher_pid is None else _mask(launcher_pid)
    )


def _mask(pid: int) -> tuple[int, ...] | None:
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except OSError:
        return None


def _memory(pid: int) -> tuple[dict[int, int] | None, str | None]:
    """Source: /proc/PID/numa_maps, see proc(5): a line for each mapping, its policy, and N<node>=<pages>."""
    try:
        lines = (_PROC / str(pid) / "numa_maps").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None, None
    by_node: Counter[int] = Counter()
    by_policy: Counter[str] = Counter()
    for line in lines:
        words = line.split()
        if len(words) < 3 or " file=" in line:
            continue
        size = re.search(r"kernelpagesize_kB=(\d+)", line)
        page = int(size[1]) * 1024 if size else os.sysconf("SC_PAGE_SIZE")
        for node, pages in re.findall(r"\bN(\d+)=(\d+)", line):
            by_node[int(node)] += int(pages) * page
            by_policy[words[1]] += int(pages) * page
    return dict(by_node), by_policy.most_common(1)[0][0] if by_policy else None
