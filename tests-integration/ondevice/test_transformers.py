"""Models of transformers, built on meta from a configuration and materialized, are those of eager construction."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")

import torch
from ds_ondevice import OnDevice, materialize
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
SEED = 7
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
DECODER = {**COMMON, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
TOKENS = {"input_ids": torch.arange(16).reshape(2, 8) % 100}
PIXELS = {"pixel_values": torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
IMAGE = {"image_size": 16, "patch_size": 4}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
MEL = {"input_features": torch.linspace(-1, 1, 2 * 16 * 100).reshape(2, 16, 100)}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
DECODED = {"decoder_input_ids": TOKENS["input_ids"]}

# (configuration class, its arguments, model class, inputs)
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, torch.Tensor]]] = {
    "llama": ("LlamaConfig", DECODER, "LlamaForCausalLM", TOKENS),
    "llama tied": ("LlamaConfig", {**DECODER, "tie_word_embeddings": True}, "LlamaForCausalLM", TOKENS),
    "mistral": ("MistralConfig", DECODER, "MistralForCausalLM", TOKENS),
    "qwen2": ("Qwen2Config", DECODER, "Qwen2ForCausalLM", TOKENS),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {**DECODER, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "Qwen3MoeForCausalLM",
        TOKENS,
    ),
    "mixtral": ("MixtralConfig", {**DECODER, "num_local_experts": 4}, "MixtralForCausalLM", TOKENS),
    "gemma3": (
        "Gemma3TextConfig",
        {**DECODER, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "Gemma3ForCausalLM",
        TOKENS,
    ),
    "phi3": ("Phi3Config", {**DECODER, "pad_token_id": 0}, "Phi3ForCausalLM", TOKENS),
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel", TOKENS),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJForCausalLM", TOKENS),
    "gpt neox": ("GPTNeoXConfig", {**COMMON, "max_position_embeddings": 64}, "GPTNeoXForCausalLM", TOKENS),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "word_embed_proj_dim": 32,
        },
        "OPTForCausalLM",
        TOKENS,
    ),
    "bert": ("BertConfig", COMMON, "BertForMaskedLM", TOKENS),
    "roberta": ("RobertaConfig", COMMON, "RobertaForMaskedLM", TOKENS),
    "vit": (
        "ViTConfig",
        {**{k: v for k, v in COMMON.items() if k != "vocab_size"}, **IMAGE},
        "ViTForImageClassification",
        PIXELS,
    ),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration", {**TOKENS, **DECODED}),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
        "MambaForCausalLM",
        TOKENS,
    ),
    "whisper": ("WhisperConfig", WHISPER, "WhisperForConditionalGeneration", {**MEL, **DECODED}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def eager(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(torch.float32)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | {f"buffer {name}": one for name, one in module.named_buffers(remove_duplicate=False)}


def ties(found: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in found.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def assert_same_module(expected: nn.Module, found: nn.Module) -> None:
    theirs, ours = tensors(expected), tensors(found)
    assert list(theirs) == list(ours)
    assert list(expected.state_dict()) == list(found.state_dict())
    assert ties(theirs) == ties(ours)
    for name, tensor in theirs.items():
        other = ours[name]
        assert type(tensor) is type(other), name
        assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == (
            other.shape,
            other.dtype,
            other.device,
            other.stride(),
        ), name
        assert tensor.requires_grad == other.requires_grad, name
        assert torch.equal(tensor.detach().nan_to_num(), other.detach().nan_to_num()), name
        assert torch.equal(tensor.isnan(), other.isnan()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_as_eager(name: str, dtype: torch.dtype) -> None:
    config, arguments, model, inputs = MODELS[name]

    def build() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**arguments))

    expected = eager(build, dtype)
    torch.manual_seed(SEED)
    with OnDevice(dtype, "cpu"):
        assert_same_module(expected, build())
    with OnDevice(dtype):
        found = build()
    assert all(tensor.is_meta for tensor in tensors(found).values())
    torch.manual_seed(SEED)
    report = materialize(found, "cpu")
    assert report.missing == report.uninitialized == ()
    assert_same_module(expected, found)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        assert torch.equal(expected.eval()(**given).logits, found.eval()(**given).logits)
