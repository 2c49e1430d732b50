"""Ranks of process groups, written short: most are a range with a stride, and many operations share one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Ranks = tuple[int, ...]


class RankSets:
    """Numbers the groups of a message, so that each one's ranks are written once.

    >>> sets = RankSets()
    >>> sets.number((0, 8, 16)), sets.number(None), sets.number((0, 8, 16)), sets.number((5, 1, 2))
    (0, 1, 0, 2)
    >>> sets.to_json()
    [{'range': [0, 24, 8]}, None, [5, 1, 2]]
    >>> read_rank_sets(sets.to_json())
    [(0, 8, 16), None, (5, 1, 2)]
    """

    def __init__(self) -> None:
        self._numbers: dict[Ranks | None, int] = {}

    def number(self, ranks: Ranks | None) -> int:
        """Return the number that stands for these ranks."""
        return self._numbers.setdefault(ranks, len(self._numbers))

    def to_json(self) -> list[Any]:
        """Return what `read_rank_sets` reads, of JSON's types only."""
        return [_write(ranks) for ranks in self._numbers]


def read_rank_sets(written: Sequence[Any]) -> list[Ranks | None]:
    """Return the ranks by number."""
    return [
        tuple(range(*one["range"])) if isinstance(one, dict) else None if one is None else tuple(one) for one in written
    ]


def _write(ranks: Ranks | None) -> Any:
    if ranks is None or len(ranks) < 3:
        return ranks if ranks is None else list(ranks)
    stride = ranks[1] - ranks[0]
    if stride > 0 and ranks == tuple(range(ranks[0], ranks[-1] + 1, stride)):
        return {"range": [ranks[0], ranks[-1] + stride, stride]}
    return list(ranks)
