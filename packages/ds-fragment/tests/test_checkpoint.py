"""One consolidated file: what is in it, what becomes of the old one, and back into a sharded run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, iter_full, load_full, save_full
from ds_fragment.collective import exchange
from ds_fragment.errors import FragmentError, InvalidValueError
from fragment_oracle import raised
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Net(nn.Module):
    """Tied weights, buffers of both kinds, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.last = nn.Linear(3, 5, bias=False)
        self.again = nn.Linear(3, 5, bias=False)
        self.again.weight = self.last.weight
        self.register_buffer("scratch", torch.randn(4), persistent=False)


def _sharded(dtype: torch.dtype = torch.bfloat16) -> tuple[Net, FlatPartition]:
    model = Net()
    model.first.to(dtype)
    model.last.to(dtype)
    partition = FlatPartition(model.parameters())
    with torch.no_grad():  # what bf16 cannot hold
        partition.hp_param.add_(2.0**-20)
    partition.publish()
    return model, partition


def _there_and_back(rank: int, folder: str, max_shard_bytes: int) -> None:
    model, partition = _sharded()
    path = Path(folder, "model.safetensors")
    expected = dict(iter_full(model))
    told: list[tuple[int, int]] = []
    save_full(
        model,
        path,
        max_shard_bytes=max_shard_bytes,
        bucket_bytes=64,
        metadata={"step": "7"},
        progress=lambda done, total: told.append((done, total)),
    )
    if rank == 0:
        assert told[-1][0] == told[-1][1] > 0
        assert [done for done, _ in told] == sorted(done for done, _ in told)
    else:
        assert not told

    lp = {name: param.detach().clone() for name, param in model.named_parameters()}
    with torch.no_grad():
        partition.hp_param.zero_()
        model.norm.running_mean.fill_(9.0)
        for param in model.parameters():
            param.zero_()
    load_full(model, path)
    for name, value in iter_full(model):
        assert torch.equal(value, expected[name]), name
    for name, param in model.named_parameters():
        assert torch.equal(param, lp[name]), name
    assert bool((model.norm.running_mean == 0).all())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 50], ids=["one", "shards"])
