"""Named timers and a throughput meter. The names of ``deepspeed.utils.timer``.

On CUDA, time is measured by events on the current stream: starting and stopping never make the host wait, reading does.
Elsewhere it is the host's clock; the work of another accelerator goes on behind it, so wait for that before you stop.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ds_logging._timers.device_memory import device_memory
from ds_logging._timers.device_timer import DeviceTimer
from ds_logging._timers.interval import WINDOW, Interval
from ds_logging._timers.throughput import TIME_EPSILON, ThroughputTimer
from ds_logging.errors import ArgumentError, TimerError
from ds_logging.logging import log_dist

__all__ = [
    "BACKWARD_GLOBAL_TIMER",
    "BACKWARD_INNER_GLOBAL_TIMER",
    "BACKWARD_INNER_MICRO_TIMER",
    "BACKWARD_MICRO_TIMER",
    "BACKWARD_REDUCE_GLOBAL_TIMER",
    "BACKWARD_REDUCE_MICRO_TIMER",
    "FORWARD_GLOBAL_TIMER",
    "FORWARD_MICRO_TIMER",
    "STEP_GLOBAL_TIMER",
    "STEP_MICRO_TIMER",
    "TIME_EPSILON",
    "CudaEventTimer",
    "NoopTimer",
    "SynchronizedWallClockTimer",
    "ThroughputTimer",
    "trim_mean",
]

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"


def trim_mean(data: Sequence[float], trim_percent: float) -> float:
    """Return the mean without the smallest and the largest values; 0 for no data.

    Args:
        data: numbers; left as they are.
        trim_percent: the part, from 0 to 1, that is left out at either end. The middle always stays.

    Raises:
        ArgumentError: ``trim_percent`` is out of range.

    >>> trim_mean([100.0, 1.0, 2.0, 3.0, 0.0], 0.2)
    2.0
    """
    if not 0.0 <= trim_percent <= 1.0:
        raise ArgumentError(f"trim_percent={trim_percent!r}: give a number from 0 to 1")
    ordered = sorted(data)
    if not ordered:
        return 0.0
    cut = min(round(len(ordered) * trim_percent), (len(ordered) - 1) // 2)
    return statistics.fmean(ordered[cut : len(ordered) - cut])


class CudaEventTimer:
    """The time between two events on a stream, both recorded already.

    Args:
        start_event: as ``torch.cuda.Event(enable_timing=True)``.
        end_event: the later one.
    """

    def __init__(self, start_event: Any, end_event: Any) -> None:
        self.start_event = start_event
        self.end_event = end_event

    def get_elapsed_msec(self) -> float:
        """Wait for the device to pass the end and return milliseconds."""
        self.end_event.synchronize()
        return float(self.start_event.elapsed_time(self.end_event))


class SynchronizedWallClockTimer:
    """Timers by name: ``timers("fwd").start()``. No communication; each rank has its own.

    >>> timers = SynchronizedWallClockTimer()
    >>> timers("fwd").start()
    >>> timers("fwd").stop()
    >>> timers("fwd").elapsed() < 1000
    True
    """

    class Timer:
        """One of them. The time of all its intervals is kept, and the last 1024 of them for `mean`."""

        def __init__(self, name: str) -> None:
            self.name_ = name
            self._running: Interval | None = None
            self._total = 0.0  # ms
            self._records: deque[float] = deque(maxlen=WINDOW)  # ms
            self._pending = DeviceTimer()

        @property
        def started_(self) -> bool:
            """Whether it is running."""
            return self._running is not None

        def start(self) -> None:
            """Begin an interval.

            Raises:
                TimerError: it is running already.
            """
            if self._running is not None:
                raise TimerError(f"timer {self.name_!r} was started already; stop() it before start()")
            self._running = Interval()

        def stop(self, reset: bool = False, record: bool = False) -> None:
            """End the interval.

            Args:
                reset: forget the earlier intervals.
                record: without effect, every interval counts in `mean`.

            Raises:
                TimerError: it is not running.
            """
            if self._running is None:
                raise TimerError(f"timer {self.name_!r} is not running; start() it before stop()")
            running, self._running = self._running, None
            if reset:
                self.reset()
            running.end(self._pending, self._count)

        def _count(self, milliseconds: float) -> None:
            self._total += milliseconds
            self._records.append(milliseconds)

        def reset(self) -> None:
            """Forget every interval, also the one that is running."""
            self._running = None
            self._pending.clear()
            self._total = 0.0
            self._records.clear()

        def elapsed(self, reset: bool = True) -> float:
            """Return the milliseconds of all intervals, after waiting for the device.

            The time of a running one counts until now, and it goes on; with ``reset`` from zero.
            """
            running = self._running
            until_now = 0.0 if running is None else running.read(restart=reset)
            self._pending.flush()
            elapsed = self._total + until_now
            if reset:
                self.reset()
                self._running = running
            return elapsed

        def mean(self) -> float:
            """Return the mean interval in milliseconds, without a tenth of them at either end; 0 if there is none.

            A running one counts as long as it is now, and goes on.
            """
            until_now = [] if self._running is None else [self._running.read()]
            self._pending.flush()
            return trim_mean([*self._records, *until_now], 0.1)

    def __init__(self) -> None:
        self.timers: dict[str, SynchronizedWallClockTimer.Timer] = {}

    def get_timers(self) -> dict[str, SynchronizedWallClockTimer.Timer]:
        """Return the timers by name, themselves."""
        return self.timers

    def __call__(self, name: str) -> SynchronizedWallClockTimer.Timer:
        """Return the timer of this name, a new one if there is none."""
        if name not in self.timers:
            self.timers[name] = self.Timer(name)
        return self.timers[name]

    @staticmethod
    def memory_usage() -> str:
        """Return the memory of the current CUDA device as text, in units of 2**30 bytes; 0 where CUDA is not in use."""
        allocated, most_allocated, reserved, most_reserved = device_memory()
        return (
            f" | mem_allocated: {allocated:.4f} GB | max_mem_allocated: {most_allocated:.4f} GB"
            f" | cache_allocated: {reserved:.4f} GB | max_cache_allocated: {most_reserved:.4f} GB"
        )

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Iterable[int] | None = None,
    ) -> None:
        """Log the time of timers, at INFO, as coming from the caller's line. Waits for the device.

        Args:
            names: of timers; those that do not exist are left out.
            normalizer: times are divided by it, for example by the number of steps.
            reset: forget the intervals afterwards.
            memory_breakdown: add `memory_usage`.
            ranks: as for `log_dist`; rank 0 unless given.

        Raises:
            ArgumentError: ``normalizer`` is not above 0, or ``names`` is one string.
            RanksError: ``ranks`` is no list of ranks.
        """
        _check_normalizer(normalizer)
        text = "time (ms)"
        for name in _listed(names):
            if name in self.timers:
                text += f" | {name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}"
        log_dist(text + (self.memory_usage() if memory_breakdown else ""), ranks, stacklevel=2)

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Return the mean interval of timers by name, in milliseconds divided by ``normalizer``.

        Args:
            names: of timers; those that do not exist are left out.
            normalizer: above 0.
            reset: forget the intervals afterwards; a running one goes on from zero.

        Raises:
            ArgumentError: ``normalizer`` is not above 0, or ``names`` is one string.
        """
        _check_normalizer(normalizer)
        means = {}
        for name in _listed(names):
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].elapsed(reset=True)
        return means


class NoopTimer:
    """Has the methods of `SynchronizedWallClockTimer` and measures nothing."""

    class Timer:
        """One that measures nothing."""

        def start(self) -> None:
            """Do nothing."""

        def reset(self) -> None:
            """Do nothing."""

        def stop(self, **kwargs: Any) -> None:
            """Do nothing."""

        def elapsed(self, **kwargs: Any) -> float:
            """Return 0."""
            return 0

        def mean(self) -> float:
            """Return 0."""
            return 0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:
        """Return the one that measures nothing."""
        return self.timer

    def get_timers(self) -> dict[str, NoopTimer.Timer]:
        """Return no timers."""
        return {}

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Iterable[int] | None = None,
    ) -> None:
        """Do nothing."""

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Return no means."""
        return {}


def _check_normalizer(normalizer: float) -> None:
    if not normalizer > 0:
        raise ArgumentError(f"normalizer={normalizer!r}: give a number above 0")


def _listed(names: Iterable[str]) -> Iterable[str]:
    if isinstance(names, str):
        raise ArgumentError(f"names={names!r} is one string; write [{names!r}]")
    return names
