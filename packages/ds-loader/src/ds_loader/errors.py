"""Errors and the warning of ds_loader. No error is a ``StopIteration``: that would end the caller's loop in silence."""

from __future__ import annotations


class EmptyLoaderError(ValueError):
    """The loader gave no batch at all."""


class OneShotLoaderError(TypeError):
    """The loader can be iterated only once, so it cannot be repeated."""


class LoaderStateError(ValueError):
    """A state is malformed, or does not fit this loader; or the loader was advanced by somebody else."""


class UnevenRanksError(RuntimeError):
    """The ranks of a group have epochs of different length, or are at different places."""


class LoaderWarning(UserWarning):
    """Something that a loader cannot do: it names the loader and the reason."""
