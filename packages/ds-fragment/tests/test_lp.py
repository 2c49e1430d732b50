"""`what="lp"`: the weights that the model computes with, whatever engine holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import (
    FlatPartition,
    InvalidValueError,
    attach,
    get_local,
    iter_full,
    safe_set_full_optimizer_state,
    set_local,
    set_many,
    update_many,
)
from fragment_oracle import assert_same
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))


def test_a_plain_parameter_is_itself_whatever_its_master_is() -> None:
    model = net().bfloat16()
    masters = [(param, torch.nn.Parameter(param.detach().float() + 1)) for param in model.parameters()]
    attach(model, torch.optim.SGD([master for _, master in masters], lr=0.1), masters=masters)
    for (name, got), param in zip(iter_full(model, "lp"), model.parameters(), strict=True):
        assert_same(got, param.detach())
        assert got.data_ptr() != param.data_ptr(), name
        assert get_local(param, "lp").data_ptr() == param.data_ptr()


def _write_lp(way: str, param: torch.Tensor) -> None:
    if way == "set_many":
        set_many([(param, torch.ones(2))], "lp")
    elif way == "set_local":
        set_local(param, torch.ones(2), "lp")
    elif way == "update_many":
        update_many([param], lambda _, whole: whole, "lp")
    else:
        safe_set_full_optimizer_state(param, torch.ones(2), "lp")


@pytest.mark.parametrize("way", ["set_many", "set_local", "update_many", "safe_set_full_optimizer_state"])
def test_it_is_only_read(way: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(InvalidValueError, match="what is 'lp', which is only read: write 'value' with refresh_lp=True"):
        _write_lp(way, param)
    assert not param.detach().any()


def _whole_on_every_rank(rank: int) -> None:
    model = net().bfloat16()
    partition = FlatPartition(model.parameters())
    with torch.no_grad():
        partition.hp_param.add_(1)  # the weights do not follow before publish()
    for dst in (None, 1):
        got = dict(iter_full(model, "lp", dst=dst))
        assert list(got) == ([name for name, _ in model.named_parameters()] if dst in (None, rank) else [])
        for name, whole in got.items():
            assert_same(whole, model.get_parameter(name).detach())
    if rank == 0:  # no other rank calls: nothing is communicated
        assert len(list(iter_full(model, "lp"))) == 5
        assert get_local(model[0].weight, "lp").shape == (7, 5)
    partition.publish()
    assert_same(dict(iter_full(model, "lp"))["0.weight"], dict(iter_full(model))["0.weight"].bfloat16())

    model = net(rank)  # DDP broadcasts rank 0's
    ddp = DistributedDataParallel(model)
    attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    for name, whole in iter_full(ddp, "lp"):
        assert_same(whole, model.get_parameter(name).detach())


def test_what_every_rank_holds_whole_is_not_communicated() -> None:
    run_ranks(_whole_on_every_rank, 2)


def _fsdp2(rank: int, dtype: torch.dtype | None, tensor_parallel: bool) -> None:
    model = net()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    if tensor_parallel:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        parallelize_module(model, both["tp"], {"0": ColwiseParallel(output_layouts=Replicate())})
        mesh = both["fsdp"]
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for module in (model[0], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    wanted = dtype or torch.float32

    def check() -> None:
        for name, whole in iter_full(model, "lp"):
            assert_same(whole, expected[name].to(wanted))
        for dst in range(2):
            assert len(list(iter_full(model, "lp", dst=dst, bucket_bytes=40))) == (5 if rank == dst else 0)
        for param in model.parameters():
            assert get_local(param, "lp").dtype == wanted

    check()  # before the first forward, which sets up mixed precision
    output = model(torch.ones(2, 5))
    check()  # while the root is gathered
    output.sum().backward()
    model.unshard()
    model[0].unshard()
    gathered = {name: param.detach().clone() for name, param in model.named_parameters()}
    check()
    if not tensor_parallel:
        for name, whole in iter_full(model, "lp"):
            assert_same(whole, gathered[name])  # what FSDP2 itself gathered
    model.reshard()
    model[0].reshard()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_fsdp2_gives_what_it_gathers(dtype: torch.dtype | None) -> None:
    run_ranks(_fsdp2, 2, dtype, False)


def test_fsdp2_with_tensor_parallelism() -> None:
    run_ranks(_fsdp2, 4, torch.bfloat16, True)


def _fsdp1(rank: int, strategy: str, dtype: torch.dtype | None) -> None:
    model = net()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    options: dict[str, Any] = {"mixed_precision": MixedPrecision(param_dtype=dtype)} if dtype else {}
    fsdp = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        **options,
    )
    attach(fsdp)
    seen: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    for _ in range(2):
        for name, whole in iter_full(fsdp, "lp"):
            assert_same(whole, expected[name].to(dtype or torch.float32))
        fsdp(torch.ones(2, 5, dtype=dtype)).sum()
        assert_same(dict(iter_full(fsdp, "lp"))["0.weight"], seen[-1])  # what the forward pass computed with


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_gives_what_it_gathers(strategy: str, dtype: torch.dtype | None) -> None:
    run_ranks(_fsdp1, 2, strategy, dtype)
