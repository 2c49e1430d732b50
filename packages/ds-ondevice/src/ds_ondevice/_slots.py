"""Where a module holds tensors: parameters, buffers, and plain attributes (alone, in containers, or in objects)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size})
_CONTAINERS = (list, tuple, dict, set)
_DEPTH = 4  # objects in objects
_FOREIGN = frozenset({"torch", "builtins", "functools", "typing", "logging", "threading", "collections", "enum"})


@dataclass(frozen=True)
class Slot:
    """One place that holds one tensor, or a container or an object that holds some.

    ``kind`` is "parameter", "buffer" or "attribute"; ``name`` is the dotted name from the root module. ``held`` are the
    tensors found there; of an attribute only those on meta, since no one moves the others.
    """

    owner: torch.nn.Module
    attribute: str
    name: str
    kind: str
    held: tuple[torch.Tensor, ...]

    def put(self, replacements: Mapping[int, torch.Tensor]) -> None:
        """Put the replacement of every tensor here in its place; ``replacements`` go by the old tensor's id."""
        if not any(id(tensor) in replacements for tensor in self.held):
            return
        if self.kind == "attribute":
            attributes = vars(self.owner)
            attributes[self.attribute] = _replaced(
                attributes[self.attribute], lambda leaf: replacements.get(id(leaf), leaf), _DEPTH
            )
        else:
            setattr(self.owner, self.attribute, replacements[id(self.held[0])])


def find_parts(root: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """``root`` and its submodules, by dotted name; and those that are only in lists, dicts or objects of these."""
    parts = {module: name for name, module in root.named_modules()}
    seen: set[int] = set()
    pending = list(parts.items())
    while pending:
        module, prefix = pending.pop()
        dot = f"{prefix}." if prefix else ""
        for name, value in _attributes(module):
            for leaf in _leaves(value, seen, _DEPTH):
                if isinstance(leaf, torch.nn.Module) and leaf not in parts:
                    found = {part: f"{dot}{name}.{inner}".rstrip(".") for inner, part in leaf.named_modules()}
                    found = {part: inner for part, inner in found.items() if part not in parts}
                    parts.update(found)
                    pending.extend(found.items())
    return parts


def find_slots(parts: Mapping[torch.nn.Module, str]) -> Iterator[Slot]:
    """Every slot of some modules: parameters and buffers of a module before its attributes.

    Args:
        parts: the modules and the prefixes of their names, as `find_parts` gives them.
    """
    seen: set[int] = set()
    for module, prefix in parts.items():
        yield from own_slots(module, f"{prefix}." if prefix else "", seen)


def own_slots(module: torch.nn.Module, prefix: str, seen: set[int]) -> Iterator[Slot]:
    """The slots of a module itself.

    Args:
        module: the module.
        prefix: begins their names.
        seen: the ids of objects that were looked into already; those looked into now are added.
    """
    for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in registry.items():
            if tensor is not None:
                yield Slot(module, name, prefix + name, kind, (tensor,))
    for name, value in _attributes(module):
        held = tuple(leaf for leaf in _leaves(value, seen, _DEPTH) if isinstance(leaf, torch.Tensor) and leaf.is_meta)
        if held:
            yield Slot(module, name, prefix + name, "attribute", held)


def put_device(module: torch.nn.Module, is_stale: Callable[[torch.device], bool], device: torch.device) -> None:
    """Put ``device`` where attributes of ``module`` hold a device that ``is_stale``, alone or in containers."""

    def new(leaf: Any) -> Any:
        return device if isinstance(leaf, torch.device) and is_stale(leaf) else leaf

    for name, value in list(_attributes(module)):
        if isinstance(value, (torch.device, *_CONTAINERS)) and any(
            new(leaf) is not leaf for leaf in tree_leaves(value)
        ):
            vars(module)[name] = tree_map(new, value)


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that may hold something: no numbers, names or modules, and no empty containers."""
    for name, value in vars(module).items():
        if type(value) in _SIMPLE or name in _REGISTRIES or isinstance(value, torch.nn.Module):
            continue
        if not (isinstance(value, _CONTAINERS) and not value):
            yield name, value


def _leaves(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """What containers hold, and the attributes of objects that are neither modules nor torch's or Python's own."""
    if isinstance(value, (torch.Tensor, torch.nn.Module)):
        yield value
    elif isinstance(value, _CONTAINERS):
        for leaf in value if isinstance(value, set) else tree_leaves(value):
            if not isinstance(leaf, _CONTAINERS):
                yield from _leaves(leaf, seen, depth)
    elif depth and id(value) not in seen and (fields := _fields(value)):
        seen.add(id(value))
        for field in fields.values():
            yield from _leaves(field, seen, depth - 1)


def _replaced(value: Any, new: Callable[[Any], Any], depth: int) -> Any:
    """The value with every tensor replaced; objects are changed."""
    if isinstance(value, torch.Tensor):
        return new(value)
    if isinstance(value, _CONTAINERS) and not isinstance(value, set):
        return tree_map(lambda leaf: leaf if isinstance(leaf, _CONTAINERS) else _replaced(leaf, new, depth), value)
    if depth:
        for name, field in _fields(value).items():
            changed = _replaced(field, new, depth - 1)
            if changed is not field:
                object.__setattr__(value, name, changed)
    return value


def _fields(value: Any) -> dict[str, Any]:
    """The attributes of an object that may hold tensors."""
    kind = type(value)
    if kind in _SIMPLE or isinstance(value, (type, torch.nn.Module)) or kind.__module__.partition(".")[0] in _FOREIGN:
        return {}
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
    attributes = getattr(value, "__dict__", None)
    return dict(attributes) if isinstance(attributes, dict) else {}
