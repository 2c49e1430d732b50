"""Samples per second of a training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ds_logging._timers.device_memory import device_memory
from ds_logging._timers.device_timer import DeviceTimer
from ds_logging._timers.interval import Interval
from ds_logging.errors import ArgumentError, MissingExtraError
from ds_logging.logging import log_dist

TIME_EPSILON = 1e-6
"""Seconds that are added to a measured time, so that none divides by zero."""


class ThroughputTimer:
    """Counts samples per second over steps that may have several micro steps. No communication.

    With ``config.synchronized`` on CUDA it measures the work itself, by events on the stream, and waits for the device
    only when a value is read or logged. Otherwise it reads the host's clock.

    Args:
        config: an object, or a mapping, with ``enabled`` and ``synchronized``.
        batch_size: samples of a whole step, of all ranks; 1 if None.
        start_step: how many steps are not measured at first.
        steps_per_output: log after so many steps; never if None.
        monitor_memory: log the host's memory, too; needs psutil.
        logging_fn: gets each line; `log_dist` on rank 0 unless given.

    Raises:
        ArgumentError: ``config`` lacks one of the two, or ``steps_per_output`` is below 1.
        MissingExtraError: ``monitor_memory`` without psutil.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], object] | None = None,
    ) -> None:
        if steps_per_output is not None and steps_per_output < 1:
            raise ArgumentError(f"steps_per_output={steps_per_output!r}: give 1 or more, or None for no lines")
        self.config = config
        _option(config, "enabled")
        _option(config, "synchronized")
        self.batch_size = 1 if batch_size is None else batch_size
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = log_dist if logging_fn is None else logging_fn
        self.started = False
        self.initialized = False
        self.epoch_count = 0
        self.micro_step_count = 0
        self.global_step_count = 0
        self._psutil = _import_psutil() if monitor_memory else None
        self._running: Interval | None = None
        self._pending = DeviceTimer()
        self._measured_steps = 0
        self._step = 0  # counts the measured steps that were begun
        self._folded = (0, 0.0)  # the step that the last folded interval is of, and its milliseconds
        self._total = 0.0  # ms

    def update_epoch_count(self) -> None:
        """Say that an epoch begins."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """Begin a micro step. A second call before `stop` begins it anew."""
        if not _option(self.config, "enabled"):
            return
        self.initialized = self.started = True
        if self.global_step_count >= self.start_step:
            self._running = Interval(on_host=not _option(self.config, "synchronized"))

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro step; without `start` before it, do nothing.

        Args:
            global_step: it was the last one of its step.
            report_speed: log if it is time to.
        """
        if not _option(self.config, "enabled") or not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        self.global_step_count += global_step
        running, self._running = self._running, None
        if running is None:
            return
        running.end(self._pending, functools.partial(self._fold, self._step))
        if global_step:
            self._measured_steps += 1
            if report_speed and self._is_report_boundary():
                self._report()
            self._step += 1

    def _fold(self, step: int, milliseconds: float) -> None:
        self._total += milliseconds
        before = self._folded[1] if self._folded[0] == step else 0.0
        self._folded = (step, before + milliseconds)

    @property
    def total_elapsed_time(self) -> float:
        """Seconds of all measured micro steps; reading waits for the device."""
        self._pending.flush()
        return self._total / 1e3

    @property
    def step_elapsed_time(self) -> float:
        """Seconds of the micro steps of the step that is not over yet; reading waits for the device."""
        self._pending.flush()
        return self._folded[1] / 1e3 if self._folded[0] == self._step else 0.0

    def avg_samples_per_sec(self) -> float:
        """Return the mean over all measured steps, after waiting for the device; minus infinity before the first."""
        if self._measured_steps == 0:
            return float("-inf")
        return self.batch_size * self._measured_steps / (self.total_elapsed_time + TIME_EPSILON)

    def _is_report_boundary(self) -> bool:
        return self.steps_per_output is not None and self.global_step_count % self.steps_per_output == 0

    def _report(self) -> None:
        where = f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}"
        current = self.batch_size / (self.step_elapsed_time + TIME_EPSILON)
        allocated, most_allocated, *_ = device_memory()
        self.logging(
            f"{where}, RunningAvgSamplesPerSec={self.avg_samples_per_sec()}, CurrSamplesPerSec={current}, "
            f"MemAllocated={round(allocated, 2)}GB, MaxMemAllocated={round(most_allocated, 2)}GB"
        )
        if self._psutil is not None:
            memory, swap = self._psutil.virtual_memory().percent, self._psutil.swap_memory().percent
            self.logging(f"{where}, vm %: {memory}, swap %: {swap}")


def _option(config: Any, name: str) -> bool:
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if found is None:
        raise ArgumentError(
            f"config={config!r} has no {name!r}: give an object or a mapping that has enabled and synchronized"
        )
    return bool(found)


def _import_psutil() -> Any:
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("monitor_memory=True needs psutil: pip install psutil, or leave it out") from None
    return psutil
