"""The comparison of ranks as arithmetic. With real ranks it is tested where torch is."""

import random
import sys
from collections import deque
from types import SimpleNamespace

import pytest
from ds_logging._comms.exchange import decode, encode
from ds_logging._comms.op_stats import OpKey, OpStats
from ds_logging._straggler import analyze, exchange
from ds_logging.comms_logging import CommsLogger


def key(name="grads", size=1000, n=2, op="all_reduce", **more):
    return OpKey(name, op, size, n, **more)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_shortest_over_the_ranks_is_communication_and_the_rest_is_waiting(world_size):
    draw = random.Random(world_size)
    latencies = [[draw.uniform(1, 5) for _ in range(8)] for _ in range(world_size)]
    everyone = [{key(n=world_size): (8, row)} for row in latencies]
    lowest = [min(row[i] for row in latencies) for i in range(8)]
    for rank in range(world_size):
        entry = analyze(rank, everyone)["grads"][1000]
        assert entry["count"] == entry["ops_compared"] == 8
        assert entry["total_comm_lat_ms"] == pytest.approx(sum(lowest))
        assert entry["total_straggler_ms"] == pytest.approx(sum(latencies[rank]) - sum(lowest))
        assert entry["avg_comm_lat_ms"] == pytest.approx(sum(lowest) / 8)


def test_the_last_to_arrive_waited_least():
    everyone = [{key(n=3): (2, row)} for row in ([5.0, 5.0], [1.0, 2.0], [4.0, 4.0])]
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


def test_groups_of_one_message_size_are_joined():
    everyone = [
        {key(): (1, [1.0]), key(group="1:tp", ranks=(0, 1)): (1, [5.0])},
        {key(): (1, [4.0]), key(group="1:tp", ranks=(0, 1)): (1, [6.0])},
    ]
    entry = analyze(1, everyone)["grads"][1000]
    assert (entry["count"], entry["ops_compared"]) == (2, 2)
    assert entry["total_comm_lat_ms"] == pytest.approx(1.0 + 5.0)
    assert entry["total_straggler_ms"] == pytest.approx(3.0 + 1.0)


def test_groups_whose_ranks_nobody_knows_are_not_compared():
    # Two pairs of the same size, one with a slow link: nobody waited for anybody.
    everyone = [{key(): (1, [latency])} for latency in (1.0, 1.0, 10.0, 10.0)]
    for rank in range(4):
        entry = analyze(rank, everyone)["grads"][1000]
        assert (entry["count"], entry["ops_compared"], entry["total_straggler_ms"]) == (1, 0, 0.0)
        assert (entry["last_to_arrive"], entry["missing_ranks"]) == (None, [])


def test_groups_whose_ranks_are_known_are_compared_inside():
    pairs = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    latencies = (1.0, 4.0, 10.0, 10.0)
    everyone = [{key(group=f"{pairs[r][0]}:tp", ranks=pairs[r]): (1, [latencies[r]])} for r in range(4)]
    entries = [analyze(rank, everyone)["grads"][1000] for rank in range(4)]
    assert [entry["total_straggler_ms"] for entry in entries] == [0.0, 3.0, 0.0, 0.0]
    assert [entry["last_to_arrive"] for entry in entries] == [0, 0, None, None]  # of its own group only
    assert [entry["ops_compared"] for entry in entries] == [1] * 4


@pytest.mark.parametrize("names", [("p2p", "p2p"), ("send", "recv"), ("isend", "irecv")])
def test_a_send_and_its_receive_are_one_operation(names):
    send, recv = ("isend", "irecv") if names[0] == "isend" else ("send", "recv")
    everyone = [{key(names[0], op=send): (1, [1.0])}, {key(names[1], op=recv): (1, [9.0])}]
    sender, receiver = analyze(0, everyone)[names[0]][1000], analyze(1, everyone)[names[1]][1000]
    assert (sender["ops_compared"], receiver["ops_compared"]) == (1, 1)
    assert (sender["total_straggler_ms"], receiver["total_straggler_ms"]) == (0.0, 8.0)
    assert sender["last_to_arrive"] == receiver["last_to_arrive"] == 0
    assert sender["missing_ranks"] == receiver["missing_ranks"] == []


def test_the_two_directions_of_a_pair_are_told_apart():
    send, recv = key("p2p", op="send"), key("p2p", op="recv")
    everyone = [{send: (1, [1.0]), recv: (1, [7.0])}, {send: (1, [2.0]), recv: (1, [3.0])}]
    entries = [analyze(rank, everyone)["p2p"][1000] for rank in range(2)]
    assert [entry["ops_compared"] for entry in entries] == [2, 2]
    assert [entry["total_straggler_ms"] for entry in entries] == [5.0, 2.0]


