"""The training step that log lines, the communication log and the timeline name."""

from __future__ import annotations

import bisect
import time
from typing import NamedTuple

from ds_logging.errors import ArgumentError


class Step(NamedTuple):
    """A training step and the moment at which it began, as ``time.time_ns`` gives it."""

    number: int
    time_ns: int


_step: int | None = None
_begun: list[tuple[int, int | None]] = []  # (time.time_ns() at set_step, the step), the last ones
_MOST_KEPT = 4096


def set_step(step: int | None) -> None:
    """Say which training step begins. JSON lines, the communication log and its timeline name it from now on.

    It is of the process, not of a thread: backward passes and data loading run on other threads. No communication.

    Args:
        step: 0 or more, or ``None`` outside training.

    Raises:
        ArgumentError: ``step`` is no step.
    """
    global _step
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ArgumentError(f"step={step!r}: give the number of the step, 0 or more, or None outside training")
    _step = step
    _begun.append((time.time_ns(), step))
    if len(_begun) > _MOST_KEPT:
        del _begun[: _MOST_KEPT // 2]


def step_at(moment_ns: int) -> int | None:
    """Return the step that was the current one at ``moment_ns`` (``time.time_ns``)."""
    place = bisect.bisect_right(_begun, moment_ns, key=lambda one: one[0])
    return _begun[place - 1][1] if place else None


def begun_steps() -> list[Step]:
    """Return the last steps that were set, oldest first."""
    return [Step(step, moment) for moment, step in list(_begun) if step is not None]


def current_step() -> int | None:
    """Return what `set_step` said last."""
    return _step
