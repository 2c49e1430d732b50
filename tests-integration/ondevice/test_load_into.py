"""Models of transformers, built on meta and loaded from saved files, are those of ``from_pretrained``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")
    accelerate: Any = pytest.importorskip("accelerate")

import torch
from ds_ondevice import LoadError, OnDevice, UnrestorableError, load_into
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

TOKENS = torch.arange(16).reshape(2, 8) % 100
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": (
        "LlamaConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 129,
            "max_position_embeddings": 64,
        },
        "LlamaForCausalLM",
    ),
    "gpt2 tied": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 129, "n_positions": 64},
        "GPT2LMHeadModel",
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)


def build(name: str) -> nn.Module:
    config, arguments, model = CONFIGS[name]
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    return made.eval()


def saved(name: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(11)
    model: Any = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 8)  # biases and norms as well
    model.save_pretrained(folder, **options)
    return folder


def pretrained(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = getattr(transformers, CONFIGS[name][2]).from_pretrained(folder, dtype=dtype)
    return model.eval()


def groups(module: nn.Module) -> list[list[str]]:
    """Names of the state dict that are the same memory."""
    found: dict[int, list[str]] = {}
    for name, tensor in module.state_dict().items():
        found.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(names for names in found.values() if len(names) > 1)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    ours |= {f"buffer {name}": tensor for name, tensor in found.named_buffers()}
    theirs |= {f"buffer {name}": tensor for name, tensor in expected.named_buffers()}
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(ours[name], tensor), name
    assert groups(found) == groups(expected)
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_from_pretrained(tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    folder = saved(name, tmp_path, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == bool(options)
    with OnDevice(dtype, device="meta"):
        model = build(name)
    report = load_into(model, folder, "cpu")
    assert_same(model, pretrained(name, folder, dtype))
    assert (report.tied == ()) == (name == "llama")
    assert report.uninitialized == ()
    if name == "llama":
        assert "model.rotary_emb.inv_freq" in report.computed


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_init_empty_weights(tmp_path: Path, name: str, include_buffers: bool) -> None:
    folder = saved(name, tmp_path)
    expected = pretrained(name, folder)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model: Any = build(name)
    if name == "llama" and include_buffers:  # nobody knows inv_freq now
        with pytest.raises(UnrestorableError) as failed:
            load_into(model, folder, "cpu")
        assert set(failed.value.reasons) == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
        assert all(parameter.is_meta for parameter in model.parameters())
        report = load_into(model, folder, "cpu", strict=False)
        assert set(report.uninitialized) == set(failed.value.reasons)
        for buffer, other in zip(model.buffers(), expected.buffers(), strict=True):
            buffer.copy_(other)
    else:
        load_into(model, folder, "cpu")
    assert_same(model, expected)


def test_a_new_head_is_initialised(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = transformers.LlamaConfig(**CONFIGS["llama"][1], num_labels=3, pad_token_id=0)
    with OnDevice(torch.float32, device="meta"):
        model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(LoadError) as failed:
        load_into(model, folder, "cpu")
    assert (failed.value.missing, failed.value.unexpected) == (("score.weight",), ("lm_head.weight",))
    torch.manual_seed(4)
    report = load_into(model, folder, "cpu", strict=False)
    torch.manual_seed(4)
    eager = transformers.LlamaForSequenceClassification(config)
    assert (report.missing, report.unexpected) == (("score.weight",), ("lm_head.weight",))
    assert torch.equal(model.score.weight, eager.score.weight)
    assert torch.equal(model.model.norm.weight, pretrained("llama", folder).model.norm.weight)


def on_a_rank(rank: int, folder: Path, name: str) -> tuple[int, list[str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    with OnDevice(torch.float32, device="meta"):
        model: Any = build(name)
        for layer in model.model.layers if name == "llama" else model.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    report = load_into(model, folder, "cpu")
    assert report.nbytes == sum(parameter.to_local().nbytes for parameter in model.parameters())
    expected = pretrained(name, folder)
    for (key, ours), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs), key
    for (key, ours), (_, theirs) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), key
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    return report.nbytes, list(report.tied)


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_of_fsdp2(tmp_path: Path, name: str) -> None:
    folder = saved(name, tmp_path, max_shard_size="20KB")
    (first, tied), (second, _) = run_ranks(on_a_rank, 2, folder, name)
    whole = sum(parameter.nbytes for parameter in pretrained(name, folder).parameters())
    assert first + second == whole
    assert abs(first - second) < whole / 10  # neither reads for the other
    assert tied == ([] if name == "llama" else ["lm_head.weight"])