def test_point_to_point_in_a_larger_group_is_not_compared():
    everyone = [{key(n=3, op=op): (1, [latency])} for op, latency in (("send", 1.0), ("recv", 9.0), ("recv", 5.0))]
    for rank in range(3):
        assert analyze(rank, everyone)["grads"][1000]["ops_compared"] == 0


def test_send_and_isend_of_one_rank_are_not_guessed_into_an_order():
    everyone = [
        {key("x", op="send"): (1, [1.0]), key("x", op="isend"): (1, [2.0])},
        {key("x", op="recv"): (2, [9.0] * 2)},
    ]
    assert analyze(1, everyone)["x"][1000]["ops_compared"] == 0


def test_nobody_is_last_in_a_rooted_operation():
    everyone = [{key(op="broadcast"): (1, [1.0])}, {key(op="broadcast"): (1, [5.0])}]
    entry = analyze(1, everyone)["grads"][1000]
    assert (entry["total_straggler_ms"], entry["last_to_arrive"]) == (4.0, None)


def test_nobody_is_last_while_a_rank_of_the_group_is_missing():
    everyone = [{key(n=3): (1, [1.0])}, {key(n=3): (1, [5.0])}, {}]
    entry = analyze(1, everyone)["grads"][1000]
    assert (entry["last_to_arrive"], entry["missing_ranks"]) == (None, [2])


def test_operations_of_unknown_latency_keep_their_place():
    everyone = [{key(): (3, [20.0, None, 40.0])}, {key(): (3, [1.0, 2.0, None])}]
    entry = analyze(0, everyone)["grads"][1000]
    assert (entry["ops_compared"], entry["total_straggler_ms"]) == (1, 19.0)


@pytest.mark.parametrize("seed", range(20))
def test_simulated_arrivals(seed):
    """Ranks arrive at drawn times at operations of overlapping groups; who waits how long is known from them."""
    draw = random.Random(seed)
    world_size = 6
    groups = {"0": tuple(range(6)), "1:tp": (0, 1, 2), "2:tp": (3, 4, 5), "3:dp": (0, 3), "4:dp": (2, 5)}
    everyone = [{} for _ in range(world_size)]
    waited = [0.0] * world_size
    for name, ranks in groups.items():
        count = draw.randrange(1, 9)
        rows = {rank: [] for rank in ranks}
        for _ in range(count):
            arrivals = {rank: draw.uniform(0, 50) for rank in ranks}
            took = draw.uniform(1, 5)
            for rank in ranks:
                rows[rank].append(max(arrivals.values()) + took - arrivals[rank])
                waited[rank] += max(arrivals.values()) - arrivals[rank]
        for rank in ranks:
            everyone[rank][key(n=len(ranks), group=name, ranks=ranks, dtype="float32")] = (count, rows[rank])
    for rank in range(world_size):
        entry = analyze(rank, everyone)["grads"][1000]
        assert entry["ops_compared"] == entry["count"]
        assert entry["total_straggler_ms"] == pytest.approx(waited[rank])


def test_sizes_are_in_order():
    everyone = [{key(size=9): (1, [1.0])}, {key(size=1): (1, [1.0]), key(size=5): (1, [1.0])}]
    assert list(analyze(0, everyone)["grads"]) == [1, 5, 9]


@pytest.mark.parametrize("keys", [0, 1, 50])
def test_one_exchange_whatever_the_keys(monkeypatch, keys):
    calls = []

    def gather_bytes(data):
        calls.append(data)
        return [data, encode({"ranks": [], "rows": []})]

    monkeypatch.setattr("ds_logging._straggler.gather_bytes", gather_bytes)
    monkeypatch.setitem(sys.modules, "torch.distributed", SimpleNamespace(get_rank=lambda: 0))
    comms = CommsLogger()
    for number in range(keys):
        comms.append("all_reduce", f"op{number}", 1.0, number, group_size=2)
    found = comms.log_all(show_straggler=True, return_dict=True)
    assert len(calls) == 1
    assert len(decode(calls[0])["rows"]) == keys
    assert len(found["straggler_analysis"]) == keys
    assert all(
        entry["missing_ranks"] == [1] for sizes in found["straggler_analysis"].values() for entry in sizes.values()
    )


def test_every_rank_learns_what_the_others_counted(monkeypatch):
    stats = OpStats(key(group="1:tp", ranks=(0, 1), dtype="float32"), deque(maxlen=4))
    for latency in (1.0, None, 3.0):
        stats.add(latency, 1000)
    world = OpStats(key(), deque([2.0]), count=1)
    rank, everyone = exchange([stats, world])
    assert rank == 0
    assert everyone == [{stats.key: (3, [1.0, None, 3.0]), world.key: (1, [2.0])}]


@pytest.mark.parametrize("module", [None, SimpleNamespace(is_available=lambda: False)])
def test_without_a_process_group_nothing_is_sent(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    assert exchange([]) == (0, [{}])
