"""Linux's NUMA memory policy of the calling thread, without `numactl` or libnuma.

Source: set_mempolicy(2), get_mempolicy(2); mode and system call numbers from the kernel's uapi headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence

_PREFERRED, _BIND, _PREFERRED_MANY = 1, 2, 5
# (set_mempolicy, get_mempolicy) by machine, 64-bit only
_CALLS = {
    "x86_64": (238, 239),
    "amd64": (238, 239),
    "aarch64": (237, 236),
    "arm64": (237, 236),
    "riscv64": (237, 236),
    "loongarch64": (237, 236),
    "ppc64le": (261, 260),
    "s390x": (270, 269),
}
_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)  # bits in a word of a node mask


def set_memory_policy(mode: str, nodes: Sequence[int]) -> None:
    """Take memory from these nodes first (``prefer``) or only (``bind``).

    Holds for the calling thread and for threads and processes that it starts afterwards; memory that is in use stays
    where it is.

    Raises:
        OSError: refused: ``EPERM`` in most containers without CAP_SYS_NICE, ``ENOSYS`` where there is no such call,
            ``EINVAL`` for several preferred nodes before Linux 5.15 or nodes that the cpuset excludes.
    """
    number = _BIND if mode == "bind" else _PREFERRED if len(nodes) == 1 else _PREFERRED_MANY
    words = (ctypes.c_ulong * (max(nodes) // _WORD + 1))()
    for node in nodes:
        words[node // _WORD] |= 1 << (node % _WORD)
    # The kernel reads one bit fewer than it is told (maxnode - 1).
    _call(_numbers()[0], ctypes.c_int(number), words, ctypes.c_ulong(len(words) * _WORD + 1))


def memory_policy_refusal() -> OSError | None:
    """Why this process may not set a memory policy, found out by reading its own; None when it may."""
    mode = ctypes.c_int()
    try:
        _call(_numbers()[1], ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    except OSError as error:
        return error
    return None


def _numbers() -> tuple[int, int]:
    machine = platform.machine().lower()
    if not sys.platform.startswith("linux") or machine not in _CALLS or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"no memory policy on {sys.platform} {machine}")
    return _CALLS[machine]


def _call(number: int, *arguments: object) -> None:
    """Make a system call by its number; raises `OSError` with what it set errno to."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