def test_there_and_back(tmp_path: Path, ranks: int, max_shard_bytes: int) -> None:
    run_ranks(_there_and_back, ranks, str(tmp_path), max_shard_bytes)
    names = sorted(path.name for path in tmp_path.iterdir())
    if max_shard_bytes == 50:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(names) - {"model.safetensors.index.json"}
        tensors = {
            name: value
            for file in set(index["weight_map"].values())
            for name, value in load_file(tmp_path / file).items()
        }
        assert set(tensors) == set(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    else:
        assert names == ["model.safetensors"]
        tensors = load_file(tmp_path / "model.safetensors")
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert file.metadata()["step"] == "7"
            assert json.loads(file.metadata()["tied"]) == {"again.weight": "last.weight"}
    fresh = Net()
    held = {**fresh.state_dict()}
    assert set(tensors) == set(held) - {"again.weight"}
    assert "scratch" not in tensors
    oracle = fresh.first.weight.detach().bfloat16().float() + 2.0**-20
    assert torch.equal(tensors["first.weight"], oracle)
    assert tensors["norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(tensors["frozen"], fresh.frozen)


def test_without_torch_distributed_and_in_another_dtype(tmp_path: Path) -> None:
    model, _partition = _sharded()
    save_full(model, tmp_path / "m.safetensors", dtype=torch.bfloat16, progress=True)
    held = load_file(tmp_path / "m.safetensors")
    assert held["first.weight"].dtype == torch.bfloat16
    assert torch.equal(held["first.weight"], model.first.weight)
    assert held["norm.num_batches_tracked"].dtype == torch.int64


def _bad_calls(rank: int, folder: str) -> list[str]:
    model, partition = _sharded()
    save_full(model, Path(folder, "m.safetensors"))
    before = partition.hp_param.detach().clone()
    told = []
    smaller = nn.Linear(5, 3).bfloat16()
    other = FlatPartition(smaller.parameters())
    path = Path(folder, "m.safetensors")
    for call in (
        lambda: save_full(model, Path(folder, "none", "m.safetensors")),
        lambda: save_full(model, folder),
        lambda: save_full(model, path, max_shard_bytes=0),
        lambda: save_full(model, path, dtype=torch.complex64),
        lambda: load_full(smaller, path),
        lambda: load_full(model, Path(folder, "absent.safetensors")),
    ):
        with pytest.raises(FragmentError) as caught:
            call()
        told.append(f"{type(caught.value).__name__}: {caught.value}")
    assert torch.equal(partition.hp_param, before)
    assert other.numel == 18
    return told


def test_bad_calls_are_the_same_error_everywhere_and_leave_the_file(tmp_path: Path) -> None:
    told = run_ranks(_bad_calls, 2, str(tmp_path))
    assert told[0] == told[1]
    folder, target, size, dtype, misfit, absent = told[0]
    assert "its folder does not exist" in folder
    assert "which is a folder" in target
    assert "max_shard_bytes is 0" in size
    assert "dtype is torch.complex64, expected a floating-point dtype" in dtype
    assert "missing 2 (bias, weight), unexpected" in misfit
    assert "there is neither that file nor an index" in absent
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert torch.equal(load_file(tmp_path / "m.safetensors")["frozen"], Net().frozen)


def _pairs_without_each_other(rank: int, folder: str) -> tuple[list[str], list[str]]:
    """Ranks 0 and 1 share a model, and 2 and 3 another of the same names: at first with other values."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("models", "shards"))["shards"]
    torch.manual_seed(rank // 2)
    model = nn.Linear(4, 2)
    fully_shard(model, mesh=mesh)
    path = Path(folder, "model.safetensors")
    path.write_bytes(b"as it was")
    told = [str(raised(lambda: save_full(model, path)))]
    assert path.read_bytes() == b"as it was"
    other = Path(folder, "other.safetensors")
    if rank == 0:
        save_file({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, other)
    dist.barrier()
    model.weight.allreduce = False  # as DeepSpeed and Megatron mark experts
    told.append(str(raised(lambda: load_full(model, other))))
    assert not any(bool((tensor == 1).all()) for _, tensor in iter_full(model))
    del model.weight.allreduce
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_full(model, other)
        assert all(bool((tensor == 1).all()) for _, tensor in iter_full(model))
        said = [str(each.message) for each in caught]
        load_full(model, other)  # the copies are equal now
        assert len(caught) == len(said)
    save_full(model, path)
    dist.barrier()
    assert bool((load_file(path)["weight"] == 1).all())
    return told, said


def test_what_only_other_ranks_hold_is_not_lost_silently(tmp_path: Path) -> None:
    everybodys = run_ranks(_pairs_without_each_other, 4, str(tmp_path))
    (saving, loading), said = everybodys[0]
    assert all(told == [saving, loading] for told, _ in everybodys)
    assert "'weight' differs on ranks 0 and 2, which hold the same part of it" in saving
    assert "expert-parallel ranks have different tensors under the names 1 (weight)" in loading
    assert "ranks hold 2 (weight, bias) apart, with different values" in said[0]


def _wrong_shape(rank: int, folder: str) -> str:
    model, partition = _sharded()
    save_full(model, Path(folder, "m.safetensors"))
    partition.unlink()
    model.first = nn.Linear(4, 3).bfloat16()
    partition = FlatPartition(model.parameters())
    before = partition.hp_param.detach().clone()
    with pytest.raises(InvalidValueError) as caught:
        load_full(model, Path(folder, "m.safetensors"))
    assert torch.equal(partition.hp_param, before), "nothing is written"
    return str(caught.value)


def test_a_wrong_shape_changes_nothing(tmp_path: Path) -> None:
    for told in run_ranks(_wrong_shape, 2, str(tmp_path)):
        assert "'first.weight' has shape (3, 5) in the file and (3, 4) in the model" in told


def _killed(rank: int, folder: str) -> str:
    model, _partition = _sharded()
    path = Path(folder, "m.safetensors")
    save_full(model, path)
    with torch.no_grad():
        _partition.hp_param.zero_()
    if rank == 2:
        calls = []

        class Dying(exchange.InFlight):
            def __init__(self, *args: Any) -> None:
                calls.append(1)
                if len(calls) == 3:
                    os._exit(9)
                super().__init__(*args)

        exchange.InFlight = Dying
    with pytest.raises((FragmentError, RuntimeError)) as caught:
        save_full(model, path, bucket_bytes=8)
    return str(caught.value)


def test_a_rank_that_dies_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    told = run_ranks(_killed, 4, str(tmp_path), killed=(2,), timeout=40)
    assert told[2] is None
    assert all(told[rank] for rank in (0, 1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    held = load_file(tmp_path / "m.safetensors")
    assert bool(held["first.weight"].any()), "the file of the first save, not the zeros of the second"


def _disk_full(rank: int, folder: str) -> str:
    model, _partition = _sharded()
    path = Path(folder, "m.safetensors")
    save_full(model, path)

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FragmentError) as caught:
        save_full(model, path, bucket_bytes=8, progress=full)
    save_full(model, path)  # the ranks are still together
    return str(caught.value)


def test_a_write_that_fails_on_rank_0_is_everybodys_error(tmp_path: Path) -> None:
    told = run_ranks(_disk_full, 3, str(tmp_path))
    assert len(set(told)) == 1
    assert "No space left on device" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def _tensor_parallel(rank: int, folder: str) -> None:
    from torch.distributed.tensor import distribute_module

    def build() -> nn.Module:
        plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
        return distribute_module(plain, init_device_mesh("cpu", (2,)))  # makes DTensors of the buffers, too

    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        model[1].running_mean.fill_(0.3)
        model[1].num_batches_tracked.fill_(7)
    path = f"{folder}/model.safetensors"
    save_full(model, path)
    stored = load_file(path)
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor()
        assert stored[name].dtype is whole.dtype, name
        assert torch.equal(stored[name], whole), name
    fresh = build()
    load_full(fresh, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name].full_tensor(), tensor.full_tensor()), name


def test_buffers_that_are_dtensors_there_and_back(tmp_path: Path) -> None:
    run_ranks(_tensor_parallel, 2, str(tmp_path))
