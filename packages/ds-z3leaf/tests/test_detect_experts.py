"""Which shapes of experts and of routers count, whatever adapts, packs or wraps them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ds_z3leaf import find_leaf_candidates
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def block(kind: str = "Block", **parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module with these children and parameters, of a class with this name."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x

    made: nn.Module = type(kind, (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def numbered(prefix: str, count: int = 4) -> dict[str, nn.Module | nn.Parameter]:
    return {f"{prefix}{index}": nn.Linear(8, 8) for index in range(count)}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def four() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


class Packed(nn.Module):
    """As GPTQ layers are: the weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = 8, 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))


class Adapted(nn.Module):
    """As peft's layers are."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, names: tuple[str, ...] = ("default",), rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({name: nn.Linear(8, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, 8, bias=False) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        return x


class Linear4bit(nn.Linear):
    """As quantised layers are called."""


def gate(width: int = 4) -> nn.Linear:
    return nn.Linear(8, width)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "children expert_0 to expert_3": (
        lambda: block(gate=gate(), **numbered("expert_")),
        "4 experts of class Linear in 'expert_0..expert_3', router 'gate' with 4 outputs",
    ),
    "children expert0 to expert3": (lambda: block(gate=gate(), **numbered("expert")), "in 'expert0..expert3'"),
    "numbered children of a holder": (
        lambda: block(gate=gate(), experts=block(**numbered(""))),
        "in 'experts.0..3', router 'gate'",
    ),
    "numbered children by another name": (lambda: block(gate=gate(), **numbered("ffn_")), "in 'ffn_0..ffn_3'"),
    "a sequence": (lambda: block(gate=gate(), experts=nn.Sequential(*four())), "4 experts of class Linear"),
    "two holders down": (
        lambda: block(gate=gate(), experts=block(inner=block(local_experts=four()))),
        "in 'experts.inner.local_experts', router 'gate' with 4 outputs",
    ),
    "a list of parameters": (
        lambda: block(gate=gate(), experts=nn.ParameterList(weight(8, 8) for _ in range(4))),
        "4 experts as parameters in 'experts.0..3'",
    ),
    "numbered parameters": (
        lambda: block(
            router=block(weight=weight(4, 8)),
            experts=block(fc1=block(**{f"weight{i}": weight(16, 8) for i in range(4)})),
        ),
        "4 experts as parameters in 'experts.fc1.weight0..weight3', router 'router' with 4 outputs",
    ),
    "stacked rows": (
        lambda: block(router=block(layer=gate()), experts=block(mlp=block(w1=weight(64, 8), w2=weight(64, 8)))),
        "4 experts stacked in 'experts.mlp.w1', router 'router' with 4 outputs",
    ),
    "fused, one holder down": (
        lambda: block(router=gate(), experts=block(mlp=block(w1=weight(4, 16, 8)))),
        "4 experts fused in 'experts.mlp.w1'",
    ),
    "fused, biases beside": (
        lambda: block(router=gate(), experts=block(up=weight(4, 16, 8), up_bias=weight(4, 16))),
        "4 experts fused in 'experts.up', router 'router' with 4 outputs",
    ),
    "fused, packed as buffers": (
        lambda: block(router=gate(), experts=_with_buffer(4, 16, 4)),
        "4 experts fused in 'experts.qweight'",
    ),
    "packed layers": (
        lambda: block(gate=gate(), experts=nn.ModuleList(Packed() for _ in range(4))),
        "4 experts of class Packed in 'experts'",
    ),
    "some quantised": (
        lambda: block(gate=gate(), experts=nn.ModuleList([Linear4bit(8, 8), nn.Linear(8, 8)] * 2)),
        "4 experts of classes Linear, Linear4bit in 'experts'",
    ),
    "some adapted": (
        lambda: block(gate=gate(), experts=nn.ModuleList([Adapted(nn.Linear(8, 8)), *four()[:3]])),
        "4 experts of class Linear in 'experts', router 'gate' with 4 outputs",
    ),
    "adapted router": (
        lambda: block(gate=Adapted(gate()), experts=four()),
        "4 experts of class Linear in 'experts', router 'gate' with 4 outputs",
    ),
    "adapted parameters": (
        lambda: block(gate=gate(), experts=Adapted(Adapted(block(up=weight(4, 16, 8))))),
        "4 experts fused in 'experts.up', router 'gate' with 4 outputs",
    ),
    "experts that compute nothing": (
        lambda: block(router=gate(6), experts=nn.ModuleList([*four(), nn.Identity(), nn.Identity()])),
        "4 experts of class Linear (and 2 without weights) in 'experts', router 'router' with 6 outputs",
    ),
    "helpers among the experts": (
        lambda: block(
            router=gate(), experts=nn.ModuleDict({**dict(zip("abcd", four(), strict=True)), "drop": nn.Dropout()})
        ),
        "router 'router' with 4 outputs",
    ),
    "more outputs than local experts": (
        lambda: block(gate=gate(16), experts=four()),
        "4 experts of class Linear in 'experts', router 'gate' with 16 outputs",
    ),
    "no width to read": (lambda: block(gate=block("Hash"), experts=four()), "in 'experts', router 'gate'"),
    "any name with as many outputs": (lambda: block(classifier=gate(), experts=four()), "router 'classifier' with 4"),
    "a network as router": (
        lambda: block(score=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), gate()), experts=four()),
        "router 'score' with 4 outputs",
    ),
    "the other way round": (lambda: block(wg=weight(8, 4), experts=four()), "router 'wg' with 4 outputs"),
    "a router for each modality": (
        lambda: block(gates=nn.ModuleDict({"text": gate(), "vision": gate()}), experts=four()),
        "router 'gates' with 4 outputs",
    ),
    "a router one level down": (
        lambda: block(control=block(gate=gate()), experts=four()),
        "router 'control.gate' with 4 outputs",
    ),
    "experts' own class": (
        lambda: block(gate=gate(), feed=nn.ModuleList(block("MlpExpert", up=nn.Linear(8, 8)) for _ in range(4))),
        "4 experts of class MlpExpert in 'feed'",
    ),
    "the block's class": (lambda: block("TinyMoE", pick=gate(), branches=four()), "router 'pick' with 4 outputs"),
    "convolutions": (
        lambda: block(router=nn.Conv2d(8, 4, 1), experts=nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(4))),
        "4 experts of class Conv2d in 'experts', router 'router' with 4 outputs",
    ),
    "only the block's class says mixture": (
        lambda: block(
            "MoE",
            router=block(layer=gate()),
            input_linear=block(weight=weight(4, 16, 8)),
            output_linear=block(weight=weight(4, 8, 16)),
        ),
        "4 experts fused in 'input_linear.weight', router 'router' with 4 outputs",
    ),
    "a hash and no parameters": (
        lambda: block("HashMoe", router=nn.Identity(), experts=four()),
        "4 experts of class Linear in 'experts', chosen in its forward without a router",
    ),
    "a mixture of adapters": (
        lambda: block(base_layer=nn.Linear(8, 8), lora_router=gate(), lora_experts=four()),
        "in 'lora_experts', router 'lora_router' with 4 outputs",
    ),
}


def _with_buffer(*shape: int) -> nn.Module:
    made = block("PackedExperts")
    made.register_buffer("qweight", torch.zeros(shape, dtype=torch.uint8))
    return made


@pytest.mark.parametrize(
    "router",
    [
        "gate",
        "gate_fn",
        "selector",
        "routing",
        "routerLinear",
        "wg",
        "switch",
        "dispatcher",
        "gating_network",
        "router",
    ],
)
def test_routers_have_many_names(router: str) -> None:
    (found,) = find_leaf_candidates(nn.Sequential(block(branches=four(), **{router: gate()})))
    assert found.reason == f"4 experts of class Linear in 'branches', router {router!r} with 4 outputs"


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_every_shape(kind: str) -> None:
    make, reason = BLOCKS[kind]
    found = find_leaf_candidates(nn.Sequential(nn.Linear(8, 8), make()))
    assert [candidate.name for candidate in found] == ["1"]
    assert reason in found[0].reason


@pytest.mark.parametrize("kind", BLOCKS)
def test_partitioned_parameters_have_the_same_shapes(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), BLOCKS[kind][0]())
    before = [str(candidate) for candidate in find_leaf_candidates(model)]
    for param in model.parameters():
        param.ds_shape = param.shape  # as ZeRO-3 leaves them
        param.data = torch.empty(0)
    assert [str(candidate) for candidate in find_leaf_candidates(model)] == before


class EveryMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = four()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).sum(0)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gate of one output": lambda: block(gate=gate(1), experts=four()),
    "activation called gate": lambda: block(gate=nn.Sigmoid(), experts=four()),
    "two adapters of rank two": lambda: Adapted(nn.Linear(8, 8), names=("first", "second")),
    "layers beside a gate": lambda: block(gate=gate(), layers=four()),
    "layers in a class called Moe": lambda: block("MoeModel", layers=four(), score=gate()),
    "branches beside a head": lambda: block("TinyMoE", branches=four(), lm_head=gate()),
    "branches that differ": lambda: block(gate=gate(), branches=nn.ModuleList([*four()[:3], nn.Linear(8, 16)])),
    "pyramid": lambda: block(gate=gate(), levels=nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(4))),
    "parameters with three dimensions": lambda: block(gate=gate(), pos=weight(4, 8, 8)),
    "shared expert": lambda: block(shared_expert=nn.Linear(8, 8), shared_expert_gate=gate(1)),
    "no weights": lambda: block(gate=gate(), experts=nn.ModuleList([nn.Identity() for _ in range(4)])),
    "convolution beside weights in a class called Moe": lambda: block(
        "MoeDecoder", conv=block(weight=weight(4, 8, 3)), head=gate()
    ),
    "a class called Moe that calls all of its experts": lambda: EveryMoe(),
    "lazy": lambda: block(gate=gate(), branches=nn.ModuleList(nn.Dropout() for _ in range(4))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_shapes_are_left_alone(kind: str) -> None:
    assert [str(candidate) for candidate in find_leaf_candidates(nn.Sequential(nn.Linear(8, 8), OTHERS[kind]()))] == []


def test_the_parts_of_one_expert_are_no_experts() -> None:
    """A router of two outputs, and a dense expert beside the mixture that has two linear layers."""
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    mixture = block("MoE", gate=gate(2), experts=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    model = block(before=block("Expert", net=net), mixture=mixture)
    assert [candidate.name for candidate in find_leaf_candidates(model)] == ["mixture"]


def test_a_router_in_the_parent() -> None:
    layer = block("Layer", router=gate(), moe=block("Dispatch", local_experts=four()), attention=nn.Linear(8, 8))
    (found,) = find_leaf_candidates(nn.Sequential(layer))
    assert (found.name, found.reason) == (
        "0",
        "4 experts of class Linear in 'moe.local_experts', router 'router' with 4 outputs",
    )


def test_an_adapter_around_the_block_has_its_name() -> None:
    model = nn.Sequential(Adapted(block(router=gate(), expert_w=weight(4, 8, 8))))
    assert [candidate.name for candidate in find_leaf_candidates(model)] == ["0"]


def test_checkpointed_and_compiled_blocks() -> None:
    made = block(gate=gate(), experts=four())
    (found,) = find_leaf_candidates(nn.Sequential(checkpoint_wrapper(made)))
    assert found.module is made
    compiled = block(gate=gate(), experts=four())
    (found,) = find_leaf_candidates(nn.Sequential(torch.compile(compiled, backend="eager")))
    assert found.module is compiled


def test_a_dictionary_of_parts_goes_to_the_module_that_uses_it() -> None:
    layer = block("Layer", moe=nn.ModuleDict({"gate": gate(), "experts": four()}))
    (found,) = find_leaf_candidates(nn.Sequential(layer))
    assert found.name == "0"
    assert found.reason.endswith("not 'moe' alone: a ModuleDict is never called itself")


def test_a_block_that_is_registered_twice_is_found_once() -> None:
    made = block(gate=gate(), experts=four())
    assert [candidate.name for candidate in find_leaf_candidates(nn.ModuleDict({"a": made, "b": made}))] == ["a"]


def find_when_sharded(rank: int) -> list[tuple[str, list[str], list[str]]]:
    from torch.distributed.fsdp import fully_shard

    different = []
    for kind in ("some adapted", "fused, biases beside", "stacked rows", "a list of parameters"):
        model = nn.Sequential(nn.Linear(8, 8), BLOCKS[kind][0]())
        before = [str(candidate).partition(": ")[2] for candidate in find_leaf_candidates(model)]
        for module in model[1].modules():
            if next(module.parameters(recurse=False), None) is not None:
                fully_shard(module)
        fully_shard(model)
        after = [str(candidate).partition(": ")[2] for candidate in find_leaf_candidates(model)]
        if before != after or len(after) != 1:
            different.append((kind, before, after))
    return different


def test_sharded_parameters_have_the_same_shapes() -> None:
    assert run_ranks(find_when_sharded, 2) == [[], []]
