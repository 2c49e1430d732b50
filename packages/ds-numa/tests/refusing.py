"""Run a Python program whose memory policy calls are refused by the kernel, as container runtimes have it.

``python refusing.py CODE [ARGUMENT...]``: installs a real seccomp filter (seccomp(2), BPF by hand), then runs CODE.
``REFUSED_CALLS`` names the calls, separated by commas; all of them when unset. Exit code 77 where the kernel allows no
filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
ALLOW, FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM
NAMES = ("mbind", "set_mempolicy", "get_mempolicy")
CALLS = {"x86_64": (237, 238, 239), "aarch64": (235, 237, 236)}


def refuse(names: tuple[str, ...] = NAMES) -> bool:
    """Install the filter for this process; False where that cannot be done."""
    if platform.machine() not in CALLS:
        return False
    numbers = dict(zip(NAMES, CALLS[platform.machine()], strict=True))
    calls = [numbers[name] for name in names]
    steps = [(LOAD, 0, 0, 0)]  # the call's number is the first word of seccomp_data
    steps += [(EQUAL, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    if libc.prctl(38, 1, None, 0, 0):  # PR_SET_NO_NEW_PRIVS
        return False
    return not libc.prctl(22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    if not refuse(tuple(os.environ.get("REFUSED_CALLS", ",".join(NAMES)).split(","))):
        sys.exit(77)
    source = sys.argv[1]
    sys.argv = sys.argv[1:]
    exec(compile(source, "<refused>", "exec"))
