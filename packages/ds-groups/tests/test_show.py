"""The picture of characters says which rank is in which group."""

from __future__ import annotations

import io

import pytest
from ds_groups import ParallelTopology, RankGrid, TopologyError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(grid, axis, **options):
    out = io.StringIO()
    assert grid.show(axis, file=out, **options) is None
    return out.getvalue().splitlines()


def test_a_row_a_node():
    assert shown(ParallelTopology(16, tp=2, ranks_per_node=4), "dp") == [
        "dp: 2 groups of 8",
        "node 0  A B A B",
        "node 1  A B A B",
        "node 2  A B A B",
        "node 3  A B A B",
        "A = ranks 0 2 4 6 8 10 12 14",
        "B = ranks 1 3 5 7 9 11 13 15",
    ]


@pytest.mark.parametrize("axis", ["tp", "dp", "ep", "edp"])
def test_every_cell_is_the_group_of_its_rank(axis):
    topology = ParallelTopology(128, tp=2, ep=4, ranks_per_node=8)
    lines = shown(topology, axis)
    cells = [cell for line in lines if line.startswith("node") for cell in line.split()[2:]]
    groups = topology.table(axis)
    for rank, cell in enumerate(cells):
        number = next(place for place, group in enumerate(groups) if rank in group)
        assert cell == (chr(ord("A") + number) if len(groups) <= 26 else str(number))
    assert len(cells) == 128


def test_what_is_left_out_is_said():
    lines = shown(ParallelTopology(1024, tp=8, ranks_per_node=8), "tp", max_nodes=8)
    assert sum(line.startswith("node") for line in lines) == 8
    assert "... 120 more nodes" in lines
    assert lines[-1] == "... 122 more groups"


def test_ranks_outside_the_grid_are_dots():
    grid = RankGrid({"tp": 2, "dp": 2}, span=range(4, 8), world_size=10, ranks_per_node=4)
    assert shown(grid, "tp")[1:4] == ["node 0  . . . .", "node 1  A A B B", "node 2  . ."]


def test_nodes_of_unknown_size():
    lines = shown(ParallelTopology(40, tp=4), "tp", max_nodes=2)
    assert lines[1:4] == ["ranks 0..   A A A A B B B B C C C C D D D D", "ranks 16..  E E E E F F F F G G G G H H H H",
                          "... 1 more rows"]  # fmt: skip


def test_wide_nodes_are_folded():
    lines = shown(ParallelTopology(144, tp=2, ranks_per_node=72), "tp")
    assert max(map(len, lines)) <= 100
    cells = [cell for line in lines[1:-7] for cell in line.replace("node 0", "").replace("node 1", "").split()]
    assert cells == [str(rank // 2) for rank in range(144)]


def test_a_terminal_gets_colours(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    topology, out = ParallelTopology(16, tp=2, ranks_per_node=4), Terminal()
    topology.show("dp", file=out)
    assert "\x1b[" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    topology.show("dp", file=plain)
    assert plain.getvalue().splitlines() == shown(topology, "dp")


def test_a_terminal_without_rich(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    topology, out = ParallelTopology(16, tp=2, ranks_per_node=4), Terminal()
    topology.show("dp", file=out)
    assert out.getvalue().splitlines() == shown(topology, "dp")


def test_standard_output(capsys):
    ParallelTopology(4, tp=2, ranks_per_node=4).show("tp")
    assert "node 0  A A B B" in capsys.readouterr().out


def test_nothing_to_show():
    with pytest.raises(TopologyError, match="max_nodes=0 must be 1 or more"):
        shown(ParallelTopology(4), "dp", max_nodes=0)
    with pytest.raises(TopologyError, match="'xp' is not known"):
        shown(ParallelTopology(4), "xp")
