"""Mixed-radix digits: the arithmetic below every layout of ranks.

[Note: digits] A position is a number in a mixed radix: ``position = sum(coordinate * stride)``, one *digit* for each
named coordinate. The group of a position along some digits is everything reached by turning only those digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple


class Digit(NamedTuple):
    """One digit of a mixed-radix number."""

    name: str
    size: int
    stride: int

    def of(self, number: int) -> int:
        """The digit's value in ``number``."""
        return number // self.stride % self.size


class Factor(NamedTuple):
    """``size`` numbers that lie ``stride`` apart."""

    size: int
    stride: int


def make_digits(sizes: Iterable[tuple[str, int]]) -> tuple[Digit, ...]:
    """Digits of the given (name, size) pairs, the fastest varying first."""
    digits: list[Digit] = []
    stride = 1
    for name, size in sizes:
        digits.append(Digit(name, size, stride))
        stride *= size
    return tuple(digits)


def turn(number: int, digits: Sequence[Digit]) -> list[int]:
    """Every number that differs from ``number`` in ``digits`` only, the first digit varying fastest."""
    start = number - sum(digit.of(number) * digit.stride for digit in digits)
    return [start + offset for offset in offsets([Factor(digit.size, digit.stride) for digit in digits])]


def offsets(factors: Sequence[Factor]) -> list[int]:
    """All sums of one multiple of each factor's stride, the first factor varying fastest.

    >>> offsets([Factor(2, 1), Factor(2, 8)])
    [0, 1, 8, 9]
    """
    found = [0]
    for size, stride in factors:
        found = [before + step * stride for step in range(size) for before in found]
    return found


def merge(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """The same factors with those of size 1 left out and neighbours made one.

    >>> merge([Factor(2, 1), Factor(1, 2), Factor(4, 2), Factor(3, 16)])
    (Factor(size=8, stride=1), Factor(size=3, stride=16))
    """
    merged: list[Factor] = []
    for size, stride in factors:
        if size > 1 and merged and stride == merged[-1].size * merged[-1].stride:
            merged[-1] = Factor(merged[-1].size * size, merged[-1].stride)
        elif size > 1:
            merged.append(Factor(size, stride))
    return tuple(merged)


def complement(factors: Sequence[Factor], count: int) -> list[Factor]:
    """What the factors, ordered by stride, leave of ``count`` consecutive numbers.

    >>> complement([Factor(2, 4)], 16)
    [Factor(size=4, stride=1), Factor(size=2, stride=8)]
    """
    rest: list[Factor] = []
    reached = 1
    for size, stride in factors:
        if stride > reached:
            rest.append(Factor(stride // reached, reached))
        reached = stride * size
    if count > reached:
        rest.append(Factor(count // reached, reached))
    return rest


def refine(digit: Digit, over: Sequence[tuple[Digit, Digit]]) -> list[Factor] | None:
    """The strides that turning ``digit`` takes, where it counts the numbers of other digits; None where it takes none.

    Args:
        digit: one digit of a number that counts the values of other digits.
        over: those digits, the fastest first, each with its digit in the counting number.
    """
    found: list[Factor] = []
    first, last = digit.stride, digit.stride * digit.size
    joined: list[tuple[Digit, Digit]] = []  # neighbours count as one digit does
    for source, place in over:
        if joined and source.stride == joined[-1][0].stride * joined[-1][0].size:
            size = joined[-1][0].size * source.size
            joined[-1] = (joined[-1][0]._replace(size=size), joined[-1][1]._replace(size=size))
        else:
            joined.append((source, place))
    for source, place in joined:
        low, high = max(first, place.stride), min(last, place.stride * place.size)
        if low < high:
            end = place.stride * place.size
            if low % place.stride or high % low or end % low or end % high:
                return None
            found.append(Factor(high // low, source.stride * (low // place.stride)))
    return found if prod(factor.size for factor in found) == digit.size else None
