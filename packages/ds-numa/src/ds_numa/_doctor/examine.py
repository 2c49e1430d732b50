"""What Linux says of a running rank: the CPUs of its threads, and the nodes on which its memory lies."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_numa._ranges import parse_range_list
from ds_numa.errors import CoreListError, RankError

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

    Everything is read below /proc, whose process numbers may be those of another namespace than this process's.

    Raises:
        RankError: it has ended, or ends meanwhile.
    """
    cpus = _mask(pid)
    threads = [_mask(pid, thread) for thread in _threads(pid)]
    if not cpus or not threads:
        raise RankError(f"process {pid} has ended")
    stray = Counter(mask for mask in threads if mask is not None and not set(mask) <= set(cpus))
    memory, policy = _memory(pid)
    parent = None if launcher_pid is None else _mask(launcher_pid)
    return Placement(cpus, len(threads), dict(stray), memory, policy, parent)


def _threads(pid: int) -> list[int]:
    try:
        return [int(entry.name) for entry in (_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return []


def _mask(pid: int, thread: int | None = None) -> tuple[int, ...] | None:
    """Source: proc(5), ``Cpus_allowed_list`` of ``status``. None where it ended; a zombie has no CPUs either."""
    folder = _PROC / str(pid) if thread is None else _PROC / str(pid) / "task" / str(thread)
    try:
        text = (folder / "status").read_text(errors="replace")
        found = re.search(r"^Cpus_allowed_list:[ \t]*(\S+)", text, re.MULTILINE)
        if found is None or re.search(r"^State:[ \t]*[ZX]", text, re.MULTILINE):
            return None
        return tuple(sorted(parse_range_list(found[1])))
    except (OSError, CoreListError):
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
