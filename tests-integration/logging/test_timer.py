"""The timers beside those of the installed DeepSpeed, and on a real device."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys

import ds_logging.timer as ours
import pytest

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# Both are given the same clock, which moves by hand, so that the results must be equal.
BOTH = """
import itertools, json, sys, time
from types import SimpleNamespace

import deepspeed.utils.timer as theirs
import ds_logging._timers.interval
import ds_logging.timer as ours

now = [1.0]
clock = SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0])
theirs.time = ds_logging._timers.interval.time = clock

def wait(milliseconds):
    now[0] += milliseconds / 1e3

def results(module):
    timers = module.SynchronizedWallClockTimer()
    found = []
    for length in (1.0, 2.0, 50.0, 3.0, 4.0, 2.5, 2.25, 1.5, 1.25, 8.0):
        timers("a").start(); wait(length); timers("a").stop()
        wait(9.0)
    found.append(timers("a").mean())
    found.append(timers("a").elapsed(reset=False))
    found.append(timers("a").elapsed())
    found.append(timers("a").elapsed())
    timers("b").start(); wait(3.0)
    found.append(timers("b").elapsed(reset=True))
    wait(5.0); timers("b").stop()
    found.append(timers("b").elapsed(reset=False))
    config = SimpleNamespace(enabled=True, synchronized=True)
    lines = []
    meter = module.ThroughputTimer(config, 16, start_step=2, steps_per_output=3, logging_fn=lines.append)
    for length in (100.0, 90.0, 10.0, 20.0, 30.0, 40.0):
        for last in (False, True):
            meter.start(); wait(length / 2); meter.stop(global_step=last)
    found.append(meter.avg_samples_per_sec())
    found += [meter.total_elapsed_time, meter.micro_step_count, meter.global_step_count, len(lines)]
    for line in lines:
        found.append(float(line.partition("RunningAvgSamplesPerSec=")[2].partition(",")[0]))
        found.append(float(line.partition("CurrSamplesPerSec=")[2].partition(",")[0]))
    found += [module.trim_mean([5.0, 1.0, 2.0, 9.0, 4.0], part) for part in (0.0, 0.1, 0.2, 0.3)]
    return [float(value) for value in found]

print("RESULTS", json.dumps([results(theirs), results(ours)]))
"""


@needs_deepspeed
def test_results_are_those_of_deepspeed():
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", BOTH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    theirs, mine = json.loads(line.removeprefix("RESULTS "))
    assert len(mine) == len(theirs) > 15
    assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("deepspeed")
    import deepspeed.utils.timer

    return deepspeed.utils.timer


@needs_deepspeed
def test_every_name_of_deepspeed_is_here(theirs):
    own = {
        name
        for name, value in vars(theirs).items()
        if not name.startswith("_") and (getattr(value, "__module__", None) == theirs.__name__ or name.isupper())
    }
    assert own - {"PSUTILS_INSTALLED"} == set(ours.__all__)
    for name in own & set(ours.__all__):
        if name.isupper():
            assert getattr(ours, name) == getattr(theirs, name)


CALLS = ["CudaEventTimer", "SynchronizedWallClockTimer", "NoopTimer", "ThroughputTimer", "trim_mean"]


@needs_deepspeed
@pytest.mark.parametrize("name", CALLS)
def test_parameters_are_those_of_deepspeed(theirs, name):
    def compare(full, their, our):
        if inspect.isclass(their):
            for member in vars(their):
                if not member.startswith("_") or member == "__init__" or member == "__call__":
                    compare(f"{full}.{member}", vars(their)[member], inspect.getattr_static(our, member))
        elif callable(their):
            wanted = [(p.name, p.kind, p.default) for p in inspect.signature(their).parameters.values()]
            found = [(p.name, p.kind, p.default) for p in inspect.signature(our).parameters.values()]
            assert found == wanted, full

    compare(name, getattr(theirs, name), getattr(ours, name))


@pytest.mark.gpu
def test_on_a_device_it_measures_the_work_without_waiting():
    torch = pytest.importorskip("torch")
    x = torch.randn(4096, 4096, device="cuda")
    x @ x  # loads the library
    torch.cuda.synchronize()
    timers = ours.SynchronizedWallClockTimer()
    meter = ours.ThroughputTimer({"enabled": True, "synchronized": True}, batch_size=64, start_step=0)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(2):
        meter.start()
        timers("matmul").start()
        for _ in range(100):
            x @ x
        timers("matmul").stop()
        meter.stop(global_step=True)
    last.record()
    assert not last.query(), "the host waited for the device"
    measured = timers("matmul").elapsed()
    rate = meter.avg_samples_per_sec()
    whole = first.elapsed_time(last)
    assert 0.9 * whole < measured <= whole  # events on the same stream, inside these two
    assert 64 * 2 / (whole / 1e3) <= rate < 1.1 * 64 * 2 / (whole / 1e3)
    assert not ours.SynchronizedWallClockTimer.memory_usage().startswith(" | mem_allocated: 0.0000")
