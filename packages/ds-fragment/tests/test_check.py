"""Checked calls: a rank that does not come, comes late or does something else is named on every rank."""

from __future__ import annotations

import time

import pytest
import torch
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


def test_a_rank_that_comes_too_late_does_not_wait_alone() -> None:
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


def test_a_time_limit_that_is_none() -> None:
    with pytest.raises(ValueError, match="timeout is 0, expected a positive number"), checked(timeout=0):
        pass


def test_a_bad_time_limit_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_fragment import _check

    monkeypatch.setenv("DS_FRAGMENT_CHECK", "1")
    monkeypatch.setenv("DS_FRAGMENT_CHECK_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DS_FRAGMENT_CHECK_TIMEOUT is 'soon'"):
        _check.time_limit()
    monkeypatch.setenv("DS_FRAGMENT_CHECK", "0")
    assert _check.time_limit() is None
