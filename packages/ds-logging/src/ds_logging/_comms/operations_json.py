"""Operations as JSON, to be sent to another rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ds_logging._comms.operation import Operation
from ds_logging._comms.rank_sets import RankSets, read_rank_sets


def write_operations(operations: Iterable[Operation]) -> dict[str, Any]:
    """Return what `read_operations` reads, of JSON's types only."""
    sets = RankSets()
    written = [{**asdict(op), "ranks": sets.number(op.ranks)} for op in operations]
    return {"operations": written, "ranks": sets.to_json()}


def read_operations(data: Mapping[str, Any]) -> list[Operation]:
    """Return the operations that `write_operations` wrote."""
    sets = read_rank_sets(data["ranks"])
    return [Operation(**{**fields, "ranks": sets[fields["ranks"]]}) for fields in data["operations"]]
