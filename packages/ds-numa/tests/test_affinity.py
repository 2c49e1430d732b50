from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
from ds_numa import _affinity


def test_the_mask_is_that_of_this_process() -> None:
    assert set(_affinity.read_mask()) == set(psutil.Process().cpu_affinity())


THREADS = """
import os, threading
from ds_numa._affinity import set_mask
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(5)]
for thread in threads: thread.start()
last = max(os.sched_getaffinity(0))
count = set_mask([last])
late = threading.Thread(target=stop.wait); late.start()
masks = [os.sched_getaffinity(thread.native_id) for thread in [*threads, late]] + [os.sched_getaffinity(0)]
stop.set()
print(count, all(mask == {last} for mask in masks))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_every_thread_is_bound_and_later_ones_inherit() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["6", "True"]


def test_a_thread_that_ends_meanwhile_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def set_one(thread: int, mask: set[int]) -> None:
        calls.append(thread)
        if thread == 7:
            raise ProcessLookupError(errno.ESRCH, "No such process")

    seen = [{5, 7}, {5, 7, 8}, {5, 8}]
    monkeypatch.setattr(os, "sched_setaffinity", set_one, raising=False)
    monkeypatch.setattr(_affinity, "_threads", lambda: seen.pop(0))
    assert _affinity.set_mask([0]) == 2
    assert calls[0] == 0
    assert sorted(calls[1:]) == [5, 7, 8]


def without_linux_calls(monkeypatch: pytest.MonkeyPatch, process: object) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(psutil, "Process", lambda: process)


def test_windows_goes_through_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = [3, 1]
    process = SimpleNamespace(
        cpu_affinity=lambda cpus=None: mask if cpus is None else mask.__setitem__(slice(None), cpus),
        num_threads=threading.active_count,
    )
    without_linux_calls(monkeypatch, process)
    assert _affinity.read_mask() == [1, 3]
    _affinity.set_mask({2})
    assert mask == [2]


def test_macos_has_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_linux_calls(monkeypatch, SimpleNamespace())
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    assert _affinity.read_mask() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="cannot bind a process to CPUs") as caught:
        _affinity.set_mask([0])
    assert caught.value.errno == errno.ENOSYS


def test_every_threads_mask_is_read() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        masks = _affinity.read_masks()
        if not hasattr(os, "sched_getaffinity"):
            assert masks == {}
            return
        assert {threading.get_native_id(), thread.native_id} <= set(masks)
        assert masks[threading.get_native_id()] == tuple(_affinity.read_mask())
    finally:
        stop.set()
        thread.join()


def test_a_thread_that_is_refused_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_one(thread: int, mask: set[int]) -> None:
        if thread == 7:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", set_one, raising=False)
    monkeypatch.setattr(_affinity, "_threads", lambda: {5, 7})
    assert _affinity.set_mask([0]) == 1
