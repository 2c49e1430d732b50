"""`Axis`: the groups that one or more digits cut a grid into; `TableAxis`: those of a list."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Protocol, SupportsIndex

from ._digits import Digit, Factor, complement, merge, offsets, refine, turn
from .errors import RankRangeError

if TYPE_CHECKING:
    from ._grid import RankGrid

Over = Sequence[tuple[Digit, Digit]]


class Partition(Protocol):
    """Disjoint groups of ranks."""

    @property
    def key(self) -> str:
        """A short text; equal ones mean equal groups."""

    @property
    def is_ascending(self) -> bool:
        """Whether the ranks of every group ascend."""

    def ranks(self, rank: SupportsIndex, /) -> tuple[int, ...]:
        """The group of ``rank``, in the order in which a process group numbers its members."""

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Every group."""


class Axis:
    """A partition of a grid's ranks into groups of equal size.

    Attributes:
        name: as it was asked for.
        size: ranks in a group.
        digits: names of its digits, however the axis was spelled.
        key: a short text. Axes of equal keys have the same groups, also in other grids of the same world.

    Args:
        grid: whose ranks are cut.
        name: of the axis.
        base: the grid's own digits in it, the fastest first.
        view: all digits of the view whose digits are in it.
        over: the digits that this view factors, each with its digit in the number that the view counts.
        turned: the view's digits in the axis.
    """

    def __init__(
        self,
        grid: RankGrid,
        name: str,
        *,
        base: Sequence[Digit],
        view: Sequence[Digit] = (),
        over: Over = (),
        turned: Sequence[Digit] = (),
    ) -> None:
        self.name = name
        self.size = prod(digit.size for digit in (*base, *turned))
        self.digits = frozenset(digit.name for digit in (*base, *turned))
        self._grid, self._base, self._over, self._turned = grid, base, over, turned
        self._count = len(grid.span)
        strides = [source.stride for source, _ in over]
        self._in_order = strides == sorted(strides)  # the view counts ranks in their own order
        refined = [refine(digit, over) for digit in turned]
        self._factors: tuple[Factor, ...] | None = None
        if None not in refined:
            inner = list(chain.from_iterable(factors for factors in refined if factors is not None))
            outer = [Factor(digit.size, digit.stride) for digit in base]
            if self._in_order:
                self._factors = merge(sorted([*inner, *outer], key=lambda factor: factor.stride))
            else:
                self._factors = merge([*inner, *outer])
        self.key = self._make_key(view)

    def ranks(self, rank: SupportsIndex) -> tuple[int, ...]:
        """The group of ``rank``, in the order in which a process group numbers its members.

        Raises:
            RankRangeError: ``rank`` is not in the grid.
        """
        return self._ranks_of(self._members(self._grid.position(rank)))

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Every group, ordered by its first position."""
        if self._factors is None or not isinstance(self._grid.span, range):
            return tuple(self.groups())
        origin, step = self._grid.span.start, self._grid.span.step
        places = [offset * step for offset in offsets(self._factors)]
        inner, *outer = complement(self._ascending(), self._count) or [Factor(1, 1)]
        starts = [origin + offset * step for offset in offsets(outer)]
        stride, length = inner.stride * step, inner.size * inner.stride * step
        if len(starts) * inner.size < len(places):  # few long rows
            firsts = [first for start in starts for first in range(start, start + length, stride)]
            return tuple([tuple([first + place for place in places]) for first in firsts])
        columns = [
            chain.from_iterable([range(start, start + length, stride) for start in (first + place for first in starts)])
            for place in places
        ]
        return tuple(zip(*columns, strict=True))

    def groups(self) -> Iterator[tuple[int, ...]]:
        """Every group, lazily, in the order of `table`."""
        if self._factors is not None:
            return (self._ranks_of(self._members(start)) for start in self._starts())
        return self._walk()

    def group_of(self, rank: SupportsIndex) -> int:
        """Which group of `table` holds ``rank``."""
        position = self._grid.position(rank)
        if self._factors is None:
            number = operator.index(rank)
            return next(place for place, group in enumerate(self.groups()) if number in group)
        place, scale = 0, 1
        for size, stride in complement(self._ascending(), self._count):
            place += position // stride % size * scale
            scale *= size
        return place

    @property
    def is_ascending(self) -> bool:
        """Whether the ranks of every group ascend."""
        span = self._grid.span
        if self._factors is None or not isinstance(span, range):
            return all(group == tuple(sorted(group)) for group in self.groups())
        return list(self._factors) == self._ascending() and span.step > 0

    def ascending(self) -> Axis | None:
        """The same groups with their positions in ascending order; None where that takes a table."""
        if self._factors is None:
            return None
        found = copy(self)
        found._factors = merge(self._ascending())
        found.key = found._make_key(())
        return found

    def __repr__(self) -> str:
        return f"Axis({self.name!r}, size={self.size})"

    @property
    def factors(self) -> tuple[Factor, ...] | None:
        """What the positions of a group differ by: all sums of multiples of these strides. None where groups differ."""
        return self._factors

    def _members(self, position: int) -> list[int]:
        if self._factors is not None:
            start = position - sum(position // stride % size * stride for size, stride in self._factors)
            return [start + offset for offset in offsets(self._factors)]
        number = sum(source.of(position) * place.stride for source, place in self._over)
        turned = [source for source, _ in self._over] + list(self._base)
        outside = position - sum(digit.of(position) * digit.stride for digit in turned)
        inner = [
            outside + sum(place.of(other) * source.stride for source, place in self._over)
            for other in turn(number, self._turned)
        ]
        members = [start + place for start in turn(0, self._base) for place in inner]
        return sorted(members) if self._in_order else members

    def _ranks_of(self, positions: Sequence[int]) -> tuple[int, ...]:
        span = self._grid.span
        return tuple(positions) if span == range(self._count) else tuple([span[position] for position in positions])

    def _ascending(self) -> list[Factor]:
        assert self._factors is not None
        return sorted(self._factors, key=lambda factor: factor.stride)

    def _starts(self) -> Iterator[int]:
        """The first position of every group, ascending; lazily, for worlds of any size."""
        rest = reversed(complement(self._ascending(), self._count))
        steps = [range(0, size * stride, stride) for size, stride in rest]
        return _sums(steps)

    def _walk(self) -> Iterator[tuple[int, ...]]:
        seen = bytearray(self._count)
        for position in range(self._count):
            if not seen[position]:
                members = self._members(position)
                for member in members:
                    seen[member] = 1
                yield self._ranks_of(members)

    def _make_key(self, view: Sequence[Digit]) -> str:
        span = self._grid.span
        where = f"{span.start}:{span.stop}:{span.step}" if isinstance(span, range) else _digest(str(span))
        if self._factors is not None:
            return f"{where}/{'.'.join(f'{size}x{stride}' for size, stride in self._factors)}"
        return f"{where}/{_digest(str((self._base, view, self._over, self._turned)))}"


class TableAxis:
    """The groups of a table.

    Args:
        table: every group; each rank is in one.
    """

    def __init__(self, table: Sequence[Sequence[int]]) -> None:
        self._table = tuple(map(tuple, table))
        self.key = f"table/{_digest(str(sorted(self._table)))}"
        self.is_ascending = all(group == tuple(sorted(group)) for group in self._table)

    def ranks(self, rank: SupportsIndex, /) -> tuple[int, ...]:
        """The group of ``rank``.

        Raises:
            RankRangeError: it is in none.
        """
        number = operator.index(rank)
        for group in self._table:
            if number in group:
                return group
        raise RankRangeError(f"rank {rank} is in no group of the table")

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Every group."""
        return self._table


def _sums(steps: Sequence[range]) -> Iterator[int]:
    if not steps:
        return iter((0,))
    return (first + rest for first in steps[0] for rest in _sums(steps[1:]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
