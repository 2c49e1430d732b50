"""Ranks that wait for each other in a cycle are told so; ranks that are only slow are not."""

from __future__ import annotations

import logging
import time

import pytest
import torch
import torch.distributed as dist
from ds_groups import DeadlockError, GroupCreationError, ParallelTopology, PlanTimeoutError, _registry
from ranks import run_ranks


def watch(seconds=0.3):
    """Look after so many seconds; returns the warnings that are logged."""
    _registry.LOOK_AFTER, _registry.LOOK_AGAIN = seconds, 0.1
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logging.getLogger("ds.groups").addHandler(Handler())
    logging.getLogger("ds.groups").propagate = False
    return lines


def reduce_in(bound, *axes):
    sums = []
    for axis in axes:
        value = torch.tensor([10**bound.rank])
        dist.all_reduce(value, group=bound.group(axis))
        sums.append(value.item())
    return sums


def opposite_orders(rank):
    """Ranks 0 and 3 ask for tp first, 1 and 2 for dp: each waits for the next one around the square."""
    warned = watch()
    bound = ParallelTopology(4, tp=2).bind(timeout=30)
    order = ("tp", "dp") if rank in (0, 3) else ("dp", "tp")
    with pytest.raises(DeadlockError) as caught:
        [bound.group(axis) for axis in order]
    assert isinstance(caught.value, GroupCreationError)
    assert bound._pool._made == {}
    sums = reduce_in(bound, "tp", "dp")  # in the same order on every rank
    bound.close()
    return caught.value.waits, str(caught.value), len(warned), sums


def test_a_circle_of_four():
    answers = run_ranks(opposite_orders, 4)
    expected = {0: ("tp", 1), 1: ("dp", 3), 3: ("tp", 2), 2: ("dp", 0)}
    for rank, (waits, message, warnings, sums) in enumerate(answers):
        assert {waiting: on for waiting, (_, on) in waits.items()} == {
            waiting: (on,) for waiting, (_, on) in expected.items()
        }
        assert all(f"the {expected[waiting][0]} group" in what for waiting, (what, _) in waits.items())
        assert sums == [[11, 101], [11, 1010], [1100, 101], [1100, 1010]][rank]
        assert "rank 1 waits for the dp group of ranks [1, 3]: rank 3 missing" in message
        assert "the same order on every rank" in message
        assert warnings <= 1
    assert any(warnings for _, _, warnings, _ in answers)


def plans_differ(rank):
    """Nobody called verify(): rank 0 asks for the pair, rank 1 for all four."""
    watch()
    bound = ParallelTopology(4, tp=4 if rank else 2).bind(timeout=30)
    if rank in (2, 3):
        with pytest.raises(GroupCreationError):  # waits in the group of four with rank 1: in the round of the cycle
            ParallelTopology(4, tp=4).bind(timeout=31).group("tp")
        return None
    if rank == 1:
        bound = ParallelTopology(4, tp=4).bind(timeout=31)
    with pytest.raises(DeadlockError) as caught:
        bound.group("tp")
    return sorted(caught.value.waits)


def test_a_circle_of_two_with_different_plans():
    assert run_ranks(plans_differ, 4) == [[0, 1], [0, 1], None, None]


def three_in_a_ring(rank):
    """Each pair of three ranks is a group of one of three plans; each rank asks for the pair with its successor."""
    watch()
    from ds_groups._axis import TableAxis
    from ds_groups._pool import GroupPool

    pool = GroupPool()
    pairs = [(0, 1), (1, 2), (0, 2)]
    with pytest.raises(DeadlockError) as caught:
        pool.get(TableAxis((pairs[rank],)), f"pair{rank}")
    for number, pair in enumerate(pairs):
        if rank in pair:
            group = pool.get(TableAxis((pair,)), f"pair{number}")
            dist.barrier(group=group)
    return sorted(caught.value.waits), len(pool)


