"""On a GPU: the scaler of mixed precision, FSDP2 with CPU offload, and moves of the model between devices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ds_fragment import attach, iter_full, set_many
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from fragment_oracle import assert_same, raised
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def world(tmp_path: object) -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("cuda:nccl,cpu:gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_scaled_gradient() -> None:
    model = nn.Linear(3, 2, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    attach(model, optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with torch.autocast("cuda", torch.float16):
        loss = model(torch.ones(2, 3, device="cuda")).float().sum()
    scaler.scale(loss).backward()
    assert "unscale_" in str(raised(partial(safe_get_full_grad, model.weight)))
    scaler.unscale_(optimizer)
    assert_same(safe_get_full_grad(model.weight), torch.full((2, 3), 2.0, device="cuda"))
    scaler.step(optimizer)
    scaler.update()
    assert "has stepped with it" in str(raised(partial(safe_get_full_grad, model.weight)))


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp2_moves_and_writes(world: None, offload: bool) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).cuda()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model, model):
        fully_shard(module, mp_policy=mixed, offload_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach(model, optimizer)
    data = torch.ones(2, 5, device="cuda")
    for _ in range(2):
        optimizer.zero_grad()
        model(data).float().sum().backward()
        assert len(dict(iter_full(model, "grad"))) == 4
        optimizer.step()
        assert "has stepped with it" in str(raised(partial(safe_get_full_grad, next(model.parameters()))))
        for param in model.parameters():
            assert safe_get_full_optimizer_state(param, "exp_avg").shape == param.shape
        model(data)
        values = dict(iter_full(model))
        set_many([(param, torch.full(param.shape, 0.5)) for param in model.parameters()])
        assert_same(model(data).float().detach(), torch.full((2, 3), 0.5 + 7 * 0.5 * 3.0, device="cuda"))
        for name, param in model.named_parameters():
            set_many([(param, values[name])])
        if not offload:
            model.cpu()
            model.cuda()
            for name, param in model.named_parameters():
                assert_same(safe_get_full_fp32_param(param), values[name])
