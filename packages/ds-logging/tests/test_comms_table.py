import re
from collections import deque

import pytest
from ds_logging._comms.op_stats import OpKey, OpStats, summarize_all
from ds_logging._comms.table import MAX_LINES, MAX_WIDTH, format_ranks, straggler_table, summary_table
from ds_logging._straggler import analyze


def stats(name="all_reduce", latencies=(1.0,), size=1000, **more):
    made = OpStats(OpKey(name, "all_reduce", size, 4, **more), deque())
    for latency in latencies:
        made.add(latency, size)
    return made


def rows_of(*snapshot):
    return summary_table(summarize_all(snapshot)).splitlines()[1:]


def test_those_that_took_most_time_are_first_then_those_with_most_bytes():
    rows = rows_of(
        stats("short", [1.0]), stats("big", [None], size=10**9), stats("long", [50.0]), stats("small", [None], size=1)
    )
    assert [row.split()[0] for row in rows] == ["long", "short", "big", "small"]


def test_what_is_unknown_is_a_dash():
    (row,) = rows_of(stats(latencies=[None, None]))
    assert row.split() == ["all_reduce", "1000.0", "B", "4", "2", *["-"] * 7]


def test_a_named_group_and_the_dtype_are_shown():
    (row,) = rows_of(stats(group="2:tp", ranks=(0, 1, 2, 3), dtype="bfloat16"))
    assert "all_reduce bfloat16" in row
    assert "2:tp (4)" in row


@pytest.mark.parametrize("kinds", [0, 1, MAX_LINES - 1, MAX_LINES, MAX_LINES + 1, 1000])
def test_at_most_one_screen_and_nothing_is_lost(kinds):
    many = [stats(f"op{number}", [float(number + 1)] * 3, size=number + 1) for number in range(kinds)]
    lines = summary_table(summarize_all(many)).splitlines()
    assert len(lines) <= MAX_LINES
    shown = [int(line.split()[0][2:]) for line in lines[1:] if line.startswith("op")]
    assert shown == list(range(kinds))[::-1][: len(shown)]
    if kinds < MAX_LINES:
        assert len(shown) == kinds
    else:
        rest = kinds - len(shown)
        found = re.match(r"\.\.\. and ([\d,]+) more: ([\d,]+) operations, .*; to_jsonl writes all$", lines[-1])
        assert (found[1], found[2]) == (f"{rest:,}", f"{rest * 3:,}")


def test_no_line_is_too_long():
    long = [
        stats(
            f"{number}" + "x" * 300, [1e12, 1e7, 123.456], size=1023 * 1024**5, group="g" * 200, dtype="float8_e4m3fn"
        )
        for number in range(3)
    ]
    long[0].count = 10**15
    lines = rows_of(*long)
    assert max(map(len, lines)) <= MAX_WIDTH
    assert all("..." in line for line in lines)
    assert all(len(line.split()) == len(lines[0].split()) for line in lines)


def test_straggler_table_is_one_screen_too():
    names = [f"op{number}" * 9 for number in range(100)]
    everyone = [{OpKey(name, "all_reduce", 8, 50): (1, [1.0]) for name in names}, *({} for _ in range(49))]
    lines = straggler_table(analyze(0, everyone)).splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_WIDTH
    assert "1-49" in lines[1]
    assert lines[-1].startswith("... and ")


def test_a_long_name_keeps_its_end():
    (row,) = rows_of(stats("all_reduce" + "x" * 200, dtype="bfloat16"))
    assert row.startswith("all_reduce")
    assert "x bfloat16 " in row
    assert len(row) <= MAX_WIDTH


def test_who_waited_longest_is_first():
    def keyed(name, latency):
        return {OpKey(name, "all_reduce", 8, 2): (1, [latency])}

    table = straggler_table(
        analyze(0, [{**keyed("a", 2.0), **keyed("b", 9.0)}, {**keyed("a", 1.0), **keyed("b", 1.0)}])
    )
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows == [
        ["b", "8.0", "B", "1", "1.000", "1.000", "8.000", "8.000", "rank", "1", "-"],
        ["a", "8.0", "B", "1", "1.000", "1.000", "1.000", "1.000", "rank", "1", "-"],
    ]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([1, 2], "1, 2"),
        ([2, 1, 0], "0-2"),
        ([0, 2, 3, 4, 9], "0, 2-4, 9"),
        (range(1024), "0-1023"),
    ],
)
def test_format_ranks(ranks, text):
    assert format_ranks(ranks) == text
