"""Counts and lists in notes and errors."""

from __future__ import annotations

from collections.abc import Sequence

from ds_numa._ranges import format_ranges


def count(number: int, what: str) -> str:
    """``1 core``, ``2 cores``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(what: str, numbers: Sequence[int]) -> str:
    """``node 0``, ``nodes 0-1``; ``node ?`` for none."""
    return f"{what}{'s' if len(numbers) > 1 else ''} {format_ranges(numbers) or '?'}"
