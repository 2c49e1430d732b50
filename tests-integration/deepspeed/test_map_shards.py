"""`map_shards` and `Shadow` under every ZeRO stage: the same as on dense tensors, and the model computes with it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
from engines import ENV, TIMEOUT, Case, backward, batch, make_engine, train, trained
from oracles import differing, lp_weights
from ranks import run_ranks

CASES = [
    Case("zero1", "bf16"),
    Case("zero2", "fp16"),  # a loss scale of 16
    Case("zero3", "bf16"),
    Case("zero3", "fp16", offload=True),
    Case("bf16opt", "bf16"),
    Case("none", "bf16"),
]


def whole(params: Any, what: str) -> dict[str, torch.Tensor]:
    return {str(name): tensor.clone() for name, tensor in ds_fragment.iter_full(params.items(), what)}


def clamp(_name: object, shard: torch.Tensor) -> torch.Tensor:
    return shard.clamp_(-0.25, 0.25)


def halve(_name: object, shard: torch.Tensor) -> torch.Tensor:
    return shard * 0.5  # exact in every dtype


def check(params: Any, what: str) -> None:
    fns: tuple[Callable[[object, torch.Tensor], torch.Tensor], ...] = (clamp, halve)
    for fn in fns:
        expected = {name: fn(name, tensor) for name, tensor in whole(params, what).items()}
        ds_fragment.map_shards(params.items(), fn, what)
        assert not differing(whole(params, what), expected), (fn.__name__, what)


def _every_stage(rank: int, case: Case) -> None:
    engine = make_engine(case)
    ds_fragment.attach(engine)
    params = trained(engine)
    train(engine, 0)
    backward(engine, 1)
    check(params, "grad")
    engine.step()
    for what in ("exp_avg", "value"):
        check(params, what)
    values = {str(name): tensor.to(case.lp).float() for name, tensor in ds_fragment.iter_full(engine.module)}
    assert not differing(lp_weights(engine), values)
    data = batch(5, 0, rank).to(case.lp)

    def output() -> torch.Tensor:
        with torch.no_grad():
            return engine(data).clone()

    before = output()
    shadow = ds_fragment.Shadow(engine)
    ds_fragment.map_shards(engine, lambda name, shard: shard.zero_() if name in ("scale", "extra") else None)
    assert not output().any(), "the next forward computes with the mapped weights"
    with shadow.swapped():
        assert torch.equal(output(), before)
    assert not output().any()
    train(engine, 2)  # the engine goes on
    assert torch.isfinite(torch.tensor(ds_fragment.total_norm(params.items())))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_of_every_stage(case: Case) -> None:
    run_ranks(_every_stage, 2, case, timeout=TIMEOUT, env=ENV)
