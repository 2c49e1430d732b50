"""DeepSpeed's expert layouts, against the lists that its documentation spells out and against what a layout means."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from ds_groups import _expert_tables as tables
from ds_groups.errors import DivisibilityError, TopologyError

SIZES = list(itertools.product((4, 6, 8, 12, 24), (1, 2, 3), (1, 2, 3, 4, 6), (1, 2)))  # world, tp, ep, pp


def test_folded_layout():
    expert, data = tables.folded_tables(16, 2, 1, data_before_expert=False)
    assert expert == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert data == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))


def test_folded_layout_data_first():
    expert, data = tables.folded_tables(8, 2, 2, data_before_expert=True)
    assert expert == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert data == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_lanes_layout():
    expert, data = tables.lane_tables(16, 2, 4, 1, data_before_expert=False)
    assert expert == ((0, 2, 4, 6), (8, 10, 12, 14), (1, 3, 5, 7), (9, 11, 13, 15))
    assert data == ((0, 8), (2, 10), (4, 12), (6, 14), (1, 9), (3, 11), (5, 13), (7, 15))


def test_lanes_layout_data_first():
    expert, _ = tables.lane_tables(32, 2, 4, 2, data_before_expert=True)
    assert expert[:4] == ((0, 4, 8, 12), (2, 6, 10, 14), (1, 5, 9, 13), (3, 7, 11, 15))


def test_strided_layout_takes_lane_after_lane():
    expert, data = tables.strided_tables(8, 2, 2, 1, data_before_expert=False)
    assert expert == ((0, 2), (4, 6), (1, 3), (5, 7))
    assert data == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_spec_must_fit_the_call():
    spec = SimpleNamespace(world_size=8, ep_size=4, tp_size=2, pp_size=1)
    assert tables.from_spec(spec, 8, 4, 2, 1)[0].table() == ((0, 1, 2, 3), (4, 5, 6, 7))
    with pytest.raises(TopologyError, match=r"folding_spec\.tp_size=2 is not the 4 of this call"):
        tables.from_spec(spec, 8, 4, 4, 1)


@pytest.mark.parametrize("kind", ["folded", "lane", "strided"])
@pytest.mark.parametrize("before", [False, True])
def test_replicas_hold_the_same_experts(kind, before):
    """Members of an expert-data group stand at the same place of their expert groups, all of them, in every layout."""
    checked = 0
    for world, tp, ep, pp in SIZES:
        arguments = (world, ep, pp) if kind == "folded" else (world, tp, ep, pp)
        try:
            expert, data = getattr(tables, f"{kind}_tables")(*arguments, data_before_expert=before)
        except DivisibilityError:
            continue
        checked += 1
        axes = getattr(tables, {"folded": "folded", "lane": "lanes", "strided": "strided"}[kind])(
            *arguments, data_before_expert=before
        )
        for axis, table in zip(axes, (expert, data), strict=True):
            assert sorted(axis.table()) == sorted(table), (kind, arguments)
            assert all(axis.ranks(rank) == group for group in table for rank in group)
            assert axis.is_ascending
        place = {rank: group.index(rank) for group in expert for rank in group}
        for groups, size in ((expert, ep), (data, world // pp // ep // (tp if kind == "lane" else 1))):
            assert sorted(rank for group in groups for rank in group) == list(range(world))
            assert {len(group) for group in groups} == {size}
        assert all(len({place[rank] for rank in group}) == 1 for group in data), (world, tp, ep, pp)
    assert checked > 10
