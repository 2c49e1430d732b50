import json
import random
import statistics
from collections import deque

import pytest
from ds_logging._comms.op_stats import OpKey, OpStats, merge, pack, summarize, summarize_all, trimmed_mean, unpack
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
    assert (copy.count, copy.latencies.maximum, list(copy.recent), copy.recent.maxlen) == (1, 1.0, [1.0], 256)
    assert (copy.latencies.buckets, stats.latencies.count) == (filled([1.0]).latencies.buckets, 2)


def test_percentiles_are_of_all_operations_not_of_the_window():
    found = summarize([filled([1.0] * 89 + [100.0] * 10 + [1000.0], window=4)])
    assert found["p50_latency_ms"] == pytest.approx(1.0, rel=0.025)
    assert found["p90_latency_ms"] == pytest.approx(100.0, rel=0.025)
    assert found["p99_latency_ms"] == pytest.approx(100.0, rel=0.025)


def test_an_operation_of_unknown_latency_is_counted_and_takes_no_part_in_latency():
    stats = filled([2.0, None, 4.0])
    stats.add(None, 10**9)  # other bytes, which must not raise the bandwidth
    found = summarize([stats])
    assert (found["count"], found["timed_count"], found["total_bytes"]) == (4, 2, 3000 + 10**9)
    assert (found["avg_latency_ms"], found["total_latency_ms"], found["max_latency_ms"]) == (3.0, 6.0, 4.0)
    wanted = calc_bw_log("all_reduce", 1000, 3.0, group_size=4)
    assert (found["tput_avg_gbps"], found["busbw_avg_gbps"]) == pytest.approx(wanted)


def test_of_unknown_latencies_alone_everything_but_counts_is_none():
    found = summarize([filled([None, None])])
    assert (found["count"], found["timed_count"], found["total_bytes"]) == (2, 0, 2000)
    unknown = [name for name, value in found.items() if value is None]
    assert sorted(unknown) == sorted(
        ["tput_avg_gbps", "busbw_avg_gbps"]
        + [f"{name}_latency_ms" for name in ("total", "avg", "min", "max", "p50", "p90", "p99")]
    )


def test_a_window_of_unknown_latencies_falls_back_on_all():
    assert summarize([filled([2.0, 4.0, None, None], window=2)])["avg_latency_ms"] == 3.0


def test_groups_and_dtypes_are_told_apart():
    parts = []
    for group, ranks, dtype in (("1:tp", (0, 1), "float32"), ("1:tp", (0, 1), "bfloat16"), ("2:dp", (0, 2), "float32")):
        parts.append(OpStats(OpKey("x", "all_reduce", 8, 2, group, ranks, dtype), deque()))
        parts[-1].add(1.0, 8)
    (entry,) = summarize_all(parts)["x"].values()
    assert entry["dtype"] == "bfloat16, float32"
    assert [(part["group"], part["ranks"], part["dtype"], part["count"]) for part in entry["by_group"]] == [
        ("1:tp", [0, 1], "bfloat16", 1),
        ("1:tp", [0, 1], "float32", 1),
        ("2:dp", [0, 2], "float32", 1),
    ]
    assert json.loads(json.dumps(entry["by_group"])) == entry["by_group"]


def test_json_round_trip():
    stats = filled([1.0, None, 0.0, 3.5])
    stats.key = stats.key._replace(ranks=(0, 1, 2, 3), group="0", dtype="float32")
    again = OpStats.from_json(json.loads(json.dumps(stats.to_json())))
    assert again.to_json() == stats.to_json()
    assert again.key == stats.key
    assert summarize([again]) == summarize([stats])


def test_packing_names_the_ranks_of_a_group_once():
    world = tuple(range(1000))
    snapshot = [filled([1.0, None], size=size) for size in range(50)]
    for stats in snapshot[:-1]:
        stats.key = stats.key._replace(ranks=world, group="0", dtype="float32")
    text = json.dumps(pack(snapshot))
    assert "[0, 1000, 1]" in text
    assert "998" not in text
    again = unpack(json.loads(text))
    assert [json.dumps(stats.to_json()) for stats in again] == [json.dumps(stats.to_json()) for stats in snapshot]
    assert [stats.key for stats in again] == [stats.key for stats in snapshot]


def test_merging_ranks_is_counting_all_at_once():
    draw = random.Random(1)
    ranks = [[draw.expovariate(1) for _ in range(50)] for _ in range(4)]
    (merged,) = merge([[filled(row)] for row in ranks])
    whole = filled([latency for row in ranks for latency in row])
    assert summarize([merged])["count"] == 200
    for name, value in summarize([whole]).items():
        assert summarize([merged])[name] == (value if isinstance(value, (str, int)) else pytest.approx(value)), name


def test_merging_keeps_keys_of_one_rank_apart():
    merged = merge([[filled([1.0], n=2)], [filled([1.0], n=4)], []])
    assert [stats.key.group_size for stats in merged] == [2, 4]
