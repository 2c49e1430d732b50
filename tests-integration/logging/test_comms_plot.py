"""The figure, by the data of its axes."""

import sys
from collections import deque

import pytest
from ds_logging._comms.op_stats import OpKey, OpStats
from ds_logging._comms.plot import MAX_LINES, plot_bandwidth

pytest.importorskip("matplotlib")


def stats(name="all_reduce", size=10**6, latencies=(1.0,), n=4, **more):
    made = OpStats(OpKey(name, name, size, n, **more), deque())
    for latency in latencies:
        made.add(latency, size)
    return made


def lines_of(figure):
    (axes,) = figure.axes
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()}


def test_a_line_for_each_operation_of_each_group():
    figure = plot_bandwidth(
        [
            stats(size=2 * 10**6, latencies=[1.0] * 10),
            stats(size=10**6),
            stats(group="1:tp", n=2),
            stats("all_gather_into_tensor", n=2, group="1:tp"),
        ]
    )
    # 1 MB in 1 ms is 1 GB/s. An all-reduce of 4 ranks counts 3/2 of it, of 2 ranks all of it; an all-gather of 2 ranks
    # has 2 MB and counts half of them.
    wanted = {
        "4 ranks, all_reduce": [(10**6, 1.5), (2 * 10**6, 3.0)],
        "1:tp (2), all_reduce": [(10**6, 1.0)],
        "1:tp (2), all_gather": [(10**6, 1.0)],
    }
    found = lines_of(figure)
    assert found.keys() == wanted.keys()
    for label, points in wanted.items():
        assert found[label] == [pytest.approx(point) for point in points]
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "Bus bandwidth (GB/s)"
    assert axes.get_title() == "Communication"


def test_more_operations_are_larger_markers():
    figure = plot_bandwidth([stats(size=1000, latencies=[1.0]), stats(size=2000, latencies=[1.0] * 1000)])
    (points,) = figure.axes[0].collections
    once, often = points.get_sizes()
    assert often > once > 0


def test_what_has_no_bandwidth_is_left_out():
    unknown = [stats("all_shuffle"), stats(latencies=[None]), stats(size=0), stats(latencies=[0.0]), stats(n=1)]
    figure = plot_bandwidth(unknown)
    assert lines_of(figure) == {}
    assert "no operation has a bus bandwidth" in [text.get_text() for text in figure.axes[0].texts]


def test_the_legend_says_what_is_not_drawn(tmp_path):
    many = [stats(group=f"{number}:tp", latencies=[float(number + 1)]) for number in range(MAX_LINES + 5)]
    figure = plot_bandwidth(many, tmp_path / "picture.png", title="mine")
    labels = list(lines_of(figure))
    assert len(labels) == MAX_LINES
    assert labels[0].startswith(f"{MAX_LINES + 4}:tp")
    assert "5 more not drawn" in figure.axes[0].get_legend().get_title().get_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
