"""Offsets with gaps, as DeepSpeed 0.19.7 and later make them where ``parameter_alignment`` is on."""

from __future__ import annotations

import importlib.util
import inspect
import random
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
from engines import ENV, TIMEOUT, Case, backward, make_engine, trained
from oracles import same
from ranks import run_ranks
from torch import nn

ALIGNED = {"parameter_alignment": True}
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    Case("zero1", "bf16", zero=ALIGNED),
    Case("zero2", "bf16", gas=2, zero=ALIGNED),
    Case("zero2", "bf16", zero=ALIGNED, config=FP32),
    Case("zero1", "bf16", zero={**ALIGNED, "round_robin_gradients": True}),
    Case("zero2", "bf16", gas=2, offload=True, zero=ALIGNED),
]


def knows_alignment() -> bool:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "parameter_alignment" in DeepSpeedZeroConfig.model_fields


def state_piece(optimizer: Any, param: Any) -> torch.Tensor:
    """This rank's part of a state, cut as DeepSpeed's link says; its own reader has that of the first group only."""
    group = next(i for i, params in enumerate(optimizer.bit16_groups) if any(param is other for other in params))
    flat = optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[group]]["exp_avg"]
    if param._hp_mapping is None:
        return flat.new_empty(0)
    address = param._hp_mapping.hp_fragment_address
    return flat.narrow(0, address.start, address.numel)


def aligned(rank: int) -> bool:
    """What is read is what DeepSpeed's own functions read, which know the gaps from `link_hp_params`."""
    if not knows_alignment():
        return False
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    for case in CASES:
        engine = make_engine(case)
        assert any(any(padding) for padding in engine.optimizer.round_robin_bit16_padding), str(case)
        for step in range(2):
            for micro in range(case.gas):
                backward(engine, step, micro)
                if micro < case.gas - 1:
                    engine.step()
            params = trained(engine)
            for name, grad in ds_fragment.iter_full(params.items(), "grad"):
                assert same(grad, safe_get_full_grad(params[name]).float()), (str(case), name)
            engine.step()
            for name, value in ds_fragment.iter_full(params.items()):
                assert same(value, safe_get_full_fp32_param(params[name])), (str(case), name)
            for name, param in params.items():
                assert same(ds_fragment.get_local(param, "exp_avg"), state_piece(engine.optimizer, param)), name
        new = {
            name: torch.randn(param.shape, generator=torch.Generator().manual_seed(1)) for name, param in params.items()
        }
        ds_fragment.set_many([(param, new[name]) for name, param in params.items()])
        for name, param in params.items():
            assert same(safe_get_full_fp32_param(param), new[name]), (str(case), name)
            assert same(param.detach(), new[name].to(param.dtype)), (str(case), name)
        engine.destroy()
    return True


def test_engines_with_aligned_parameters() -> None:
    if not run_ranks(aligned, 2, env=ENV, timeout=TIMEOUT)[0]:
        pytest.skip("this DeepSpeed has no parameter_alignment")


def linked(rank: int) -> bool:
    """Both `link_hp_params` set the same attributes, for random offsets, sizes and slices."""
    import deepspeed.utils.mixed_precision_linkage as theirs
    from ds_fragment import mixed_precision_linkage as ours

    if "param_offsets" not in inspect.signature(theirs.link_hp_params).parameters:
        return False
    draw = random.Random(0)
    for _ in range(200):
        numels = [draw.randrange(6) for _ in range(6)]
        order = draw.sample(range(6), 6)
        offsets, end = [0] * 6, 0
        for i in order:
            end += draw.randrange(3)
            offsets[i] = end
            end += numels[i]
        start = draw.randrange(end) if end else 0
        size = draw.randrange(1, end - start + 3)
        for use_offload in (False, True):
            found = []
            for module in (theirs, ours):
                params = [nn.Parameter(torch.zeros(numel)) for numel in numels]
                flat = torch.arange(float(size))
                module.link_hp_params(
                    params, flat, {}, {}, use_offload, 0, start, size, torch.distributed.group.WORLD, offsets
                )
                mappings = [param._hp_mapping for param in params]
                addresses = [m and (vars(m.lp_fragment_address), vars(m.hp_fragment_address)) for m in mappings]
                indices = [getattr(param, "_index_in_param_group", None) for param in params]
                found.append((addresses, indices))
            assert found[0] == found[1], (numels, offsets, start, size, use_offload)
    return True


def test_link_hp_params_sets_what_deepspeed_sets() -> None:
    if not all(run_ranks(linked, 2, env=ENV, timeout=TIMEOUT)):
        pytest.skip("this DeepSpeed's link_hp_params has no param_offsets")
