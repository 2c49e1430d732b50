from __future__ import annotations

import pytest
from ds_groups._pool import check_partition
from ds_groups.errors import RankRangeError


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(0, 1), (2, 4)], r"rank 4 is outside the world: 0\.\.3"),
        ([(0, 1), (2, -1)], "rank -1 is outside the world"),
        ([(0, 1), (1, 2, 3)], "rank 1 is in two groups"),
        ([(0, 1)], r"ranks \[2, 3\] of 4 are in no group"),
    ],
)
def test_rank_lists_must_hold_every_rank_once(groups, message):
    with pytest.raises(RankRangeError, match=f"expert groups: {message}"):
        check_partition("expert groups", groups, 4)


def test_a_partition_is_fine():
    check_partition("expert groups", [(2, 0), (3, 1)], 4)
