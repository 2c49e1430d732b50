import random
import statistics
from collections import deque

import pytest
from ds_logging._op_stats import OpKey, OpStats, summarize, trimmed_mean
from ds_logging.comms_logging import calc_bw_log


def filled(latencies, *, n=4, size=1000, op="all_reduce", window=256):
    stats = OpStats(OpKey(op, op, size, n), deque(maxlen=window))
    for latency in latencies:
        stats.add(latency, size)
    return stats


def test_sums_are_of_all_and_averages_of_the_window():
    draw = random.Random(0)
    latencies = [draw.uniform(1, 9) for _ in range(1000)]
    found = summarize([filled(latencies, window=50)])
    assert found["count"] == 1000
    assert found["total_latency_ms"] == pytest.approx(sum(latencies))
    assert found["min_latency_ms"] == min(latencies)
    assert found["max_latency_ms"] == max(latencies)
    assert found["avg_latency_ms"] == pytest.approx(statistics.fmean(sorted(latencies[-50:])[5:-5]))


def test_a_slow_first_operation_does_not_spoil_the_average():
    assert summarize([filled([5000.0, *[1.0] * 19])])["avg_latency_ms"] == 1.0


def test_bandwidth_is_that_of_the_average_time():
    found = summarize([filled([2.0, 4.0])])
    wanted = calc_bw_log("all_reduce", 1000, 3.0, group_size=4)
    assert (found["tput_avg_gbps"], found["busbw_avg_gbps"]) == pytest.approx(wanted)


def test_group_sizes_are_joined_by_bytes_over_time():
    found = summarize([filled([1.0] * 3, n=2), filled([4.0], n=8)])
    bits, seconds = 4 * 1000 * 8, (3 * 1.0 + 4.0) / 1000
    assert found["tput_avg_gbps"] == pytest.approx(bits / seconds / 1e9)
    bus_bits = 1000 * 8 * (3 * (2 * 1 / 2) + 2 * 7 / 8)
    assert found["busbw_avg_gbps"] == pytest.approx(bus_bits / seconds / 1e9)
    assert found["avg_latency_ms"] == pytest.approx(7 / 4)


def test_no_time_at_all():
    found = summarize([filled([0.0, 0.0])])
    assert (found["avg_latency_ms"], found["tput_avg_gbps"], found["busbw_avg_gbps"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 25])
def test_trimmed_mean_cuts_a_tenth_at_both_ends(count):
    values = [float(value**2) for value in range(count)]
    cut = count // 10
    assert trimmed_mean(values[::-1]) == pytest.approx(statistics.fmean(values[cut : count - cut]))


def test_trimmed_mean_of_nothing():
    assert trimmed_mean([]) == 0.0


def test_a_copy_does_not_change_any_more():
    stats = filled([1.0])
    copy = stats.copy()
    stats.add(9.0, 1000)
    assert (copy.count, copy.max_latency, list(copy.recent), copy.recent.maxlen) == (1, 1.0, [1.0], 256)
