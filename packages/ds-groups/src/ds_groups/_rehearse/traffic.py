"""Bytes that leave a node: a model of what collectives along an axis send.

[Note: traffic] ``bytes`` is what one rank sends along an axis in a step, in one of three patterns:

- ``"ring"``: every rank sends them to the next one of a ring that visits the ranks node by node, so a group on m > 1
  nodes has m hops between nodes. An all-reduce of S bytes among n ranks sends ``2 (n - 1) / n * S``, an all-gather or
  reduce-scatter ``(n - 1) / n * S``. Source: doc/PERFORMANCE.md of NVIDIA/nccl-tests.
- ``"all-to-all"``: every rank sends ``bytes / (n - 1)`` to each of the others.
- ``"pipeline"``: every rank but the last sends them to the next one in the group.

Trees, in-network reduction, and rails that not all ranks of a node share equally are outside this model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from ds_groups.errors import TopologyError

from .nodes import Spread

if TYPE_CHECKING:
    from ds_groups._grid import AxisName, RankGrid

Pattern = Literal["ring", "all-to-all", "pipeline"]
Traffic: TypeAlias = "float | tuple[float, Pattern]"
LINKS: Mapping[Pattern, str] = {"ring": "hops", "all-to-all": "pairs", "pipeline": "sends"}
_BY_NAME: Mapping[str, Pattern] = {"ep": "all-to-all", "sp": "all-to-all", "pp": "pipeline"}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Load(NamedTuple):
    """What ranks send along an axis.

    Attributes:
        axis: its name.
        pattern: who sends to whom.
        bytes: that one rank sends in a step.
    """

    axis: AxisName
    pattern: Pattern
    bytes: Fraction


class AxisTraffic(NamedTuple):
    """The bytes that leave a node along one axis.

    Attributes:
        axis: its name.
        size: ranks of a group.
        pattern: who sends to whom.
        bytes: that one rank sends in a step.
        links: hops, pairs or sends of all groups.
        crossing: those of them that go from one node to another.
        link_bytes: bytes on each.
        leaving: bytes that leave a node for each rank, on average: ``link_bytes * crossing / ranks``.
    """

    axis: str
    size: int
    pattern: Pattern
    bytes: float
    links: int
    crossing: int
    link_bytes: Fraction
    leaving: Fraction


def default_pattern(grid: RankGrid, axis: AxisName) -> Pattern:
    """The pattern that the name of an axis stands for; a ring where it stands for none."""
    same = [alias for alias, names in grid.aliases.items() if names == (axis,)]
    return next((_BY_NAME[name] for name in (grid.axis(axis).name, *same) if name in _BY_NAME), "ring")


def parse_traffic(grid: RankGrid, traffic: Mapping[AxisName, Traffic]) -> list[Load]:
    """The loads that a user gave.

    Raises:
        TopologyError: an axis is not known, a pattern is not, or bytes are no number from 0 up.
    """
    return [_parse(grid, axis, value) for axis, value in traffic.items()]


def _parse(grid: RankGrid, axis: AxisName, value: object) -> Load:
    default = default_pattern(grid, axis)
    parts = value if isinstance(value, tuple) else (value, default)
    if len(parts) != 2 or parts[1] not in get_args(Pattern):
        patterns = ", ".join(map(repr, get_args(Pattern)))
        raise TopologyError(f"traffic[{axis!r}]={value!r} must be bytes, or (bytes, pattern) with one of {patterns}")
    amount = parts[0]
    number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not number or not math.isfinite(amount) or amount < 0:
        raise TopologyError(f"traffic[{axis!r}]={value!r} must be a number of bytes, 0 or more")
    return Load(axis, parts[1], Fraction(amount))


def leaving(load: Load, spread: Spread, axis: str) -> AxisTraffic:
    """Apply the model to the groups of an axis."""
    ranks, size = spread.groups * spread.size, spread.size
    crossing, links, each = {
        "ring": (spread.hops, ranks if size > 1 else 0, load.bytes),
        "all-to-all": (spread.pairs, ranks * (size - 1), load.bytes / max(size - 1, 1)),
        "pipeline": (spread.sends, spread.groups * (size - 1), load.bytes),
    }[load.pattern]
    amount = each * crossing / ranks
    return AxisTraffic(axis, size, load.pattern, float(load.bytes), links, crossing, each, amount)


def format_bytes(amount: float | Fraction) -> str:
    """Bytes for people, in powers of 1000.

    >>> format_bytes(1536), format_bytes(2e9), format_bytes(0)
    ('1.54 kB', '2 GB', '0 B')
    """
    value, unit = float(amount), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
