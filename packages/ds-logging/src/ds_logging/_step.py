"""The training step that log lines, the communication log and the timeline name."""

from __future__ import annotations

from ds_logging.errors import ArgumentError

_step: int | None = None


def set_step(step: int | None) -> None:
    """Say which training step begins. JSON lines, the communication log and its timeline name it from now on.

    It is of the process, not of a thread: a step's backward and its data loading run on other threads. No communication.

    Args:
        step: 0 or more, or ``None`` outside training.

    Raises:
        ArgumentError: ``step`` is no step.
    """
    global _step
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ArgumentError(f"step={step!r}: give the number of the step, 0 or more, or None outside training")
    _step = step


def current_step() -> int | None:
    """Return what `set_step` said last."""
    return _step
