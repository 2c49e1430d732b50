"""Errors of this package. None of them prints a model: names, classes and near misses only."""

from __future__ import annotations


class LeafError(Exception):
    """The base of every error here."""


class LeafNotFoundError(LeafError, ValueError):
    """At least one selector matched no module."""


class LeafValueError(LeafError, ValueError):
    """A selector has a value that would mark everything or cannot mean anything."""


class LeafTypeError(LeafError, TypeError):
    """An argument has a type that cannot be used."""


class LeafShardError(LeafError, RuntimeError):
    """Leaves cannot be sharded as one unit each, in the state that the model is in."""


class LeafRehearsalError(LeafError, RuntimeError):
    """A rehearsal cannot run: the model's forward fails on a rank, or the model cannot be rehearsed as it is."""


class LeafOrderError(LeafError, RuntimeError):
    """Ranks call modules in different order, and the leaves given (or any leaves) do not hide it."""


class LeafHangError(LeafError, RuntimeError):
    """Ranks stopped because they called modules in different order."""
