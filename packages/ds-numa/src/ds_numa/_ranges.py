"""Lists of CPUs or nodes as text, the way the kernel and `numactl` write them: ``0-3,8``."""

from __future__ import annotations

from collections.abc import Iterable

from ds_numa.errors import CoreListError

_HIGHEST = (1 << 16) - 1  # far above any machine; keeps a slip such as 0-99999999999 from filling the memory


def parse_range(rng: str) -> range:
    """Read one number or one range.

    Args:
        rng: ``"4"`` or ``"0-3"``; both ends are included.

    Returns:
        The numbers, ascending.

    Raises:
        CoreListError: it is neither, is negative, runs backwards, or is longer than any machine.

    >>> parse_range("2-4"), parse_range("7")
    (range(2, 5), range(7, 8))
    """
    return _read_range(str(rng), f"rng = {rng!r}")


def parse_range_list(range_str: str) -> list[int]:
    """Read a comma-separated list of numbers and ranges, in any order.

    Args:
        range_str: for example ``"0-3,8"``; spaces around its parts are ignored.

    Returns:
        The numbers, ascending.

    Raises:
        CoreListError: the list or one of its parts is empty, a part cannot be read, or a number comes twice.

    >>> parse_range_list("8,0-3")
    [0, 1, 2, 3, 8]
    """
    return read_core_list(str(range_str), "range_str")


def read_core_list(text: str, argument: str) -> list[int]:
    """`parse_range_list`, whose errors speak of the caller's own argument."""
    name = f"{argument} = {text!r}"
    if not text.strip():
        raise CoreListError(f"{name} is empty: write numbers and ranges such as 0-3,8")
    seen: set[int] = set()
    for part in text.split(","):
        if not part.strip():
            raise CoreListError(f"{name} has nothing between two commas: write numbers and ranges such as 0-3,8")
        numbers = _read_range(part, name)
        twice = seen.intersection(numbers)
        if twice:
            raise CoreListError(f"{name} names {format_ranges(twice)} twice: name each number once")
        seen.update(numbers)
    return sorted(seen)


def _read_range(text: str, name: str) -> range:
    ends = [part.strip() for part in text.split("-")]
    if len(ends) > 2 or not all(end.isascii() and end.isdecimal() for end in ends):
        raise CoreListError(f"{name}: {text.strip()!r} is no number or range: write 4 or 0-3")
    start, end = int(ends[0]), int(ends[-1])
    if start > end:
        raise CoreListError(f"{name}: {text.strip()!r} runs backwards: write {end}-{start}")
    if end > _HIGHEST:
        raise CoreListError(f"{name}: {end} is past {_HIGHEST}, the highest number read here: write a smaller one")
    return range(start, end + 1)


def format_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as a list of ranges, shortest form.

    >>> format_ranges([8, 1, 0, 2])
    '0-2,8'
    >>> format_ranges([])
    ''
    """
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
