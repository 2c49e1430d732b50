from __future__ import annotations

import random
from itertools import accumulate, combinations, pairwise

import pytest
from ds_numa._planning.shares import equal_cuts


def weigh(cuts: list[int], weights: dict[int, int]) -> int:
    return sum(weights.get(cut, 0) for cut in cuts[1:-1])


def best_by_trying_all(total: int, ranks: int, weights: dict[int, int]) -> int:
    """The most that the cuts weigh over every way to deal out the remainder."""
    each, larger = divmod(total, ranks)
    return max(
        weigh([0, *accumulate(each + (rank in chosen) for rank in range(ranks))], weights)
        for chosen in combinations(range(ranks), larger)
    )


def test_shares_are_equal_and_no_other_cuts_weigh_more() -> None:
    dice = random.Random(1)
    for _ in range(400):
        total = dice.randint(1, 30)
        ranks = dice.randint(1, min(8, total))
        weights = {dice.randint(1, total): dice.choice([1, 9, 81]) for _ in range(dice.randint(0, 6))}
        cuts = equal_cuts(total, ranks, weights)
        shares = [b - a for a, b in pairwise(cuts)]
        assert cuts[0] == 0
        assert cuts[-1] == total
        assert len(shares) == ranks
        assert max(shares) - min(shares) <= 1
        assert weigh(cuts, weights) == best_by_trying_all(total, ranks, weights), (total, ranks, weights, cuts)


@pytest.mark.parametrize(
    ("total", "ranks", "weights", "cuts"),
    [
        (7, 2, {}, [0, 4, 7]),  # the remainder is dealt out, to the earlier ranks
        (14, 4, {7: 1}, [0, 4, 7, 11, 14]),
        (30, 4, {16: 1}, [0, 8, 16, 23, 30]),
        (8, 2, {7: 1}, [0, 4, 8]),  # no edge can be met: equal shares win
        (16, 2, {4: 1, 8: 1, 12: 1}, [0, 8, 16]),
        (2, 4, {}, [0, 1, 2, 2, 2]),
        (7, 3, {3: 1, 4: 9}, [0, 2, 4, 7]),  # the heavier edge
    ],
)
def test_known_cuts(total: int, ranks: int, weights: dict[int, int], cuts: list[int]) -> None:
    assert equal_cuts(total, ranks, weights) == cuts


def test_many_ranks_on_a_large_machine() -> None:
    cuts = equal_cuts(1016, 192, dict.fromkeys(accumulate([63, 64] * 8), 1))
    assert sorted({b - a for a, b in pairwise(cuts)}) == [5, 6]
