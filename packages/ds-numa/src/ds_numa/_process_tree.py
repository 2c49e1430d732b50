"""What ``/proc`` says of the processes above this one: who launched it, and with which CPUs.

Source: proc(5): ``stat``, ``status``, ``environ`` (a process's environment as it was started).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ds_numa._ranges import parse_range_list


class Ancestor(NamedTuple):
    """A process above this one. What may not be read is None."""

    pid: int
    cpus: tuple[int, ...] | None
    env: Mapping[str, str] | None


def find_launcher(root: Path, variables: Sequence[str], pid: int | None = None) -> Ancestor | None:
    """The nearest process above this one that was started without these variables: it set them for its children.

    A process whose environment may not be read belongs to somebody else, so it counts as the launcher
    (slurmstepd). None where this process itself was started without the variables, or ``/proc`` ends before.
    """
    pid = os.getpid() if pid is None else pid
    own = _environment(root, pid)
    if own is None or not all(name in own for name in variables):
        return None
    for _ in range(100):  # more than any real depth; a damaged copy of /proc may hold a circle
        pid = _parent(root, pid)
        if pid <= 0:
            return None
        env = _environment(root, pid)
        if env is None or not all(name in env for name in variables):
            return Ancestor(pid, _mask(root, pid), env)
    return None


def read_own_mask(root: Path) -> tuple[int, ...] | None:
    """The CPUs of this process as ``/proc`` has them; None where it does not say."""
    return _mask(root, os.getpid())


def _environment(root: Path, pid: int) -> dict[str, str] | None:
    try:
        data = (root / f"proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    entries = (entry.partition("=") for entry in os.fsdecode(data).split("\0") if entry)
    return {name: value for name, _, value in entries}


def _parent(root: Path, pid: int) -> int:
    match = re.search(r"^PPid:\s*(\d+)", _text(root / f"proc/{pid}/status"), re.MULTILINE)
    return int(match[1]) if match else 0


def _mask(root: Path, pid: int) -> tuple[int, ...] | None:
    match = re.search(r"^Cpus_allowed_list:[ \t]*(\S+)", _text(root / f"proc/{pid}/status"), re.MULTILINE)
    return _cpus(match[1]) if match else None


def _cpus(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(sorted(parse_range_list(text.strip()))) if text.strip() else None
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
