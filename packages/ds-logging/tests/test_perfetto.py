import json
import random
from collections import Counter

import pytest
from ds_logging._comms.operation import Operation
from ds_logging._comms.perfetto import Timeline, to_perfetto, trace_events
from ds_logging._step import Step
from ds_logging._timeline import LogRecord, Range

MS = 10**6
START = 1_700_000_000 * 10**9


def op(start_ms, latency_ms=1.0, kind="all_reduce", sequence=1, group="0:tp", ranks=(0, 1), *, done=True, **more):
    fields = {"nbytes": 10**6, "dtype": "float32", "name": kind, **more}
    return Operation(
        kind,
        group,
        ranks,
        sequence,
        started_ns=START + round(start_ms * MS),
        latency_ms=latency_ms,
        completed=done,
        **fields,
    )


def check_structure(trace):
    """What a viewer relies on, of any trace."""
    events = trace["traceEvents"]
    named = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ph"] == "M" for event in events] == [True] * (len(events) - len(timed)) + [False] * len(timed)
    times = [event["ts"] for event in timed]
    assert times == sorted(times)
    slices, flows = {}, {}
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        assert event["ph"] in "XMistf"
    for event in timed:
        assert (event["pid"], event["tid"]) in named
        assert isinstance(event["ts"], float)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], float)
            assert event["dur"] >= 0
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "i":
            assert event["s"] in ("t", "p")
        else:
            flows.setdefault(event["id"], []).append(event)
    for spans in slices.values():  # slices of one track are apart, or one is inside of the other
        open_ends = []
        for start, end in spans:
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-6
            open_ends.append(end)
    for steps in flows.values():  # balanced: one start, one end, each bound to a slice
        assert [event["ph"] for event in steps] == ["s", *["t"] * (len(steps) - 2), "f"]
        assert len({event["pid"] for event in steps}) == len(steps)
        for event in steps:
            assert any(start <= event["ts"] <= end for start, end in slices[event["pid"], event["tid"]])
    return timed


def load(tmp_path, *timelines):
    to_perfetto(tmp_path / "trace.json", timelines)
    trace = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    return trace


