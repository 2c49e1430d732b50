"""Rehearsals of transformers' models, and engines that train by the plan."""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")

import torch
from ds_z3leaf import rehearse
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
TIMEOUT = 280.0
TOKENS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = 99


def text(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (1, count), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TOKENS, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**TOKENS, **sizes))


def jetmoe() -> nn.Module:
    sizes = {**TOKENS, "hidden_size": 16, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    del sizes["num_attention_heads"]
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes))


class Ernie(nn.Module):
    """The text model of ERNIE-4.5-VL, whose layers hold a mixture for words and one for images."""

    def __init__(self) -> None:
        super().__init__()
        family = transformers.models.ernie4_5_vl_moe
        config = family.Ernie4_5_VLMoeTextConfig(
            **TOKENS,
            moe_intermediate_size=[16, 16],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        )
        self.body = family.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeTextModel(config)
        self.head = nn.Linear(32, 1)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(**batch).last_hidden_state).square().mean()
        return out


def ernie_batch(with_image: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": text(8, seed)["input_ids"],
        "position_ids": torch.arange(8)[None, None].expand(3, 1, 8).contiguous(),
    }
    if with_image:
        batch["moe_mm_token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]])
    return batch


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=128,
        max_source_positions=50,
        max_target_positions=32,
        num_mel_bins=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        encoder_layerdrop=0.4,
    )
    return transformers.WhisperForConditionalGeneration(config)


def mel(seed: int = 0) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(1, 16, 100, generator=drawn),
        "labels": torch.randint(3, 100, (1, 6), generator=drawn),
    }


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(**TOKENS),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_batch(with_image: bool) -> dict[str, torch.Tensor]:
    batch = text(8)
    if with_image:
        batch["input_ids"][0, :4] = IMAGE
        batch["pixel_values"] = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    return batch


@pytest.mark.parametrize(
    ("make", "batches", "leaves", "device"),
    [
        (llama, [text(5), text(9)], [], "meta"),
        (mixtral, [text(5), text(9)], [], "cpu"),  # its experts are one module, called as a whole
        (qwen2_moe, [text(5), text(9)], [], "cpu"),  # the same, and an expert that every rank calls
        (jetmoe, [text(5), text(9)], [], "cpu"),
        (Ernie, [ernie_batch(False), ernie_batch(True)], ["body.layers.1.mlp"], "cpu"),
        (whisper, [mel()], ["model.encoder"], "meta"),
        (llava, [llava_batch(True), llava_batch(False)], ["model"], "cpu"),
        (llava, [llava_batch(True), llava_batch(True)], [], "cpu"),
    ],
    ids=[
        "llama",
        "mixtral",
        "qwen2 moe",
        "jetmoe",
        "ernie",
        "whisper with layer drop",
        "llava, mixed",
        "llava, images only",
    ],
)
def test_leaves_of_transformers_models(
    make: Callable[[], nn.Module], batches: list[Any], leaves: list[str], device: str
) -> None:
    torch.manual_seed(0)
    random.seed(0)
    model = make()
    plan = rehearse(model, batches)
    assert [leaf.name for leaf in plan.leaves] == leaves
    assert plan.rehearsal is not None
    assert plan.rehearsal.device == device


def test_the_model_computes_the_same_after_a_rehearsal() -> None:
    """Some of transformers' models install hooks and caches in their first forward, here on meta."""
    torch.manual_seed(0)
    model, batch = llava().eval(), llava_batch(True)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    rehearse(model, [batch])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    torch.manual_seed(0)
    expected = llava().eval()(**batch).loss
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_lora_changes_nothing_about_the_leaves() -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Ernie(), peft.LoraConfig(target_modules="all-linear"))
    plan = rehearse(wrapped, [ernie_batch(False), ernie_batch(True)])
    assert [leaf.name for leaf in plan.leaves] == ["base_model.model.body.layers.1.mlp"]


