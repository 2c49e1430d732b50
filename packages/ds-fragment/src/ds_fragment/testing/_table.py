"""What a run found: one record for each cell, as JSON, as text and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ds_fragment.testing._cells import MOMENTS, OPERATIONS, QUANTITIES, Cell

DEFECTS = ("different", "untyped", "hang")
_MARKS = {"equal": "=", "none": "-", "different": "!", "untyped": "?", "hang": "#"}
_ERRORS = {
    "GradientUnavailableError": "G",
    "StateNotReadyError": "N",
    "UnlinkedParameterError": "U",
    "InvalidValueError": "I",
    "StateKeyError": "K",
    "RankMismatchError": "R",
    "UnusedGradientError": "u",
    "FragmentError": "F",
}


@dataclass(frozen=True)
class Record:
    """What one cell of one engine is.

    Attributes:
        engine: its name.
        layout: its ranks, in words.
        cell: which cell.
        result: ``equal``, ``error``, or a defect: ``different``, ``untyped`` or ``hang``; ``none`` where the engine has
            no such moment, or there is no safetensors to load.
        detail: the error's class where it is ``error``, else what happened.
        text: what the error says on the first rank.
        seconds: how long it took.
    """

    engine: str
    layout: str
    cell: Cell
    result: str
    detail: str = ""
    text: str = ""
    seconds: float = 0.0

    @property
    def is_defect(self) -> bool:
        """Whether it is neither right nor one named error."""
        return self.result in DEFECTS

    @property
    def mark(self) -> str:
        """One character for the page."""
        return _ERRORS.get(self.detail, "E") if self.result == "error" else _MARKS[self.result]

    def __str__(self) -> str:
        return f"{self.engine}/{self.cell}: {self.result}{f': {self.detail}' if self.detail else ''}"


@dataclass
class Table:
    """Records in the order in which the cells were tried; tables of several engines add up."""

    records: list[Record] = field(default_factory=list)

    def __add__(self, other: Table) -> Table:
        return Table([*self.records, *other.records])

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def defects(self) -> list[Record]:
        """Those that are wrong."""
        return [record for record in self.records if record.is_defect]

    def counts(self) -> dict[str, int]:
        """How many cells there are of each result."""
        return dict(Counter(record.result for record in self.records))

    def to_json(self) -> str:
        """One line for each record."""
        return "[\n" + ",\n".join(json.dumps(asdict(record)) for record in self.records) + "\n]\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """What `to_json` wrote."""
        return cls([Record(**{**found, "cell": Cell(**found["cell"])}) for found in json.loads(text)])

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Table:
        """The tables of several files, one after the other."""
        return sum((cls.from_json(path.read_text()) for path in paths), cls())

    def to_markdown(self) -> str:
        """For each quantity a row for each engine, a column for each operation, and a character for each moment."""
        parts = [_legend()]
        for quantity in QUANTITIES:
            operations = [name for name in OPERATIONS if name != "load" or quantity == "value"]
            rows = [["engine", "layout", *operations], ["---"] * (len(operations) + 2)]
            for engine, layout in dict.fromkeys((record.engine, record.layout) for record in self.records):
                mine = [r for r in self.records if (r.engine, r.layout, r.cell.quantity) == (engine, layout, quantity)]
                rows.append([engine, layout, *(_marks(mine, operation) for operation in operations)])
            parts.append(f"## {quantity}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
        return "\n\n".join(parts) + "\n"


def _marks(records: Sequence[Record], operation: str) -> str:
    found = {record.cell.moment: record.mark for record in records if record.cell.operation == operation}
    return f"`{''.join(found.get(moment, ' ') for moment in MOMENTS)}`"


def _legend() -> str:
    moments = ", ".join(f"`{moment}`" for moment in MOMENTS)
    errors = ", ".join(f"`{mark}` {name}" for name, mark in _ERRORS.items())
    return (
        f"Each cell has one character for each moment, in this order: {moments}.\n\n"
        "`=` equal to the oracle on every rank, `-` the engine has no such moment; one error, the same on every rank: "
        f"{errors}. Defects: `!` different, `?` an error of no such class, `#` a hang."
    )
