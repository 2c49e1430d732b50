"""The comparison of ranks as arithmetic. With real ranks it is tested where torch is."""

import random
import sys
from types import SimpleNamespace

import pytest
from ds_logging._op_stats import OpKey
from ds_logging._straggler import analyze, exchange
from ds_logging.comms_logging import CommsLogger


def key(name="grads", size=1000, n=4):
    return OpKey(name, "all_reduce", size, n)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_shortest_over_the_ranks_is_communication_and_the_rest_is_waiting(world_size):
    draw = random.Random(world_size)
    latencies = [[draw.uniform(1, 5) for _ in range(8)] for _ in range(world_size)]
    everyone = [{key(): (8, row)} for row in latencies]
    lowest = [min(row[i] for row in latencies) for i in range(8)]
    for rank in range(world_size):
        entry = analyze(rank, everyone)["grads"][1000]
        assert entry["count"] == entry["ops_compared"] == 8
        assert entry["total_comm_lat_ms"] == pytest.approx(sum(lowest))
        assert entry["total_straggler_ms"] == pytest.approx(sum(latencies[rank]) - sum(lowest))
        assert entry["avg_comm_lat_ms"] == pytest.approx(sum(lowest) / 8)


def test_the_last_to_arrive_waited_least():
    everyone = [{key(): (2, [5.0, 5.0])}, {key(): (2, [1.0, 2.0])}, {key(): (2, [4.0, 4.0])}]
    for rank in range(3):
        assert analyze(rank, everyone)["grads"][1000]["last_to_arrive"] == 1


def test_nobody_is_last_where_all_waited_alike():
    everyone = [{key(): (1, [5.0])}, {key(): (1, [5.0])}]
    assert analyze(0, everyone)["grads"][1000]["last_to_arrive"] is None


def test_the_union_of_keys_is_reported_on_every_rank():
    everyone = [
        {key("a"): (1, [1.0]), key("both"): (1, [2.0])},
        {key("both"): (1, [3.0]), key("b", size=5): (2, [1.0, 1.0])},
    ]
    first, second = analyze(0, everyone), analyze(1, everyone)
    assert set(first) == set(second) == {"a", "both", "b"}
    assert first["a"][1000]["missing_ranks"] == [1]
    assert first["b"][5]["missing_ranks"] == [0]
    assert first["b"][5]["count"] == first["b"][5]["ops_compared"] == 0
    assert first["both"][1000]["missing_ranks"] == []
    assert second["both"][1000]["total_straggler_ms"] == pytest.approx(1.0)
    assert second["b"][5]["count"] == 2


def test_operations_are_matched_by_their_place_in_the_sequence():
    # The window holds 3. Rank 0 has done 5 operations (2, 3, 4 are kept), rank 1 has done 4 (1, 2, 3 are kept).
    everyone = [{key(): (5, [20.0, 30.0, 40.0])}, {key(): (4, [1.0, 2.0, 3.0])}]
    entry = analyze(0, everyone)["grads"][1000]
    assert entry["ops_compared"] == 2
    assert entry["total_comm_lat_ms"] == pytest.approx(2.0 + 3.0)
    assert entry["total_straggler_ms"] == pytest.approx((20.0 - 2.0) + (30.0 - 3.0))


def test_windows_without_a_common_operation_compare_nothing():
    everyone = [{key(): (100, [1.0, 2.0])}, {key(): (2, [1.0, 2.0])}]
    for rank in range(2):
        entry = analyze(rank, everyone)["grads"][1000]
        assert (entry["ops_compared"], entry["total_comm_lat_ms"], entry["last_to_arrive"]) == (0, 0, None)


def test_group_sizes_of_one_message_size_are_joined():
    everyone = [
        {key(n=2): (1, [1.0]), key(n=4): (1, [5.0])},
        {key(n=2): (1, [4.0]), key(n=4): (1, [6.0])},
    ]
    entry = analyze(1, everyone)["grads"][1000]
    assert (entry["count"], entry["ops_compared"]) == (2, 2)
    assert entry["total_comm_lat_ms"] == pytest.approx(1.0 + 5.0)
    assert entry["total_straggler_ms"] == pytest.approx(3.0 + 1.0)


def test_sizes_are_in_order():
    everyone = [{key(size=9): (1, [1.0])}, {key(size=1): (1, [1.0]), key(size=5): (1, [1.0])}]
    assert list(analyze(0, everyone)["grads"]) == [1, 5, 9]


@pytest.mark.parametrize("keys", [0, 1, 50])
def test_one_collective_whatever_the_keys(monkeypatch, keys):
    calls = []

    def all_gather_object(everyone, mine):
        calls.append(mine)
        everyone[:] = [mine, {}]

    dist = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: 0,
        get_world_size=lambda: 2,
        all_gather_object=all_gather_object,
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", dist)
    comms = CommsLogger()
    for number in range(keys):
        comms.append("all_reduce", f"op{number}", 1.0, number)
    found = comms.log_all(show_straggler=True, return_dict=True)
    assert len(calls) == 1
    assert len(found["straggler_analysis"]) == keys
    assert all(
        entry["missing_ranks"] == [1] for sizes in found["straggler_analysis"].values() for entry in sizes.values()
    )


@pytest.mark.parametrize("module", [None, SimpleNamespace(is_available=lambda: False)])
def test_without_a_process_group_nothing_is_sent(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    assert exchange([]) == (0, [{}])
