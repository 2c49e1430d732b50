"""The picture: a panel an axis, a colour a group."""

from __future__ import annotations

import sys

import pytest
from ds_groups import GroupsError, MissingDependencyError, ParallelTopology, RankGrid, TopologyError, megatron


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib") as caught:
        ParallelTopology(8, tp=2).plot()
    assert isinstance(caught.value, GroupsError)
    assert isinstance(caught.value, ImportError)


def cells(panel):
    return [[tuple(color) for color in row] for row in panel.images[0].get_array().tolist()]


def test_a_panel_an_axis(tmp_path):
    pytest.importorskip("matplotlib")
    topology = megatron(64, tp=4, pp=2, ep=4, ranks_per_node=8)
    figure = topology.plot(path=tmp_path / "groups.png")
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles[:2] == ["tp: 16 groups of 4, inside a node", "dp: 8 groups of 8, on 4 nodes each"]
    assert [title.partition(":")[0] for title in titles] == list(topology.axes_in_use())
    assert "Outlined: the group of rank 0" in figure.get_suptitle()


def test_ranks_of_a_group_have_a_colour_that_neighbours_do_not():
    pytest.importorskip("matplotlib")
    topology = ParallelTopology(32, tp=2, ranks_per_node=8)
    for name in ("tp", "dp"):
        found = cells(topology.plot(name).axes[0])
        by_group = [{found[rank % 8][rank // 8] for rank in group} for group in topology.groups(name)]
        assert all(len(colors) == 1 for colors in by_group)
        assert len(set.union(*by_group)) == len(by_group)  # fewer than 21: no colour comes twice


def test_the_group_of_the_first_rank_is_outlined():
    pytest.importorskip("matplotlib")
    panel = ParallelTopology(32, tp=2, ranks_per_node=8).plot("tp").axes[0]
    lines = [line for line in panel.lines if line.get_color() == "black"]
    assert {x for line in lines for x in line.get_xdata()} == {-0.5, 0.5}
    assert {y for line in lines for y in line.get_ydata()} == {-0.5, 0.5, 1.5}


def test_what_does_not_fit_is_said():
    pytest.importorskip("matplotlib")
    figure = ParallelTopology(2048, tp=8, ranks_per_node=8).plot(("tp",), max_nodes=100)
    assert "156 more to the right are not drawn" in figure.get_suptitle()
    assert len(cells(figure.axes[0])[0]) == 100


def test_ranks_outside_the_grid_are_white():
    pytest.importorskip("matplotlib")
    grid = RankGrid({"tp": 2, "dp": 2}, span=range(4, 8), world_size=12, ranks_per_node=4)
    figure = grid.plot("dp")
    white = [[color == (1.0, 1.0, 1.0) for color in row] for row in cells(figure.axes[0])]
    assert white == [[True, False, True]] * 4
    assert "rank 4" in figure.get_suptitle()


def test_nodes_of_unknown_size():
    pytest.importorskip("matplotlib")
    figure = ParallelTopology(40, tp=4).plot("tp", figsize=(3, 2))
    assert figure.axes[0].get_title(loc="left") == "tp: 10 groups of 4"
    assert "16 a column" in figure.get_suptitle()
    assert tuple(figure.get_size_inches()) == (3, 2)


def test_nothing_to_draw():
    pytest.importorskip("matplotlib")
    with pytest.raises(TopologyError, match="nothing to draw"):
        ParallelTopology(1).plot()
