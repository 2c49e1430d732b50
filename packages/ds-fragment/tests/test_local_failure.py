"""What goes wrong on one rank alone is raised as what it is, not as a collective that broke off."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, available, iter_full, kernels, norms, save_full, set_many, update_many
from ds_fragment._collectives import CollectiveError
from ds_fragment.collective.exchange import InFlight
from ds_fragment.errors import FragmentError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_optimizer_state
from fragment_oracle import raised
from ranks import run_ranks
from torch import nn


def _fails(error: BaseException) -> Any:
    def call(*_args: object, **_kwargs: object) -> Any:
        raise error

    return call


def test_a_kernel_that_fails_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3))
    for error in (RuntimeError("view size is not compatible"), MemoryError("none"), NotImplementedError("no kernel")):
        monkeypatch.setattr(kernels, "copy", _fails(error))
        with pytest.raises(type(error)) as caught:
            list(iter_full([weight]))
        assert caught.value is error
        with pytest.raises(type(error)):
            safe_get_full_fp32_param(weight)


def _model() -> tuple[nn.Module, FlatPartition, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).bfloat16()
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.Adam([partition.hp_param])
    attach(model, optimizer)
    model(torch.ones(2, 5).bfloat16()).sum().backward()
    partition.reduce_gradients()
    optimizer.step()
    return model, partition, optimizer


def _locally(rank: int, folder: str) -> list[Any]:
    model, partition, optimizer = _model()
    found: list[Any] = []
    original = partition.hp_param.data

    def refuse(_name: object, _tensor: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("the user's function")
        return _tensor

    found.append(raised(lambda: update_many(model, refuse)))

    def report(done: int, total: int) -> None:
        raise RuntimeError("the user's progress")

    found.append(raised(lambda: save_full(model, Path(folder, "model.safetensors"), bucket_bytes=1, progress=report)))

    # A rank that fails after the exchange, and tells the others with a later bucket.
    unpacked = InFlight.unpacked
    for error in (RuntimeError("shape '[2]' is invalid"), MemoryError("no room")):
        list(iter_full(model, "exp_avg"))
        if rank == 1:
            InFlight.unpacked = _fails(error)  # type: ignore[method-assign]
        found.append(raised(lambda: list(iter_full(model, "exp_avg", bucket_bytes=1))))
        InFlight.unpacked = unpacked  # type: ignore[method-assign]
        assert len(list(iter_full(model, "exp_avg"))) == 4, "all ranks agree anew, or none does"

    # In the last bucket it is told nobody, and what it was.
    if rank == 1:
        InFlight.unpacked = _fails(RuntimeError("shape '[2]' is invalid"))  # type: ignore[method-assign]
    found.append(raised(lambda: list(iter_full(model))))
    InFlight.unpacked = unpacked  # type: ignore[method-assign]
    assert len(list(iter_full(model))) == 4
    assert original.data_ptr() == partition.hp_param.data_ptr()
    del optimizer
    return found


def test_a_local_failure_says_what_it_was(tmp_path: Path) -> None:
    zero, one = run_ranks(_locally, 2, str(tmp_path))
    assert zero[:4] == one[:4]
    assert one[0] == ("FragmentError", "rank 1: RuntimeError: the user's function")
    assert one[1] == ("FragmentError", "rank 0: RuntimeError: the user's progress")
    assert one[2] == ("FragmentError", "rank 1: RuntimeError: shape '[2]' is invalid")
    assert one[3] == ("FragmentError", "rank 1: MemoryError: no room")
    assert zero[4] is None
    assert one[4] == ("RuntimeError", "shape '[2]' is invalid")


def _away(rank: int) -> list[Any]:
    model, partition, optimizer = _model()
    params = list(model.parameters())
    list(iter_full(model, "exp_avg_sq"))
    if rank == 1:
        time.sleep(4.0)
        return []
    group = dist.group.WORLD
    assert group is not None
    group._get_backend(torch.device("cpu"))._set_default_timeout(dt.timedelta(seconds=0.5))
    calls = [
        lambda: safe_get_full_fp32_param(params[0]),
        lambda: safe_get_full_optimizer_state(params[0], "exp_avg"),  # the first read of it: the ranks agree
        lambda: norms(model, "exp_avg_sq"),
        lambda: available(model, "exp_avg_sq"),
        lambda: list(iter_full(model, dst=0)),
        lambda: set_many([(params[0], torch.ones(3, 5))]),
    ]
    found = [raised(call) for call in calls]
    assert partition.rank == rank
    del optimizer
    return found


def test_a_collective_that_fails_is_told_from_it() -> None:
    found, _ = run_ranks(_away, 2, timeout=40)
    for kind, text in found:
        assert kind == "FragmentError"
        assert "broke off: a rank died, or did not make the same call" in text


def test_no_memory_is_no_collectives_failure() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert CollectiveError.of(error) is error
    assert isinstance(CollectiveError.of(dist.DistBackendError("closed")), CollectiveError)
    assert not issubclass(CollectiveError, FragmentError)
