"""Timers on a host clock and on a device that the test moves."""

import gc
import logging
import sys
import weakref
from types import SimpleNamespace

import pytest
from ds_logging import timer
from ds_logging._timers import interval as _interval
from ds_logging.errors import ArgumentError, MissingExtraError, RanksError, TimerError
from ds_logging.timer import CudaEventTimer, NoopTimer, SynchronizedWallClockTimer, ThroughputTimer, trim_mean

ON = SimpleNamespace(enabled=True, synchronized=True)
UNSYNCHRONIZED = {"enabled": True, "synchronized": False}


class Clock:
    """The host's; ``clock(3.0)`` is three milliseconds later."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, milliseconds):
        self.now += milliseconds


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, in a process without CUDA."""
    clock = Clock()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(_interval, "time", SimpleNamespace(perf_counter=lambda: clock.now / 1e3))
    return clock


class Work:
    """Work on the device: ``work(3.0)`` queues three milliseconds of it, and the host goes on."""

    def __init__(self, device):
        self.device = device

    def __call__(self, milliseconds):
        self.device.queued += milliseconds


@pytest.fixture(params=["host", "device"])
def work(request):
    """Let time pass, on either clock; what is measured must be the same."""
    return request.getfixturevalue("clock") if request.param == "host" else Work(request.getfixturevalue("device"))


def run(timers, name, work, *milliseconds):
    for length in milliseconds:
        timers(name).start()
        work(length)
        timers(name).stop()
        work(100.0)  # between intervals nothing counts


def test_elapsed_is_the_sum_and_resets(work):
    timers = SynchronizedWallClockTimer()
    run(timers, "fwd", work, 1.0, 2.0, 4.0)
    assert timers("fwd").elapsed(reset=False) == pytest.approx(7.0)
    assert timers("fwd").elapsed() == pytest.approx(7.0)
    assert timers("fwd").elapsed() == 0.0
    run(timers, "fwd", work, 3.0)
    assert timers("fwd").elapsed() == pytest.approx(3.0)
    assert list(timers.get_timers()) == ["fwd"]


def test_a_running_timer_is_read_and_goes_on(work):
    one = SynchronizedWallClockTimer()("one")
    one.start()
    work(2.0)
    assert one.elapsed(reset=False) == pytest.approx(2.0)
    assert one.started_
    work(3.0)
    assert one.mean() == pytest.approx(5.0)
    assert one.elapsed(reset=True) == pytest.approx(5.0)
    assert one.started_
    work(4.0)
    one.stop()
    assert one.elapsed() == pytest.approx(4.0)
    assert not one.started_


def test_the_mean_is_trimmed(work):
    timers = SynchronizedWallClockTimer()
    run(timers, "step", work, *[100.0], *[2.0] * 8, *[0.0])
    assert timers("step").mean() == pytest.approx(2.0)
    assert SynchronizedWallClockTimer()("none").mean() == 0.0


def test_get_mean_is_in_milliseconds_and_resets(work):
    timers = SynchronizedWallClockTimer()
    run(timers, "a", work, 2.0, 4.0)
    assert timers.get_mean(["a", "missing"], normalizer=2.0, reset=False) == {"a": pytest.approx(1.5)}
    assert timers.get_mean(["a"]) == {"a": pytest.approx(3.0)}
    assert timers("a").elapsed() == 0.0


def test_reset_forgets_also_what_runs(work):
    one = SynchronizedWallClockTimer()("one")
    one.start()
    work(5.0)
    one.reset()
    assert not one.started_
    assert one.elapsed() == 0.0
    one.start()
    work(1.0)
    one.stop()
    one.start()
    work(2.0)
    one.stop(reset=True)
    assert one.elapsed() == pytest.approx(2.0)


def test_the_wrong_order_is_an_error(work):
    one = SynchronizedWallClockTimer()("one")
    with pytest.raises(TimerError, match=r"timer 'one' is not running; start\(\) it before stop"):
        one.stop()
    one.start()
    with pytest.raises(TimerError, match="timer 'one' was started already"):
        one.start()
    assert one.started_
    one.stop()


def test_measuring_never_waits_for_the_device(device):
    timers = SynchronizedWallClockTimer()
    run(timers, "fwd", Work(device), *[1.0] * 50)
    assert device.waits == 0
    assert timers("fwd").elapsed() == pytest.approx(50.0)
    assert device.waits > 0


