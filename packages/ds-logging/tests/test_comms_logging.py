import gc
import json
import logging
import math
import statistics
import sys
import threading
import tracemalloc
from datetime import datetime

import pytest
from ds_logging.comms_logging import CommsLogger, calc_bw_log, print_rank_0
from ds_logging.errors import ArgumentError
from ds_logging.logging import logger


@pytest.fixture
def comms():
    return CommsLogger()


def test_defaults(comms):
    assert (comms.enabled, comms.prof_all, comms.prof_ops, comms.verbose, comms.debug) == (
        False,
        True,
        [],
        False,
        False,
    )
    assert not comms.has_data()
    assert comms.get_total_operations() == 0
    assert comms.get_operation_names() == []
    assert comms.get_raw_data() == {}
    assert comms.get_operation_summary("all_reduce") is None


def test_operations_are_counted_by_name_size_and_group(comms):
    for latency in (1.0, 2.0, 3.0):
        comms.append("all_reduce", "grads", latency, 1000, group_size=4)
    comms.append("all_reduce", "grads", 5.0, 1000, group_size=2)
    comms.append("all_reduce", "grads", 1.0, 500, group_size=4)
    comms.append("broadcast", "broadcast", 1.0, 1000, group_size=4)
    assert comms.get_operation_names() == ["grads", "broadcast"]
    assert comms.get_total_operations() == 6
    summary = comms.get_operation_summary("grads")
    assert list(summary) == [500, 1000]
    assert summary[1000]["count"] == 4
    assert summary[1000]["total_latency_ms"] == 11.0
    groups = summary[1000]["by_group_size"]
    assert {n: part["count"] for n, part in groups.items()} == {2: 1, 4: 3}
    for n, average in ((2, 5.0), (4, statistics.fmean([1, 2, 3]))):
        wanted = calc_bw_log("all_reduce", 1000, average, group_size=n)
        assert (groups[n]["tput_avg_gbps"], groups[n]["busbw_avg_gbps"]) == pytest.approx(wanted)


def test_raw_data_has_deepspeeds_shape(comms):
    comms.append("all_gather", "all_gather", 1.0, 1000, group_size=4)
    comms.append("all_gather", "all_gather", 2.0, 1000, group_size=4)
    rates = [calc_bw_log("all_gather", 1000, latency, group_size=4) for latency in (1.0, 2.0)]
    count, latencies, algorithm, bus = comms.get_raw_data()["all_gather"][1000]
    assert (count, latencies) == (2, [1.0, 2.0])
    assert list(zip(algorithm, bus, strict=True)) == rates


def test_latencies_are_taken_as_given_and_not_accumulated(comms):
    for _ in range(5):
        comms.append("all_reduce", "all_reduce", 2.0, 8, group_size=2)
    assert comms.get_operation_summary("all_reduce")[8]["avg_latency_ms"] == 2.0
    assert comms.get_operation_summary("all_reduce")[8]["total_latency_ms"] == 10.0


def test_no_time_is_no_error(comms):
    comms.append("barrier", "barrier", 0.0, 0, group_size=2)
    comms.append("all_reduce", "all_reduce", 0.0, 100, group_size=2)
    assert comms.get_operation_summary("all_reduce")[100]["busbw_avg_gbps"] == 0.0
    comms.log_all(show_straggler=True)


def test_an_unknown_operation_is_counted_and_reported_once(comms, caplog):
    for _ in range(3):
        comms.append("all_shuffle", "all_shuffle", 1.0, 1000, group_size=2)
    entry = comms.get_operation_summary("all_shuffle")[1000]
    assert entry["count"] == 3
    assert entry["tput_avg_gbps"] == pytest.approx(1000 * 8 / 1e-3 / 1e9)
    assert math.isnan(entry["busbw_avg_gbps"])
    assert caplog.text.count("'all_shuffle'") == 1
    comms.verbose = True
    comms.append("all_shuffle", "all_shuffle", 1.0, 1000)
    comms.log_all()


def test_memory_is_bounded_for_many_operations():
    comms = CommsLogger(window=16)
    comms.append("all_reduce", "all_reduce", 1.0, 8, group_size=2)
    for _ in range(100):
        comms.append("all_reduce", "all_reduce", 1.5, 8, group_size=2)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for step in range(20_000):
        comms.append("all_reduce", "all_reduce", 1.0 + step / 7, 8, group_size=2)
    assert comms.get_total_operations() == 20_101  # all are counted, none waits
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 60_000  # some hundred buckets of a histogram; a list would take 160,000 at the least
    assert len(comms.get_raw_data()["all_reduce"][8][1]) == 16


