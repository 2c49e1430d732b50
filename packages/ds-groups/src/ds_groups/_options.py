"""`GroupOptions`: how a process group is made, compared by value."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from .errors import TopologyError

_SET_BY_TORCH = {"backend", "global_ranks_in_group", "group_name", "split_from", "split_color"}
_DEPTH = 4


@dataclass(frozen=True)
class GroupOptions:
    """How the groups of one axis are made. None leaves it as ``bind()`` says for all axes.

    Args:
        backend: ``"nccl"``, ``"gloo"``, ``"cpu:gloo,cuda:nccl"``, or None for the default group's.
        timeout: of the collectives, and of waiting for other ranks; in seconds or as a timedelta.
        pg_options: the backend's own, such as ``ProcessGroupNCCL.Options()``, or a function of no arguments that
            returns them. An object is copied for every group.
        warm_up: reduce one small tensor as soon as a group is made, so that it is connected.
    """

    backend: str | None = None
    timeout: timedelta | float | None = None
    pg_options: Any = None
    warm_up: bool | None = None

    def over(self, base: GroupOptions) -> GroupOptions:
        """These options, and those of ``base`` where they are None."""
        pairs = {name: (getattr(self, name), getattr(base, name)) for name in _FIELDS}
        return GroupOptions(**{name: other if own is None else own for name, (own, other) in pairs.items()})


_FIELDS = ("backend", "timeout", "pg_options", "warm_up")


@dataclass(frozen=True)
class Settings:
    """Checked options; equal ones make groups that can be shared.

    Attributes:
        backend: None is the default group's.
        timeout: None is PyTorch's default.
        pg_text: the backend's own options by value.
        warm_up: whether to use a group once when it is made.
        make_pg_options: new ones for a group, or None.
    """

    backend: str | None = None
    timeout: timedelta | None = None
    pg_text: str | None = None
    warm_up: bool = field(default=False, compare=False)
    make_pg_options: Callable[[], Any] | None = field(default=None, compare=False)

    @property
    def plain(self) -> bool:
        """Whether groups are made as the default group is."""
        return self == Settings()

    def as_dict(self) -> dict[str, Any]:
        """What ranks compare, JSON-serialisable."""
        timeout = None if self.timeout is None else self.timeout.total_seconds()
        found = {"backend": self.backend, "timeout": timeout}
        return found if self.pg_text is None else {**found, "pg_options": json.loads(self.pg_text)}


def settings_of(options: GroupOptions, where: str = "") -> Settings:
    """Check types and values of options.

    Args:
        options: as the user gave them.
        where: what an error message begins with, such as ``"axes['ep']: "``.

    Raises:
        TopologyError: an option is of a wrong type, or cannot be copied.
    """
    backend, warm_up = options.backend, options.warm_up
    if backend is not None and (not isinstance(backend, str) or not backend):
        raise TopologyError(f"{where}backend must be a name like 'gloo' or None, got {backend!r}")
    if warm_up is not None and not isinstance(warm_up, bool):
        raise TopologyError(f"{where}warm_up must be True or False, got {warm_up!r}")
    timeout = seconds(options.timeout, f"{where}timeout")
    backend = None if backend is None else backend.lower()
    if options.pg_options is None:
        return Settings(backend, timeout, None, bool(warm_up))
    make = _maker(options.pg_options, where)
    return Settings(backend, timeout, json.dumps(_value(make()), sort_keys=True), bool(warm_up), make)


def seconds(value: timedelta | float | None, name: str = "timeout") -> timedelta | None:
    """A time-out as a timedelta.

    Raises:
        TopologyError: it is no positive number of seconds.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, timedelta | float | int):
        raise TopologyError(f"{name} must be seconds or a timedelta, got {value!r}")
    found = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if not math.isfinite(found) or found <= 0:
        raise TopologyError(f"{name} must be positive and finite, got {value!r}")
    return value if isinstance(value, timedelta) else timedelta(seconds=found)


def _maker(given: Any, where: str) -> Callable[[], Any]:
    if callable(given):
        factory: Callable[[], Any] = given
        return factory
    _copy(given, where)  # now, not when the first group is made
    return lambda: _copy(given, where)


def _copy(given: Any, where: str) -> Any:
    """A copy, because PyTorch writes a group's name, ranks and time-out into the object that it is given."""
    advice = "give a function of no arguments that makes new ones"
    kind = type(given).__name__
    try:
        made = _duplicate(given)
    except Exception as error:
        raise TopologyError(f"{where}pg_options of type {kind} cannot be copied ({error}); {advice}") from error
    if _value(made) != _value(given):
        raise TopologyError(f"{where}pg_options of type {kind} cannot be copied: the copy differs; {advice}")
    return made


def _duplicate(given: Any) -> Any:
    try:
        return copy.deepcopy(given)
    except TypeError:  # an extension class that cannot be pickled
        made = type(given)()
        _assign(made, given)
        return made


def _assign(made: Any, given: Any) -> None:
    for name in _names(given):
        value = getattr(given, name)
        if _is_plain(value):
            if getattr(made, name) != value:
                setattr(made, name, value)
        else:
            _assign(getattr(made, name), value)


def _value(options: Any, depth: int = 0) -> Any:
    """The public attributes, and those of what they hold, JSON-serialisable."""
    if isinstance(options, timedelta):
        return options.total_seconds()
    if _is_plain(options):
        return list(options) if isinstance(options, tuple) else options
    if depth == _DEPTH:
        return type(options).__name__
    found = {name: _value(getattr(options, name), depth + 1) for name in _names(options)}
    return {"type": type(options).__name__, **found}


def _names(options: Any) -> list[str]:
    names = [name for name in dir(options) if not name.startswith("_") and name not in _SET_BY_TORCH]
    return [name for name in names if not callable(getattr(options, name))]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(part, bool | int | float | str) for part in value)
    return value is None or isinstance(value, bool | int | float | str | timedelta)
