from __future__ import annotations

from ds_groups import ParallelTopology


def test_default_axes_are_those_with_something_to_see():
    lines = ParallelTopology(16, tp=2, pp=2).describe().splitlines()
    assert [line.split()[0] for line in lines] == ["world", "axis", "tp", "dp", "pp"]
    assert lines[2] == "tp       2       8  0 1 | 2 3 | 4 5 | 6 7 | ..."


def test_long_groups_are_shortened():
    assert ParallelTopology(64).describe("dp").splitlines()[-1] == "dp      64       1  0 1 2 ... 63"


def test_one_rank():
    assert ParallelTopology(1).describe().splitlines()[0] == "world size 1, order tp-cp-dp-pp"
