"""Cut a row of cores into equal shares. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def equal_cuts(sizes: Sequence[int], ranks: int) -> list[int]:
    """Cut a row of ``sum(sizes)`` cores into `ranks` shares that differ by at most one core.

    The row is made of blocks (the nodes). Of all ways to deal out the remainder, this takes one with the most cuts
    between two blocks, so that as few block edges as possible fall inside a share; among those, the earlier ranks get
    the larger shares.

    Args:
        sizes: how many cores each block has.
        ranks: how many shares.

    Returns:
        ``ranks + 1`` positions; share i is ``[cuts[i], cuts[i + 1])``.

    >>> equal_cuts([7], 2)
    [0, 4, 7]
    >>> equal_cuts([8, 7], 2), equal_cuts([7, 8], 2)
    ([0, 8, 15], [0, 7, 15])
    """
    total = sum(sizes)
    each, larger = divmod(total, ranks)  # `larger` of the shares are one core larger
    edges = set(accumulate(sizes))
    # hits[i][u]: the most cuts on an edge from cut i on, when u of the first i shares are larger ones.
    hits = [[0] * (larger + 1) for _ in range(ranks + 1)]
    for i in range(ranks - 1, -1, -1):
        left = ranks - i  # shares still to be cut
        for u in range(max(0, larger - left), min(i, larger) + 1):
            best = max(hits[i + 1][n] for n in _next(u, larger, left))
            hits[i][u] = best + (i * each + u in edges)
    cuts, used = [0], 0
    for i in range(ranks):
        used = max(_next(used, larger, ranks - i), key=lambda n: (hits[i + 1][n], n))
        cuts.append((i + 1) * each + used)
    return cuts


def _next(used: int, larger: int, left: int) -> list[int]:
    """How many larger shares there may be after the next one, so that exactly `larger` are dealt in the end."""
    return [n for n in (used, used + 1) if n <= larger and larger - n <= left - 1]
