"""Leaf candidates in the model types of transformers, plain and under peft's adapters."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")):
    pytest.skip("needs transformers and peft", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_leaves as sweep

pytestmark = pytest.mark.filterwarnings("default")  # of transformers and peft

# The names that the block has in each type, by hand: layers are numbered away.
MIXTURES = {
    "mixtral": {"MixtralSparseMoeBlock": "layers.*.mlp"},
    "qwen3_moe": {"Qwen3MoeSparseMoeBlock": "layers.*.mlp"},
    "deepseek_v3": {"DeepseekV3MoE": "layers.*.mlp"},
    "gpt_oss": {"GptOssMLP": "layers.*.mlp"},
    "jetmoe": {"JetMoeMoE": "layers.*.mlp", "JetMoeAttention": "layers.*.self_attention"},
    "ernie4_5_vl_moe": {"Ernie4_5_VLMoeMoeBlock": "language_model.layers.*.mlp"},
    "llama4_text": {"Llama4TextMoe": "layers.*.feed_forward"},
    "dbrx": {"DbrxFFN": "blocks.*.ffn"},
    "switch_transformers": {"SwitchTransformersSparseMLP": "*.block.*.layer.*.mlp"},
    "gemma4_text": {"Gemma4TextDecoderLayer": "layers.*"},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_are_found_under_the_same_names(kind: str) -> None:
    result = sweep.sweep_one(kind)
    assert result.errors == {}
    assert result.mixture
    found = {name: _without_numbers(first) for name, first, _, _ in result.blocks}
    assert found == MIXTURES[kind]
    assert result.same("lora") == "yes"
    assert result.same("parameters") == ("-" if kind in ("dbrx", "switch_transformers") else "yes")


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() or part in ("encoder", "decoder") else part for part in name.split("."))


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5", "gemma3n_text", "pp_doclayout_v3"])
def test_models_without_mixtures_have_no_candidates(kind: str) -> None:
    result = sweep.sweep_one(kind, ("plain", "lora") if kind != "pp_doclayout_v3" else ("plain",))
    assert result.errors == {}
    assert not result.mixture
    assert all(names == [] for names in result.names.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_type() -> None:
    results = [sweep.sweep_one(kind) for kind in sweep.model_types()]
    built = [result for result in results if result.names.get("plain") is not None]
    assert len(built) > 500
    assert sum(result.mixture for result in built) > 80
    assert sweep.missed_types(results) == []
    assert [result.kind for result in sweep.false_alarms(results)] == []
    assert sweep.changed_types(results) == []
