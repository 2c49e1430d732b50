"""A choice of leaves with its reasons: by evidence, by selectors or by rehearsal; applied to either engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_z3leaf._flags import set_flag
from ds_z3leaf._select import check_model
from ds_z3leaf._sizes import size_of

if TYPE_CHECKING:
    from ds_z3leaf._rehearse.stage import Rehearsal

_FORMAT = 1


@dataclass(frozen=True)
class LeafCandidate:
    """A module that should be a leaf.

    Attributes:
        name: its name in the model; "" is the model itself.
        module: the module.
        reason: why, in words.
        parameters: number of elements of its parameters, before sharding.
        bytes: what the engine gathers for it at once, in the parameters' own dtypes.
    """

    name: str
    module: nn.Module
    reason: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, name: str, module: nn.Module, reason: str) -> LeafCandidate:
        """A candidate with its size."""
        size = size_of(module.parameters())
        return cls(name, module, reason, size.elements, size.bytes)

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({type(self.module).__name__}): {self.reason}"


class LeafPlan:
    """Which modules of a model are leaves, and why.

    Attributes:
        model: the model.
        leaves: the leaves, none inside another, in the order of ``named_modules()``.
        notes: what the plan could not find out or had to change, in words.
        rehearsal: what was tried, where the plan comes from a rehearsal.
    """

    def __init__(
        self,
        model: nn.Module,
        leaves: Iterable[LeafCandidate] = (),
        notes: Iterable[str] = (),
        *,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        check_model(model)
        self.rehearsal = rehearsal
        self.model = model
        self.leaves = tuple(leaves)
        self.notes = tuple(notes)

    @property
    def modules(self) -> list[nn.Module]:
        """The leaves' modules."""
        return [leaf.module for leaf in self.leaves]

    def apply_deepspeed(self) -> list[nn.Module]:
        """Flag the leaves for ZeRO-3, and return them. Call it before ``deepspeed.initialize()``, on every rank."""
        for leaf in self.leaves:
            set_flag(leaf.module, True)
        return self.modules

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it, without the model."""
        return {
            "format": _FORMAT,
            "model": type(self.model).__name__,
            "leaves": [
                {
                    "name": leaf.name,
                    "class": type(leaf.module).__name__,
                    "reason": leaf.reason,
                    "parameters": leaf.parameters,
                }
                for leaf in self.leaves
            ],
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __iter__(self) -> Iterator[LeafCandidate]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)
