"""Leaf candidates in models of other libraries: where their mixtures are, and nothing where there are none."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from ds_z3leaf import find_leaf_candidates
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries


def need(*libraries: str) -> None:
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")


def names(model: nn.Module) -> list[str]:
    return [candidate.name for candidate in find_leaf_candidates(model)]


def assert_holds_the_calls(model: nn.Module, part: str, *inputs: object, **keywords: object) -> None:
    """Run the model: every candidate must be called, and every module with `part` in its name only inside of one."""
    candidates = {id(candidate.module): candidate.name for candidate in find_leaf_candidates(model)}
    inside: list[str] = []
    called: set[str] = set()
    outside: list[str] = []
    parts = 0
    for name, module in model.named_modules():

        def before(module: nn.Module, inputs: object, name: str = name) -> None:
            nonlocal parts
            if id(module) in candidates:
                inside.append(name)
                called.add(name)
            if part in name:
                parts += 1
                if not inside:
                    outside.append(name)

        def after(module: nn.Module, inputs: object, output: object) -> None:
            if id(module) in candidates:
                inside.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    with torch.no_grad():
        model(*inputs, **keywords)
    assert parts > 0
    assert called == set(candidates.values())
    assert outside == []


@pytest.mark.parametrize("residual", [False, True])
def test_deepspeed(residual: bool) -> None:
    need("deepspeed")
    layer = importlib.import_module("deepspeed.moe.layer")
    model = nn.Sequential(nn.Linear(16, 16), layer.MoE(16, nn.Linear(16, 16), num_experts=4, use_residual=residual))
    assert names(model) == ["1.deepspeed_moe"]


def test_language_adapters_of_xmod() -> None:
    need("transformers")
    xmod = importlib.import_module("transformers.models.xmod")
    model = xmod.XmodModel(
        xmod.XmodConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            languages=["en_XX", "de_DE", "fr_XX"],
            default_language="en_XX",
        )
    )
    assert names(model) == ["encoder.layer.0.output", "encoder.layer.1.output"]
    tokens = torch.arange(3, 19).view(2, 8)
    assert_holds_the_calls(model, "adapter_modules", tokens, lang_ids=torch.tensor([0, 2]))


def megatron(rank: int) -> tuple[list[str], list[str]]:
    """The names of the candidates, and of the mixtures by their class."""
    state = importlib.import_module("megatron.core.parallel_state")
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    configs = importlib.import_module("megatron.core.transformer.transformer_config")
    models = importlib.import_module("megatron.core.models.gpt.gpt_model")
    state.initialize_model_parallel()
    config = configs.TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_layer_freq=[0, 1, 1],
        moe_token_dispatcher_type="allgather",
        moe_shared_expert_intermediate_size=32,
        use_cpu_initialization=True,
        add_bias_linear=False,
    )
    spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = models.GPTModel(config, spec, vocab_size=64, max_sequence_length=32)
    return names(model), [name for name, module in model.named_modules() if type(module).__name__ == "MoELayer"]


def test_megatron() -> None:
    need("megatron", "megatron.core")
    ((found, expected),) = run_ranks(megatron, 1)
    assert len(expected) == 2
    assert found == expected


def test_torchtitan() -> None:
    need("torchtitan", "triton", "spmd_types")
    models = importlib.import_module("torchtitan.models.kimi_k2_7")
    made = models.kimi_k2_5_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    with torch.device("meta"):
        model = made.build()
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "MoE"]
    assert len(blocks) > 1
    assert names(model) == blocks
