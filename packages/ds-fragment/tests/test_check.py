"""Checked calls: a rank that does not come, comes late or does something else is named on every rank."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, checked, iter_full, norms
from ds_fragment.errors import RankMismatchError
from ranks import run_ranks
from torch import nn


def _partition() -> tuple[nn.Module, FlatPartition]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).bfloat16()
    partition = FlatPartition(model.parameters())
    return model, partition


def _same_call(rank: int) -> None:
    model, _partition_kept = _partition()
    with checked(timeout=20):
        for _ in range(5):
            assert len(list(iter_full(model))) == 4
            assert len(norms(model)) == 4


def test_equal_calls_go_through() -> None:
    run_ranks(_same_call, 3)


def _switched_on(rank: int) -> str:
    model, _partition_kept = _partition()
    if rank == 2:
        return ""
    with pytest.raises(RankMismatchError) as caught:
        list(iter_full(model))
    return str(caught.value)


def test_a_missing_rank_is_named_within_the_time_limit() -> None:
    env = {"DS_FRAGMENT_CHECK": "1", "DS_FRAGMENT_CHECK_TIMEOUT": "2"}
    told = run_ranks(_switched_on, 3, env=env, timeout=30)
    for rank in (0, 1):
        assert f"rank {rank} called iter_full('value')" in told[rank]
        assert "ranks [2] of [0, 1, 2] did not come within 2 s" in told[rank]
        assert "a parameter of shape (3, 5)" in told[rank]


def _late(rank: int) -> str:
    model, _partition_kept = _partition()
    if rank == 1:
        time.sleep(2.5)
    with checked(timeout=1.0), pytest.raises(RankMismatchError) as caught:
        list(iter_full(model))
    return str(caught.value)


def test_a_rank_that_comes_too_late_is_told_so() -> None:
    told = run_ranks(_late, 2, timeout=30)
    assert "ranks [1] of [0, 1] did not come within 1 s" in told[0]
    assert "rank 1 called iter_full('value')" in told[1]
    assert "too late: rank 0 has given up waiting for ranks 1" in told[1]


def _different(rank: int) -> str:
    model, _partition_kept = _partition()
    params = list(model.parameters())
    call = (lambda: list(iter_full(params[:2]))) if rank == 0 else (lambda: norms(params[2:]))
    with checked(timeout=20), pytest.raises(RankMismatchError) as caught:
        call()
    return str(caught.value)


def test_different_calls_are_both_told_on_every_rank() -> None:
    for told in run_ranks(_different, 2, timeout=30):
        assert "rank 0 called iter_full('value') with a parameter of shape (3, 5)" in told
        assert "rank 1 called norms or count_nonfinite('value') with a parameter of shape (7, 3)" in told


def _again(rank: int) -> list[str]:
    """Rounds in which some ranks stay away, come late or do something else; after each a call that all make."""
    model, _partition_kept = _partition()
    params = list(model.parameters())
    told = []
    with checked(timeout=0.9):
        for away, late in (([1], []), ([0, 1], []), ([2], []), ([], [1]), ([2], [0])):
            if rank in late:
                time.sleep(2.5)  # a FileStore waits for whole seconds
            if rank not in away:
                with pytest.raises(RankMismatchError) as caught:
                    list(iter_full(model))
                told.append(str(caught.value))
            dist.barrier()
            for _ in range(2):
                assert len(dict(iter_full(model))) == 4
        for _ in range(2):
            with pytest.raises(RankMismatchError, match="did not make the same call"):
                norms(params[rank:])
            assert len(norms(model)) == 4
    return told


def test_after_a_miss_all_meet_again() -> None:
    told = run_ranks(_again, 3, timeout=60)
    assert [len(each) for each in told] == [4, 3, 3]
    assert "ranks [1] of [0, 1, 2] did not come" in told[0][0]
    assert "ranks [0, 1] of [0, 1, 2] did not come" in told[2][1]


def _back_at_once(rank: int) -> None:
    model, _partition_kept = _partition()
    with checked(timeout=2.0):
        if rank == 0:
            with pytest.raises(RankMismatchError, match=r"ranks \[1\]"):
                list(iter_full(model))
        else:
            time.sleep(3.0)
        for _ in range(3):
            assert len(dict(iter_full(model))) == 4


def test_who_raised_may_call_again_before_the_others_come() -> None:
    run_ranks(_back_at_once, 2, timeout=30)


def _overlapping(rank: int) -> None:
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2], [0, 1, 2])]
    models = [nn.Linear(3, 5), nn.Linear(3, 4), nn.Linear(3, 3)]
    mine = [i for i in range(3) if rank in dist.get_process_group_ranks(groups[i])]
    kept = {i: FlatPartition(models[i].parameters(), groups[i]) for i in mine}
    params = [param for i in mine for param in models[i].parameters()]
    alone = {0: [0, 2], 1: [2], 2: []}  # by the rank that stays away: the groups in which others wait for it
    with checked(timeout=0.9):
        for away in (0, 1, 2, 1):
            if rank != away:
                for i in alone[away]:
                    if i in mine:
                        with pytest.raises(RankMismatchError, match=rf"ranks \[.*{away}.*\] of"):
                            norms(models[i])
            dist.barrier()
            for i in mine:
                assert len(norms(models[i])) == 2
            for _key, _tensor in iter_full(params[-2:]):  # all ranks have the last group
                assert len(norms(models[2])) == 2
    assert len(kept) == len(mine)


def test_groups_that_overlap_meet_each_for_itself() -> None:
    run_ranks(_overlapping, 3, timeout=40)


def _missed(rank: int) -> tuple[int, int]:
    model, _partition_kept = _partition()
    store = dist.distributed_c10d._get_default_store()
    counts = []
    with checked(timeout=0.3):
        for _ in range(3):
            for turn in range(4):
                if rank == 0 and turn == 0:
                    with pytest.raises(RankMismatchError):
                        norms(model)
                dist.barrier()
                norms(model)
            dist.barrier()
            counts.append(store.num_keys())
            dist.barrier()
    return counts[-2], counts[-1]


def test_the_store_does_not_fill_up() -> None:
    for before, after in run_ranks(_missed, 2, timeout=30):
        assert before == after


def test_a_time_limit_that_is_none() -> None:
    with pytest.raises(ValueError, match="timeout is 0, expected a positive number"), checked(timeout=0):
        pass


def test_a_bad_time_limit_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_fragment.collective import check

    monkeypatch.setenv("DS_FRAGMENT_CHECK", "1")
    monkeypatch.setenv("DS_FRAGMENT_CHECK_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DS_FRAGMENT_CHECK_TIMEOUT is 'soon'"):
        check.time_limit()
    monkeypatch.setenv("DS_FRAGMENT_CHECK", "0")
    assert check.time_limit() is None
