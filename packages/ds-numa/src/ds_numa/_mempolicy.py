"""Linux's NUMA memory policy of the calling thread, without `numactl` or libnuma.

Source: set_mempolicy(2), get_mempolicy(2); mode and system call numbers from the kernel's uapi headers.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

_DEFAULT, _PREFERRED, _BIND, _INTERLEAVE, _LOCAL, _PREFERRED_MANY, _WEIGHTED = range(7)
_NAMES = {
    _DEFAULT: "none",
    _PREFERRED: "preferred",
    _BIND: "bind",
    _INTERLEAVE: "interleave",
    _LOCAL: "none",
    _PREFERRED_MANY: "preferred",
    _WEIGHTED: "weighted interleave",
}
_FLAGS = 0xE000  # MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES, MPOL_F_NUMA_BALANCING stand above the mode
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
_WORD = 64  # bits in a word of a node mask
_MOST_NODES = 1 << 12  # get_mempolicy refuses a mask shorter than the kernel's; no kernel is built for more


def set_memory_policy(mode: str, nodes: Sequence[int]) -> None:
    """Take memory from these nodes first (``preferred``), only (``bind``), or in turn (``interleave``).

    ``none`` goes back to the default: memory of the node that a thread runs on. Holds for the calling thread and for
    threads and processes that it starts afterwards; memory that is in use stays where it is.

    Raises:
        OSError: refused: ``EPERM`` in most containers without CAP_SYS_NICE, ``ENOSYS`` where there is no such call,
            ``EINVAL`` for several preferred nodes before Linux 5.15 or nodes that the cpuset excludes.
    """
    if mode == "none":
        number, nodes = _DEFAULT, ()
    elif mode in ("preferred", "prefer"):
        number = _PREFERRED if len(nodes) == 1 else _PREFERRED_MANY
    else:
        number = {"bind": _BIND, "interleave": _INTERLEAVE, "weighted interleave": _WEIGHTED}[mode]
    _set(number, nodes)


def read_memory_policy() -> tuple[str, tuple[int, ...]]:
    """The mode that `set_memory_policy` takes and the nodes, as the kernel has them for the calling thread.

    Raises:
        OSError: the system refuses to say.
    """
    number, nodes = _get()
    mode = _NAMES.get(number & ~_FLAGS, f"mode {number & ~_FLAGS}")
    return (mode, nodes) if nodes else ("none", ())  # without nodes each mode means the node that a thread runs on


def memory_policy_refusal() -> OSError | None:
    """Why this process may not set a memory policy, found by setting what is in force; None when it may.

    A container may refuse to set and allow to read, or the other way round. Where reading is refused, the default is
    set, so call it before you set a policy.
    """
    try:
        number, nodes = _get()
    except OSError:
        number, nodes = _DEFAULT, ()
    try:
        _set(number, nodes)
    except OSError as error:
        return error
    return None


# ctypes and platform are imported where they are used: they take a fifth of the time of `import ds_numa`.
def _set(number: int, nodes: Sequence[int]) -> None:
    import ctypes

    if not nodes:
        _call(_numbers()[0], ctypes.c_int(number), None, ctypes.c_ulong(0))
        return
    words = (ctypes.c_ulong * (max(nodes) // _WORD + 1))()
    for node in nodes:
        words[node // _WORD] |= 1 << (node % _WORD)
    # The kernel reads one bit fewer than it is told (maxnode - 1).
    _call(_numbers()[0], ctypes.c_int(number), words, ctypes.c_ulong(len(words) * _WORD + 1))


def _get() -> tuple[int, tuple[int, ...]]:
    """The kernel's number of the mode, with flags, and the nodes."""
    import ctypes

    mode, words = ctypes.c_int(), (ctypes.c_ulong * (_MOST_NODES // _WORD))()
    _call(_numbers()[1], ctypes.byref(mode), words, ctypes.c_ulong(_MOST_NODES), None, ctypes.c_ulong(0))
    nodes = (i * _WORD + bit for i, word in enumerate(words) if word for bit in range(_WORD) if word >> bit & 1)
    return mode.value, tuple(nodes)


def _numbers() -> tuple[int, int]:
    import platform

    machine = platform.machine().lower()
    if not sys.platform.startswith("linux") or machine not in _CALLS or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"no memory policy on {sys.platform} {machine}")
    return _CALLS[machine]


def _call(number: int, *arguments: object) -> None:
    """Make a system call by its number; raises `OSError` with what it set errno to."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
