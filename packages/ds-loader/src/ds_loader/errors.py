"""Errors that ds_loader raises. None of them is a ``StopIteration``: that would end the caller's loop in silence."""

from __future__ import annotations


class EmptyLoaderError(ValueError):
    """The source gave no batch at all."""


class OneShotLoaderError(TypeError):
    """The source can be iterated only once, so it cannot be repeated."""


class LoaderStateError(ValueError):
    """A state is malformed, or does not fit this loader."""
