"""`WeightSource` on transformers, peft, FSDP2, DDP and DeepSpeed. The oracle for LoRA is peft's own merge."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import torch
import torch.distributed as dist
from ds_fragment import FragmentError, InvalidValueError, WeightSource, attach, iter_full
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own

ENV = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "4",
}
TIMEOUT = 280.0
LINEAR: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).train()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2)).train()


def disturbed(model: Any) -> Any:
    """A peft model whose adapters add something: B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                param.copy_(torch.randn(param.shape, generator=generator) / 3)
    return model


def lora(**options: Any) -> Any:
    return disturbed(get_peft_model(llama(), LoraConfig(**{**LINEAR, **options})))


def two_adapters() -> Any:
    model = get_peft_model(llama(), LoraConfig(**LINEAR))
    model.add_adapter("second", LoraConfig(**{**LINEAR, "r": 2, "target_modules": ["q_proj", "k_proj"]}))
    model.add_adapter("idle", LoraConfig(**LINEAR))
    model.base_model.set_adapter(["default", "second"])
    return disturbed(model)


def conv1d() -> Any:
    return disturbed(get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)))


def half() -> Any:
    return disturbed(get_peft_model(llama().bfloat16(), LoraConfig(**LINEAR)))


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lora,
    "rslora": lambda: lora(use_rslora=True),
    "two adapters": two_adapters,
    "conv1d": conv1d,
    "modules to save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "bf16": half,
    "no adapter": llama,
}


def merged(model: Any) -> dict[str, torch.Tensor]:
    """What peft makes of it."""
    model = deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2)


