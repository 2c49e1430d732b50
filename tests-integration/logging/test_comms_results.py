"""Reports of a communication log over several ranks: summary, stragglers, JSON lines, trace and picture."""

import json
import logging
import time

import pytest
from ds_logging import CommsLogger, instrument_w_nvtx, log_dist, set_step
from ranks import run_ranks

pytest.importorskip("torch")


def summarize(rank):
    import torch
    import torch.distributed as dist

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("ds").addHandler(handler)
    logging.getLogger("ds").setLevel("INFO")
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    with CommsLogger() as comms:
        for _ in range(10):
            dist.all_reduce(torch.ones(256))
        for _ in range(5):
            dist.all_reduce(torch.ones(64), group=pairs[rank // 2])
        own = comms.summary(merge=False, show=False)
        merged = comms.summary()
        again = comms.summary(show=False)
    assert merged == again  # the exchange of a summary is not recorded
    return own, merged, messages


def test_a_summary_is_of_all_ranks_and_its_table_comes_once():
    reports = run_ranks(summarize, 3)
    assert [len(messages) for _, _, messages in reports] == [1, 0, 0]
    table = reports[0][2][0]
    assert len(table.splitlines()) <= 35
    assert "all_reduce float32" in table
    for own, merged, _ in reports:
        assert own["records"]["all_reduce"][1024]["count"] == 10
        assert (own["world_size"], merged["world_size"], merged["operations"]) == (1, 3, 45)
        assert merged == reports[0][1]
        whole = merged["records"]["all_reduce"]
        assert whole[1024]["count"] == sum(own["records"]["all_reduce"][1024]["count"] for own, _, _ in reports)
        assert whole[1024]["max_latency_ms"] == max(
            o["records"]["all_reduce"][1024]["max_latency_ms"] for o, _, _ in reports
        )
        assert {n: part["count"] for n, part in whole[256]["by_group_size"].items()} == {1: 5, 2: 10}
        assert merged["not_seen"] == []
        assert whole[1024]["p50_latency_ms"] <= whole[1024]["p99_latency_ms"] <= whole[1024]["max_latency_ms"]


def arrive_late(rank):
    """Rank 1 comes late to its pair; in the other pair nobody does."""
    import torch
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1], group_desc="first"), dist.new_group([2, 3], group_desc="second")]
    tensor = torch.ones(8)
    with CommsLogger() as comms:
        for _ in range(5):
            dist.barrier(group=pairs[rank // 2])
            if rank == 1:
                time.sleep(0.1)
            dist.all_reduce(tensor, group=pairs[rank // 2])
        reports = comms.stragglers()
    return [
        (report.group.partition(":")[2], report.ranks, report.compared, report.waited_ms, report.times_last)
        for report in reports
    ]


def test_the_rank_that_comes_late_is_found_in_its_own_group():
    for reports in run_ranks(arrive_late, 4):
        name, ranks, compared, waited, times_last = reports[0]
        assert (name, ranks) == ("first", (0, 1))
        assert compared >= 5
        assert waited[0] > 5 * 50
        assert times_last[1] >= 5
        second = next(report for report in reports if report[0] == "second")
        assert second[1] == (2, 3)
        assert sum(second[3].values()) < waited[0] / 2


def trace(rank, folder):
    import torch
    import torch.distributed as dist

    logging.getLogger("ds").setLevel("INFO")
    with CommsLogger() as comms:

        @instrument_w_nvtx(message="forward")
        def forward():
            dist.all_reduce(torch.ones(16))

        for step in range(3):
            set_step(step)
            forward()
            with instrument_w_nvtx(message="block"):
                dist.broadcast(torch.ones(4), 0)
            log_dist(f"step {step} done", ranks=[-1])
            logging.getLogger("ds.groups").info("from another package")
        comms.to_perfetto(f"{folder}/all.json")
        comms.to_perfetto(f"{folder}/{{rank}}.json", merge=False)
        comms.to_jsonl(f"{folder}/{{rank}}.jsonl")
        comms.plot(f"{folder}/{{rank}}.png")
    set_step(None)
    return True


def named(events, phase, rank):
    return [event["name"] for event in events if event["ph"] == phase and event["pid"] == rank]


def test_a_trace_has_operations_ranges_lines_and_steps_of_all_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    assert run_ranks(trace, 2, str(tmp_path)) == [True, True]
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    for rank in range(2):
        slices, instants = named(events, "X", rank), named(events, "i", rank)
        for name, count in (("forward", 3), ("block", 3)):
            assert slices.count(name) == count
        assert sum(name.startswith("all_reduce") for name in slices) == 3
        assert sum(name.startswith("broadcast") for name in slices) == 3
        assert [name for name in instants if name.startswith("step")] == ["step 0", "step 1", "step 2"]
        assert sum("done" in name for name in instants) == 3
        assert sum("another package" in name for name in instants) == 3
        own = json.loads((tmp_path / f"{rank}.json").read_text())["traceEvents"]
        assert sorted(named(own, "X", rank)) == sorted(slices)
        assert not named(own, "X", 1 - rank)
        lines = [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        operations = [line for line in lines if line["line"] == "operation"]
        assert [(line["kind"], line["step"]) for line in operations] == [
            (kind, step) for step in range(3) for kind in ("all_reduce", "broadcast")
        ]
        assert (tmp_path / f"{rank}.png").read_bytes().startswith(b"\x89PNG")
    for event in events:
        if event["ph"] == "X" and event["name"].startswith("all_reduce"):
            inside = [e for e in events if e["ph"] == "X" and e["name"] == "forward" and e["pid"] == event["pid"]]
            assert any(e["ts"] <= event["ts"] and event["ts"] + event["dur"] <= e["ts"] + e["dur"] for e in inside)


def silent(rank):
    """Nothing was recorded, on one rank or on all."""
    import torch
    import torch.distributed as dist

    comms = CommsLogger()
    empty = comms.summary(show=False), comms.stragglers()
    if rank == 0:
        comms.append("send", "by hand", 1.0, 8, group_size=2)
    uneven = comms.summary(show=False)
    dist.all_reduce(torch.ones(1))
    return empty[0]["operations"], empty[1], uneven["operations"]


def test_reports_of_nothing_and_of_one_rank_alone_do_not_hang():
    assert run_ranks(silent, 2) == [(0, [], 1)] * 2
