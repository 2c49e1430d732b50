"""What the source of a block says: whether it routes, whether it is called, and whether on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ds_z3leaf import find_leaf_candidates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def four(width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(4))


def names(model: nn.Module) -> list[str]:
    return [candidate.name for candidate in find_leaf_candidates(model)]


class Unnamed(nn.Module):
    """A mixture that no name tells from anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(8, 4)
        self.branches = four()


class ByIndex(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        return self.branches[int(self.pick(x).sum(0).argmax())](x)


class ByRows(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.pick(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for index, branch in enumerate(self.branches):
            rows, slot = torch.where(choice == index)
            out.index_add_(0, rows, branch(x[rows]) * weight[rows, slot, None])
        return out


class ByLoop(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        best, choice = self.pick(x).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            mask = choice == index
            out[mask] = self.branches[index](x[mask]) * best[mask, None]
        return out


class ByCondition(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        open_ = self.pick(x).sigmoid().mean(0) > 0.5
        out = x
        for index, branch in enumerate(self.branches):
            if open_[index]:
                out = out + branch(x)
        return out


class ByMethods(Unnamed):
    def choose(self, x: Tensor) -> Tensor:
        return self.pick(x).argmax(-1)

    def one(self, x: Tensor, index: int, choice: Tensor) -> Tensor:
        return self.branches[index](x[choice == index])

    def forward(self, x: Tensor) -> Tensor:
        choice = self.choose(x)
        return torch.cat([self.one(x, index, choice) for index in range(4)])


class LeftOrRight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(8, 2)
        self.left, self.right = nn.Bilinear(8, 8, 8), nn.Bilinear(8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.pick(x).mean(0).argmax() == 0:
            return self.left(x, x)
        return self.right(x, x)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(8, 4)
        self.w = nn.Parameter(torch.empty(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,bij->bj", x, self.w[self.pick(x).argmax(-1)])


class ShortSelf(Unnamed):
    def forward(s, x: Tensor) -> Tensor:
        return s.branches[int(s.pick(x).sum(0).argmax())](x)


@pytest.mark.parametrize("kind", [ByIndex, ShortSelf, ByRows, ByLoop, ByCondition, ByMethods, LeftOrRight, Fused])
def test_a_source_that_routes_needs_no_names(kind: type[nn.Module]) -> None:
    assert names(nn.Sequential(nn.Linear(8, 8), kind())) == ["1"]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = four()
        self.pick = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = branch(x).relu()
        return self.pick(x).argmax(-1)


class ResidualStack(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = x + self.branches[index](x)
        return self.pick(x).topk(2).indices


class GatedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.blocks_of_it = four()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate(x).sigmoid()
        for index, block in enumerate(self.blocks_of_it):
            x = x + scale[:, index, None] * block(x)
        return x


class HeadsBesideAClassifier(Unnamed):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        label = self.pick(x).argmax(-1)
        return label, [branch(x) for branch in self.branches]


class TopKOfTheOutput(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([branch(x) for branch in self.branches]).mean(0)
        return self.pick(x).topk(2).values


class MoeModel(nn.Module):
    """Its class says Moe; its layers are a stack all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = four()
        self.score = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


class PerHead(nn.Module):
    """A gate for each attention head beside weights for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.empty(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hij,bh->bj", x, self.weight, self.gate(x).sigmoid())


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.gate = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.norm2(self.norm1(x)))


@pytest.mark.parametrize(
    "kind",
    [Stack, ResidualStack, GatedStack, HeadsBesideAClassifier, TopKOfTheOutput, MoeModel, PerHead, TwoNorms],
)
def test_stacks_and_heads_are_left_alone(kind: type[nn.Module]) -> None:
    assert [str(candidate) for candidate in find_leaf_candidates(nn.Sequential(nn.Linear(8, 8), kind()))] == []


class HashMixture(nn.Module):
    """The caller, or a hash of the input, says which expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = four()

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.experts[domain](x)


class AllExperts(HashMixture):
    def forward(self, x: Tensor, domain: int) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


def test_experts_may_be_chosen_without_a_router() -> None:
    (found,) = find_leaf_candidates(nn.Sequential(HashMixture()))
    assert found.reason == "4 experts of class Linear in 'experts', chosen in its forward without a router"
    assert names(nn.Sequential(AllExperts())) == []


class Adapters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"de": nn.Linear(8, 8), "fr": nn.Linear(8, 8)})


class ByLanguage(Adapters):
    def forward(self, x: Tensor, language: str) -> Tensor:
        return self.adapters[language](x)


class ByLanguageOfRows(Adapters):
    def forward(self, languages: Tensor, x: Tensor) -> Tensor:
        return self.each(languages, x)

    def each(self, languages: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, language in enumerate(self.adapters.keys()):
            mask = languages == index
            out[mask] += self.adapters[language](x[mask])
        return out


class ByLanguageOfKeptRows(ByLanguageOfRows):
    def each(self, languages: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, language in enumerate(self.adapters.keys()):
            mask = languages == index
            rows = x[mask]
            out[mask] += self.adapters[language](rows)
        return out


class Counted(Adapters):
    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [self.adapters[name](features[index]) for index, name in enumerate(self.adapters)]


class ByStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = four()

    def forward(self, x, step=None):  # type: ignore[no-untyped-def]
        return self.heads[step](x)


class ByCountedStep(ByStep):
    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.heads[step](x)


@pytest.mark.parametrize("kind", [ByLanguage, ByLanguageOfRows, ByLanguageOfKeptRows])
def test_branches_may_be_chosen_by_an_argument(kind: type[nn.Module]) -> None:
    (found,) = find_leaf_candidates(nn.Sequential(kind()))
    assert found.reason == "2 experts of class Linear in 'adapters', chosen in its forward without a router"


def test_branches_in_a_fixed_order_are_no_choice() -> None:
    assert names(nn.Sequential(Counted(), ByStep(), ByCountedStep())) == []


def test_experts_are_known_by_name_where_there_is_no_source() -> None:
    code: dict[str, type[nn.Module]] = {"Module": nn.Module}
    exec("class Hashed(Module):\n    def forward(self, x):\n        return x", code)
    model = code["Hashed"]()
    model.experts = four()
    assert [str(candidate) for candidate in find_leaf_candidates(model)] == [
        "(the model itself) (Hashed): 4 experts of class Linear in 'experts', chosen in its forward without a router"
    ]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = four()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(self.gate(x).sum(0).argmax())](x)

    def mapped(self, x: Tensor) -> Tensor:
        return self(x)


class Raises(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Cannot be called."""
        raise NotImplementedError("use mapped()")


class Around(nn.Module):
    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.moe = block if block is not None else Block()
        self.other = nn.Linear(8, 8)
        self.sparse, self.checkpointing = True, False


class CallsAMethod(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe.mapped(x)


class CallsForward(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe.forward(x)


class CallsParts(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe.experts[int(self.moe.gate(x).argmax())](x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (CallsAMethod, "its forward is never called: CallsAMethod calls .mapped()"),
        (CallsForward, "its forward is never called: CallsForward calls .forward()"),
        (CallsParts, "its forward is never called: CallsParts calls .experts() and calls .gate()"),
    ],
)
def test_what_is_never_called_moves_up(kind: type[Around], why: str) -> None:
    (found,) = find_leaf_candidates(nn.Sequential(kind()))
    assert found.name == "0"
    assert f"; not 'moe' alone: {why}" in found.reason


def test_a_forward_that_only_raises_moves_up() -> None:
    (found,) = find_leaf_candidates(nn.Sequential(Calls(Raises())))
    assert (found.name, found.reason.partition("; ")[2]) == ("0", "not 'moe' alone: its forward only raises")


class Calls(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


class Checkpoints(Around):
    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(self.moe, x, use_reentrant=False)
        return self.moe(x)


class Closure(Around):
    def forward(self, x: Tensor) -> Tensor:
        def run(value: Tensor) -> Tensor:
            return self.moe(value)

        return checkpoint(run, x, use_reentrant=False)


class OnlyIfSparse(Around):
    def forward(self, x: Tensor, output_logits: bool = False) -> Tensor:
        if not self.sparse:
            return self.other(x)
        if self.moe is not None:
            x = self.moe(x)
        if output_logits:
            x = x + 1
        return x


class BothBranches(Around):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.moe(x) if mask is None else self.moe(x * mask)


class AnotherCondition(Around):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and mask.any():
            x = self.other(x)
        if x.dim() > 2 or isinstance(mask, list):
            raise ValueError(x.shape)
        return self.moe(x)


class OwnLoop(Around):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.moe(x)
        return x


@pytest.mark.parametrize("kind", [Calls, Checkpoints, Closure, OnlyIfSparse, BothBranches, AnotherCondition, OwnLoop])
def test_a_block_that_every_rank_calls_stays(kind: Callable[[], nn.Module]) -> None:
    assert names(nn.Sequential(kind())) == ["0.moe"]


class IfAny(Around):
    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        if images.any():
            x = self.moe(x)
        return x


class IfGiven(Around):
    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        return x if images is None else x + self.moe(images)


class EarlyReturn(Around):
    def forward(self, x: Tensor) -> Tensor:
        rows = x[x.sum(-1) > 0]
        if rows.shape[0] == 0:
            return x
        return self.moe(x)


class DataLoop(Around):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.moe(part) for part in x.split(2)])


class WhileData(Around):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = self.moe(x) / 2
        return x


class InAMethod(Around):
    def vision(self, x: Tensor, images: Tensor) -> Tensor:
        return self.moe(x) if images.sum() > 0 else x

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        return self.vision(x, images)


class Skips(Around):
    def forward(self, x: Tensor) -> Tensor:
        for part in range(2):
            if x[part].isnan().any():
                continue
            x = self.moe(x)
        return x


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        (IfAny, "images.any()"),
        (IfGiven, "images is None"),
        (EarlyReturn, "rows.shape[0] == 0"),
        (DataLoop, "x.split(2)"),
        (WhileData, "x.norm() > 1"),
        (InAMethod, "images.sum() > 0"),
        (Skips, "x[part].isnan().any()"),
    ],
)
def test_a_block_that_some_ranks_may_not_call_moves_up(kind: type[Around], condition: str) -> None:
    (found,) = find_leaf_candidates(nn.Sequential(kind()))
    assert found.name == "0"
    assert found.reason.endswith(f"; not 'moe' alone: whether it is called depends on {condition}")


class TwoModalities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_moe, self.vision_moe = Block(), Block()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if ids.any():
            return self.text_moe(x) + self.vision_moe(x)
        return self.text_moe(x)


def test_a_conditional_mixture_takes_its_neighbours_along() -> None:
    (found,) = find_leaf_candidates(nn.Sequential(TwoModalities()))
    assert found.name == "0"
    assert "'vision_moe.experts'" in found.reason
    assert "not 'vision_moe' alone: whether it is called depends on ids.any()" in found.reason


def test_a_class_without_source_is_taken_as_called() -> None:
    scope: dict[str, type[nn.Module]] = {"Around": Around}
    exec("class Hidden(Around):\n    def forward(self, x):\n        return self.moe(x) if x.any() else x", scope)
    assert names(nn.Sequential(scope["Hidden"]())) == ["0.moe"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = four()

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(-1)
            out[rows] = expert(x[rows])
        return out


class SharedRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        for layer in self.layers:
            x = layer(x, choice)
        return x


def test_layers_that_share_a_router_are_leaves_each() -> None:
    found = find_leaf_candidates(nn.Sequential(SharedRouter()))
    assert [candidate.name for candidate in found] == ["0.layers.0", "0.layers.1"]
    assert found[0].reason == ("4 experts of class Linear in 'experts', router '0.router' of the model with 4 outputs")


class TwoExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_expert, self.vision_expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        return self.vision_expert(x) if images.any() else self.text_expert(x)


def test_experts_with_names_of_their_own() -> None:
    (found,) = find_leaf_candidates(nn.Sequential(TwoExperts()))
    assert found.reason == (
        "2 experts of class Linear in 'text_expert..vision_expert', chosen in its forward without a router"
    )