def test_an_operation_is_a_slice_with_its_arguments(tmp_path):
    trace = load(tmp_path, Timeline(3, [op(5, 2.0, step=7), op(8, 1.0, sequence=2)], host="node1"))
    first, second = check_structure(trace)
    assert (first["name"], first["pid"], first["ts"], first["dur"]) == ("all_reduce", 3, 0.0, 2000.0)
    assert (second["ts"], second["dur"], second["tid"]) == (3000.0, 1000.0, first["tid"])
    assert first["args"] == {
        "kind": "all_reduce",
        "sequence": 1,
        "bytes": 10**6,
        "dtype": "float32",
        "step": 7,
        "ranks": [0, 1],
        "busbw_gbps": pytest.approx(10**6 * 8 / 2e-3 / 1e9),
    }
    assert trace["otherData"]["start_time_ns"] == START + 5 * MS
    names = {event["name"]: event["args"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names["process_name"] == {"name": "rank 3 node1"}
    assert names["thread_name"] == {"name": "group 0:tp"}


def test_each_group_has_a_track(tmp_path):
    events = check_structure(load(tmp_path, Timeline(0, [op(0), op(0, group="1:dp"), op(2, sequence=2)])))
    assert len({event["tid"] for event in events}) == 2


def test_operations_that_overlap_stand_on_further_tracks(tmp_path):
    operations = [op(0, 10.0), op(1, 2.0, sequence=2), op(2, 3.0, sequence=3), op(4, 1.0, sequence=4)]
    events = check_structure(load(tmp_path, Timeline(0, operations)))
    assert len({event["tid"] for event in events}) == 3


def test_an_unfinished_operation_lasts_until_the_end_and_says_so(tmp_path):
    events = check_structure(load(tmp_path, Timeline(0, [op(0, None, done=False), op(5, 4.0, group="1")])))
    assert (events[0]["name"], events[0]["dur"]) == ("all_reduce (unfinished)", 9000.0)
    assert "unfinished" in events[0]["args"]["state"]


def test_an_operation_whose_end_nobody_saw_has_no_length(tmp_path):
    events = check_structure(load(tmp_path, Timeline(0, [op(0, None), op(5, 4.0)])))
    assert (events[0]["dur"], events[0]["args"]["state"]) == (0.0, "completed: its end was not observed")


def test_an_arrow_joins_the_same_operation_of_all_ranks(tmp_path):
    ranks = (0, 1, 2)
    timelines = [Timeline(rank, [op(3 - rank, 5.0, ranks=ranks), op(9, sequence=2, ranks=ranks)]) for rank in ranks]
    events = check_structure(load(tmp_path, *timelines))
    flows = [(event["ph"], event["pid"]) for event in events if event["ph"] in "stf" and event["id"] == 1]
    assert flows == [("s", 2), ("t", 1), ("f", 0)]  # in order of arrival
    assert Counter(event["ph"] for event in events) == {"X": 6, "s": 2, "t": 2, "f": 2}


def test_groups_of_one_name_and_operations_without_a_number_are_not_joined(tmp_path):
    timelines = [
        Timeline(0, [op(0, ranks=(0, 1)), op(5, sequence=None)]),
        Timeline(2, [op(0, ranks=(2, 3)), op(5, sequence=None)]),
    ]
    assert all(event["ph"] == "X" for event in check_structure(load(tmp_path, *timelines)))


def test_a_send_is_joined_with_its_receive(tmp_path):
    timelines = [
        Timeline(0, [op(0, kind="send", peer=1), op(5, kind="recv", peer=1)]),
        Timeline(1, [op(1, kind="recv", peer=0), op(4, kind="send", peer=0)]),
    ]
    events = check_structure(load(tmp_path, *timelines))
    flows = {}
    for event in events:
        if event["ph"] in "sf":
            flows.setdefault(event["id"], []).append((event["pid"], event["ts"]))
    assert sorted(flows.values()) == [[(0, 0.0), (1, 1000.0)], [(1, 4000.0), (0, 5000.0)]]


def test_ranges_records_and_steps(tmp_path):
    timeline = Timeline(
        0,
        ranges=[Range("forward", START, START + 9 * MS, 77), Range("layer", START + MS, START + 2 * MS, 77)],
        records=[LogRecord(START + 3 * MS, "WARNING", "loss is not finite", 77, 4), LogRecord(START, "INFO", "x", 78)],
        steps=[Step(4, START + 2 * MS)],
    )
    events = {event["name"]: event for event in check_structure(load(tmp_path, timeline))}
    assert events["forward"]["tid"] == events["layer"]["tid"] == events["WARNING loss is not finite"]["tid"]
    assert events["INFO x"]["tid"] != events["forward"]["tid"]
    warning = events["WARNING loss is not finite"]
    assert (warning["s"], warning["args"]) == ("t", {"level": "WARNING", "message": "loss is not finite", "step": 4})
    assert (events["step 4"]["ph"], events["step 4"]["s"], events["step 4"]["args"]) == ("i", "p", {"step": 4})


def test_a_timeline_travels_as_json():
    timeline = Timeline(
        *(5, [op(0), op(1, None, ranks=None, done=False, step=3)], [Range("r", 1, 2, 3)]),
        *([LogRecord(1, "INFO", "x", 2)], [Step(1, 2)], "node7"),
    )
    again = Timeline.from_json(json.loads(json.dumps(timeline.to_json())))
    assert again == timeline


def test_nothing_is_a_trace_too(tmp_path):
    assert check_structure(load(tmp_path)) == []
    assert check_structure(load(tmp_path, Timeline(0))) == []


@pytest.mark.parametrize("seed", range(20))
def test_any_trace_is_sound(tmp_path, seed):
    draw = random.Random(seed)
    timelines = []
    for rank in range(4):
        operations = []
        for group, ranks in {"0": (0, 1, 2, 3), "1:tp": (0, 1), "2:tp": (2, 3)}.items():
            for sequence in range(15) if rank in ranks else ():
                latency = draw.choice([None, draw.uniform(0, 20), 0.0])
                kind = draw.choice(["all_reduce", "strange"])
                done = latency is not None or draw.random() < 0.5
                operations.append(op(draw.uniform(0, 100), latency, kind, sequence, group, ranks, done=done))
        moments = [(draw.randrange(100), draw.randrange(30)) for _ in range(20)]
        ranges = [Range("r", START + at * MS, START + (at + took) * MS, draw.randrange(3)) for at, took in moments]
        timelines.append(
            Timeline(rank, operations, ranges, [LogRecord(START + MS, "INFO", "hello", 1)], [Step(0, START)])
        )
    events = check_structure(load(tmp_path, *timelines))
    count = Counter(event.get("cat") for event in events if event["ph"] == "X")
    assert count == {"communication": sum(len(one.operations) for one in timelines), "range": 80}
    flows = Counter(event["ph"] for event in events if event["ph"] in "stf")
    assert flows["s"] == flows["f"] == 15 * 3
    assert flows["t"] == 15 * 2
    assert trace_events(timelines)[0][-1]["ts"] == events[-1]["ts"]
