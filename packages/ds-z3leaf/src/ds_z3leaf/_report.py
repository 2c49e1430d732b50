"""What the leaves of a model are, why, and what they change for ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ds_z3leaf._flags import outermost_leaves, reason_of
from ds_z3leaf._sizes import size_of
from ds_z3leaf._table import show_bytes, table
from ds_z3leaf._walk import check_model, class_name, walk


@dataclass(frozen=True)
class LeafRow:
    """One leaf.

    Attributes:
        name: its name in the model; "" is the model itself.
        class_name: its class.
        why: why it is flagged.
        parameters: number of elements, before sharding.
        bytes: of these elements, in the parameters' own dtypes.
        gathers_before: all-gathers a step without the flag: ZeRO-3 gathers every module with parameters of its own in
            forward and in backward.
        gathers_after: all-gathers a step with the flag.
        peak_before: the bytes of the largest of the modules that would be gathered one by one.
        peak_after: the bytes that are gathered at once: the whole leaf.
    """

    name: str
    class_name: str
    why: str
    parameters: int
    bytes: int
    gathers_before: int
    gathers_after: int
    peak_before: int
    peak_after: int


@dataclass(frozen=True)
class LeafReport:
    """The leaves of a model; prints as a table.

    Attributes:
        model: the class of the model.
        rows: a row for each leaf, in the order of ``named_modules()``; leaves inside leaves have none.
    """

    model: str
    rows: tuple[LeafRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {"model": self.model, "leaves": [asdict(row) for row in self.rows]}

    def __iter__(self) -> Iterator[LeafRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.model} has no leaves"
        rows = [
            [
                row.name or "(the model itself)",
                row.class_name,
                str(row.parameters),
                show_bytes(row.bytes),
                f"{row.gathers_before} -> {row.gathers_after}",
                f"{show_bytes(row.peak_before)} -> {show_bytes(row.peak_after)}",
                row.why,
            ]
            for row in self.rows
        ]
        head = ["leaf", "class", "parameters", "bytes", "gathers a step", "gathered at once", "why"]
        return table(head, rows, [False, False, True, True, True, True, False])


def leaf_report(model: nn.Module) -> LeafReport:
    """The flagged modules of a model. Changes nothing; any rank may call it alone.

    Raises:
        LeafTypeError: `model` is no module.

    >>> from ds_z3leaf import mark_leaves
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    >>> _ = mark_leaves(model, names="1")
    >>> print(leaf_report(model))
    leaf  class       parameters  bytes  gathers a step  gathered at once  why
    1     Sequential          40    160          4 -> 2         80 -> 160  selected by name '1'
    """
    check_model(model)
    leaves = {id(leaf) for leaf in outermost_leaves(model)}
    rows = []
    for name, module in walk(model):
        if id(module) in leaves:
            leaves.remove(id(module))
            rows.append(_row(name, module))
    return LeafReport(class_name(model), tuple(rows))


def _row(name: str, leaf: nn.Module) -> LeafRow:
    size = size_of(leaf.parameters())
    own = [size_of(part.parameters(recurse=False)).bytes for part in leaf.modules()]
    holders = [count for count in own if count]
    return LeafRow(
        name,
        class_name(leaf),
        reason_of(leaf),
        size.elements,
        size.bytes,
        2 * len(holders),
        2 if holders else 0,
        max(holders, default=0),
        size.bytes,
    )
