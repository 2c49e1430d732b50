"""One stretch of time, measured where the work is done: on the CUDA stream, or on the host's clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ds_logging._timers.device_timer import DeviceTimer, choose_device

WINDOW = 1024
"""How many stretches of one timer are kept, and how many may wait for the device."""


class Interval:
    """A stretch that began now. On CUDA its ends are events on the current stream; the host waits for none of them.

    Inside the capture of a CUDA graph nothing is measured: the work runs later, as often as the graph is replayed.

    Args:
        on_host: read the host's clock although this process uses CUDA.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self._cuda: Any = None
        self._begun: Any
        if on_host or choose_device(None) == "cpu":
            self._begun = time.perf_counter()
        else:
            self._cuda = sys.modules["torch"].cuda
            self._begun = self._event()

    def _event(self) -> Any:
        if self._cuda.is_current_stream_capturing():
            return None
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, pending: DeviceTimer, report: Callable[[float], None]) -> None:
        """End it. ``report`` gets its milliseconds: now, or through ``pending`` once the device was there."""
        if self._cuda is None:
            report((time.perf_counter() - self._begun) * 1e3)
            return
        ended = self._event()
        if self._begun is not None and ended is not None:
            pending.add(self._begun, ended, report)

    def read(self, *, restart: bool = False) -> float:
        """Return the milliseconds until now, after waiting for the device; ``restart`` begins it again from there."""
        if self._cuda is None:
            now: Any = time.perf_counter()
            passed = (now - self._begun) * 1e3
        else:
            now = self._event()
            if now is None or self._begun is None:
                passed = 0.0
            else:
                now.synchronize()
                passed = self._begun.elapsed_time(now)
        if restart:
            self._begun = now
        return float(passed)
