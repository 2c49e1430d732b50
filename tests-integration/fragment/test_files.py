"""Files that go from and to transformers, peft, accelerate, huggingface_hub and pipelines, bit by bit.

The oracle is a plain model that transformers itself writes with ``save_pretrained`` or reads with ``from_pretrained``.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", minversion="5")

import torch
import torch.distributed as dist
from ds_fragment import Shadow, attach, load_full, save_full
from ds_fragment.errors import CheckpointError, InvalidValueError
from ranks import run_ranks
from safetensors.torch import load_file, load_model, save_file
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own

ENV = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "4",
    "HF_HUB_OFFLINE": "1",
}
TIMEOUT = 280.0  # the first start on a machine compiles DeepSpeed's communication operator
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 32, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, **WORDS, "num_key_value_heads": 1}
IMAGES = {**SIZES, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
BLOCKS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
PAIR = {"vocab_size": 32, "d_model": 16, **BLOCKS, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}
CONV = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

GPT2 = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
CLIP = {"text_config": {**SIZES, **WORDS}, "vision_config": IMAGES, "projection_dim": 8}
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", **IMAGES},
}
GEMMA3 = {"text_config": {**TEXT, "head_dim": 8}, "vision_config": IMAGES, "mm_tokens_per_image": 4}

# The classes of the model and of its configuration, and what that is given.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **WORDS}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **EXPERTS, "head_dim": 8, "num_experts": 4}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **EXPERTS, **LATENT, **GROUPS}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**TEXT, "head_dim": 8, "num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**PAIR, "max_position_embeddings": 16}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**PAIR, **AUDIO}),
    "bert": ("BertForMaskedLM", "BertConfig", {**SIZES, **WORDS}),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**SIZES, **WORDS}),
    "clip": ("CLIPModel", "CLIPConfig", CLIP),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**SIZES, **CONV, **POSITIONS, "vocab_size": 32}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA),
    "gemma3 with images": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3),
}


def build(family: str, seed: int, **changed: Any) -> Any:
    """A model with random parameters."""
    kind, config, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**options, **changed}))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    return model


def assert_equal(model: nn.Module, other: nn.Module, dtype: torch.dtype | None = None) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        rounded = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert torch.equal(found[name], rounded.to(found[name].dtype)), name


def assert_reads(folder: Path, model: Any, **options: Any) -> None:
    """Have transformers read a folder, and compare with the model."""
    read, told = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    assert_equal(read, model, options.get("dtype"))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_saved(family: str, tmp_path: Path) -> None:
    model = build(family, 0)
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_full(model, path)
    assert_reads(tmp_path, model)
    save_full(model, path, max_shard_bytes=4000)
    assert not path.exists()
    assert_reads(tmp_path, model)
    save_full(model, path, dtype=torch.bfloat16)
    assert_reads(tmp_path, model, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_loaded(family: str, tmp_path: Path) -> None:
    for i, options in enumerate(({}, {"max_shard_size": "20KB"})):
        model, other = build(family, i), build(family, 7)
        model.save_pretrained(tmp_path / str(i), **options)
        load_full(other, tmp_path / str(i))
        assert_equal(other, model)


@pytest.mark.parametrize("family", ["llama", "tied llama", "mixtral", "bert", "t5", "gpt2"])
def test_a_base_models_file_and_one_with_a_head(family: str, tmp_path: Path) -> None:
    model, other = build(family, 0), build(family, 1)
    bases = [getattr(each, each.base_model_prefix, each) for each in (model, other)]  # T5 has none
    bases[0].save_pretrained(tmp_path / "base")
    load_full(other, tmp_path / "base", strict=False)
    assert_equal(bases[1], bases[0])
    other = build(family, 2)
    model.save_pretrained(tmp_path / "head")
    load_full(getattr(other, other.base_model_prefix, other), tmp_path / "head", strict=False)
    assert_equal(getattr(other, other.base_model_prefix, other), bases[0])


def test_a_repository_in_the_cache(tmp_path: Path) -> None:
    model, other = build("mixtral", 0), build("mixtral", 1)
    root = tmp_path / "models--some--mixtral"
    snapshot = root / "snapshots" / "0123abcd"
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abcd")
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    for i, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(root / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(root / "blobs" / f"{i:040x}", snapshot))
    for where in (root, snapshot, snapshot / "model.safetensors.index.json"):
        load_full(other, where)
        assert_equal(other, model)


# Files that do not fit.


def test_another_family(tmp_path: Path) -> None:
    build("gpt2", 0).save_pretrained(tmp_path)
    with pytest.raises(InvalidValueError, match=r"missing 21 \(lm_head.weight.*unexpected 28 \(transformer.h.0"):
        load_full(build("llama", 0), tmp_path)
    with pytest.raises(InvalidValueError, match="no name in common"):
        load_full(build("llama", 0), tmp_path, strict=False)


def test_another_vocabulary(tmp_path: Path) -> None:
    build("llama", 0, vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(InvalidValueError, match=r"'lm_head.weight' has shape \(40, 16\) in the file and \(32, 16\)"):
        load_full(build("llama", 0), tmp_path)


def test_other_experts(tmp_path: Path) -> None:
    build("mixtral", 0, num_local_experts=8).save_pretrained(tmp_path)
    model = build("mixtral", 0)
    with pytest.raises(InvalidValueError, match=r"gate_up_proj' has shape \(8, 48, 16\) in the file and \(4, 48, 16\)"):
        load_full(model, tmp_path)
    with pytest.raises(InvalidValueError, match=r"missing 6 .*unexpected 50 .*experts.0.w1"):
        load_full(model, tmp_path, map_names={})
    assert_equal(model, build("mixtral", 0))


def test_an_expert_is_missing(tmp_path: Path) -> None:
    build("mixtral", 0).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"7 tensors.* cannot make 'model.layers.1.mlp.experts.gate_up_proj'"):
        load_full(build("mixtral", 0), tmp_path)


def test_weights_in_fp8(tmp_path: Path) -> None:
    model = build("llama", 0).bfloat16()
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    load_full(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].bfloat16()), name
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file({**stored, scale: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidValueError, match=rf"missing none, unexpected 1 \({scale}\)"):
        load_full(model, tmp_path)


def test_offloaded_models(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    save_full(build("llama", 0), tmp_path / "model.safetensors")
    models = [accelerate.cpu_offload(build("llama", 0), torch.device("cpu")), build("llama", 0)]
    accelerate.disk_offload(models[1], str(tmp_path / "offloaded"), torch.device("cpu"))
    for model in models:
        with pytest.raises(InvalidValueError, match="on the meta device"):
            save_full(model, tmp_path / "other.safetensors")
        with pytest.raises(InvalidValueError, match="on the meta device"):
            load_full(model, tmp_path / "model.safetensors")


# Other readers.


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 4000])
@pytest.mark.parametrize("family", ["tied llama", "bert", "resnet"])
def test_other_libraries_read_it(family: str, max_shard_bytes: int, tmp_path: Path) -> None:
    import accelerate
    import huggingface_hub

    model = build(family, 0)
    save_full(model, tmp_path / "model.safetensors", max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 4000)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    if len(files) == 1:
        other = build(family, 1)
        assert load_model(other, files[0]) == (set(), [])
        assert_equal(other, model)
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)
    empty.tie_weights()
    dispatched = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    assert_equal(dispatched, model)
    for load in (accelerate.load_checkpoint_in_model, huggingface_hub.load_torch_model):
        other = build(family, 1)
        load(other, str(tmp_path), strict=False)  # neither knows ties
        assert_equal(other, model)


# Sharded models.


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__.endswith(("Layer", "MambaBlock")):
            fully_shard(module)
    return fully_shard(model)


def fsdp2_of_the_base(model: Any) -> Any:
    """Of a class that FSDP2 makes, inside too, by which transformers does not find its conversions."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.base_model)
    return fully_shard(model)


def fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith(("Layer", "MambaBlock"))}
    policy, device = ModuleWrapPolicy(kinds), torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    attach(wrapped)
    return wrapped


def compiled_ddp(model: Any) -> Any:
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")


def prepared(model: Any) -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True).prepare(model)


def fabric(model: Any) -> Any:
    from lightning.fabric import Fabric

    made = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    made.launch()
    return made.setup(model)


def zero3(model: Any) -> Any:
    """In bf16, with fp32 masters."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    params = [param for param in model.parameters() if param.requires_grad]
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(params), config=config)[0]


SEVERAL = ["tied llama", "mixtral", "whisper", "bert", "mamba", "gemma3 with images"]
WRAPS: dict[Callable[[Any], Any], list[str]] = {
    fsdp2: SEVERAL,
    fsdp2_of_the_base: ["gpt-neox", "llava"],
    fsdp1: SEVERAL,
    compiled_ddp: SEVERAL[:2],
    prepared: SEVERAL[:1],
    fabric: SEVERAL[:1],
    zero3: ["tied llama", "mixtral", "bert"],  # what is frozen, as a part of whisper, is in bf16 alone
}


def there_and_back(rank: int, at: int, top: str) -> dict[str, str]:
    """Load what transformers saved, and save it for transformers."""
    warnings.simplefilter("ignore")
    wrap, told = list(WRAPS)[at], {}
    for family in WRAPS[wrap]:
        folder, plain = Path(top, family), build(family, 0)
        if rank == 0:
            plain.save_pretrained(folder / "theirs", max_shard_size="20KB")
            plain.config.save_pretrained(folder)
        dist.barrier()
        try:
            model = wrap(build(family, 1))
            load_full(model, folder / "theirs")
            save_full(model, folder / "model.safetensors")
            if rank == 0:
                assert_reads(folder, plain)
        except Exception:
            told[family] = traceback.format_exc()
        torch._dynamo.reset()
    return told


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_there_and_back(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    for told in run_ranks(there_and_back, 2, list(WRAPS).index(wrap), str(tmp_path), timeout=TIMEOUT, env=ENV):
        assert not told, "\n".join(f"{family}:\n{error}" for family, error in told.items())


def averages(rank: int, top: str) -> None:
    folder, model = Path(top), fsdp2(build("tied llama", 0))
    shadow = Shadow(model)
    load = build("tied llama", 1)
    save_full(load, folder / "other.safetensors")
    load_full(model, folder / "other.safetensors")
    shadow.update(0.5)
    save_full(model, folder / "model.safetensors", values=shadow)
    if rank == 0:
        averaged = torch.optim.swa_utils.AveragedModel(
            build("tied llama", 0), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        for model in (build("tied llama", 0), load):  # the first is copied
            averaged.update_parameters(model)
        averaged.module.config.save_pretrained(folder)
        assert_reads(folder, averaged.module)


def test_averages(tmp_path: Path) -> None:
    run_ranks(averages, 2, str(tmp_path))
    model = build("tied llama", 0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(build("tied llama", 1))
    save_full(averaged, tmp_path / "model.safetensors")
    assert_reads(tmp_path, averaged.module)


# Adapters.


def lora(seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama", 0), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.normal_()
    return model


def adapters(rank: int, at: int, top: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    plain, folder = lora(1), Path(top)
    if rank == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    model = lora(2)
    peft_names = {
        name.replace(".default", "").replace(".modules_to_save", ""): name for name, _ in model.named_parameters()
    }
    model = (fsdp2, zero3)[at](model)
    load_full(model, folder, map_names=peft_names, strict=False)
    params = dict(model.module.named_parameters() if at else model.named_parameters())
    chosen = {short: params[name] for short, name in peft_names.items() if params[name].requires_grad}
    for form in (chosen, list(chosen.items())):
        save_full(form, folder / "adapter_model.safetensors")
        if rank == 0:
            read = get_peft_model_state_dict(PeftModel.from_pretrained(build("llama", 0), folder))
            expected = get_peft_model_state_dict(plain)
            assert read.keys() == expected.keys() == chosen.keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
        dist.barrier()
    with pytest.raises(InvalidValueError, match="no name in common"):
        load_full(model, folder, strict=False)


@pytest.mark.parametrize("at", [0, 1], ids=["fsdp2", "zero3"])
def test_adapters(at: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_ranks(adapters, 2, at, str(tmp_path), timeout=TIMEOUT, env=ENV)


# Pipelines.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 8)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layers(self.embed(x)) * self.scale)
        return out


def stages(rank: int, top: str) -> None:
    from torch.distributed.pipelining import SplitPoint, pipeline

    spec = {"layers.1": SplitPoint.BEGINNING}
    pipe = pipeline(Net(), mb_args=(torch.arange(4),), split_spec=spec)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    save_full(stage, Path(top, "stage.safetensors"))
    save_full(stage.submod, Path(top, "submod.safetensors"))
    expected = Net().state_dict()
    for name in ("stage", "submod"):
        whole = Net()
        with torch.no_grad():
            for param in whole.parameters():
                param.zero_()
        load_full(whole, Path(top, f"{name}.safetensors"))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in whole.state_dict().items())
    with torch.no_grad():
        for param in stage.submod.parameters():
            param.zero_()
    load_full(stage, Path(top, "submod.safetensors"))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stage.submod.state_dict().items())


def test_pipeline_stages(tmp_path: Path) -> None:
    run_ranks(stages, 2, str(tmp_path))


def deepspeed_stages(rank: int, top: str) -> None:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo")
    net = PipelineModule([LayerSpec(nn.Linear, 4, 4) for _ in range(4)], num_stages=2, loss_fn=nn.MSELoss())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
    }
    engine = deepspeed.initialize(model=net, config=config, model_parameters=net.parameters())[0]
    own = {name: param.detach().clone() for name, param in net.named_parameters()}
    assert set(own) == {f"{layer}.{kind}" for layer in (2 * rank, 2 * rank + 1) for kind in ("weight", "bias")}
    save_full(engine, Path(top, "model.safetensors"))
    whole = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    load_full(whole, top)
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in own.items())
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    load_full(engine, top)
    assert all(torch.equal(dict(net.named_parameters())[name], tensor) for name, tensor in own.items())


def test_deepspeeds_pipeline_stages(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_ranks(deepspeed_stages, 2, str(tmp_path), timeout=TIMEOUT, env=ENV)
