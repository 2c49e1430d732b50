"""Errors of this package: all are `ValueError`s, so that code written for `deepspeed.utils.numa` still catches them."""

from __future__ import annotations


class NumaError(ValueError):
    """The base of every error here."""


class CoreListError(NumaError):
    """A list of cores cannot be read, repeats a core, or names one that this process may not use."""


class TopologyError(NumaError):
    """A machine's description contradicts itself or lacks something."""


class RankError(NumaError):
    """A local rank or the number of local ranks is missing or out of range."""


class PlanError(NumaError):
    """No plan fits this machine and these options."""


class NotEnoughCoresError(PlanError):
    """There are more ranks than CPUs that they may use."""


class GpuLookupError(NumaError):
    """A GPU is named that this machine does not show."""


class BindingError(NumaError):
    """Under ``strict=True``: the system did not grant what was asked for. What was set before is in force again.

    Attributes:
        report: what was refused, a `ds_numa.BindReport`.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class AffinityConflictError(NumaError):
    """An environment variable makes another library pin threads as well."""


class MissingDependencyError(NumaError, ImportError):
    """An optional package is not installed; the message says which."""
