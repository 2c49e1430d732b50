"""A private attribute of torch or DeepSpeed that a later version names otherwise: one typed error on every rank."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import attach, describe, get_local, iter_full, norms, state_keys
from ds_fragment.engines import base, register_adapter
from ds_fragment.engines.plain import PlainAdapter
from ds_fragment.errors import EngineChangedError, FragmentError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_grad
from fragment_oracle import raised
from ranks import run_ranks
from torch import nn


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def _lacks(told: Any, name: str, rank: int | None = None) -> None:
    assert told is not None
    kind, text = told
    assert kind == "EngineChangedError", told
    assert text.startswith(("" if rank is None else f"rank {rank}: ") + "ds-fragment ")
    assert f"(torch {torch.__version__}" in text
    assert f"has no attribute '{name}'" in text


def _records(module: Any) -> list[Any]:
    """FSDP2's records of the parameters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [record for group in groups for record in group.fsdp_params]


def _fsdp2(rank: int) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    model = _net()
    for module in (*model, model):
        fully_shard(module)
    groups = "_fsdp_param_groups" if hasattr(model._get_fsdp_state(), "_fsdp_param_groups") else "_fsdp_param_group"
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(model[0]._get_fsdp_state(), groups)
        _lacks(raised(lambda: attach(model)), groups)
    attach(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("torch.distributed._composable_state._module_state_mapping")
        for call in (lambda: attach(model), lambda: list(iter_full(model)), lambda: describe(model)):
            _lacks(raised(call), "_module_state_mapping")
    model(torch.ones(3, 4)).sum().backward()
    weight = model[0].weight
    told = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            for record in _records(model[0]):
                patch.delattr(record, "unsharded_accumulated_grad")
        told += [
            raised(lambda: list(iter_full(model, "grad"))),
            raised(lambda: safe_get_full_grad(weight)),
            raised(lambda: norms(model, "grad")),
        ]
        if rank == 1:
            _lacks(raised(lambda: get_local(weight, "grad")), "unsharded_accumulated_grad")
    gradient, kept = weight.grad, weight.grad._local_tensor
    del gradient._local_tensor
    _lacks(raised(lambda: get_local(weight, "grad")), "_local_tensor")
    gradient._local_tensor = kept
    assert len(list(iter_full(model, "grad"))) == 4
    kept = weight._local_tensor
    if rank == 1:
        del weight._local_tensor
    told.append(raised(lambda: safe_get_full_fp32_param(weight)))
    weight._local_tensor = kept
    assert safe_get_full_fp32_param(weight).shape == (6, 4)
    return told


def test_fsdp2() -> None:
    zero, one = run_ranks(_fsdp2, 2)
    assert zero == one
    for told in zero[:3]:
        _lacks(told, "unsharded_accumulated_grad", rank=1)
    _lacks(zero[3], "_local_tensor", rank=1)


def _fsdp1(_rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore", FutureWarning)
    model = FullyShardedDataParallel(_net(), use_orig_params=True, device_id=torch.device("cpu"))
    flat, weight = model._handle.flat_param, next(model.parameters())
    for thing, name in (
        (flat, "_numels_with_padding"),
        (flat, "_params"),
        (weight, "_fsdp_flattened"),
        (model._handle, "flat_param"),
        (model, "_handle"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(thing, name)
            _lacks(raised(lambda: attach(model)), name)
    attach(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(flat, "_sharded_size")
        for call in (lambda: list(iter_full(model)), lambda: get_local(weight), lambda: describe(weight)):
            _lacks(raised(call), "_sharded_size")
    assert len(list(iter_full(model))) == 4


def test_fsdp1() -> None:
    run_ranks(_fsdp1, 2)


class _Stage3:
    """As much of DeepSpeed's optimizer as tells where a value is."""

    def __init__(self) -> None:
        self.grad_position = {7: (0, 0, 3)}
        self.fp32_partitioned_groups_flat = [torch.arange(3.0)]
        self.offload_optimizer = self.swap_optimizer = False
        self._offload_boundary_param_ids = {7}


_Stage3.__module__ = "deepspeed.runtime.zero.stage3"


def _zero3(rank: int) -> list[Any]:
    optimizer: Any = _Stage3()
    param: Any = nn.Parameter(torch.empty(0))
    param.ds_id, param.ds_shape, param.ds_numel = 7, torch.Size([6]), 6
    param.ds_process_group, param._z3_optimizer = dist.group.WORLD, optimizer
    assert safe_get_full_fp32_param(param).tolist() == [0.0, 1.0, 2.0] * 2
    told = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.delattr(optimizer, "fp32_partitioned_groups_flat")
        told.append(raised(lambda: list(iter_full([param]))))
        if rank == 1:
            _lacks(raised(lambda: get_local(param)), "fp32_partitioned_groups_flat")
    other: Any = nn.Parameter(torch.empty(0))
    vars(other).update(vars(param))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(optimizer, "grad_position")
        _lacks(raised(lambda: safe_get_full_fp32_param(other)), "grad_position")
    assert safe_get_full_fp32_param(other).tolist() == [0.0, 1.0, 2.0] * 2
    told.append(raised(lambda: norms([other], "grad")))
    return told


def test_a_stub_of_deepspeed() -> None:
    zero, one = run_ranks(_zero3, 2)
    assert zero == one
    _lacks(zero[0], "fp32_partitioned_groups_flat", rank=1)
    _lacks(zero[1], "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", rank=0)
    assert "deepspeed.runtime.zero.stage3._Stage3 has no attribute" in zero[1][1]


def test_other_failed_look_ups_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="optimizer is a Linear"):
        attach(nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[arg-type]

    class Own(PlainAdapter):
        def claims(self, param: torch.Tensor) -> bool:
            return hasattr(param, "own")

        def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
            found: torch.Tensor = param if what == "value" else param.missing if what == "grad" else {}["missing"]
            return found.detach()

    monkeypatch.setattr(base, "_adapters", list(base._adapters))
    register_adapter(Own())
    param: Any = nn.Parameter(torch.ones(2))
    param.own = True
    for what, kind in (("grad", AttributeError), ("exp_avg", KeyError)):
        with pytest.raises(kind):
            get_local(param, what)
        with pytest.raises(kind):
            list(iter_full([param], what))
    with pytest.raises(FragmentError):
        state_keys(param)
    assert issubclass(EngineChangedError, FragmentError)
