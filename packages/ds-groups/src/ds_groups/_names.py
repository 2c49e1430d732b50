"""Take names of axes apart: ``"dp_shard_cp"`` is ``dp_shard`` and ``cp``."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import TopologyError


def parse_axis(axis: object, known: Sequence[str]) -> tuple[str, ...]:
    """The known names that an axis consists of.

    Args:
        axis: a known name, several joined with underscores, or a sequence of known names.
        known: the names there are.

    Raises:
        TopologyError: it has other parts, or could be taken apart in two ways.

    >>> parse_axis("dp_shard_cp", ["cp", "dp", "dp_shard"]), parse_axis(("cp", "dp"), ["cp", "dp"])
    (('dp_shard', 'cp'), ('cp', 'dp'))
    """
    if isinstance(axis, str):
        ways = [(axis,)] if axis in known else _split(axis, known)
        if len(ways) > 1:
            spelled = " or ".join(map(str, ways))
            raise TopologyError(f"axis {axis!r} can be read as {spelled}; give it as a tuple of names")
        if ways:
            return ways[0]
    elif isinstance(axis, tuple) and axis and set(axis) <= set(known):
        return axis
    raise TopologyError(f"axis {axis!r} is not known: join any of {', '.join(known)} with underscores")


def _split(text: str, known: Sequence[str]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [(name,) for name in known if name == text]
    for name in known:
        if text.startswith(f"{name}_"):
            found += [(name, *rest) for rest in _split(text.removeprefix(f"{name}_"), known)]
    return found
