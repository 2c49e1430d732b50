"""Names of axes, and mixed-radix digits.

[Note: axes] An *axis* names what varies inside a group: ``"tp"``, ``"dp"``, or several joined by underscores,
``"dp_cp"``. Every name is made of *atoms*; ``"dp"`` is short for its two atoms, ``"dp_shard"`` and ``"dp_replicate"``.

[Note: digits] A rank is a number in a mixed radix: ``rank = sum(coordinate * stride)``, one *digit* per atom.
The group of a rank along some atoms is everything reached by turning only those digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from .errors import TopologyError

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_ATOMS = ("ep", "edp")
ATOMS_OF = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp_shard", "dp_replicate"),
    "dp_shard": ("dp_shard",),
    "dp_replicate": ("dp_replicate",),
    "pp": ("pp",),
    "ep": ("ep",),
    "edp": ("edp",),
}
_NAME = "|".join(sorted(ATOMS_OF, key=len, reverse=True))
_AXIS = re.compile(f"(?:{_NAME})(?:_(?:{_NAME}))*")
_PART = re.compile(f"(?:{_NAME})(?=_|$)")


class Digit(NamedTuple):
    """One digit of a mixed-radix number."""

    name: str
    size: int
    stride: int

    def of(self, number: int) -> int:
        """The digit's value in ``number``."""
        return number // self.stride % self.size


def make_digits(sizes: Iterable[tuple[str, int]]) -> tuple[Digit, ...]:
    """Digits of the given (name, size) pairs, the fastest varying first."""
    digits: list[Digit] = []
    stride = 1
    for name, size in sizes:
        digits.append(Digit(name, size, stride))
        stride *= size
    return tuple(digits)


def turn(number: int, digits: Sequence[Digit]) -> list[int]:
    """Every number that differs from ``number`` in ``digits`` only, ascending.

    Args:
        number: where to start.
        digits: the digits to turn, ordered by stride, the smallest first.
    """
    found = [number - sum(digit.of(number) * digit.stride for digit in digits)]
    for digit in reversed(digits):
        found = [start + step * digit.stride for start in found for step in range(digit.size)]
    return found


@lru_cache(maxsize=256)
def atoms_of(axis: str) -> tuple[str, ...]:
    """The atoms of an axis name, in a fixed order.

    Raises:
        TopologyError: a part of the name is no axis, or comes twice.

    >>> atoms_of("cp_dp")
    ('cp', 'dp_shard', 'dp_replicate')
    """
    if not isinstance(axis, str) or not _AXIS.fullmatch(axis):
        raise TopologyError(f"axis {axis!r} is not known: join any of {', '.join(ATOMS_OF)} with underscores")
    found = [atom for part in _PART.findall(axis) for atom in ATOMS_OF[part]]
    if len(set(found)) != len(found):
        raise TopologyError(f"axis {axis!r} names {_repeated(found)} twice")
    every = [atom for axis_atoms in ATOMS_OF.values() for atom in axis_atoms]
    return tuple(sorted(found, key=every.index))


def parse_order(argument: str, text: str, *, complete: bool) -> tuple[str, ...]:
    """The axes of a text like ``"tp-cp-dp-pp"``; ``complete`` asks for all of them."""
    names = tuple(text.split("-")) if isinstance(text, str) else ()
    if not set(names) <= set(DENSE_AXES) or len(set(names)) != len(names) or not names:
        raise TopologyError(f"{argument}={text!r} must join distinct axes of {', '.join(DENSE_AXES)} with '-'")
    if complete and len(names) != len(DENSE_AXES):
        absent = ", ".join(axis for axis in DENSE_AXES if axis not in names)
        raise TopologyError(f"{argument}={text!r} leaves out {absent}; say where every axis goes, the fastest first")
    return names


def product(names: Sequence[str], sizes: Sequence[int]) -> str:
    """Spell a product for an error message.

    >>> product(["tp", "cp", "dp"], [1, 1, 8])
    'tp * cp * dp = 1 * 1 * 8 = 8'
    >>> product(["dp"], [8])
    'dp = 8'
    """
    if len(names) == 1:
        return f"{names[0]} = {sizes[0]}"
    return f"{' * '.join(names)} = {' * '.join(map(str, sizes))} = {prod(sizes)}"


def _repeated(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
