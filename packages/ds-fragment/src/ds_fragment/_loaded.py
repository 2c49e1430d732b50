"""Engines' classes, without importing the engines: who has an object of one has imported it already."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
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


def composable_states() -> Mapping[Any, weakref.ref[Any]]:
    """What torch keeps of the modules under `fully_shard` or `replicate`, by module."""
    states = sys.modules.get("torch.distributed._composable_state")
    found: Mapping[Any, weakref.ref[Any]] = {} if states is None else states._module_state_mapping
    return found


def composable_state(module: object) -> object:
    """What torch keeps of a module under `fully_shard` or `replicate`; None of any other."""
    reference = composable_states().get(module)
    return None if reference is None else reference()


def reshard(module: object) -> None:
    """Free what an FSDP2 or FSDP1 module has gathered, so that its own sharded parameters are in place.

    No communication; the next forward or backward gathers anew. A module of FSDP1 that is at work, or whose parameters
    are summoned, is left as it is, and so is anything else.
    """
    if is_a(module, "torch.distributed.fsdp", "FSDPModule"):
        module.reshard()  # type: ignore[attr-defined]
    elif is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        unit: Any = module
        handle = unit._handle
        if handle is None or handle._training_state.name != "IDLE":
            return
        gathers = hasattr(handle.flat_param, "_full_param_padded")  # from the first forward on
        if gathers and handle.uses_sharded_strategy and not handle.needs_unshard():
            sys.modules["torch.distributed.fsdp._runtime_utils"]._reshard(unit, handle, True)
