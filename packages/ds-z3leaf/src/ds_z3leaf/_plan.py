"""A choice of leaves with its reasons: by evidence, by selectors or by rehearsal; applied to either engine."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ds_z3leaf._costs import CostTable, costs_of
from ds_z3leaf._mark import mark
from ds_z3leaf._sizes import size_of
from ds_z3leaf._suggest import NameIndex, quoted
from ds_z3leaf._table import show_bytes, table
from ds_z3leaf._walk import check_model, class_name, is_wrapped, short_name, walk
from ds_z3leaf.errors import LeafNotFoundError, LeafValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from ds_z3leaf._rehearse.stage import Rehearsal

_FORMAT = 1
_LISTED = 8  # missing names in an error
MixedDtypes = Literal["raise", "separate"]


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

    Raises:
        LeafNotFoundError: a leaf is no module of the model.
        LeafValueError: a leaf is given twice or is inside another one.
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
        known = {id(module) for _, module in walk(model)} if self.leaves else set()
        for leaf in self.leaves:
            if id(leaf.module) not in known:
                raise LeafNotFoundError(f"leaf {leaf} is no module of the {class_name(model)}: plan for this model")
        inside = Counter(id(part) for leaf in self.leaves for part in leaf.module.modules())
        for leaf in self.leaves:
            if inside[id(leaf.module)] > 1:
                raise LeafValueError(f"leaf {leaf.name!r} is given twice or is inside another leaf: leave it out")

    @property
    def modules(self) -> list[nn.Module]:
        """The leaves' modules."""
        return [leaf.module for leaf in self.leaves]

    def apply_deepspeed(self) -> list[nn.Module]:
        """Flag the leaves for ZeRO-3, and return them. Call it before ``deepspeed.initialize()``, on every rank.

        Raises:
            LeafValueError: a leaf is a container that is never called; nothing is changed.
        """
        chosen = {leaf.name: leaf.module for leaf in self.leaves}
        mark(walk(self.model), chosen, {leaf.name: leaf.reason for leaf in self.leaves})
        return self.modules

    def apply_fsdp2(
        self,
        mesh: DeviceMesh | None = None,
        *,
        layers: Literal["auto"] | nn.Module | Iterable[nn.Module] | None = "auto",
        root: bool = True,
        mixed_dtypes: MixedDtypes = "raise",
        reduce_scatter_unused_params: bool = True,
        **fully_shard_kwargs: Any,
    ) -> list[nn.Module]:
        """Shard the model by FSDP2 so that it trains as it is: the leaves, the repeated blocks around, and the root.

        Everything is checked before anything is sharded. All ranks of the mesh must call it, with the same plan.

        Args:
            mesh: the device mesh; ``fully_shard``'s default if None.
            layers: ``"auto"`` takes the members of each outermost ``ModuleList`` or ``ModuleDict`` outside the leaves
                (not those of a mixture of experts that is no leaf; a warning names it); or the modules to shard; None
                shards none.
            root: shard the model itself, which holds what is in none of the units.
            mixed_dtypes: see `fully_shard_leaves`.
            reduce_scatter_unused_params: see `fully_shard_leaves`; for the leaves only.
            fully_shard_kwargs: given to `torch.distributed.fsdp.fully_shard` for every unit.

        Returns:
            The units, in the order in which they were sharded: leaves, layers, root.

        Raises:
            LeafTypeError, LeafNotFoundError: a layer is no module, or none of the model.
            LeafShardError: a unit cannot be sharded; see `fully_shard_leaves`. Nothing is changed.
        """
        from ds_z3leaf._fsdp import shard_units

        if mesh is not None:
            fully_shard_kwargs["mesh"] = mesh
        leaves = {leaf.name: leaf.module for leaf in self.leaves}
        return shard_units(
            self.model, leaves, layers, root, mixed_dtypes, reduce_scatter_unused_params, fully_shard_kwargs
        )

    def costs(self, dtype: torch.dtype | None = None) -> CostTable:
        """What four ways to cut the model into units cost: gathers a step, largest gather, peak of gathered bytes.

        Args:
            dtype: what parameters are gathered in (``MixedPrecisionPolicy.param_dtype``); each in its own if None.

        Returns:
            A row for ``every module`` (ZeRO-3 without leaves), ``leaves`` (ZeRO-3 with them), ``layers``
            (`apply_fsdp2`) and ``whole model``; prints as a table. `ds_z3leaf._costs` has the formulas. Gradients,
            optimizer state and activations are not in it.
        """
        return costs_of(self.model, self.modules, dtype)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it, without the model."""
        return {
            "format": _FORMAT,
            "model": class_name(self.model),
            "leaves": [
                {
                    "name": short_name(leaf.name),
                    "class": class_name(leaf.module),
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

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> LeafPlan:
        """Read a plan for a model, which may be wrapped otherwise than the one it was made for.

        Raises:
            LeafNotFoundError: the model has no module of a name; the message has near ones.
            LeafValueError: the file is no plan, is of a newer format, has a leaf twice or inside another one, or a
                module has another class than the plan says.
            OSError: the file cannot be read.
        """
        check_model(model)
        where = f"{os.fspath(path)!s}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise LeafValueError(f"{where} is no leaf plan: it is not JSON ({error})") from None
        rows = _rows_of(data, where)
        # Where a module is wrapped, the wrapper has the short name.
        by_name = {short_name(name): (name, module) for name, module in walk(model) if not is_wrapped(name)}
        missing = [row["name"] for row in rows if row["name"] not in by_name]
        if missing:
            index = NameIndex([name for name in by_name if name])
            shown = [f"{name!r}{quoted(index.near(name))}" for name in missing[:_LISTED]]
            shown += [f"and {len(missing) - _LISTED} more"] if len(missing) > _LISTED else []
            raise LeafNotFoundError(
                f"{where}: {len(missing)} of {len(rows)} leaves are not in {class_name(model)}: {', '.join(shown)}"
            )
        leaves, notes = [], [str(note) for note in data.get("notes", ())]
        for row in rows:
            name, module = by_name[row["name"]]
            if class_name(module) != row["class"]:
                raise LeafValueError(
                    f"{where}: leaf {row['name']!r} is a {row['class']} in the plan and a {class_name(module)} in the "
                    "model: plan again, or correct the file"
                )
            leaf = LeafCandidate.of(name, module, row["reason"])
            if leaf.parameters != row["parameters"]:
                notes.append(f"{name!r} has {leaf.parameters} elements, and had {row['parameters']} in the plan")
            leaves.append(leaf)
        return cls(model, leaves, notes)

    def __str__(self) -> str:
        if not self.leaves:
            lines = [f"{class_name(self.model)}: no leaves"]
        else:
            rows = [
                [
                    leaf.name or "(the model itself)",
                    class_name(leaf.module),
                    str(leaf.parameters),
                    show_bytes(leaf.bytes),
                    leaf.reason,
                ]
                for leaf in self.leaves
            ]
            lines = [table(["leaf", "class", "parameters", "bytes", "why"], rows, [False, False, True, True, False])]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __iter__(self) -> Iterator[LeafCandidate]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def _rows_of(data: Any, where: str) -> list[dict[str, Any]]:
    """The leaves of a plan's file, checked."""
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("leaves"), list):
        raise LeafValueError(f"{where} is no leaf plan: it has no format and leaves; LeafPlan.save() writes them")
    if data["format"] > _FORMAT:
        raise LeafValueError(
            f"{where} has the format {data['format']}, and this ds-z3leaf reads up to {_FORMAT}: upgrade ds-z3leaf"
        )
    kinds = {"name": str, "class": str, "reason": str, "parameters": int}
    for row in data["leaves"]:
        wrong = [key for key, kind in kinds.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if wrong:
            raise LeafValueError(f"{where} is no leaf plan: a leaf has no {' and '.join(wrong)} of the right type")
    if not isinstance(data.get("notes", []), list):
        raise LeafValueError(f"{where} is no leaf plan: its notes are no list")
    return list(data["leaves"])
