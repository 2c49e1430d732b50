from __future__ import annotations

import pytest
from ds_groups._axes import atoms_of, make_digits, parse_order, turn
from ds_groups.errors import TopologyError


@pytest.mark.parametrize(
    ("axis", "atoms"),
    [
        ("tp", ("tp",)),
        ("dp", ("dp_shard", "dp_replicate")),
        ("cp_dp_shard", ("cp", "dp_shard")),
        ("dp_shard_cp", ("cp", "dp_shard")),
        ("dp_cp", ("cp", "dp_shard", "dp_replicate")),
        ("dp_replicate_dp_shard", ("dp_shard", "dp_replicate")),
        ("edp_ep", ("ep", "edp")),
    ],
)
def test_atoms(axis, atoms):
    assert atoms_of(axis) == atoms


@pytest.mark.parametrize("axis", ["", "tp_", "_tp", "tp__cp", "tpcp", "dp_shards", "world", "tp-cp", None])
def test_unknown_axis(axis):
    with pytest.raises(TopologyError, match="is not known: join any of tp, cp, dp"):
        atoms_of(axis)


@pytest.mark.parametrize("axis", ["tp_tp", "dp_dp_shard"])
def test_repeated_axis(axis):
    with pytest.raises(TopologyError, match="twice"):
        atoms_of(axis)


def test_turn_counts_like_an_odometer():
    hours, minutes, seconds = make_digits([("s", 60), ("m", 60), ("h", 24)])[::-1]
    noon = 12 * 3600
    assert turn(noon + 61, [minutes]) == [noon + 1 + 60 * minute for minute in range(60)]
    assert turn(noon + 61, [seconds, minutes]) == list(range(noon, noon + 3600))
    assert turn(61, [hours]) == [61 + 3600 * hour for hour in range(24)]
    assert turn(61, []) == [61]


def test_parse_order():
    assert parse_order("order", "pp-dp-cp-tp", complete=True) == ("pp", "dp", "cp", "tp")
    assert parse_order("ep_axes", "dp", complete=False) == ("dp",)
    with pytest.raises(TopologyError, match="order=None"):
        parse_order("order", None, complete=True)
