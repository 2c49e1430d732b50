"""Times work on a CUDA stream without ever making the host wait for it."""

from __future__ import annotations

import sys
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

    The host waits in `flush` only. There is no limit to how many pairs may wait: a stream's own queue is one, and the
    driver makes the host wait when that is full. It has no lock, so that a signal handler may use it.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def add(self, start: Any, end: Any, report: Callable[[float], None]) -> None:
        """Call ``report(milliseconds)`` some time after the device has passed both events."""
        self._pending.append((start, end, report))
        self._collect(wait=False)

    def flush(self) -> None:
        """Wait for the device and report everything."""
        self._collect(wait=True)

    def clear(self) -> None:
        """Forget what was not reported yet."""
        self._pending.clear()

    def _collect(self, *, wait: bool) -> None:
        while True:
            try:
                start, end, report = self._pending.popleft()
            except IndexError:
                return
            if not end.query():
                if not wait:
                    self._pending.appendleft((start, end, report))
                    return
                end.synchronize()
            report(start.elapsed_time(end))