def test_memory_is_bounded(device):
    events = []
    plain = device.Event

    class Counted(plain):
        def __init__(self, enable_timing):
            super().__init__(enable_timing)
            events.append(weakref.ref(self))

    device.Event = Counted
    timers = SynchronizedWallClockTimer()
    for _ in range(5000):
        run(timers, "fwd", Work(device), 1.0)
        device.done = device.queued
    gc.collect()
    assert sum(event() is not None for event in events) < 10
    assert device.waits == 0
    assert timers("fwd").elapsed(reset=False) == pytest.approx(5000.0)
    assert len(timers("fwd")._records) == _interval.WINDOW


def test_a_captured_graph_is_not_measured(device):
    one = SynchronizedWallClockTimer()("one")
    device.capturing = True
    one.start()
    device.queued += 5.0
    assert one.elapsed(reset=False) == 0.0
    one.stop()
    device.capturing = False
    assert one.elapsed() == 0.0


def test_log(clock, caplog):
    caplog.set_level(logging.INFO, logger="ds")
    timers = SynchronizedWallClockTimer()
    run(timers, "fwd", clock, 3.0)
    run(timers, "bwd", clock, 5.0)
    timers.log(["fwd", "missing", "bwd"], normalizer=2.0, reset=False)
    timers.log(["fwd"], memory_breakdown=True)
    timers.log(["fwd"])
    timers.log(["bwd"], reset=False, ranks=[])
    timers.log(["bwd"], ranks=[0])
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "[Rank 0] time (ms) | fwd: 1.50 | bwd: 2.50",
        "[Rank 0] time (ms) | fwd: 3.00 | mem_allocated: 0.0000 GB | max_mem_allocated: 0.0000 GB"
        " | cache_allocated: 0.0000 GB | max_cache_allocated: 0.0000 GB",
        "[Rank 0] time (ms) | fwd: 0.00",
        "[Rank 0] time (ms) | bwd: 5.00",
    ]
    assert {record.filename for record in caplog.records} == {"test_timer.py"}


def test_memory_usage_on_a_device(device):
    assert SynchronizedWallClockTimer.memory_usage().startswith(
        " | mem_allocated: 1.5000 GB | max_mem_allocated: 1.5000"
    )


@pytest.mark.parametrize("method", ["log", "get_mean"])
@pytest.mark.parametrize("normalizer", [0, -1.0, float("nan")])
def test_normalizers(method, normalizer):
    with pytest.raises(ArgumentError, match="normalizer="):
        getattr(SynchronizedWallClockTimer(), method)(["a"], normalizer=normalizer)


def test_names_and_ranks(clock):
    timers = SynchronizedWallClockTimer()
    with pytest.raises(ArgumentError, match="names='fwd' is one string"):
        timers.log("fwd")
    with pytest.raises(ArgumentError, match="names='fwd' is one string"):
        timers.get_mean("fwd")
    with pytest.raises(RanksError):
        timers.log(["fwd"], ranks=[-2])


@pytest.mark.parametrize(
    ("data", "part", "mean"),
    [
        ([], 0.1, 0),
        ([3], 0.9, 3),
        ([1, 2, 3, 4], 0.0, 2.5),
        ([9, 1, 2, 3, 0], 0.2, 2),
        ([4, 1, 2, 100], 0.5, 3),  # the middle stays
        ([4, 1, 2], 1.0, 2),
    ],
)
def test_trim_mean(data, part, mean):
    before = list(data)
    assert trim_mean(data, part) == pytest.approx(mean)
    assert data == before


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_what_trim_mean_refuses(part):
    with pytest.raises(ArgumentError, match="trim_percent="):
        trim_mean([1.0], part)


def test_cuda_event_timer(device):
    start, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
    start.record()
    device.queued += 7.0
    end.record()
    assert CudaEventTimer(start, end).get_elapsed_msec() == 7.0
    assert device.waits == 1


def test_the_timer_that_measures_nothing():
    timers = NoopTimer()
    timers("a").start()
    timers("a").stop(reset=True)
    timers("a").reset()
    assert timers("a").elapsed(reset=False) == timers("a").mean() == 0
    assert timers.get_timers() == timers.get_mean(["a"]) == {}
    timers.log(["a"])


