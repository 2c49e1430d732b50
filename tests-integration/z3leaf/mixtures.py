"""Small mixtures of experts that ranks pass through differently: transformers' own, and those of no library.

A `Case` makes the same model on every rank and a different batch for every rank and step. The modules that must be kept
whole are named by hand, so that a test of the detection has something to compare with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, EXPERTS, VOCABULARY = 16, 4, 48

Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model to train on ranks that route differently.

    Attributes:
        make: builds the model; equal on every rank.
        batch: the keywords of ``forward`` for a rank and a step.
        layers: the class of the layers around the leaves, which FSDP2 shards one by one.
        leaves: the names of the modules that must be leaves.
        needs: libraries without which there is no such model.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    layers: str
    leaves: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Libraries that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def loss_of(output: Any) -> torch.Tensor:
    """The loss of a model that has one, else a mean over its last hidden state, whose squares its norm makes equal."""
    if isinstance(output, torch.Tensor):
        return output
    loss = getattr(output, "loss", None)
    return output.last_hidden_state.pow(4).mean() if loss is None else loss


# ---------------------------------------------------------------------------------------------- models of no library


class Expert(nn.Module):
    """A gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w2 = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class ListMixture(nn.Module):
    """Calls those of its experts that a row goes to, and returns its router's logits as well."""

    def __init__(self, top: int = 2, expert: Callable[[], nn.Module] = Expert) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.top = top

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.reshape(-1, WIDTH)
        logits = self.gate(rows)
        weights, chosen = logits.softmax(-1).topk(self.top, dim=-1)  # both (rows, top)
        out = torch.zeros_like(rows)
        for index in chosen.unique().tolist():
            row, place = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, row, self.experts[index](rows[row]) * weights[row, place, None])
        return out.view_as(x), logits


class SkippedMixture(ListMixture):
    """Uses no parameter where a batch has a single row; its output is of the same kind, as DeepSpeed's trace needs."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.shape[1] > 1:
            return super().forward(x)
        return 0.5 * x, 0.0 * x[0, :, :EXPERTS]


class Float64Router(nn.Module):
    """A router that computes in a higher precision than the model, and keeps its own parameter in the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.double(), self.weight.double()).to(x.dtype)


class PreciseMixture(ListMixture):
    """A mixture whose router computes in a higher precision."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Float64Router()


class EitherMixture(nn.Module):
    """Two mixtures, of which one batch takes one: a rank passes the other by."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ListMixture()
        self.image = ListMixture()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.image if x.shape[1] % 2 else self.text)(x)


class Layer(nn.Module):
    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.mlp = mixture()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.norm(x))
        out, logits = self.mlp(x)
        return x + out, logits


class Net(nn.Module):
    """Two layers around mixtures; the loss has an auxiliary part that comes from the routers alone."""

    def __init__(self, mixture: Callable[[], nn.Module], checkpointing: str | None = None) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(mixture) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        auxiliary: Any = 0.0
        for layer in self.layers:
            if self.checkpointing is None:
                x, logits = layer(x)
            else:
                x, logits = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
            auxiliary = auxiliary + logits.softmax(-1).square().mean()
        return self.head(x).square().mean() + 0.1 * auxiliary


def rows(rank: int, step: int) -> Batch:
    """One row a rank, plus the rank's number: the ranks use different experts, and different numbers of them."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {"x": 2 * torch.randn(1, 1 + rank, WIDTH, generator=generator)}


def own(mixture: Callable[[], nn.Module], checkpointing: str | None = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net(mixture, checkpointing)

    return make


def frozen_experts() -> nn.Module:
    net = own(ListMixture)()
    for name, param in net.named_parameters():
        param.requires_grad_(".experts." not in name)
    return net


def frozen_mixture() -> nn.Module:
    net = own(ListMixture)()
    net.layers[0].mlp.requires_grad_(False)  # type: ignore[union-attr]
    return net


def frozen_input() -> nn.Module:
    """What the first leaf is given has no gradient, as where embeddings are frozen."""
    net = own(ListMixture)()
    net.layers[0].requires_grad_(False).mlp.requires_grad_(True)  # type: ignore[union-attr]
    net.inp.requires_grad_(False)  # type: ignore[operator]
    return net


def partly_adapted() -> nn.Module:
    """LoRA on two of the four experts, which then are of another class than the rest."""
    import peft

    net = own(lambda: ListMixture(expert=lambda: nn.Linear(WIDTH, WIDTH)))()
    adapters = peft.LoraConfig(r=2, target_modules=r".*experts\.[01]", init_lora_weights=False)
    return peft.inject_adapter_in_model(adapters, net)


# ------------------------------------------------------------------------------------------- models of transformers


def transformer(name: str, checkpointing: bool = False, **options: Any) -> Callable[[], nn.Module]:
    """A maker of a causal language model of transformers, from a configuration that is small unless `options` says."""

    def make() -> nn.Module:
        import transformers

        small: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "attn_implementation": "eager",
            "initializer_range": 0.2,
            "use_cache": False,
        }
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(small | options))
        model = getattr(transformers, f"{name}ForCausalLM")(config).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        return model

    return make


def ernie_text() -> nn.Module:
    """ERNIE-4.5-VL without its vision tower: text tokens and image tokens have experts of their own."""
    from transformers import Ernie4_5_VLMoeTextConfig, Ernie4_5_VLMoeTextModel

    torch.manual_seed(0)
    config = Ernie4_5_VLMoeTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=[8, 4],
        moe_k=2,
        moe_num_experts=EXPERTS,
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        attn_implementation="eager",
        initializer_range=0.2,
        use_cache=False,
    )
    return Ernie4_5_VLMoeTextModel(config).train()


def tokens(rank: int, step: int) -> Batch:
    """Three tokens, and more on later ranks."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, VOCABULARY, (1, 3 + 2 * rank), generator=generator)
    return {"input_ids": ids, "labels": ids}


