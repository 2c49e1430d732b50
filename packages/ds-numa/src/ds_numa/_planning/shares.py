"""Cut a row of cores into equal shares. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping


def equal_cuts(total: int, ranks: int, weights: Mapping[int, int]) -> list[int]:
    """Cut a row of cores into shares that differ by at most one core.

    The remainder may be dealt out in many ways. This takes the one whose cuts weigh the most; among equals, the earlier
    ranks get the larger shares.

    Args:
        total: how many cores the row has.
        ranks: how many shares.
        weights: what a cut at a position is worth, such as 1 at every edge of a node; positions left out are worth 0.

    Returns:
        ``ranks + 1`` positions; share i is ``[cuts[i], cuts[i + 1])``.

    >>> equal_cuts(7, 2, {})
    [0, 4, 7]
    >>> equal_cuts(15, 2, {8: 1}), equal_cuts(15, 2, {7: 1})
    ([0, 8, 15], [0, 7, 15])
    """
    each, larger = divmod(total, ranks)  # `larger` of the shares are one core larger
    if larger == 0:
        return [i * each for i in range(ranks + 1)]
    # best[i][u]: the most that the cuts from cut i on can weigh, when u of the first i shares are larger ones.
    best = [[0] * (larger + 1) for _ in range(ranks + 1)]
    for i in range(ranks - 1, -1, -1):
        left = ranks - i  # shares still to be cut
        for u in range(max(0, larger - left), min(i, larger) + 1):
            best[i][u] = max(best[i + 1][n] for n in _next(u, larger, left)) + weights.get(i * each + u, 0)
    cuts, used = [0], 0
    for i in range(ranks):
        used = max(_next(used, larger, ranks - i), key=lambda n: (best[i + 1][n], n))
        cuts.append((i + 1) * each + used)
    return cuts


def _next(used: int, larger: int, left: int) -> list[int]:
    """How many larger shares there may be after the next one, so that exactly `larger` are dealt in the end."""
    return [n for n in (used, used + 1) if n <= larger and larger - n <= left - 1]