def test_memory_is_bounded_for_many_sizes():
    comms = CommsLogger(max_sizes=10)
    for size in range(1000):
        comms.append("all_to_all_single", "moe", 1.0, size, group_size=4)
    raw = comms.get_raw_data()["moe"]
    assert len(raw) <= 10 + 11  # the first ten, and the powers of two up to 1024
    assert set(raw) == {*range(10), 16, 32, 64, 128, 256, 512, 1024}
    assert comms.get_total_operations() == 1000
    entry = comms.get_operation_summary("moe")[1024]
    mean_bytes = statistics.fmean(range(513, 1000))
    assert entry["tput_avg_gbps"] == pytest.approx(mean_bytes * 8 / 1e-3 / 1e9)  # bytes are exact


@pytest.mark.parametrize("arguments", [{"window": 0}, {"max_sizes": 0}, {"window": 1.5}])
def test_wrong_bounds(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        CommsLogger(**arguments)


@pytest.mark.parametrize(
    ("latency", "size", "group_size", "words"),
    [
        (-1.0, 1, 2, "latency=-1.0"),
        (math.nan, 1, 2, "latency=nan"),
        (1.0, -1, 2, "msg_size=-1"),
        (1.0, 1, 0, "group_size=0"),
    ],
)
def test_wrong_numbers_count_nothing(comms, latency, size, group_size, words):
    with pytest.raises(ArgumentError, match=words):
        comms.append("all_reduce", "all_reduce", latency, size, group_size=group_size)
    assert not comms.has_data()


def test_reset_forgets_operations_and_keeps_settings(comms):
    comms.enabled = True
    comms.append("send", "send", 1.0, 1)
    comms.reset_data()
    assert not comms.has_data()
    assert comms.enabled


def test_profiling_switches(comms):
    comms.stop_profiling_comms()
    assert comms.prof_all is False
    comms.start_profiling_op(["send", "recv"])
    comms.start_profiling_op("all_reduce")  # one name, not ten letters
    comms.start_profiling_op(["send"])
    assert comms.prof_ops == ["send", "recv", "all_reduce"]
    comms.stop_profiling_op(["recv", "never"])
    assert comms.prof_ops == ["send", "all_reduce"]
    comms.start_profiling_comms()
    assert comms.prof_all is True
    with pytest.raises(ArgumentError, match="op_name_list=3"):
        comms.start_profiling_op(3)


def test_verbose_logs_every_operation_on_rank_0(comms, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="ds")
    comms.verbose = True
    comms.append("all_reduce", "grads", 1.0, 1_000_000, group_size=4)
    assert "grads: 1.00 ms, 976.56 KB, 4 ranks, algbw 8.00 Gbps, busbw 12.00 Gbps" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    comms.append("all_reduce", "grads", 1.0, 1000, group_size=4)
    assert caplog.records == []


def test_log_all_logs_a_table_and_never_prints(comms, caplog, capsys):
    caplog.set_level(logging.INFO, logger="ds")
    comms.append("all_reduce", "grads", 2.0, 1_000_000, group_size=4)
    comms.append("all_reduce", "grads", 4.0, 1_000_000, group_size=2)
    assert comms.log_all() is None
    assert capsys.readouterr().out == ""
    (record,) = caplog.records
    assert record.funcName == "test_log_all_logs_a_table_and_never_prints"
    rows = [line.split() for line in record.getMessage().splitlines()[2:]]
    assert rows == [
        ["grads", "976.56", "KB", "2", "1", "4.000", "4.000", "4.000", "4.000", "4.000", "2.00", "2.00"],
        ["grads", "976.56", "KB", "4", "1", "2.000", "2.000", "2.000", "2.000", "2.000", "4.00", "6.00"],
    ]


def test_log_all_logs_on_the_ranks_of_configure(comms, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="ds")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        comms.log_all(print_log=True)
        comms.log_all(print_log=False)
    monkeypatch.setattr(logger, "shown_ranks", None)
    comms.log_all(print_log=True)
    assert [record.rank for record in caplog.records] == [0, 2]


def test_log_all_returns_a_dict_that_is_json(comms, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    comms.append("all_reduce", "grads", 2.0, 1000)
    found = comms.log_all(print_log=False, return_dict=True)
    assert found["summary"]["grads"][1000]["count"] == 1
    assert list(found["summary"]["grads"][1000]["by_group_size"]) == [4]
    assert found["straggler_analysis"] is None
    assert (found["metadata"]["rank"], found["metadata"]["world_size"]) == (1, 4)
    assert datetime.fromisoformat(found["metadata"]["timestamp"]).tzinfo is not None
    assert json.loads(json.dumps(found))["summary"]["grads"]["1000"]["avg_latency_ms"] == 2.0


def test_log_all_of_one_process_compares_it_with_itself(comms):
    comms.append("all_reduce", "grads", 2.0, 1000, group_size=2)
    entry = comms.log_all(print_log=False, show_straggler=True, return_dict=True)["straggler_analysis"]["grads"][1000]
    assert (entry["total_comm_lat_ms"], entry["total_straggler_ms"], entry["missing_ranks"]) == (2.0, 0.0, [])
    assert entry["last_to_arrive"] is None


@pytest.fixture
def clock(monkeypatch):
    """A host clock that the test moves, and no torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    now = [100.0]
    monkeypatch.setattr("ds_logging.comms_logging.time.perf_counter", lambda: now[0])
    return now


def test_timed_counts_each_operation_alone(comms, clock):
    comms.enabled = True
    for seconds in (0.5, 0.25):
        with comms.timed("all_reduce", 1000, group_size=2):
            clock[0] += seconds
        clock[0] += 10.0
    assert comms.get_raw_data()["all_reduce"][1000][:2] == [2, [500.0, 250.0]]


def test_timed_counts_only_what_is_selected(comms, clock):
    def use():
        with comms.timed("all_reduce", 8):
            pass
        with comms.timed("all_gather", 8, record_name="params"):
            pass

    use()
    assert not comms.has_data()
    comms.enabled = True
    comms.stop_profiling_comms()
    use()
    assert not comms.has_data()
    comms.start_profiling_op(["params"])
    use()
    comms.start_profiling_op(["all_reduce"])
    use()
    assert {name: raw[8][0] for name, raw in comms.get_raw_data().items()} == {"params": 2, "all_reduce": 1}


def test_timed_names_the_calling_function_in_debug(comms, clock):
    comms.configure({"enabled": True, "debug": True})

    def train_step():
        with comms.timed("all_reduce", 8):
            pass

    train_step()
    assert comms.get_operation_names() == ["all_reduce | [Caller Func: train_step]"]


def test_timed_counts_what_raises_without_a_latency(comms, clock):
    comms.enabled = True
    with pytest.raises(KeyError, match="lost"), comms.timed("all_reduce", 8):
        raise KeyError("lost")
    summary = comms.get_operation_summary("all_reduce")[8]
    assert (summary["count"], summary["timed_count"], summary["avg_latency_ms"]) == (1, 0, None)
    assert comms.get_raw_data()["all_reduce"][8] == [1, [], [], []]


def test_timed_checks_before_the_operation(comms, clock):
    comms.enabled = True
    ran = []
    for arguments, words in (
        ({"msg_size": -1}, "msg_size=-1"),
        ({"msg_size": 8, "device": "tpu"}, "device='tpu'"),
        ({"msg_size": 8, "device": "cuda"}, "has not used CUDA"),
    ):
        with pytest.raises(ArgumentError, match=words), comms.timed("all_reduce", **arguments):
            ran.append(arguments)
    assert ran == []


def test_threads_lose_nothing(comms):
    def work():
        for _ in range(500):
            comms.append("all_reduce", "all_reduce", 1.0, 8, group_size=2)
            comms.get_total_operations()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert comms.get_total_operations() == 2000


def test_print_rank_0(capsys, monkeypatch):
    print_rank_0("zero")
    monkeypatch.setenv("RANK", "1")
    print_rank_0("one")
    assert capsys.readouterr().out == "zero\n"


def test_without_torch_a_summary_says_that_nothing_is_recorded(comms, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="ds")
    monkeypatch.setitem(sys.modules, "torch", None)
    with comms:
        comms.append("all_reduce", "grads", 1.0, 8, group_size=2)
    found = comms.summary()
    assert found["operations"] == 1
    assert len(found["not_seen"]) == 1
    assert "no torch.distributed" in caplog.text
    comms.reset_data()
    assert comms.summary(show=False)["not_seen"] == []
