"""The errors that this package raises for a caller's mistake. Each names the argument, its value and the fix."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "LogLevelError",
    "MissingExtraError",
    "RanksError",
    "ReadOnlyError",
    "TimerError",
    "UnknownOperationError",
]


class ArgumentError(ValueError):
    """An argument has a value that cannot be used."""


class RanksError(ArgumentError):
    """``ranks`` is no list of ranks of this job."""


class LogLevelError(ArgumentError):
    """Something is no logging level."""


class UnknownOperationError(ArgumentError):
    """No bandwidth formula is known for a communication operation."""


class ReadOnlyError(TypeError):
    """Something that is only to be read was changed."""


class TimerError(RuntimeError):
    """A timer was started twice, or stopped without being started."""


class MissingExtraError(ImportError):
    """An optional package is needed and not installed."""