def sharded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2 over recomputing and compiled layers, with their prefixes in the names."""
    mesh, policy = init_device_mesh("cpu", (dist.get_world_size(),)), MixedPrecisionPolicy(param_dtype=dtype)
    layers = blocks_of(model)
    for i, layer in enumerate(layers):
        layers[i] = fully_shard(checkpoint_wrapper(torch.compile(layer)), mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(right)
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _merges(rank: int) -> None:
    for kind, make in MODELS.items():
        right = merged(make())
        before = {name: param.detach().clone() for name, param in make().named_parameters()}
        for wrap in (sharded, DistributedDataParallel, lambda model: model):
            model = wrap(make())
            for what in ("lp", "value"):
                source = WeightSource(model, merge_lora=True, what=what, bucket_bytes=500)  # type: ignore[arg-type]
                infos, found = source.metadata(), dict(source)
                assert [(info.name, info.dtype, info.shape) for info in infos] == [
                    (name, tensor.dtype, tensor.shape) for name, tensor in right.items()
                ], kind
                if rank == 0:
                    same(found, right)
                else:
                    assert not found
            cast = dict(WeightSource(model, merge_lora=True, dtype=torch.float16, dst=None))
            if kind != "bf16":  # there the sum is in fp32 until it is cast
                same(cast, {name: tensor.half() for name, tensor in right.items()})
            plain = dict(iter_full(model, "lp"))
            assert set(plain) == set(before)  # as peft names them
            assert all(torch.equal(plain[name], before[name]) for name in plain)  # nothing in the model has changed
            names = [name for name, _ in WeightSource(model, dst=None)]
            assert names == list(plain)
        torch._dynamo.reset()


def test_merged_weights_are_what_peft_merges() -> None:
    run_ranks(_merges, 2, env=ENV, timeout=TIMEOUT)


def _adapters_alone(rank: int) -> None:
    model = sharded(lora())
    source = WeightSource(model, rename=lambda name: name if ".lora_" in name else None, dst=1)
    names = [info.name for info in source.metadata()]
    assert len(names) == 2 * 2 * 2
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert [name for name, _ in source] == (names if rank == 1 else [])

    changing = WeightSource(model, merge_lora=True, changed_only=True)
    assert len(list(changing)) == (len(changing) if rank == 0 else 0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "layers.1" in name and "q_proj.lora_B" in name:
                param.mul_(2)
    expected = ["model.layers.1.self_attn.q_proj.weight"]
    assert [info.name for info in changing.changed()] == expected
    assert [name for name, _ in changing] == (expected if rank == 0 else [])


def test_the_adapters_alone_and_what_they_change() -> None:
    run_ranks(_adapters_alone, 2, env=ENV, timeout=TIMEOUT)


def tied_head() -> Any:
    return get_peft_model(llama(tied=True), LoraConfig(r=3, target_modules=["lm_head"]))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: lora(use_dora=True), "q_proj' cannot be merged exactly: its adapter 'default' "),
    "embedding": (lambda: lora(target_modules=["embed_tokens"]), "embed_tokens' cannot be merged .*it is a Embedding"),
    "tied": (tied_head, "'base_model.model.lm_head' cannot be merged: its weight is tied"),
    "prompts": (
        lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "the model has prompts of peft's",
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_be_merged_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    source = WeightSource(make(), merge_lora=True)
    for call in (source.metadata, lambda: list(source)):
        with pytest.raises(InvalidValueError, match=message):
            call()
    assert len(WeightSource(make())) > 10  # as it is


def test_lora_bias_is_refused() -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True))
    with pytest.raises(InvalidValueError, match=r"c_attn' cannot be merged exactly: .* has lora_bias=True"):
        WeightSource(model, merge_lora=True).metadata()


def test_an_adapter_that_is_merged_already_is_not_added_again() -> None:
    model = lora()
    right = merged(model)
    model.merge_adapter()
    same(dict(WeightSource(model, merge_lora=True)), right)


def test_a_peft_model_within_another() -> None:
    outer = nn.ModuleDict({"policy": lora(), "value": nn.Linear(2, 1)})
    found = dict(WeightSource(outer, merge_lora=True))
    right = {f"policy.{name}": tensor for name, tensor in merged(lora()).items()}
    same(found, {**right, "value.weight": outer["value"].weight, "value.bias": outer["value"].bias})


def _blocked(rank: int, folder: str) -> None:
    store = dist.FileStore(str(Path(folder, "own")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
    model = sharded(lora(), torch.bfloat16)
    source = WeightSource(model, merge_lora=True, bucket_bytes=2000)
    begin = time.monotonic()
    for turn, _ in enumerate(source):
        if turn in (0, 5):
            time.sleep(5)
    assert time.monotonic() - begin > 10
    message = ""
    try:
        weights = iter(source)
        next(weights, None)
        weights.close()
    except FragmentError as error:
        message = str(error)
    assert ("rank 0 ended its iteration" in message) == (rank == 1)
    assert len(list(source)) == (len(source) if rank == 0 else 0)
    dist.destroy_process_group()


def test_a_blocked_receiver_times_nobody_out(tmp_path: Path) -> None:
    run_ranks(_blocked, 2, str(tmp_path), env=ENV, init=False, timeout=TIMEOUT)


def _deepspeed(rank: int, stage: str, dtype: str) -> None:
    import deepspeed

    sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))
    from engines import Case, make_engine

    engine = make_engine(Case(stage, dtype))
    attach(engine)
    model = engine.module
    for turn in range(2):
        right = {}
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], enabled=stage == "zero3"):
                right[name] = param.detach().clone()
        for dst in (0, None):
            source = WeightSource(engine, dst=dst, bucket_bytes=200)
            infos, found = source.metadata(), dict(source)
            assert [(info.name, info.dtype, info.shape) for info in infos] == [
                (name, tensor.dtype, tensor.shape) for name, tensor in right.items()
            ]
            same(found, right if dst is None or rank == 0 else {})
        values = dict(WeightSource(engine, what="value", dst=None))
        assert {values[name].dtype for name in right if name != "frozen"} == {torch.float32}
        for name, tensor in WeightSource(engine, what="value", dtype=torch.bfloat16, dst=None):
            assert torch.equal(tensor, values[name].bfloat16())
        loss = engine(torch.ones(2, 5, dtype=next(iter(right.values())).dtype) * (turn + 1))
        engine.backward(loss)
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", ["none", "zero1", "zero2", "zero3", "bf16opt"])
def test_deepspeed_lp_weights(stage: str) -> None:
    pytest.importorskip("deepspeed")
    run_ranks(_deepspeed, 2, stage, "bf16", env=ENV, timeout=TIMEOUT)
