"""A private attribute of DeepSpeed's that a later version names otherwise is named on every rank."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
from engines import ENV, TIMEOUT, Case, backward, make_engine
from oracles import told
from ranks import run_ranks

# By kind of engine, what holds the gradients, and what holds the values.
ATTRIBUTES = {
    "zero2": ("averaged_gradients", "single_partition_of_fp32_groups"),
    "zero3": (
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
        "fp32_partitioned_groups_flat",
    ),
}


def _renamed(_rank: int, stage: str) -> list[str]:
    engine = make_engine(Case(stage, "bf16"))
    ds_fragment.attach(engine)
    backward(engine, 0)
    found = []
    for what, name in zip(("grad", "value"), ATTRIBUTES[stage], strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(engine.optimizer, name)
            found.append(told(lambda what=what: list(ds_fragment.iter_full([engine.module.a.weight], what))))
        assert len(list(ds_fragment.iter_full([engine.module.a.weight], what))) == 1
    assert isinstance(engine.module.a.weight, torch.Tensor)
    return found


@pytest.mark.parametrize("stage", list(ATTRIBUTES))
def test_a_renamed_attribute(stage: str) -> None:
    zero, one = run_ranks(_renamed, 2, stage, env=ENV, timeout=TIMEOUT)
    assert zero == one
    for text, name in zip(zero, ATTRIBUTES[stage], strict=True):
        assert text.startswith("EngineChangedError"), text
        assert f"has no attribute '{name}'" in text
        assert "DeepSpeed 0." in text
