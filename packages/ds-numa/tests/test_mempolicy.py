from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ds_numa import _mempolicy
from ds_numa._mempolicy import memory_policy_refusal, read_memory_policy, set_memory_policy

linux = pytest.mark.skipif(
    memory_policy_refusal() is not None, reason=f"memory policy is refused here: {memory_policy_refusal()}"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


# The kernel's own account of a policy: the second column of /proc/self/numa_maps of fresh memory.
LOOK = """
import ctypes, mmap, re
from ds_numa._mempolicy import set_memory_policy
set_memory_policy({mode!r}, [0])
area = mmap.mmap(-1, 1 << 16); area[0] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
lines = dict(line.split()[:2] for line in open("/proc/self/numa_maps"))
starts = sorted(int(start, 16) for start in lines)
print(lines[format(max(start for start in starts if start <= address), "x").zfill(8)])
"""


@linux
@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel has no numa_maps")
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("bind", {"bind:0"}),
        ("preferred", {"prefer:0", "prefer=0"}),
        ("prefer", {"prefer:0", "prefer=0"}),
        ("interleave", {"interleave:0"}),
        ("none", {"default"}),
    ],
)
def test_the_kernel_sees_the_policy(mode: str, words: set[str]) -> None:
    assert run(LOOK.format(mode=mode)).replace(" (many)", "") in words


@linux
def test_a_node_that_is_not_there_is_refused_with_a_reason() -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        set_memory_policy("bind", [700])
    assert caught.value.errno == errno.EINVAL


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def call(number: int, mode: object, words: object, bits: object) -> None:
        told.append((mode.value, list(words or ()), bits.value))  # type: ignore[attr-defined, call-overload]

    monkeypatch.setattr(_mempolicy, "_call", call)
    monkeypatch.setattr(_mempolicy, "_numbers", lambda: (0, 0))
    set_memory_policy("bind", [0, 65])
    set_memory_policy("prefer", [3])
    set_memory_policy("preferred", [0, 1])
    set_memory_policy("interleave", [0, 1])
    set_memory_policy("none", [0, 1])
    assert told == [(2, [1, 2], 129), (1, [8], 65), (5, [3], 65), (3, [3], 65), (0, [], 0)]


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "pdp11")])
def test_other_systems_have_no_policy(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    refusal = memory_policy_refusal()
    assert refusal is not None
    assert refusal.errno == errno.ENOSYS
    with pytest.raises(OSError, match=f"no memory policy on {system} {machine}"):
        set_memory_policy("bind", [0])


READ_BACK = """
import sys
from ds_numa._mempolicy import memory_policy_refusal, read_memory_policy, set_memory_policy
set_memory_policy(sys.argv[1], [0])
print(read_memory_policy(), memory_policy_refusal(), read_memory_policy())
"""


@linux
@pytest.mark.parametrize("mode", ["preferred", "bind", "interleave", "none"])
def test_the_policy_is_read_back_and_asking_for_a_refusal_leaves_it(mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, mode], capture_output=True, text=True, check=True, timeout=60
    )
    policy = (mode, () if mode == "none" else (0,))
    assert done.stdout.strip() == f"{policy} None {policy}"


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, [0], ("none", ())),
        (1, [0], ("none", ())),  # preferred without nodes: the node that the thread runs on
        (4, [0], ("none", ())),
        (1, [8], ("preferred", (3,))),
        (0x8002, [1, 2], ("bind", (0, 65))),  # with MPOL_F_STATIC_NODES
        (5, [3], ("preferred", (0, 1))),
        (6, [3], ("weighted interleave", (0, 1))),
        (9, [1], ("mode 9", (0,))),
    ],
)
def test_what_the_kernel_says(
    monkeypatch: pytest.MonkeyPatch, number: int, words: list[int], expected: tuple[str, tuple[int, ...]]
) -> None:
    def call(_: int, mode: Any, mask: Any, bits: Any, address: object, flags: Any) -> None:
        assert (bits.value, address, flags.value) == (8 * ctypes.sizeof(mask), None, 0)
        mode._obj.value = number
        mask[: len(words)] = words

    monkeypatch.setattr(_mempolicy, "_call", call)
    monkeypatch.setattr(_mempolicy, "_numbers", lambda: (0, 0))
    assert read_memory_policy() == expected


ASK = """
from ds_numa._mempolicy import memory_policy_refusal, read_memory_policy
try:
    read = read_memory_policy()
except OSError as error:
    read = error.errno
print(read, getattr(memory_policy_refusal(), "errno", None))
"""


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ("set_mempolicy", f"('none', ()) {errno.EPERM}"),  # reading tells nothing about setting
        ("get_mempolicy", f"{errno.EPERM} None"),
        ("set_mempolicy,get_mempolicy,mbind", f"{errno.EPERM} {errno.EPERM}"),
    ],
)
def test_a_container_that_refuses_is_noticed(calls: str, expected: str) -> None:
    tool = Path(__file__).with_name("refusing.py")
    env = os.environ | {"REFUSED_CALLS": calls}
    done = subprocess.run([sys.executable, str(tool), ASK], capture_output=True, text=True, timeout=60, env=env)
    if done.returncode == 77:
        pytest.skip("no seccomp filter can be set here")
    assert (done.stdout.strip(), done.stderr) == (expected, "")
