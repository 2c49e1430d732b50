"""What this package raises. Every class is a `GroupsError`, and a builtin error of the kind one would expect."""

from __future__ import annotations

from collections.abc import Mapping


class GroupsError(Exception):
    """Base of every error of this package."""


class TopologyError(GroupsError, ValueError):
    """Sizes, axis names or options that make no topology; the message prints them."""


class TopologyWarning(UserWarning):
    """A topology that can be made, and is probably not what was meant."""


class DivisibilityError(TopologyError):
    """A size that does not divide what it has to divide."""


class RankRangeError(TopologyError):
    """A rank outside the world, listed twice, or in no group at all."""


class MissingDependencyError(GroupsError, ImportError):
    """An optional package is not installed; the message says which."""


class NotInitializedError(GroupsError, RuntimeError):
    """A group was asked for that nobody has made, or there is no process group to make it from."""


class NoSequenceGroupError(NotInitializedError, KeyError):
    """No sequence parallel group; a `KeyError` too, because `deepspeed.utils.groups` raises that."""

    __str__ = Exception.__str__  # a KeyError would show the message in quotes


class StaleGroupsError(GroupsError, RuntimeError):
    """The handle belongs to a process group that has been destroyed since."""


class LayoutConflictError(GroupsError, RuntimeError):
    """Groups of this name exist with another layout."""


class StoreError(GroupsError, RuntimeError):
    """The key-value store of the default process group cannot be used to agree, or was lost; the cause is chained."""


class GroupCreationError(GroupsError, RuntimeError):
    """A group could not be made: the backend failed (the cause is chained), or ranks did not come.

    Attributes:
        missing: the ranks that did not come in time; of a large group, the first rank of every part that is incomplete.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class DeadlockError(GroupCreationError):
    """Ranks wait for each other in a cycle. Raised on every rank that waits where the cycle passes.

    Attributes:
        waits: rank -> (what it waits for, the ranks that it waits for).
    """

    def __init__(self, message: str, waits: Mapping[int, tuple[str, tuple[int, ...]]]) -> None:
        super().__init__(message)
        self.waits = dict(waits)


class PlanMismatchError(GroupsError, RuntimeError):
    """Ranks hold different plans.

    Attributes:
        differences: field -> value (as JSON text) -> the ranks that hold it.
    """

    def __init__(self, message: str, differences: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        super().__init__(message)
        self.differences = {field: dict(values) for field, values in differences.items()}


class PlanTimeoutError(GroupsError, TimeoutError):
    """Some ranks did not say which plan they hold.

    Attributes:
        missing: the ranks that had not answered when the time was up.
    """

    def __init__(self, message: str, missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class UnsupportedTorchError(GroupsError, RuntimeError):
    """This version of PyTorch keeps its device meshes in a way that is not known."""
