"""On GPUs a read does not wait for its data: another rank's error comes as NaN, and is raised at the next call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, InvalidValueError, checked, iter_full, synchronize
from ds_fragment.engines.dtensor import DTensorAdapter
from ds_fragment.engines.flat import FlatAdapter
from ds_fragment.tensor_fragment import safe_get_full_fp32_param
from fragment_oracle import raised
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
ERROR = ("InvalidValueError", "rank 1: no shard here")


def _fails(*_: object) -> Any:
    raise InvalidValueError("no shard here")


def _fsdp2(rank: int) -> None:
    torch.cuda.set_device(rank)
    model = nn.ParameterList([nn.Parameter(torch.full((6, size), float(size))) for size in (4, 8, 5)]).cuda()
    fully_shard(model, mesh=init_device_mesh("cuda", (2,)))
    first, second, odd = model.parameters()
    pieces = DTensorAdapter.pieces
    for param in (first, odd):  # gathered in place; packed, as three rows of five have no whole number of marks
        for ask in ("read", "synchronize", "all"):
            if rank == 1:
                DTensorAdapter.pieces = _fails
                assert raised(lambda param=param: safe_get_full_fp32_param(param)) == ERROR, "at once"
                DTensorAdapter.pieces = pieces
            else:
                found = safe_get_full_fp32_param(param)
                assert param is odd or found[3:].isnan().all()
                assert param is odd or torch.equal(found[:3].cpu(), torch.full((3, param.shape[1]), 4.0))
            calls = {
                "read": lambda: safe_get_full_fp32_param(second),
                "synchronize": synchronize,
                "all": lambda: list(iter_full(model)),
            }
            assert raised(calls[ask]) == ERROR, "at the next call, on every rank"
            assert torch.equal(safe_get_full_fp32_param(second).cpu(), torch.full((6, 8), 8.0))
            synchronize()
    with checked():  # waits
        DTensorAdapter.pieces = _fails if rank == 1 else pieces
        assert raised(lambda: safe_get_full_fp32_param(first)) == ERROR
        DTensorAdapter.pieces = pieces
        assert torch.equal(safe_get_full_fp32_param(second).cpu(), torch.full((6, 8), 8.0))


def test_fsdp2() -> None:
    run_ranks(_fsdp2, 2)


def _flat(rank: int) -> None:
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    params = [nn.Parameter(torch.full((64,), float(item), device="cuda")) for item in range(8)]
    partition = FlatPartition(params, group)
    local = FlatAdapter.local
    for item, param in enumerate(params):
        assert torch.equal(safe_get_full_fp32_param(param).cpu(), torch.full((64,), float(item)))
    FlatAdapter.local = _fails if rank == 1 else local
    told = raised(lambda: safe_get_full_fp32_param(params[-1]))  # which rank 1 holds whole
    assert told == (ERROR if rank == 1 else None)
    assert raised(synchronize) == ERROR
    told = raised(lambda: safe_get_full_fp32_param(params[0]))  # of which rank 1 has nothing to send
    assert told == (ERROR if rank == 1 else None)
    assert raised(synchronize) is None
    FlatAdapter.local = local
    for item, param in enumerate(params):
        assert torch.equal(safe_get_full_fp32_param(param).cpu(), torch.full((64,), float(item)))
    del partition


def test_what_one_rank_holds_whole() -> None:
    run_ranks(_flat, 2)
