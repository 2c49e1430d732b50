"""`RankGrid`: any digits, views, spans and nodes, against an oracle that enumerates coordinates."""

from __future__ import annotations

import itertools
import pickle
from math import prod

import pytest
from ds_groups import DivisibilityError, ParallelTopology, RankGrid, RankRangeError, TopologyError, TopologyWarning


class Index:
    """An integer of another library, as `numpy.int64` is one."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def table(sizes, names, span):
    """Groups along ``names`` by comparing coordinates: the last size is the outermost loop."""
    order = list(reversed(sizes))
    fixed = [name for name in order if name not in names]
    found: dict[tuple, list[int]] = {}
    for position, place in enumerate(itertools.product(*(range(sizes[name]) for name in order))):
        at = dict(zip(order, place, strict=True))
        found.setdefault(tuple(at[name] for name in fixed), []).append(span[position])
    return tuple(tuple(group) for group in sorted(found.values(), key=lambda group: list(span).index(group[0])))


@pytest.mark.parametrize("span", [range(24), range(8, 32), [*range(23, -1, -1)], [7, 3, *range(10, 32)]])
def test_every_axis_of_any_span(span):
    sizes = {"a": 2, "b": 3, "dp_x": 2, "d": 2}
    grid = RankGrid(sizes, span=span, world_size=32)
    for count in range(1, 5):
        for names in itertools.combinations(sizes, count):
            want = table(sizes, names, span)
            assert grid.table(names) == want == tuple(grid.groups("_".join(names)))
            for number, group in enumerate(want):
                for rank in group:
                    assert grid.ranks(names, rank) == group
                    assert grid.group_of(names, rank) == number
    for rank in span:
        assert grid.rank_at(**grid.coordinates(rank)) == rank
    outside = next(rank for rank in range(33) if rank not in span)
    with pytest.raises(RankRangeError, match=f"rank {outside} is"):
        grid.ranks("a", outside)


@pytest.mark.parametrize(
    "view", [cut for cut in itertools.product((1, 2, 3, 4, 6, 12), repeat=2) if 12 % prod(cut) == 0]
)
def test_views_over_some_digits(view):
    """Every cut of 12 ranks of two digits that a third one separates, in both orders of counting."""
    sizes = {"a": 6, "b": 2, "c": 2}
    for over in (("a", "c"), ("c", "a")):
        grid = RankGrid(sizes).view(over=over, x=view[0], y=-1, z=view[1])
        cut = {"x": view[0], "y": 12 // prod(view), "z": view[1]}
        for b in (0, 1):
            members = [rank for rank in range(24) if rank // 6 % 2 == b]
            members.sort(key=lambda rank: (rank // 12, rank % 6) if over[0] == "a" else (rank % 6, rank // 12))
            for names in (("x",), ("y",), ("z",), ("x", "y"), ("x", "z"), ("z", "y")):
                for group in table(cut, names, members):
                    assert grid.ranks(names, group[0]) == group, (grid, names)
                    assert all(grid.ranks((*names, "b"), rank)[0] % 6 < 6 for rank in group)
        for rank in range(24):
            at = grid.coordinates(rank)
            assert grid.rank_at(**at) == rank == grid.rank_at(b=at["b"], **{name: at[name] for name in "xyz"})
            assert all(grid.ranks(name, rank)[at[name]] == rank for name in "abcxyz")
            assert sorted(grid.ranks(("x", "b"), rank)) == sorted(
                other for other in range(24) if all(grid.coordinates(other)[name] == at[name] for name in "yz")
            )


def test_a_view_may_share_an_axis():
    grid = RankGrid({"tp": 4, "cp": 2, "pp": 2})
    both = grid.view(etp=2, ep=4, pp=2)
    assert both.ranks("ep_pp", 1) == (1, 3, 5, 7, 9, 11, 13, 15)
    with pytest.raises(TopologyError, match="pp=2 of the view over tp, cp, pp is another axis than the pp"):
        grid.view(pp=2, ep=8)
    with pytest.raises(TopologyError, match="mixes ep with tp"):
        both.size("tp_ep")
    assert both.view(x=16).ranks("x", 3) == tuple(range(16))


def test_equal_partitions_have_equal_keys():
    grid = RankGrid({"tp": 2, "cp": 2, "dp": 4}).view(ep=4, edp=4).view(over=("cp", "dp"), x=4, y=2)
    assert grid.axis("tp_cp").key == grid.axis("ep").key
    assert grid.axis("cp_dp").key == grid.axis("x_y").key == RankGrid({"a": 2, "b": 8}).axis("b").key
    assert len({grid.axis(name).key for name in ("tp", "cp", "dp", "ep", "edp", "x", "y")}) == 6  # dp is edp
    assert RankGrid({"a": 2}, world_size=4).axis("a").key != RankGrid({"a": 2}, span=(1, 0)).axis("a").key
    for first, second in itertools.combinations(grid.names, 2):
        assert (grid.axis(first).key == grid.axis(second).key) == (grid.table(first) == grid.table(second))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RankGrid({"a": 2}, span=range(3)), DivisibilityError, "a=2 = 2 must equal the 3 ranks of the span"),
        (lambda: RankGrid({"a": 2}, span=(1, 1)), RankRangeError, r"span \(1, 1\) holds a rank twice"),
        (lambda: RankGrid({"a": 2}, span=range(2, 4), world_size=3), RankRangeError, r"span 2\.\.3 is outside"),
        (lambda: RankGrid({"a": 0}), TopologyError, "a must be a positive integer, got 0"),
        (lambda: RankGrid({"a b": 2}), TopologyError, "'a b' cannot name an axis"),
        (lambda: RankGrid({"a": 2}, aliases={"a": ("a",)}), TopologyError, "must be a new name"),
        (lambda: RankGrid({"a": 4}).view(x=3), DivisibilityError, "x=3 = 3 must equal a = 4 = 4"),
        (lambda: RankGrid({"a": 4}).view(x=3, y=-1), DivisibilityError, "x=3 = 3 must divide a = 4 = 4"),
        (lambda: RankGrid({"a": 4}).view(x=-1, y=-1), TopologyError, "one size may be -1"),
        (lambda: RankGrid({"a": 4}).view(over=("b",), x=4), TopologyError, "must name distinct digits of the grid: a"),
        (lambda: RankGrid({"a": 4}, ranks_per_node=3), DivisibilityError, "ranks_per_node=3 must divide the 4 ranks"),
        (lambda: RankGrid({"a": 4, "a_b": 2, "b": 2, "b_c": 2, "c": 1}).size("a_b_c"), TopologyError, "can be read as"),
        (lambda: RankGrid({"a": 4}).rank_at(b=1), TopologyError, "'b' is no axis of this grid: a"),
        (lambda: RankGrid({"a": 2, "b": 2}).view(x=4).rank_at(x=1, b=1), TopologyError, "no rank is at x=1, b=1"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nodes():
    grid = RankGrid({"tp": 2, "dp": 4}, ranks_per_node=4)
    assert grid.table("local") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert grid.table("node") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert RankGrid({"a": 2}, ranks_per_node=8).size("node") == 1
    with pytest.raises(TopologyError, match="'node' is not known"):
        RankGrid({"a": 4}, span=(3, 1, 0, 2), ranks_per_node=2).size("node")


def test_tensor_parallelism_that_leaves_a_node_is_named():
    with pytest.warns(TopologyWarning, match=r"tp=4 leaves a node of 2 ranks: the group of ranks 0, 1, 2, 3"):
        ParallelTopology(8, tp=4, ranks_per_node=2)
    with pytest.warns(TopologyWarning, match="tp=2 leaves a node of 4 ranks: the group of ranks 0, 4"):
        ParallelTopology(8, tp=2, order="dp-tp-cp-pp", ranks_per_node=4)
    with pytest.warns(TopologyWarning, match=r"etp=4 leaves a node of 2 ranks"):
        ParallelTopology(8, tp=2, etp=4, ranks_per_node=2)
    ParallelTopology(8, tp=2, ranks_per_node=4)  # warnings are errors in these tests


def test_other_integers():
    assert RankGrid({"tp": Index(2), "dp": 2}).ranks("dp", Index(3)) == (1, 3)
    assert ParallelTopology(Index(8), tp=Index(2)) == ParallelTopology(8, tp=2)
    assert type(ParallelTopology(Index(8), tp=Index(2)).tp) is int
    assert RankGrid({"tp": 2}).rank_at(tp=Index(1)) == 1
    with pytest.raises(RankRangeError, match="rank True is outside"):
        RankGrid({"tp": 2}).ranks("tp", True)


def test_neighbours():
    topology = ParallelTopology(8, tp=2, pp=4)
    assert [topology.neighbours("pp", rank) for rank in (1, 3, 7)] == [(7, 3), (1, 5), (5, 1)]
    assert [topology.neighbours("pp", rank, wrap=False) for rank in (1, 7)] == [(None, 3), (5, None)]
    assert topology.neighbours("cp", 3) == (3, 3)
    assert topology.neighbours("cp", 3, wrap=False) == (None, None)


def test_grids_are_values():
    grid = RankGrid({"tp": 2, "dp": 4}, span=range(8, 16)).view(ep=8)
    same = pickle.loads(pickle.dumps(grid))
    assert same == grid
    assert hash(same) == hash(grid)
    assert same.table("ep") == ((8, 9, 10, 11, 12, 13, 14, 15),)
    assert grid != RankGrid({"tp": 2, "dp": 4}, span=range(8, 16))
    assert repr(grid) == "RankGrid(tp=2, dp=4, span=8..15).view(ep=8)"
