"""`WeightSource`: names and tensors for an inference engine, at the pace of the rank that sends them on."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, FragmentError, InvalidValueError, WeightSource, attach, link_hp_params
from fragment_oracle import assert_same
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

NAMES = ["embed.weight", "up.weight", "up.bias", "norm.weight", "norm.bias"]


class Net(nn.Module):
    """Tied weights, and layers that wrappers get hold of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.up(self.embed(tokens))))
        return found


def whole(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sharded(ranks: int | None = None, dtype: torch.dtype | None = torch.bfloat16) -> tuple[nn.Module, dict[str, Any]]:
    """A model under FSDP2 with wrappers inside, and its fp32 weights by name."""
    model = whole()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.up = checkpoint_wrapper(torch.compile(model.up))  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", (ranks or dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for module in (model.up, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model, expected


def step(model: nn.Module, amount: float = 1.0, only: str = "") -> None:
    with torch.no_grad():
        for name, param in model.named_parameters():
            if only in name:
                param.add_(amount)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"what": "grad"}, InvalidValueError, "what is 'grad', expected 'lp'"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes is 0, expected a positive number"),
        ({"dst": 3}, ValueError, r"dst is 3, expected a global rank of the group, \[0\], or None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightSource(whole(), **arguments)


def test_without_torch_distributed() -> None:
    model = whole()
    source = WeightSource(model, dtype=torch.float16, bucket_bytes=100)
    infos = source.metadata()
    assert [info.name for info in infos] == NAMES
    assert len(source) == 5
    assert {info.dtype_name for info in infos} == {"float16"}
    assert infos[0].nbytes == 11 * 6 * 2
    for _ in range(2):
        for info, (name, tensor) in zip(infos, source, strict=True):
            assert (info.name, info.dtype, info.shape) == (name, tensor.dtype, tensor.shape)
            assert_same(tensor, model.get_parameter(name).detach().half())


def test_rename_leaves_out_and_is_refused_where_names_meet() -> None:
    source = WeightSource(whole(), rename=lambda name: None if "bias" in name else f"model.{name}")
    assert [name for name, _ in source] == ["model.embed.weight", "model.up.weight", "model.norm.weight"]
    with pytest.raises(InvalidValueError, match="rename gives the name 'x' to two weights"):
        WeightSource(whole(), rename=lambda name: "x").metadata()
    with pytest.raises(InvalidValueError, match="changed_only is False, expected True"):
        source.changed()


def _yields(rank: int) -> None:
    for what, dtype, wanted in (
        ("lp", None, torch.bfloat16),
        ("value", None, torch.float32),
        ("value", torch.bfloat16, torch.bfloat16),
        ("lp", torch.float32, torch.float32),
    ):
        model, expected = sharded()
        for dst in (0, 1, None):
            for bucket_bytes in (1, 200, None):
                source = WeightSource(
                    model,
                    what=what,  # type: ignore[arg-type]
                    dtype=dtype,
                    dst=dst,
                    bucket_bytes=bucket_bytes,
                )
                infos = source.metadata()
                assert [info.name for info in infos] == NAMES
                assert {info.dtype for info in infos} == {wanted}
                got = dict(source)
                assert list(got) == (NAMES if dst in (None, rank) else [])
                for info in infos if got else ():
                    right = expected[info.name].bfloat16() if what == "lp" else expected[info.name]
                    assert_same(got[info.name], right.to(wanted))
                    assert got[info.name].shape == info.shape
    leftovers = dist.distributed_c10d._get_default_store().num_keys() if rank == 0 else 0
    dist.barrier()
    assert leftovers < 60, leftovers  # 36 iterations with up to 7 keys each have deleted them


def test_it_yields_on_the_receiver_what_metadata_says() -> None:
    run_ranks(_yields, 2)


def _flat_and_ddp(rank: int) -> None:
    model = whole().bfloat16()
    partition = FlatPartition(model.parameters())
    with torch.no_grad():
        partition.hp_param.add_(1e-4)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    got = dict(WeightSource(model))
    assert list(got) == (NAMES if rank == 0 else [])
    for name, tensor in got.items():
        assert_same(tensor, expected[name])
    values = dict(WeightSource(model, what="value", dst=1))
    assert {tensor.dtype for tensor in values.values()} == ({torch.float32} if rank == 1 else set())
    partition.unlink()

    model = whole(rank)
    ddp = DistributedDataParallel(model)
    attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    got = dict(WeightSource(ddp))
    assert list(got) == (NAMES if rank == 0 else [])
    for name, tensor in got.items():
        assert_same(tensor, model.get_parameter(name).detach())


def _linked(rank: int) -> None:
    model = whole().bfloat16()
    params = list(model.parameters())
    flat = torch.cat([param.detach().float().flatten() for param in params])
    half = len(flat) // 2
    begin, size = (0, half) if rank == 0 else (half, len(flat) - half)
    mine = flat[begin : begin + size].clone()
    link_hp_params(params, mine, {}, None, False, 0, begin, size, dist.group.WORLD)
    source = WeightSource(model, what="value", dst=1)
    with pytest.raises(FragmentError, match="is not known before the first collective read"):
        source.metadata()
    assert [name for name, _ in source] == (NAMES if rank == 1 else [])
    assert [info.dtype for info in source.metadata()] == [torch.float32] * 5


def test_linked_weights_are_placed_as_they_are_read() -> None:
    run_ranks(_linked, 2)


def test_what_every_rank_holds_whole() -> None:
    run_ranks(_flat_and_ddp, 2)


def _changed_only(rank: int, dst: int | None) -> None:
    here = dst in (None, rank)
    model, _ = sharded(dtype=None)
    source = WeightSource(model, changed_only=True, dst=dst, bucket_bytes=100)
    assert [info.name for info in source.changed()] == NAMES
    assert [name for name, _ in source] == (NAMES if here else [])
    assert list(source) == []
    step(model, 0.5, only="up")
    assert [info.name for info in source.changed()] == ["up.weight", "up.bias"]
    step(model, 0.5, only="norm.bias")  # too late for the next, found by the one after it
    assert [name for name, _ in source] == (["up.weight", "up.bias"] if here else [])
    assert [name for name, _ in source] == (["norm.bias"] if here else [])

    with torch.no_grad():  # on one rank alone, and so that a sum over the bits would be the same
        local = model.get_parameter("embed.weight").to_local()  # type: ignore[operator]
        if rank == 1:
            local[0, 0], local[0, 1] = local[0, 1].clone(), local[0, 0].clone()
    with contextlib.suppress(FragmentError), contextlib.closing(iter(source)) as weights:
        if here:
            next(weights)  # and no further: it does not count
        else:
            list(weights)
    assert [name for name, _ in source] == (["embed.weight"] if here else [])
    assert list(source) == []
    assert len(source) == 5


@pytest.mark.parametrize("dst", [0, 1, None])
def test_only_what_changed_is_yielded(dst: int | None) -> None:
    run_ranks(_changed_only, 2, dst)


def _blocked(rank: int, folder: str, dst: int) -> float:
    store = dist.FileStore(str(Path(folder, "own")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    model, expected = sharded(dtype=None)
    source, begin = WeightSource(model, dst=dst, bucket_bytes=300), time.monotonic()
    for turn, (name, tensor) in enumerate(source):
        if turn in (0, 2, 4):  # at the end too: the others must not run on to a collective and wait there
            time.sleep(3)
        assert_same(tensor, expected[name])
    elapsed = time.monotonic() - begin
    dist.barrier()
    dist.destroy_process_group()
    return elapsed


@pytest.mark.parametrize("dst", [0, 1])
def test_a_blocked_receiver_times_nobody_out(tmp_path: Path, dst: int) -> None:
    elapsed = run_ranks(_blocked, 2, str(tmp_path), dst, init=False, timeout=90)
    assert min(elapsed) > 9  # three times longer than any collective may take


class Refused(Exception):
    """What a consumer raises."""


def _ends_early(rank: int, how: str) -> str:
    model, _ = sharded()
    source = WeightSource(model, bucket_bytes=1)
    message = ""
    try:
        if rank:
            list(source)
        elif how == "raise":
            for _ in source:
                raise Refused("no room")
        elif how == "unstarted":
            del_me = iter(source)
            del del_me
        else:
            weights = iter(source)
            for _ in range(5 if how == "at the end" else 1):
                next(weights)
            weights.close()
    except (FragmentError, Refused) as error:
        message = str(error)
    assert len(list(source)) == (5 if rank == 0 else 0)  # the next one is whole again
    return message


@pytest.mark.parametrize("how", ["raise", "unstarted", "close", "at the end"])
def test_a_receiver_that_ends_early_is_told_to_the_others(how: str) -> None:
    mine, other, another = run_ranks(_ends_early, 3, how)
    assert mine == ("no room" if how == "raise" else "")
    assert other == another
    assert "rank 0 ended its iteration over the weights early (its iterator was closed)" in other


def _fails(rank: int) -> str:
    model, _ = sharded()
    with torch.no_grad():
        broken = model.get_parameter("norm.weight")
    if rank == 1:
        broken._local_tensor = broken._local_tensor[:1]
    with pytest.raises(FragmentError) as caught:
        list(WeightSource(model, bucket_bytes=1))
    return str(caught.value)


def test_a_failing_rank_is_an_error_everywhere() -> None:
    first, second = run_ranks(_fails, 2)
    assert first == second
    assert first.startswith("rank 1: ")


def _unlike(rank: int) -> list[str]:
    def rename(name: str) -> str:
        if rank == 1:
            raise KeyError(name)
        return name

    found = []
    for source in (
        WeightSource(nn.Sequential(*(nn.Linear(2, 2) for _ in range(1 + rank))), bucket_bytes=1),
        WeightSource(whole(), rename=rename),
        WeightSource(whole(), what="lp" if rank else "value", dtype=torch.bfloat16 if rank else None),
    ):
        with pytest.raises(FragmentError) as caught:
            list(iter(source))
        found.append(f"{type(caught.value).__name__}: {caught.value}")
    assert len(list(WeightSource(whole()))) == (5 if rank == 0 else 0)
    return found


def test_ranks_that_are_not_alike_are_told_at_once() -> None:
    first, second = run_ranks(_unlike, 2)
    assert first[1] == second[1] == "FragmentError: rank 1: KeyError: 'embed.weight'"
    for item in (0, 2):
        assert all(
            "RankMismatchError: the ranks have weights of different names" in found[item] for found in (first, second)
        )


def _subgroup(rank: int) -> list[str]:
    trainers = dist.new_group([1, 2])
    model = whole()
    if rank == 0:
        return []
    mesh = dist.device_mesh.DeviceMesh.from_group(trainers, "cpu")
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"dst is 0, expected a global rank of the group, \[1, 2\]"):
        WeightSource(model, group=trainers)
    return [name for name, _ in WeightSource(model, group=trainers, dst=2, changed_only=True)]


def test_the_trainer_may_be_a_part_of_the_world() -> None:
    assert run_ranks(_subgroup, 3) == [[], [], NAMES]


def _dies(rank: int, folder: str) -> str:
    where = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        where.with_suffix(".new").write_text(str(store.port))
        where.with_suffix(".new").rename(where)
    else:
        while not where.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(where.read_text()), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    model, _ = sharded()
    weights = iter(WeightSource(model, bucket_bytes=1))
    if rank == 0:
        next(weights)
        time.sleep(1)
        os._exit(1)
    with pytest.raises(FragmentError) as caught:
        list(weights)
    return str(caught.value)


def test_a_receiver_that_dies_with_the_store_is_a_typed_error(tmp_path: Path) -> None:
    _, message = run_ranks(_dies, 2, str(tmp_path), init=False, killed=(0,))
    assert "the store of the default process group does not answer" in message
