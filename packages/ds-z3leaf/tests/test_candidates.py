from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from ds_z3leaf import find_leaf_candidates, mark_leaves
from ds_z3leaf.errors import LeafTypeError
from torch import nn


def block(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module of class Block with these children and parameters."""

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    made = Block()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def experts(number: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(number))


def fused() -> nn.Module:
    return block(gate_up_proj=weight(4, 8, 16), down_proj=weight(4, 16, 8))


MOE = {
    "list": (
        lambda: block(gate=nn.Linear(4, 4), experts=experts()),
        "4 experts of class Sequential in 'experts', router 'gate' with 4 outputs",
    ),
    "dict": (
        lambda: block(
            router=block(classifier=nn.Linear(4, 2)),
            experts=nn.ModuleDict({"e0": nn.Linear(4, 4), "e1": nn.Linear(4, 4)}),
        ),
        "2 experts of class Linear in 'experts', router 'router' with 2 outputs",
    ),
    "router of another class": (
        lambda: block(gate=block(weight=weight(4, 8)), experts=experts()),
        "router 'gate' with 4 outputs",
    ),
    "parameter as router": (
        lambda: block(router_weight=weight(4, 8), experts=experts()),
        "router 'router_weight' with 4 outputs",
    ),
    "one level down": (
        lambda: block(gate=nn.Linear(4, 4), experts=block(local_experts=experts())),
        "4 experts of class Sequential in 'experts.local_experts'",
    ),
    "other name, as many outputs": (
        lambda: block(wg=nn.Linear(4, 4), branches=experts()),
        "in 'branches', router 'wg' with 4 outputs",
    ),
    "fused": (
        lambda: block(gate=nn.Linear(4, 4), experts=fused()),
        "4 experts fused in 'experts.gate_up_proj', router 'gate' with 4 outputs",
    ),
    "fused in place": (
        lambda: block(router=nn.Linear(4, 4), expert_w1=weight(4, 8, 16)),
        "4 experts fused in 'expert_w1', router 'router' with 4 outputs",
    ),
    "of several classes": (
        lambda: block(gate=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 4), nn.Bilinear(4, 4, 4)])),
        "2 experts of classes Bilinear, Linear in 'experts', router 'gate' with 2 outputs",
    ),
    "shared expert beside": (
        lambda: block(
            gate=nn.Linear(4, 4), experts=experts(), shared_expert=nn.Linear(4, 4), shared_expert_gate=nn.Linear(4, 1)
        ),
        "4 experts of class Sequential in 'experts', router 'gate' with 4 outputs",
    ),
}


@pytest.mark.parametrize("kind", MOE)
def test_blocks_are_found_and_explained(kind: str) -> None:
    make, reason = MOE[kind]
    model = nn.Sequential(OrderedDict(embed=nn.Linear(4, 4), layers=nn.Sequential(make(), make())))
    found = find_leaf_candidates(model)
    assert [candidate.name for candidate in found] == ["layers.0", "layers.1"]
    assert found[0].module is model.layers[0]
    for candidate in found:
        assert reason in candidate.reason
        assert str(candidate) == f"{candidate.name} ({type(candidate.module).__name__}): {candidate.reason}"


PLAIN = {
    "transformer": lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
    "stack of layers beside a head": lambda: block(layers=experts(10), head=nn.Linear(4, 10)),
    "gated mlp": lambda: block(gate_proj=nn.Linear(4, 8), up_proj=nn.Linear(4, 8), down_proj=nn.Linear(8, 4)),
    "gated mlp with fused weights": lambda: block(gate_up_proj=weight(2, 8, 16)),
    "gate beside layers of another number": lambda: block(gate=nn.Linear(4, 3), layers=experts(5)),
    "convolutions beside a gate": lambda: block(gate=nn.Linear(4, 4), expert=nn.Conv1d(4, 4, 3)),
    "one expert": lambda: block(gate=nn.Linear(4, 1), experts=experts(1)),
    "experts of several classes beside a gate of another number": lambda: block(
        gate=nn.Linear(4, 3), experts=nn.ModuleList([nn.Linear(4, 4), nn.Bilinear(4, 4, 4)])
    ),
    "experts without a router": lambda: block(experts=experts()),
    "experts without parameters": lambda: block(gate=nn.Linear(4, 2), experts=nn.ModuleList([nn.GELU(), nn.GELU()])),
    "a list of gates": lambda: nn.ModuleDict({"gate": nn.Linear(4, 4), "experts": experts()}),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_other_modules_are_left_alone(kind: str) -> None:
    assert [str(candidate) for candidate in find_leaf_candidates(nn.Sequential(PLAIN[kind]()))] == []


def test_only_the_outermost_block_counts() -> None:
    inner = block(gate=nn.Linear(4, 4), experts=experts())
    outer = block(
        router=nn.Linear(4, 2), experts=nn.ModuleList([inner, block(gate=nn.Linear(4, 4), experts=experts())])
    )
    outer.experts = nn.ModuleList([inner, inner.__class__()])
    assert [candidate.name for candidate in find_leaf_candidates(nn.Sequential(outer))] == ["0"]


def test_the_model_itself_may_be_one() -> None:
    found = find_leaf_candidates(block(gate=nn.Linear(4, 4), experts=experts()))
    assert [str(candidate)[:29] for candidate in found] == ["(the model itself) (Block): 4"]


def test_parameters_on_meta_and_partitioned_ones() -> None:
    with torch.device("meta"):
        assert len(find_leaf_candidates(block(gate=nn.Linear(4, 4), experts=fused()))) == 1
    partitioned = fused()
    for param in partitioned.parameters():
        param.ds_shape = param.shape  # as ZeRO-3 leaves them
        param.data = torch.empty(0)
    assert len(find_leaf_candidates(block(gate=nn.Linear(4, 4), experts=partitioned))) == 1


def test_candidates_can_be_marked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), block(gate=nn.Linear(4, 4), experts=experts()))
    assert mark_leaves(model, modules=[candidate.module for candidate in find_leaf_candidates(model)]) == [model[1]]


def test_a_model_is_a_module() -> None:
    with pytest.raises(LeafTypeError, match="model is a NoneType"):
        find_leaf_candidates(None)  # type: ignore[arg-type]
