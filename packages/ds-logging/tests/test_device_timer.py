"""CUDA events, played by the `device` of conftest.py, whose clock the test moves."""

import pytest
from ds_logging._timers.device_timer import DeviceTimer, choose_device
from ds_logging.comms_logging import CommsLogger
from ds_logging.errors import ArgumentError


@pytest.fixture
def comms():
    comms = CommsLogger()
    comms.enabled = True
    return comms


def test_no_operation_makes_the_host_wait(device, comms):
    for milliseconds in (3.0, 5.0):
        with comms.timed("all_reduce", 8, group_size=2):
            device.queued += milliseconds
    assert device.waits == 0
    assert comms.get_raw_data()["all_reduce"][8][:2] == [2, [3.0, 5.0]]  # a result was asked for
    assert device.waits > 0


def test_finished_operations_are_read_without_waiting(device, comms):
    for _ in range(10):
        with comms.timed("all_reduce", 8, group_size=2):
            device.queued += 2.0
        device.done = device.queued
    assert comms.get_total_operations() == 10
    assert device.waits == 0


def test_the_host_waits_only_when_asked_however_many_are_pending(device):
    timer, seen = DeviceTimer(), []
    for number in range(2000):
        start, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
        start.record()
        device.queued += number
        end.record()
        timer.add(start, end, seen.append)
    assert (seen, device.waits) == ([0], 0)  # the first took no time
    timer.flush()
    assert seen == list(range(2000))


def test_reset_forgets_what_is_pending(device, comms):
    with comms.timed("all_reduce", 8):
        device.queued += 1.0
    comms.reset_data()
    assert not comms.has_data()


def test_a_captured_graph_is_not_timed(device, comms):
    device.capturing = True
    with comms.timed("all_reduce", 8):
        device.queued += 1.0
    assert not comms.has_data()


def test_the_host_clock_beside_cuda(device, comms):
    with comms.timed("all_reduce", 8, device="cpu"):
        device.queued += 1e9
    assert comms.get_operation_summary("all_reduce")[8]["max_latency_ms"] < 1e8


def test_which_device(device, monkeypatch):
    assert choose_device(None) == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(device, "is_initialized", lambda: False)
    assert choose_device(None) == "cpu"
    with pytest.raises(ArgumentError, match="device='cuda'"):
        choose_device("cuda")
    with pytest.raises(ArgumentError, match="device='xpu'"):
        choose_device("xpu")
