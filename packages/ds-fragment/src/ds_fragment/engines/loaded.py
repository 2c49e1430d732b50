"""Engines' classes, looked up without importing the engines: an object exists only if its module was imported."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
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
    """Whether it is a DTensor, without importing their module, which takes half a second."""
    return isinstance(thing, class_of("torch.distributed.tensor", "DTensor"))


def are_dtensors(things: Iterable[object]) -> bool:
    """Whether all are DTensors, and none of a subclass; faster for many."""
    return set(map(type, things)) <= {class_of("torch.distributed.tensor", "DTensor")}


def composable_states() -> Mapping[Any, weakref.ref[Any]]:
    """torch's states of the modules under `fully_shard` or `replicate`, by module."""
    states = sys.modules.get("torch.distributed._composable_state")
    found: Mapping[Any, weakref.ref[Any]] = {} if states is None else states._module_state_mapping
    return found


def composable_state(module: object) -> object:
    """torch's state of a module under `fully_shard` or `replicate`; None of any other."""
    reference = composable_states().get(module)
    return None if reference is None else reference()


def fsdp2_groups(state: Any) -> Sequence[Any]:
    """The groups of parameters that FSDP2 gathers together, given its state of a module."""
    groups: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch has one group a module
        group = getattr(state, "_fsdp_param_group", None)
        groups = [] if group is None else [group]
    return groups


def is_gathered(module: object) -> bool:
    """Whether an FSDP2 or FSDP1 module has gathered copies in the place of its parameters."""
    if is_a(module, "torch.distributed.fsdp", "FSDPModule"):
        return any(not group.is_sharded for group in fsdp2_groups(composable_state(module)))
    handle: Any = getattr(module, "_handle", None)
    return any(view is not None for view in getattr(getattr(handle, "flat_param", None), "_tensors", None) or ())
