"""The communication log on real ranks."""

import logging
import time

import pytest
from ds_logging import CommsLogger
from ranks import run_ranks

pytest.importorskip("torch")


def report_of(comms, **arguments):
    return comms.log_all(print_log=False, return_dict=True, **arguments)


def count_different_operations(rank):
    comms = CommsLogger()
    comms.append("all_reduce", "shared", 10.0 + rank, 1000)
    if rank == 0:
        comms.append("send", "only on 0", 1.0, 8)
    for number in range(rank * 5):
        comms.append("broadcast", f"many on {rank}", 2.0, number)
    return report_of(comms, show_straggler=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_straggler_report_does_not_hang_when_ranks_counted_different_operations(world_size):
    reports = run_ranks(count_different_operations, world_size, timeout=30)
    names = {"shared", "only on 0", *(f"many on {rank}" for rank in range(1, world_size))}
    for rank, report in enumerate(reports):
        analysis = report["straggler_analysis"]
        assert set(analysis) == names
        shared = analysis["shared"][1000]
        assert shared["total_comm_lat_ms"] == pytest.approx(10.0)
        assert shared["total_straggler_ms"] == pytest.approx(rank)
        assert (shared["last_to_arrive"], shared["missing_ranks"]) == (0, [])
        assert analysis["only on 0"][8]["missing_ranks"] == list(range(1, world_size))
        assert len(analysis["many on 1"]) == 5
        assert (report["metadata"]["rank"], report["metadata"]["world_size"]) == (rank, world_size)


def count_on_one_rank(rank):
    comms = CommsLogger()
    if rank == 1:
        comms.append("all_reduce", "all_reduce", 1.0, 8)
    return report_of(comms, show_straggler=True)["straggler_analysis"]["all_reduce"][8]["missing_ranks"]


def test_a_rank_that_counted_nothing_takes_part():
    assert run_ranks(count_on_one_rank, 3, timeout=30) == [[0, 2]] * 3


def count_collectives(rank, keys):
    """Every call that reaches the backend while the report is made."""
    import torch
    import torch.distributed as dist

    comms = CommsLogger()
    for number in range(keys):
        comms.append("all_reduce", f"op{number}", 1.0, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        report_of(comms, show_straggler=True)
        dist.barrier()  # something that must be seen
    calls = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return len(calls)


def test_the_number_of_collectives_does_not_grow_with_the_operations():
    one, many = run_ranks(count_collectives, 2, 1), run_ranks(count_collectives, 2, 200)
    assert one[0] >= 2  # the exchange and the barrier
    assert one == many


def time_real_collectives(rank):
    import torch
    import torch.distributed as dist

    comms = CommsLogger()
    comms.configure({"enabled": True})
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tensor = torch.ones(1 << 20)  # large enough to be waited for
    for _ in range(3):
        with comms.timed("all_reduce", tensor.nbytes):
            dist.all_reduce(tensor)
    with comms.timed("all_reduce", tensor.nbytes, group_size=2):
        dist.all_reduce(tensor, group=pairs[rank // 2])
    return comms.get_operation_summary("all_reduce")[tensor.nbytes]


def test_real_collectives_are_counted_by_their_groups():
    for summary in run_ranks(time_real_collectives, 4):
        groups = summary["by_group_size"]
        assert {n: part["count"] for n, part in groups.items()} == {2: 1, 4: 3}
        assert groups[2]["busbw_avg_gbps"] == pytest.approx(groups[2]["tput_avg_gbps"] * 2 * 1 / 2)
        assert groups[4]["busbw_avg_gbps"] == pytest.approx(groups[4]["tput_avg_gbps"] * 2 * 3 / 4)
        assert summary["min_latency_ms"] > 0


def arrive_late(rank):
    """Rank 1 starts its clock only after both others have started theirs."""
    import torch
    import torch.distributed as dist

    comms = CommsLogger()
    comms.configure({"enabled": True})
    tensor = torch.ones(8)
    for _ in range(2):
        if rank == 1:
            for source in (0, 2):
                dist.recv(torch.empty(1), source)
            time.sleep(0.2)
        with comms.timed("all_reduce", tensor.nbytes):
            if rank != 1:
                dist.send(torch.ones(1), 1)
            dist.all_reduce(tensor)
    return report_of(comms, show_straggler=True)["straggler_analysis"]["all_reduce"][32]


def test_the_rank_that_comes_late_is_named_on_every_rank():
    late = run_ranks(arrive_late, 3)
    assert [entry["last_to_arrive"] for entry in late] == [1, 1, 1]
    assert late[0]["total_straggler_ms"] > late[1]["total_straggler_ms"]


def log_on_rank_0(rank):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("ds").addHandler(handler)
    logging.getLogger("ds").setLevel(logging.INFO)
    comms = CommsLogger()
    comms.append("all_reduce", "all_reduce", 1.0 + rank, 8)
    comms.log_all(print_log=rank == 0, show_straggler=True)
    return [record.getMessage() for record in records]


def test_ranks_that_do_not_log_take_part_in_the_report():
    first, second = run_ranks(log_on_rank_0, 2)
    assert second == []
    assert len(first) == 1
    assert "Last to arrive" in first[0]


def test_deepspeeds_own_configuration_object():
    config = pytest.importorskip("deepspeed.comm.config")
    comms = CommsLogger()
    section = {"enabled": True, "verbose": True, "debug": True, "prof_all": False, "prof_ops": ["all_reduce"]}
    comms.configure(config.DeepSpeedCommsConfig({"comms_logger": section}))
    assert {name: getattr(comms, name) for name in section} == section
    comms.configure(config.DeepSpeedCommsConfig({}))
    assert comms.enabled is False
