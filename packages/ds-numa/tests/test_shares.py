from __future__ import annotations

import random
from itertools import accumulate, combinations, pairwise

import pytest
from ds_numa._shares import equal_cuts


def best_by_trying_all(sizes: list[int], ranks: int) -> int:
    """The most cuts on a block's edge over every way to deal out the remainder."""
    each, larger = divmod(sum(sizes), ranks)
    edges = set(accumulate(sizes)) - {sum(sizes)}
    return max(
        len(edges & set(accumulate(each + (rank in chosen) for rank in range(ranks))))
        for chosen in combinations(range(ranks), larger)
    )


def test_shares_are_equal_and_cut_at_edges_whenever_that_is_possible() -> None:
    dice = random.Random(1)
    for _ in range(400):
        sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 4))]
        ranks = dice.randint(1, min(8, sum(sizes)))
        cuts = equal_cuts(sizes, ranks)
        shares = [b - a for a, b in pairwise(cuts)]
        assert cuts[0] == 0
        assert cuts[-1] == sum(sizes)
        assert len(shares) == ranks
        assert max(shares) - min(shares) <= 1
        on_edges = len(set(cuts[1:-1]) & set(accumulate(sizes)))
        assert on_edges == best_by_trying_all(sizes, ranks), (sizes, ranks, cuts)


@pytest.mark.parametrize(
    ("sizes", "ranks", "cuts"),
    [
        ([7], 2, [0, 4, 7]),  # the remainder is dealt out, to the earlier ranks
        ([7, 7], 4, [0, 4, 7, 11, 14]),
        ([16, 14], 4, [0, 8, 16, 23, 30]),
        ([7, 1], 2, [0, 4, 8]),  # no edge can be met: equal shares win
        ([4, 4, 4, 4], 2, [0, 8, 16]),
        ([2], 4, [0, 1, 2, 2, 2]),
    ],
)
def test_known_cuts(sizes: list[int], ranks: int, cuts: list[int]) -> None:
    assert equal_cuts(sizes, ranks) == cuts


def test_many_ranks_on_a_large_machine() -> None:
    cuts = equal_cuts([63, 64] * 8, 192)
    assert sorted({b - a for a, b in pairwise(cuts)}) == [5, 6]
