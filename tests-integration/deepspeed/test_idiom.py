"""The loop of most public callers, with a frozen parameter (LoRA) and an unused one (an expert), on every stage."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_train_utils
from engines import ENV, TIMEOUT, Case, backward, make_engine
from ranks import run_ranks

CASES = [
    *(Case(stage, "bf16") for stage in ("zero1", "zero2", "zero3")),
    *(Case(stage, "bf16", offload=True) for stage in ("zero1", "zero2", "zero3")),
    Case("bf16opt", "bf16"),
]


def kinds(utils: Any, engine: Any, key: str) -> dict[str, tuple[int, ...] | None]:
    """By parameter, the shape that the loop sees, or None."""
    found = {}
    for name, param in engine.module.named_parameters():
        read = utils.safe_get_full_grad(param) if key == "grad" else utils.safe_get_full_optimizer_state(param, key)
        if read is not None:
            found[name] = tuple(read.shape)
        else:
            found[name] = None
    return found


def loops(rank: int) -> list[Any]:
    import deepspeed.utils

    answers = []
    for case in CASES:
        engine = make_engine(case)
        everything = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
        for step in range(2):
            backward(engine, step, extra=False)
            ours = kinds(ds_train_utils, engine, "grad")
            keeps_zeros = case.stage != "zero3" and not case.offload
            assert ours == {**everything, "frozen": None, **({} if keeps_zeros else {"extra": None})}, str(case)
            if keeps_zeros and case.stage != "bf16opt":  # elsewhere DeepSpeed gives old ones, or fails
                assert ours == kinds(deepspeed.utils, engine, "grad"), str(case)
            engine.step()
        assert kinds(ds_train_utils, engine, "exp_avg") == {**everything, "frozen": None}, str(case)
        values = {
            name: tuple(ds_train_utils.safe_get_full_fp32_param(p).shape)
            for name, p in engine.module.named_parameters()
        }
        assert values == everything
        answers.append((str(case), ours))
        engine.destroy()
    return answers


def test_the_loop_over_all_parameters() -> None:
    mine, other = run_ranks(loops, 2, env=ENV, timeout=TIMEOUT)
    assert mine == other
