import random

import pytest
from ds_logging._comms.operation import Operation
from ds_logging._comms.straggler_report import WORST, straggler_report

GROUPS = {"0:world": tuple(range(8)), "1:tp": (0, 1, 2, 3), "2:tp": (4, 5, 6, 7), "3:dp": (0, 4), "4:dp": (3, 7)}


def op(latency, kind="all_reduce", sequence=1, group="0", ranks=(0, 1), **more):
    return Operation(kind, group, ranks, sequence, 8, "float32", 0, latency, True, kind, **more)


@pytest.mark.parametrize("seed", range(30))
def test_simulated_arrivals(seed):
    """Every rank arrives at a drawn time at drawn operations; who waits for whom follows from the arrivals."""
    draw = random.Random(seed)
    recorded = {rank: [] for rank in range(8)}
    numbers = dict.fromkeys(GROUPS, 0)
    compared = dict.fromkeys(GROUPS, 0)
    last_count = {name: dict.fromkeys(ranks, 0) for name, ranks in GROUPS.items()}
    waited = {name: {rank: {} for rank in ranks} for name, ranks in GROUPS.items()}
    worst = dict.fromkeys(GROUPS, (-1.0, None))
    for _ in range(200):
        name = draw.choice(sorted(GROUPS))
        ranks = GROUPS[name]
        numbers[name] += 1
        arrivals = {rank: draw.uniform(0, 100) for rank in ranks}
        last = max(ranks, key=arrivals.__getitem__)
        took = draw.uniform(0.1, 5)
        known = draw.random() < 0.9
        for rank in ranks:
            latency = arrivals[last] + took - arrivals[rank]
            latency = None if not known and rank == ranks[0] else latency
            recorded[rank].append(op(latency, sequence=numbers[name], group=name, ranks=ranks, step=numbers[name]))
        if known:
            compared[name] += 1
            last_count[name][last] += 1
            total = 0.0
            for rank in set(ranks) - {last}:
                time = arrivals[last] - arrivals[rank]
                total += time
                waited[name][rank][last] = waited[name][rank].get(last, 0.0) + time
            worst[name] = max(worst[name], (total, numbers[name]))
    for rank in recorded:
        draw.shuffle(recorded[rank])  # order is of no matter, the number is
    reports = straggler_report(recorded)
    assert {report.group for report in reports} == {name for name in GROUPS if numbers[name]}
    totals = [sum(report.waited_ms.values()) for report in reports]
    assert totals == sorted(totals, reverse=True)
    for report in reports:
        name = report.group
        assert (report.ranks, report.compared) == (GROUPS[name], compared[name])
        assert report.compared + report.incomplete == numbers[name]
        assert report.times_last == last_count[name]
        for rank, by_last in waited[name].items():
            assert report.waited_for.get(rank, {}) == {last: pytest.approx(time) for last, time in by_last.items()}
            assert report.waited_ms[rank] == pytest.approx(sum(by_last.values()))
        assert (report.worst[0].waited_ms, report.worst[0].sequence) == (pytest.approx(worst[name][0]), worst[name][1])
        assert len(report.worst) == min(WORST, compared[name])
        assert report.worst[0].step == report.worst[0].sequence


@pytest.mark.parametrize("seed", range(10))
def test_simulated_pipeline(seed):
    """Stages send forward and back; the n-th send of a pair belongs with its n-th receive."""
    draw = random.Random(seed)
    stages = 4
    recorded = {rank: [] for rank in range(stages)}
    waited = dict.fromkeys(range(stages), 0.0)
    for n in range(1, 20):
        for sender, receiver in [(s, s + 1) for s in range(stages - 1)] + [(s + 1, s) for s in range(stages - 1)]:
            arrivals = {sender: draw.uniform(0, 9), receiver: draw.uniform(0, 9)}
            end = max(arrivals.values()) + 0.5
            for rank, kind, peer in ((sender, "send", receiver), (receiver, "recv", sender)):
                ranks = tuple(range(stages))
                recorded[rank].append(op(end - arrivals[rank], kind, n, "pp", ranks, peer=peer))
                waited[rank] += max(arrivals.values()) - arrivals[rank]
    (report,) = straggler_report(recorded)
    assert report.compared == 19 * 2 * (stages - 1)
    assert report.waited_ms == pytest.approx(waited)
    assert sum(report.times_last.values()) == report.compared


def test_a_send_and_a_receive_between_two_ranks():
    recorded = {0: [op(1.0, "send", peer=1)], 1: [op(9.0, "recv", peer=0)]}
    (report,) = straggler_report(recorded)
    assert (report.compared, report.waited_for, report.times_last) == (1, {1: {0: 8.0}}, {0: 1, 1: 0})
    assert report.worst[0].ranks == (0, 1)


def test_groups_of_the_same_size_do_not_mix():
    recorded = {
        rank: [op(latency, ranks=(0, 1) if rank < 2 else (2, 3))] for rank, latency in enumerate((1.0, 1.0, 9.0, 9.0))
    }
    assert [report.compared for report in straggler_report(recorded)] == [1, 1]
    assert all(sum(report.waited_ms.values()) == 0 for report in straggler_report(recorded))


def test_what_cannot_be_compared_is_counted():
    recorded = {
        0: [
            op(1.0, sequence=1),
            op(1.0, "broadcast", 2),
            op(1.0, "all_reduce", 3),
            op(1.0, sequence=4),
            op(None, sequence=5),
        ],
        1: [op(3.0, sequence=1), op(9.0, "broadcast", 2), op(1.0, "all_gather", 3), op(1.0, sequence=5)],
    }
    (report,) = straggler_report(recorded)
    assert (report.compared, report.rooted, report.mismatched, report.incomplete) == (1, 1, 1, 2)
    assert report.waited_ms == {0: 0.0, 1: 2.0}


def test_operations_that_nobody_can_place_are_left_out():
    recorded = {
        0: [op(1.0, ranks=None), op(1.0, sequence=None), op(1.0, "recv", peer=None), op(1.0, "batch_isend_irecv")]
    }
    assert straggler_report(recorded) == []
    assert straggler_report({}) == []


def test_nobody_is_last_where_all_came_together():
    (report,) = straggler_report({0: [op(2.0)], 1: [op(2.0)]})
    assert (report.compared, report.times_last, report.worst) == (1, {0: 0, 1: 0}, [])