def test_gradient_checkpointing_changes_nothing_about_the_leaves() -> None:
    torch.manual_seed(0)
    model = Ernie()
    model.body.gradient_checkpointing_enable()
    model.train()
    plan = rehearse(model, [ernie_batch(False), ernie_batch(True)])
    assert [leaf.name for leaf in plan.leaves] == ["body.layers.1.mlp"]


class Drops(nn.Module):
    """Layer drop, as in speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.rand([]) < 0.4:
                continue
            x = layer(x)
        return x


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.encoder, self.head = nn.Linear(8, 8), Drops(), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.encoder(x=self.inp(x))).square().mean()
        return out


def mine(rank: int) -> dict[str, tuple[Callable[[], nn.Module], Any]]:
    return {
        "ernie": (Ernie, ernie_batch(rank == 1, seed=rank)),
        "speech": (Speech, {"x": torch.ones(2, 8) + rank}),
        "mixtral": (mixtral, text(5 + rank, seed=rank)),
    }


def loss_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.loss


def train_on_zero_3(rank: int) -> dict[str, tuple[list[str], list[float]]]:
    import deepspeed

    seen = {}
    for name, (make, batch) in mine(rank).items():
        torch.manual_seed(0)
        model = make()
        plan = rehearse(model, [batch])
        plan.apply_deepspeed()
        torch.manual_seed(rank)  # ranks drop different layers
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
        )
        losses = []
        for _ in range(3):
            loss = loss_of(engine(**batch))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        seen[name] = [leaf.name for leaf in plan.leaves], losses
    return seen


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_zero_3_trains_by_the_plan() -> None:
    first, second = run_ranks(train_on_zero_3, 2, timeout=TIMEOUT, env=ENV)
    for answer in (first, second):
        assert {name: leaves for name, (leaves, _) in answer.items()} == {
            "ernie": ["body.layers.1.mlp"],
            "speech": ["encoder"],
            "mixtral": [],
        }
        for name in ("ernie", "mixtral"):  # the other one drops other layers every time
            losses = answer[name][1]
            assert losses[0] > losses[1] > losses[2], (name, losses)


class Tower(nn.Module):
    """Calls its image part only for images."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, words: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.words(words)
        return out if image is None else out + self.image(image)


def rehearse_what_zero_init_made(rank: int) -> tuple[list[str], str, bool]:
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(nn.Linear(8, 8), Tower())
    ones = torch.ones(2, 8)
    plan = rehearse(
        model, [ones], forward=lambda model, batch: model[1](model[0](batch), image=batch if rank == 1 else None)
    )
    assert plan.rehearsal is not None
    partitioned = all(param.numel() == 0 for param in model.parameters())
    return [leaf.name for leaf in plan.leaves], plan.rehearsal.device, partitioned


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_a_partitioned_model_is_rehearsed_on_meta() -> None:
    answers = run_ranks(rehearse_what_zero_init_made, 2, timeout=TIMEOUT, env=ENV)
    assert answers == [(["1"], "meta", True)] * 2


def losses_under_fsdp2(rank: int) -> tuple[list[str], list[float], float]:
    """A rank with an image beside one without; the largest difference to one process that has both batches."""
    torch.manual_seed(0)
    model = llava()
    alone = llava()
    alone.load_state_dict(model.state_dict())
    plan = rehearse(model, [llava_batch(rank == 1)])
    plan.apply_fsdp2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**llava_batch(rank == 1)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        for with_image in (False, True):
            (alone(**llava_batch(with_image)).loss / 2).backward()
        reference.step()
        reference.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    apart = max(float((param.full_tensor() - other).detach().abs().max()) for param, other in pairs)
    return [leaf.name for leaf in plan.leaves], losses, apart


def test_fsdp2_trains_images_beside_text_by_the_plan() -> None:
    for leaves, losses, apart in run_ranks(losses_under_fsdp2, 2, timeout=TIMEOUT):
        assert leaves == ["model"]
        assert losses[0] > losses[1] > losses[2]
        assert apart < 1e-5
