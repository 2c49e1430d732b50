"""A difference of plans is an error on every rank, names fields and ranks, and never hangs."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
from ds_groups import ParallelTopology, PlanMismatchError, PlanTimeoutError, parallel_state as groups
from ds_groups._meeting import spell
from ranks import run_ranks


def same_plan(rank):
    bound = ParallelTopology(dist.get_world_size(), ep=2).bind()
    for _ in range(3):
        bound.verify(timeout=20)
    return len(bound)


@pytest.mark.parametrize("world", [2, 4])
def test_equal_plans(world):
    assert run_ranks(same_plan, world) == [0] * world


def one_differs(rank):
    bound = ParallelTopology(4, tp=2 if rank != 2 else 4).bind()
    with pytest.raises(PlanMismatchError) as caught:
        bound.verify(timeout=20)
    return str(caught.value), caught.value.differences


def test_one_rank_differs():
    answers = run_ranks(one_differs, 4)
    assert len({message for message, _ in answers}) == 1
    message, differences = answers[0]
    assert differences["tp"] == {"2": (0, 1, 3), "4": (2,)}
    assert set(differences) == {"tp", "dp", "dp_shard"}
    assert "tp: 2 on ranks 0-1, 3; 4 on rank 2" in message


def options_differ(rank):
    bound = ParallelTopology(2).bind(timeout=30 + rank)
    with pytest.raises(PlanMismatchError) as caught:
        bound.verify(timeout=20)
    return sorted(caught.value.differences)


def test_options_belong_to_the_plan():
    assert run_ranks(options_differ, 2) == [["timeout"], ["timeout"]]


def one_is_absent(rank):
    bound = ParallelTopology(3).bind()
    if rank == 1:
        return None
    with pytest.raises(PlanTimeoutError) as caught:
        bound.verify(timeout=0.5)
    assert isinstance(caught.value, TimeoutError)
    return str(caught.value), caught.value.missing


def test_a_rank_that_does_not_call_is_named():
    answers = run_ranks(one_is_absent, 3)
    assert answers[1] is None
    for message, missing in (answers[0], answers[2]):
        assert missing == (1,)
        assert "no plan from rank 1 within 0.5 s" in message


def one_is_late(rank):
    bound = ParallelTopology(2).bind()
    missing = []
    if rank == 1:
        time.sleep(1.5)
    else:
        with pytest.raises(PlanTimeoutError) as caught:
            bound.verify(timeout=0.3)
        missing.append(caught.value.missing)
    bound.verify(timeout=20)
    return missing


def test_a_late_rank_meets_those_who_try_again():
    """The late rank has not tried yet, so its first try is the other's second one."""
    assert run_ranks(one_is_late, 2) == [[(1,)], []]


def module_functions_differ(rank):
    with pytest.raises(PlanMismatchError) as caught:
        groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=rank == 3)
    with pytest.raises(PlanMismatchError) as other:
        (groups._init_tp_mesh_device if rank == 0 else groups._create_zero_param_parallel_group)(2)
    return str(caught.value), other.value.differences["call"]


def test_module_functions_compare_plans_before_groups_are_made():
    for message, calls in run_ranks(module_functions_differ, 4):
        assert "data_before_expert: false on ranks 0-2; true on rank 3" in message
        assert calls == {'"init_tp"': (0,), '"create_zero_param"': (1, 2, 3)}


def test_spelling_ofspell():
    assert spell([4]) == "rank 4"
    assert spell([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
