"""The communication log as JSON lines, for tools that read tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ds_logging._comms.op_stats import OpStats, summarize
from ds_logging._comms.operation import Operation
from ds_logging._files import write_atomically
from ds_logging._rank import current_position


def to_jsonl(path: str | os.PathLike[str], operations: Iterable[Operation], stats: Iterable[OpStats]) -> None:
    """Write a line for every kind of operation, and then one for every recent operation. No communication.

    A line of a kind has ``"line": "kind"``, its key, and what `CommsLogger.get_operation_summary` says. A line of an
    operation has ``"line": "operation"`` and the attributes of `Operation`. All have ``"rank"``. What is not known is
    ``null``. The file appears whole or not at all; give each rank a path of its own.

    Args:
        path: the file.
        operations: recent operations of this rank.
        stats: statistics of this rank.
    """
    rank = current_position().rank
    write_atomically(path, (json.dumps(line, allow_nan=False) + "\n" for line in _lines(rank, operations, stats)))


def _lines(rank: int, operations: Iterable[Operation], stats: Iterable[OpStats]) -> Iterator[dict[str, Any]]:
    for one in stats:
        values = {
            name: None if value != value else value for name, value in summarize([one]).items()
        }  # NaN: no formula
        key = {name: value for name, value in one.key._asdict().items() if name != "msg_size"}
        yield {"line": "kind", "rank": rank, **key, **values}
    for op in operations:
        yield {"line": "operation", "rank": rank, **asdict(op)}
