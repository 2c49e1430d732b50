"""What is known of an operator before it is called."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Overload: TypeAlias = "torch._ops.OpOverload[Any, Any]"

_aten = torch.ops.aten

# The result has no value until something writes to it.
_UNWRITTEN = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)

# These write to every element of what they write to, and read none of them.
_FILLING = frozenset(
    f"aten::{name}_"
    for name in (
        *("uniform", "normal", "random", "exponential", "log_normal", "cauchy", "geometric", "bernoulli"),
        *("fill", "zero", "copy"),
    )
)

# What a normalisation writes to in training; its schema does not say so.
_RUNNING = frozenset({"running_mean", "running_var"})

_RESIZING = frozenset({"aten::resize_", "aten::resize_as_"})
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional"})


@dataclass(frozen=True, slots=True)
class Schema:
    """An operator.

    Attributes:
        written: position and name of each argument that it writes to.
        views: its results may share the memory of its arguments, and it writes to nothing.
        random: it draws random numbers.
        unwritten: its result has no value until something writes to it.
        fills: it writes to all of its first argument, whatever was there.
        fills_alone: and takes no other tensor.
        sets: it gives a tensor another storage.
        exchanges: it communicates with other ranks.
        obstacle: why it cannot be repeated, if it cannot.
        needs_values: it may read numbers out of a tensor.
    """

    written: tuple[tuple[int, str], ...]
    views: bool
    random: bool
    unwritten: bool
    fills: bool
    fills_alone: bool
    sets: bool
    exchanges: bool
    obstacle: str
    needs_values: bool


@functools.cache
def schema_of(func: Overload) -> Schema:
    """The schema of an operator."""
    schema = func._schema
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _RUNNING
    )
    returned = schema.returns
    fills = schema.name in _FILLING
    exchanges = func.namespace in _COLLECTIVES
    obstacle = "changes the size of a storage" if schema.name in _RESIZING else ""
    return Schema(
        written=written,
        views=not written and bool(returned) and all(each.alias_info is not None for each in returned),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        unwritten=schema.name in _UNWRITTEN,
        fills=fills,
        fills_alone=fills and sum("Tensor" in str(argument.type) for argument in schema.arguments) == 1,
        sets=schema.name == "aten::set_",
        exchanges=exchanges,
        obstacle="exchanges values with other ranks" if exchanges else obstacle,
        needs_values=func in (_aten._local_scalar_dense.default, _aten._to_copy.default, _aten.copy_.default),
    )
