"""Where a module holds tensors: parameters, buffers, and plain attributes (alone or inside lists, tuples, dicts)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Slot:
    """One place that holds one tensor, or a container of tensors.

    ``kind`` is "parameter", "buffer" or "attribute"; ``name`` is the dotted name from the root module.
    """

    owner: torch.nn.Module
    attribute: str
    name: str
    kind: str

    def tensors(self) -> list[torch.Tensor]:
        """The tensors held here; of an attribute only those on meta, since no one moves the others."""
        if self.kind == "attribute":
            return [leaf for leaf in tree_leaves(vars(self.owner)[self.attribute]) if _on_meta(leaf)]
        registry = self.owner._parameters if self.kind == "parameter" else self.owner._buffers
        tensor = registry[self.attribute]
        return [] if tensor is None else [tensor]

    def put(self, replacements: Mapping[int, torch.Tensor]) -> None:
        """Put the replacement of every tensor here in its place; ``replacements`` go by the old tensor's id."""

        def new(leaf: Any) -> Any:
            return replacements.get(id(leaf), leaf)

        tensors = self.tensors()
        if not any(id(tensor) in replacements for tensor in tensors):
            return
        if self.kind == "attribute":
            attributes = vars(self.owner)
            attributes[self.attribute] = tree_map(new, attributes[self.attribute])
        else:
            setattr(self.owner, self.attribute, new(tensors[0]))


def find_slots(root: torch.nn.Module) -> Iterator[Slot]:
    """Every slot of ``root`` and its submodules: parameters and buffers of a module before its attributes."""
    for prefix, module in root.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(module, name, dot + name, "parameter")
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield Slot(module, name, dot + name, "buffer")
        for name, value in vars(module).items():
            if name not in _REGISTRIES and any(_on_meta(leaf) for leaf in tree_leaves(value)):
                yield Slot(module, name, dot + name, "attribute")


def _on_meta(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_meta