def test_a_circle_of_three():
    assert run_ranks(three_in_a_ring, 3) == [([0, 1, 2], 2)] * 3


def verify_against_group(rank):
    watch()
    bound = ParallelTopology(2, tp=2).bind(timeout=30)
    with pytest.raises(DeadlockError) as caught:
        bound.verify(timeout=30) if rank == 0 else ParallelTopology(2, tp=2).bind(timeout=29).group("tp")
    bound.verify(timeout=30)
    return str(caught.value)


def test_a_comparison_of_plans_in_a_circle():
    for message in run_ranks(verify_against_group, 2):
        assert "rank 0 waits for the comparison of plans: rank 1 missing" in message
        assert "rank 1 waits for the tp group of ranks [0, 1]: rank 0 missing" in message


def slow(rank):
    warned = watch(0.2)
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=30)
    if rank == 1:
        time.sleep(2.0)
    sums = reduce_in(bound, "tp")
    return sums, warned


def test_a_slow_rank_is_a_warning_and_then_a_success():
    (first, warned), (second, nothing) = run_ranks(slow, 2)
    assert first == second == [11]
    assert nothing == []
    assert len(warned) == 1
    assert "rank 0 waits for the tp group of ranks [0, 1]: rank 1 missing" in warned[0]
    assert "rank 1: asking for no group now" in warned[0]


def time_is_up_first(rank):
    watch(30.0)  # nobody looks before the time is up
    bound = ParallelTopology(4, tp=2).bind(timeout=1)
    order = ("tp", "dp") if rank in (0, 3) else ("dp", "tp")
    with pytest.raises(GroupCreationError) as caught:
        [bound.group(axis) for axis in order]
    dist.barrier()
    sums = reduce_in(ParallelTopology(4, tp=2).bind(timeout=20), "tp", "dp")
    return type(caught.value), caught.value.missing, str(caught.value), sums


def test_time_is_up_in_a_circle():
    answers = run_ranks(time_is_up_first, 4)
    nexts = {0: 1, 1: 3, 3: 2, 2: 0}
    for rank, (kind, missing, message, sums) in enumerate(answers):
        assert (kind, missing) == (GroupCreationError, (nexts[rank],))
        assert f"rank {nexts[rank]} did not come within 1 s" in message
        assert sums == [[11, 101], [11, 1010], [1100, 101], [1100, 1010]][rank]


def three_give_up(rank):
    """Each of the first three gives up alone, at a time of its own; all meet in the end."""
    watch(30.0)
    store = dist.distributed_c10d._get_default_store()
    bound = ParallelTopology(4, tp=4).bind()
    missing = []
    for seconds in {0: (0.2, 0.5), 1: (0.6,), 2: (1.0, 0.1, 0.1), 3: ()}[rank]:
        with pytest.raises(PlanTimeoutError) as caught:
            bound.verify(timeout=seconds)
        missing.append(caught.value.missing)
    store.set(f"gave up {rank}", "")
    if rank == 3:
        store.wait([f"gave up {other}" for other in range(3)])
    bound.verify(timeout=20)
    bound.verify(timeout=20)
    return missing


def test_ranks_that_gave_up_at_different_times_meet():
    for missing in run_ranks(three_give_up, 4)[:3]:
        assert all(3 in ranks for ranks in missing)


def late_in_the_second_try(rank):
    store = dist.distributed_c10d._get_default_store()
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=5)
    dist.barrier()
    if rank == 0:
        with pytest.raises(PlanTimeoutError) as caught:
            ParallelTopology(2, tp=2, dp=1).bind(timeout=0.5).create()
        assert caught.value.missing == (1,)
        store.set("gave up", "")
    else:
        store.wait(["gave up"])
        time.sleep(0.5)
    bound.create()
    return reduce_in(bound, "tp")


def test_create_can_be_tried_again():
    assert run_ranks(late_in_the_second_try, 2) == [[11], [11]]
