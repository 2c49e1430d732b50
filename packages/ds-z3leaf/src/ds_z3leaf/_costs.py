"""What a choice of units costs, before anything is sharded: how often ranks gather, and how much they hold at once.

[Note: units] A *unit* is a module whose parameters are gathered together: all those below it that are in no unit of
their own. An engine gathers a unit when its module's forward begins, frees it when it ends, and does the same in
backward: two gathers a step. FSDP2 keeps the root from forward to backward: one gather.

[Note: peak] While the innermost unit of a path computes, the units around it are gathered too. In backward the engine
gathers one unit ahead: the one whose forward ended just before (FSDP2's implicit prefetch). With the units
u_1 ... u_n in the order in which their forwards end, which is taken to be the order of registration,

    peak = max over i of  sum(bytes of the units that hold u_i, and of u_i) + (bytes of u_{i-1}, if it is none of them)

ZeRO-3 may gather further ahead, by ``stage3_prefetch_bucket_size`` elements, keeps parameters up to
``stage3_param_persistence_threshold`` gathered, and frees none before ``stage3_max_reuse_distance``: add those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ds_z3leaf._layers import repeated_blocks
from ds_z3leaf._sizes import full_shape
from ds_z3leaf._table import show_bytes, table


@dataclass(frozen=True)
class CutCosts:
    """One way to cut a model into units.

    Attributes:
        cut: ``every module`` (ZeRO-3 without leaves), ``leaves`` (ZeRO-3 with them), ``layers`` (what
            `LeafPlan.apply_fsdp2` makes: leaves, repeated blocks, the root) or ``whole model``.
        units: how many units there are.
        gathers: how many all-gathers a step with one forward and one backward takes.
        largest_bytes: the bytes of the largest gather.
        peak_bytes: the most bytes of gathered parameters at one time.
    """

    cut: str
    units: int
    gathers: int
    largest_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


class CostTable(tuple[CutCosts, ...]):
    """The costs of several cuts; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [
            [row.cut, str(row.units), str(row.gathers), show_bytes(row.largest_bytes), show_bytes(row.peak_bytes)]
            for row in self
        ]
        head = ["cut", "units", "gathers a step", "largest gather", "peak gathered"]
        return table(head, rows, [False, True, True, True, True])


def costs_of(model: nn.Module, leaves: Sequence[nn.Module], dtype: torch.dtype | None = None) -> CostTable:
    """The costs of the four cuts; `dtype` is what parameters are gathered in, each in its own if None."""
    inside = {id(part) for leaf in leaves for part in leaf.modules()}
    holders = [module for module in model.modules() if any(p is not None for p in module._parameters.values())]
    outside = [module for module in holders if id(module) not in inside]
    layers = list(repeated_blocks(model, leaves).values())
    return CostTable(
        [
            _cost("every module", units_of(model, holders, dtype), keeps_root=False),
            _cost("leaves", units_of(model, [*leaves, *outside], dtype), keeps_root=False),
            _cost("layers", units_of(model, [*leaves, *layers, model], dtype), keeps_root=True),
            _cost("whole model", units_of(model, [model], dtype), keeps_root=True),
        ]
    )


@dataclass(frozen=True)
class Unit:
    """One unit: its module, the bytes of its parameters, and the units around it, from the outermost one."""

    module: nn.Module
    bytes: int
    around: tuple[nn.Module, ...]


def units_of(model: nn.Module, modules: Iterable[nn.Module], dtype: torch.dtype | None = None) -> list[Unit]:
    """The units that hold parameters, in the order in which their forwards end."""
    chosen = {id(module) for module in modules}
    sizes: dict[int, int] = {id(module): 0 for module in modules}
    claimed: set[int] = set()
    done: list[Unit] = []
    seen: set[int] = set()

    def visit(module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        path = (*around, module) if id(module) in chosen else around
        for child in module._modules.values():
            if child is not None:
                visit(child, path)
        for param in module._parameters.values():
            if param is not None and path and id(param) not in claimed:
                claimed.add(id(param))
                sizes[id(path[-1])] += math.prod(full_shape(param)) * (dtype or param.dtype).itemsize
        if id(module) in chosen:
            done.append(Unit(module, sizes[id(module)], around))

    visit(model, ())
    return [unit for unit in done if unit.bytes]


def _cost(cut: str, units: list[Unit], *, keeps_root: bool) -> CutCosts:
    sizes = {id(unit.module): unit.bytes for unit in units}
    gathers = sum(1 if keeps_root and not unit.around else 2 for unit in units)
    peak = 0
    for at, unit in enumerate(units):
        held = {id(module) for module in (*unit.around, unit.module)}
        if at:
            held.add(id(units[at - 1].module))  # gathered ahead
        peak = max(peak, sum(sizes.get(key, 0) for key in held))
    return CutCosts(cut, len(units), gathers, max(sizes.values(), default=0), peak)
