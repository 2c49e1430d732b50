"""Times work on a CUDA stream without ever making the host wait for it."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from ds_logging.errors import ArgumentError

Device = Literal["cpu", "cuda"]


def choose_device(device: str | None) -> Device:
    """Return where to measure: on the CUDA stream if this process uses CUDA, else on the host's clock.

    Raises:
        ArgumentError: ``device`` is neither "cpu" nor "cuda", or CUDA is asked for and not in use.
    """
    torch: Any = sys.modules.get("torch")
    in_use = torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized()
    if device is None:
        return "cuda" if in_use else "cpu"
    if device == "cpu":
        return "cpu"
    if device != "cuda":
        raise ArgumentError(f"device={device!r}: give 'cpu' or 'cuda'")
    if not in_use:
        raise ArgumentError("device='cuda': this process has not used CUDA; leave device out, or move a tensor there")
    return "cuda"


class DeviceTimer:
    """Pairs of events on a stream, read when the device has passed them.

    Args:
        limit: how many pairs may wait; past it the host waits for the oldest one.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._pending: deque[tuple[Any, Any, Callable[[float], None]]] = deque()
        self._lock = threading.Lock()

    def add(self, start: Any, end: Any, report: Callable[[float], None]) -> None:
        """Call ``report(milliseconds)`` some time after the device has passed both events."""
        with self._lock:
            self._pending.append((start, end, report))
        self._collect(lambda pending: pending > self._limit)

    def flush(self) -> None:
        """Wait for the device and report everything."""
        self._collect(lambda pending: True)

    def clear(self) -> None:
        """Forget what was not reported yet."""
        with self._lock:
            self._pending.clear()

    def _collect(self, wait: Callable[[int], bool]) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    return
                start, end, report = self._pending[0]
                if not end.query():
                    if not wait(len(self._pending)):
                        return
                    end.synchronize()
                self._pending.popleft()
            report(start.elapsed_time(end))
