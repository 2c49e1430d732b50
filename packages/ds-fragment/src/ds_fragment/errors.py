"""The errors that ds-fragment raises, all of them a `FragmentError`."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "EngineChangedError",
    "FragmentError",
    "GradientUnavailableError",
    "InvalidValueError",
    "RankMismatchError",
    "StateKeyError",
    "StateNotReadyError",
    "UnlinkedParameterError",
    "UnusedGradientError",
]


class FragmentError(Exception):
    """Base of every error that ds-fragment raises on purpose."""

    status = b""  # the error as another rank sent it, where one did


class UnlinkedParameterError(FragmentError, ValueError):
    """The parameter is not tied to what was asked for: no fp32 partition, or no optimizer (see `attach`)."""


class InvalidValueError(FragmentError, ValueError):
    """A value has the wrong shape, dtype or type for the parameter it should be written to."""


class StateKeyError(FragmentError, ValueError):
    """The optimizer keeps no state of that name for the parameter."""


class StateNotReadyError(FragmentError, RuntimeError):
    """The optimizer has not made its state yet: it does so at its first step."""


class GradientUnavailableError(FragmentError, RuntimeError):
    """There is no reduced gradient to read, and the message says why."""


class UnusedGradientError(GradientUnavailableError):
    """There is no gradient on any rank: the parameter requires none, or this backward pass did not use it.

    ``safe_get_full_grad`` and ``safe_get_local_grad`` return None in its place.
    """


class EngineChangedError(FragmentError, RuntimeError):
    """ds-fragment does not know this version of an engine: it names the version, and the attribute that is missing."""


class CheckpointError(FragmentError, ValueError):
    """A file or folder of a checkpoint is damaged, incomplete or of another kind; the message names it."""


class RankMismatchError(FragmentError, RuntimeError):
    """The ranks of a group did not make the same call with the same values."""