def steps(throughput, work, lengths, micro_steps=1):
    for length in lengths:
        for micro in range(micro_steps):
            throughput.start()
            work(length / micro_steps)
            throughput.stop(global_step=micro == micro_steps - 1)
            work(1000.0)  # outside


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_throughput(work, micro_steps):
    lines = []
    throughput = ThroughputTimer(ON, batch_size=32, start_step=2, steps_per_output=2, logging_fn=lines.append)
    assert throughput.avg_samples_per_sec() == float("-inf")
    steps(throughput, work, [5000.0, 5000.0, 100.0, 300.0], micro_steps)
    assert throughput.total_elapsed_time == pytest.approx(0.4)
    assert throughput.avg_samples_per_sec() == pytest.approx(32 / 0.2, rel=1e-4)
    (line,) = lines
    assert line.startswith(f"epoch=0/micro_step={4 * micro_steps}/global_step=4, RunningAvgSamplesPerSec=159.99")
    assert float(line.partition("CurrSamplesPerSec=")[2].partition(",")[0]) == pytest.approx(32 / 0.3, rel=1e-4)
    throughput.update_epoch_count()
    steps(throughput, work, [100.0] * 2, micro_steps)
    assert lines[1].startswith(f"epoch=1/micro_step={2 * micro_steps}/global_step=6, ")
    assert throughput.global_step_count == 6


def test_the_step_in_progress(work):
    throughput = ThroughputTimer(ON, batch_size=8, start_step=0)
    steps(throughput, work, [7.0])
    assert throughput.step_elapsed_time == 0.0
    throughput.start()
    work(3.0)
    throughput.stop()
    assert throughput.step_elapsed_time == pytest.approx(0.003)


def test_throughput_waits_for_the_device_only_to_report(device):
    lines = []
    throughput = ThroughputTimer(ON, batch_size=1, start_step=0, steps_per_output=10, logging_fn=lines.append)
    steps(throughput, Work(device), [10.0] * 9)
    assert device.waits == 0
    steps(throughput, Work(device), [10.0])
    assert device.waits > 0
    assert "RunningAvgSamplesPerSec=99.99" in lines[0]
    assert "MemAllocated=1.5GB" in lines[0]


def test_unsynchronized_throughput_reads_the_host_s_clock(device, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_interval, "time", SimpleNamespace(perf_counter=lambda: clock.now / 1e3))
    throughput = ThroughputTimer(UNSYNCHRONIZED, batch_size=1, start_step=0)
    throughput.start()
    device.queued += 1e6
    clock(20.0)
    throughput.stop(global_step=True)
    assert throughput.avg_samples_per_sec() == pytest.approx(50.0, rel=1e-3)
    assert device.waits == 0


def test_throughput_that_is_off_or_not_started(clock):
    off = ThroughputTimer({"enabled": False, "synchronized": True}, batch_size=None, start_step=0)
    on = ThroughputTimer(ON, batch_size=None, start_step=0)
    steps(off, clock, [1.0])
    on.stop(global_step=True)
    assert (off.global_step_count, on.global_step_count) == (0, 0)
    assert (off.batch_size, on.batch_size) == (1, 1)


def test_a_second_start_begins_anew(clock):
    throughput = ThroughputTimer(ON, batch_size=1, start_step=0)
    throughput.start()
    clock(100.0)
    throughput.start()
    clock(10.0)
    throughput.stop(global_step=True)
    assert throughput.total_elapsed_time == pytest.approx(0.01)


def test_throughput_logs_on_rank_0_unless_told_otherwise(clock, caplog):
    caplog.set_level(logging.INFO, logger="ds")
    steps(ThroughputTimer(ON, 1, start_step=0, steps_per_output=1), clock, [1.0])
    assert caplog.records[0].getMessage().startswith("[Rank 0] epoch=0/")


def test_the_host_s_memory(clock, monkeypatch):
    found = SimpleNamespace(
        virtual_memory=lambda: SimpleNamespace(percent=12.5), swap_memory=lambda: SimpleNamespace(percent=3.0)
    )
    monkeypatch.setitem(sys.modules, "psutil", found)
    lines = []
    throughput = ThroughputTimer(ON, 1, 0, steps_per_output=1, monitor_memory=True, logging_fn=lines.append)
    steps(throughput, clock, [1.0])
    assert lines[1] == "epoch=0/micro_step=1/global_step=1, vm %: 12.5, swap %: 3.0"
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError, match="psutil"):
        ThroughputTimer(ON, 1, monitor_memory=True)


@pytest.mark.parametrize("config", [{}, {"enabled": True}, SimpleNamespace(synchronized=True), None])
def test_a_config_that_lacks_something(config):
    with pytest.raises(ArgumentError, match="config="):
        ThroughputTimer(config, 1)


def test_how_often_to_log():
    with pytest.raises(ArgumentError, match="steps_per_output=0"):
        ThroughputTimer(ON, 1, steps_per_output=0)


def test_every_constant_is_public():
    constants = {name for name in vars(timer) if name.isupper() and not name.startswith("_")} - {"WINDOW"}
    assert constants <= set(timer.__all__)
