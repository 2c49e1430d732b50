import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ds_logging import comms_logging
from ds_logging._launchers import LAUNCHERS
from ds_logging._log import settings as _settings
from ds_logging._log.logger import DsLogger, logger

VARIABLES = [
    *_settings.VARIABLES,
    "NO_COLOR",
    "DS_NVTX",
    "NVTX_INJECTION64_PATH",
    *(name for launcher in LAUNCHERS for name in launcher[1:] if name is not None),
]


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """No launcher, no process group, no handler and no level: what a test changes is undone after it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.shown_ranks, logger.problems = DsLogger.shown_ranks, ()
    yield
    for log in list(comms_logging._logs):
        log.stop()
    logger.shown_ranks, logger.problems = DsLogger.shown_ranks, ()
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def run_script(tmp_path):
    """Run a program of its own, where neither pytest nor anybody else has configured logging."""

    def run(code, **environ):
        script = tmp_path / "script.py"
        script.write_text(code)
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env={**clean, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    return run


class Device:
    """Work is queued with `work` and done by `run`; an event is passed when the work before it is done."""

    def __init__(self):
        self.queued = 0.0  # ms
        self.done = 0.0  # ms
        self.waits = 0
        self.capturing = False
        device = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing
                self.at = None

            def record(self):
                self.at = device.queued

            def query(self):
                return self.at <= device.done

            def synchronize(self):
                device.waits += 1
                device.done = max(device.done, self.at)

            def elapsed_time(self, end):
                assert end.query(), "the time was asked for before the device was there"
                return end.at - self.at

        self.Event = Event

    def memory_allocated(self):
        return 3 * 2**29

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def is_initialized(self):
        return True

    def is_current_stream_capturing(self):
        return self.capturing

    def synchronize(self):
        raise AssertionError("the whole device was synchronised")


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=device))
    return device