def text_and_images(rank: int, step: int) -> Batch:
    """The last rank has image tokens; the others have none."""
    ids = tokens(rank, step)["input_ids"]
    kinds = torch.zeros_like(ids)
    kinds[:, 1:3] = rank
    return {"input_ids": ids, "moe_mm_token_type_ids": kinds}


OWN = ("layers.0.mlp", "layers.1.mlp")
BOTH = ("model.layers.0.mlp", "model.layers.1.mlp")
ATTENTIONS = ("model.layers.0.self_attention", "model.layers.1.self_attention")  # their queries are mixtures
HF = ("transformers",)
MIXTRAL: dict[str, Any] = {"num_local_experts": EXPERTS}
QWEN: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 8, "head_dim": 8}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 8,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT_OSS: dict[str, Any] = {
    "num_local_experts": EXPERTS,
    "head_dim": 8,
    "output_router_logits": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
JETMOE: dict[str, Any] = {"num_local_experts": EXPERTS, "kv_channels": 8}

CASES: dict[str, Case] = {
    "list": Case(own(ListMixture), rows, "Layer", OWN),
    "list, one expert a row": Case(own(lambda: ListMixture(top=1)), rows, "Layer", OWN),
    "list, checkpointing": Case(own(ListMixture, checkpointing="non-reentrant"), rows, "Layer", OWN),
    "list, reentrant checkpointing": Case(own(ListMixture, checkpointing="reentrant"), rows, "Layer", OWN),
    "list, skipped on a rank": Case(own(SkippedMixture), rows, "Layer", OWN),
    "list, frozen experts": Case(frozen_experts, rows, "Layer", OWN),
    "list, frozen mixture": Case(frozen_mixture, rows, "Layer", OWN),
    "list, frozen input": Case(frozen_input, rows, "Layer", OWN),
    "precise router": Case(own(PreciseMixture), rows, "Layer", OWN),
    "two mixtures, one taken": Case(own(EitherMixture), rows, "Layer", OWN),
    "partly adapted": Case(partly_adapted, rows, "Layer", OWN, needs=("peft",)),
    "mixtral": Case(transformer("Mixtral", **MIXTRAL), tokens, "MixtralDecoderLayer", BOTH, needs=HF),
    "mixtral, router loss": Case(
        transformer("Mixtral", **MIXTRAL, output_router_logits=True),
        tokens,
        "MixtralDecoderLayer",
        BOTH,
        needs=HF,
    ),
    "mixtral, eager experts": Case(
        transformer("Mixtral", **MIXTRAL, experts_implementation="eager"),
        tokens,
        "MixtralDecoderLayer",
        BOTH,
        needs=HF,
    ),
    "qwen3, checkpointing": Case(
        transformer("Qwen3Moe", checkpointing=True, **QWEN),
        tokens,
        "Qwen3MoeDecoderLayer",
        BOTH,
        needs=HF,
    ),
    "deepseek-v3": Case(
        transformer("DeepseekV3", **DEEPSEEK), tokens, "DeepseekV3DecoderLayer", ("model.layers.1.mlp",), needs=HF
    ),
    "gpt-oss": Case(transformer("GptOss", **GPT_OSS), tokens, "GptOssDecoderLayer", BOTH, needs=HF),
    "jetmoe": Case(transformer("JetMoe", **JETMOE), tokens, "JetMoeDecoderLayer", ATTENTIONS + BOTH, needs=HF),
    "ernie-4.5-vl": Case(ernie_text, text_and_images, "Ernie4_5_VLMoeDecoderLayer", ("layers.1.mlp",), needs=HF),
}
