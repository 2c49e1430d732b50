import itertools
import json

import pytest
from ds_logging._comms.rank_sets import RankSets, read_rank_sets


@pytest.mark.parametrize("size", range(5))
def test_every_order_of_ranks_comes_back(size):
    for ranks in itertools.permutations(range(0, 12, 2), size):
        sets = RankSets()
        assert sets.number(ranks) == 0
        assert sets.number(ranks) == 0
        assert read_rank_sets(json.loads(json.dumps(sets.to_json()))) == [ranks]


@pytest.mark.parametrize("ranks", [tuple(range(8192)), tuple(range(3, 8192, 8)), tuple(range(0, 30, 7))])
def test_a_range_is_written_short(ranks):
    sets = RankSets()
    sets.number(ranks)
    assert len(json.dumps(sets.to_json())) < 40
    assert read_rank_sets(sets.to_json()) == [ranks]
