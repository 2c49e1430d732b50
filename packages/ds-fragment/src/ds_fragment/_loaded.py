"""Engines' classes, without importing the engines: who has an object of one has imported it already."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Nothing:
    """A class without instances."""


def class_of(module: str, name: str) -> type[Any]:
    """A class of a module; one without instances where the module has not been imported, or has no such class.

    >>> import collections
    >>> class_of("collections", "Counter") is collections.Counter
    True
    """
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) else _Nothing


def is_a(thing: object, module: str, name: str) -> bool:
    """Whether ``thing`` is an instance of a class of a module, which may not have been imported.

    >>> import collections
    >>> is_a(collections.Counter(), "collections", "Counter"), is_a(1, "deepspeed", "DeepSpeedEngine")
    (True, False)
    """
    return isinstance(thing, class_of(module, name))


def is_dtensor(thing: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Importing their module takes half a second, which only who has one need pay."""
    return isinstance(thing, class_of("torch.distributed.tensor", "DTensor"))


def are_dtensors(things: Iterable[object]) -> bool:
    """Whether all are DTensors, and none of a subclass; faster for many."""
    return set(map(type, things)) <= {class_of("torch.distributed.tensor", "DTensor")}
