"""Rehearsals in one process, and over ranks that have different data."""

from __future__ import annotations

import copy
import random
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_z3leaf import (
    LeafError,
    LeafNotFoundError,
    LeafOrderError,
    LeafPlan,
    LeafRehearsalError,
    LeafTypeError,
    LeafValueError,
    check,
    get_z3_leaf_modules,
    rehearse,
    set_z3_leaf_module,
)
from ranks import run_ranks
from torch import nn

WIDTH = 8


class Mixture(nn.Module):
    """Sends each row to one expert. Nothing in it has a name that says so."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.pick = nn.Linear(WIDTH, count)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, choice = self.pick(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.parts[index](x[rows]) * best[rows].unsqueeze(-1))
        return out


class NamedMixture(nn.Module):
    """A mixture that is one by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.router(x).argmax(-1)
        return sum(self.experts[i](x) * (choice == i).unsqueeze(-1) for i in choice.unique().tolist())


class Modalities(nn.Module):
    """Calls its picture part only for pictures, as multimodal models do."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(WIDTH, WIDTH)
        self.picture = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, text: torch.Tensor, picture: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.text(text)
        return out if picture is None else out + self.picture(picture)


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = layer(x)
        return x


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.abs().max() > 10:
                break
        return x


class MapOnly(nn.Module):
    """Is never called itself: its user calls `map`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def map(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.parts[int(x.sum() > 0)](x)
        return out


class UsesMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = MapOnly()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.experts.map(x))
        return out


def around(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), block, nn.Linear(WIDTH, 1))


def rows(*signs: int) -> list[torch.Tensor]:
    return [torch.full((2, WIDTH), float(sign)) for sign in signs]


def drawn(count: int) -> list[torch.Tensor]:
    """Batches that are the same in every run: with fewer rows than experts, they take different ones."""
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(2, WIDTH, generator=generator) for _ in range(count)]


def names(plan: LeafPlan) -> list[str]:
    return [leaf.name for leaf in plan.leaves]


def test_a_mixture_without_names_is_a_leaf() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixture(), nn.Linear(WIDTH, WIDTH), Mixture())
    plan = rehearse(model, [torch.randn(2, WIDTH) for _ in range(4)])
    assert names(plan) == ["1", "3"]
    assert "goes on with '1.parts." in plan.leaves[0].reason
    assert (plan.leaves[0].parameters, plan.leaves[0].bytes) == (324, 4 * 324)  # 4 x 9 and 4 times 8 x 9
    assert plan.rehearsal is not None
    assert (plan.rehearsal.ranks, plan.rehearsal.passes, plan.rehearsal.backward) == (1, 4, True)


@pytest.mark.parametrize(
    ("block", "batches", "expected"),
    [
        (EarlyExit, [torch.full((2, WIDTH), 1e6), torch.zeros(2, WIDTH)], ["1"]),
        (LayerDrop, [torch.ones(2, WIDTH)], ["1"]),
        (UsesMap, [*rows(1, -1)], ["1"]),
        (lambda: nn.Sequential(Mixture(), Mixture()), drawn(8), ["1.0", "1.1"]),
    ],
    ids=["early exit", "layer drop", "map", "two in a row"],
)
def test_the_innermost_module_that_all_call_is_the_leaf(
    block: Callable[[], nn.Module], batches: list[torch.Tensor], expected: list[str]
) -> None:
    random.seed(0)
    model = around(block())
    assert isinstance(model[0], nn.Linear)
    nn.init.eye_(model[0].weight)
    plan = rehearse(model, batches)
    assert names(plan) == expected
    assert names(check(model, plan, batches)) == expected
    with pytest.raises(LeafOrderError, match=r"no leaves are given: add '1"):
        check(model, [], batches)


def test_a_modality_that_only_some_batches_have() -> None:
    model = nn.ModuleDict({"head": nn.Linear(WIDTH, WIDTH), "both": Modalities()})
    text, picture = torch.ones(1, WIDTH), torch.ones(1, WIDTH)
    plan = rehearse(
        model,
        [{"text": text}, {"text": text, "picture": picture}],
        forward=lambda model, batch: model["head"](model["both"](**batch)),
    )
    assert names(plan) == ["both"]
    assert plan.rehearsal is not None
    assert plan.rehearsal.device == "meta"  # nothing reads values
    assert plan.leaves[0].reason == (
        "after 'both.text' batch 0 goes on with nothing more, batch 1 with 'both.picture' in 'both'"
    )


def test_a_mixture_inside_an_expert_goes_with_the_outer_one() -> None:
    torch.manual_seed(0)
    outer = Mixture(2)
    outer.parts = nn.ModuleList([Mixture(2), Mixture(2)])
    plan = rehearse(around(outer), [torch.randn(3, WIDTH) for _ in range(5)])
    assert names(plan) == ["1"]


def test_dense_models_have_no_leaves() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.TransformerEncoderLayer(WIDTH, 2, 16), nn.GELU())
    plan = rehearse(model, [torch.randn(2, WIDTH), torch.randn(5, WIDTH)])
    assert names(plan) == []
    assert plan.notes == ()


def test_a_mixture_whose_batches_use_all_experts_is_a_leaf_all_the_same() -> None:
    torch.manual_seed(0)
    plan = rehearse(around(NamedMixture()), [torch.randn(200, WIDTH) for _ in range(2)])
    assert names(plan) == ["1"]
    assert "reads values of tensors before it calls its experts" in plan.leaves[0].reason


def test_a_mixture_whose_batches_use_one_expert_is_a_leaf_all_the_same() -> None:
    torch.manual_seed(0)
    plan = rehearse(around(NamedMixture()), [torch.ones(1, WIDTH)])
    assert names(plan) == ["1"]
    assert "these batches called the same" in plan.leaves[0].reason


@pytest.mark.parametrize("trained", [True, False])
def test_only_a_leaf_that_is_trained_needs_outputs_with_gradients(trained: bool) -> None:
    class Listed(Modalities):
        def forward(self, text: torch.Tensor, picture: torch.Tensor | None = None) -> Any:
            return [super().forward(text, picture)]

    model = nn.ModuleDict({"both": Listed(), "head": nn.Linear(WIDTH, 1)})
    model["both"].requires_grad_(trained)
    text = torch.ones(1, WIDTH)
    plan = rehearse(
        model, [(text,), (text, text)], forward=lambda model, batch: model["head"](model["both"](*batch)[0])
    )
    assert names(plan) == ["both"]
    assert any("ZeRO-3 cannot train it" in note for note in plan.notes) is trained


def test_a_batch_keeps_its_class() -> None:
    class Batch(UserDict[str, torch.Tensor]):
        """Has its entries as attributes, as batches of transformers have."""

        def __getattr__(self, name: str) -> torch.Tensor:
            if name == "data":
                raise AttributeError(name)
            return self.data[name]

    batch = Batch(x=torch.ones(2, WIDTH))
    rehearse(nn.Linear(WIDTH, WIDTH), [batch], forward=lambda model, batch: model(batch.x))
    assert not batch.x.is_meta


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_modes_of_autograd_around_a_rehearsal_do_not_matter(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    with mode():
        plan = rehearse(model, [torch.ones(2, WIDTH)], device="model")
    assert plan.rehearsal is not None
    assert plan.rehearsal.backward


class MergesInEval(nn.Linear):
    """Adds to its weight for evaluation, as some adapters do."""

    def train(self, mode: bool = True) -> MergesInEval:
        if mode != self.training:
            with torch.no_grad():
                self.weight.add_(-1.0 if mode else 1.0)
        super().train(mode)
        return self


def test_what_eval_merges_is_merged_afterwards() -> None:
    model = MergesInEval(WIDTH, WIDTH)
    with torch.no_grad():
        model.weight.zero_()
    model.eval()
    rehearse(model, [torch.ones(2, WIDTH)], device="model")
    assert not model.training
    assert bool((model.weight == 1.0).all())


def test_what_no_batch_called_is_noted() -> None:
    model = Modalities()
    plan = rehearse(model, [{"text": torch.ones(1, WIDTH)}])
    assert names(plan) == []
    assert plan.rehearsal is not None
    assert plan.rehearsal.never_called == ("picture",)
    assert "no batch called 'picture'" in plan.notes[0]


def test_a_tied_module_that_is_not_called_is_not_noted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, WIDTH), nn.Linear(WIDTH, 4, bias=False)
            self.embed.weight = self.head.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(x)
            return out

    assert rehearse(Tied(), [torch.ones(1, WIDTH)]).notes == ()


def test_a_parameter_read_by_another_module_counts() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            used = self.one if x.shape[0] == 1 else self.other  # neither is called
            return x @ used.weight

    assert names(rehearse(around(Reads()), [torch.ones(1, WIDTH), torch.ones(2, WIDTH)])) == ["1"]


def test_a_part_of_a_leaf_that_is_called_from_outside_widens_it() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Mixture()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.block(x) + self.block.parts[0](x)
            return out

    torch.manual_seed(0)
    batches = [torch.randn(2, WIDTH) for _ in range(4)]
    plan = rehearse(around(Outside()), batches)
    assert names(plan) == ["1"]
    with pytest.raises(LeafOrderError, match="while that is not being called itself"):
        check(plan.model, "1.block", batches)


def test_a_gradient_that_reaches_a_module_only_sometimes() -> None:
    class Detaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side: torch.Tensor = self.side(x)
            out: torch.Tensor = self.main(x) + (side.detach() if x.shape[0] == 1 else side)
            return out

    batches = [torch.ones(1, WIDTH), torch.ones(2, WIDTH)]
    plan = rehearse(around(Detaches()), batches)
    assert names(plan) == ["1"]
    assert plan.leaves[0].reason == ("the backward of batch 0 reaches '1.side' not at all, that of batch 1 once")
    assert names(rehearse(around(Detaches()), batches, backward=False)) == []


def test_no_leaf_helps_when_the_model_itself_is_called_differently_often() -> None:
    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch)
        return out if batch.shape[0] == 1 else model(out)

    with pytest.raises(LeafOrderError, match="no leaf can help"):
        rehearse(nn.Linear(WIDTH, WIDTH), [torch.ones(1, WIDTH), torch.ones(2, WIDTH)], forward=forward)


def test_batches_of_one_rank_need_not_agree_when_told() -> None:
    model = Modalities()
    text = torch.ones(1, WIDTH)
    batches = [{"text": text}, {"text": text, "picture": text}]
    assert names(rehearse(model, batches, across_batches=False)) == []
    assert names(rehearse(model, batches)) == [""]


class LeavesTraces(nn.Module):
    """Writes everything that a forward can write."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[torch.Tensor] = []
        self.steps = torch.zeros(2)
        self.last: deque[torch.Tensor] = deque(maxlen=2)
        self.cache: dict[str, torch.Tensor] = {}
        self.hooked = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.hooked:
            self.layer.register_forward_hook(lambda *_: None)
            self.hooked = True
        with torch.no_grad():
            self.layer.weight.clamp_(-0.01, 0.01)
            self.layer.bias.data[0] = 7.0
        x = self.lstm(self.layer(self.norm(x)))[0]
        self.seen += 1
        self.losses.append(x.sum())
        self.steps += 1
        self.last.append(x)
        self.cache["x"] = x
        self.latest = x
        torch.rand(1)
        random.random()
        return x


@pytest.mark.parametrize("device", [None, "model"])
def test_a_rehearsal_leaves_no_trace(device: str | None) -> None:
    model = LeavesTraces()
    model.eval()
    model.norm.train()
    kept = torch.ones(WIDTH, WIDTH)
    model.layer.weight.grad = kept
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    state, python = torch.get_rng_state(), random.getstate()
    rehearse(model, (torch.randn(rows, WIDTH) for rows in (3, 4)), device=device)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(param.grad is (kept if param is model.layer.weight else None) for param in parameters)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert (model.training, model.norm.training, model.layer.training) == (False, True, False)
    assert (model.losses, model.cache, model.hooked, hasattr(model, "latest")) == ([], {}, False, False)
    assert (model.steps.tolist(), len(model.last)) == ([0, 0], 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(model._parameters) is dict


def test_a_model_on_meta_stays_there() -> None:
    with torch.device("meta"):
        model = Modalities()
    text = torch.ones(1, WIDTH)
    assert names(rehearse(model, [{"text": text}, {"text": text, "picture": text}])) == [""]
    assert model.text.weight.is_meta
    with torch.device("meta"):
        mixture = around(Mixture())
    with pytest.raises(LeafRehearsalError, match="on meta, where tensors have no values"):
        rehearse(mixture, [torch.ones(1, WIDTH)])


def test_flags_are_what_is_checked_unless_leaves_are_given() -> None:
    torch.manual_seed(0)
    model = around(Mixture())
    batches = [torch.randn(2, WIDTH) for _ in range(4)]
    with pytest.raises(LeafOrderError, match=r"no leaves are given: add '1' \(Mixture\)"):
        check(model, None, batches)
    set_z3_leaf_module(model[1], True)
    assert names(check(model, None, batches)) == ["1"]
    assert names(check(model, [model[1], "2"], batches)) == ["1", "2"]
    assert get_z3_leaf_modules(model) == [model[1]]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda model: rehearse(model, []), LeafValueError, "batches is empty"),
        (lambda model: rehearse(model, {"x": 1}), LeafTypeError, "batches is a dict"),
        (lambda model: rehearse(model, torch.ones(2, WIDTH)), LeafTypeError, "batches is a Tensor"),
        (lambda model: rehearse(nn.LazyLinear(2), [1]), LeafRehearsalError, "has parameters without a shape"),
        (lambda model: rehearse(model, [1], max_batches=0), LeafValueError, "max_batches=0"),
        (lambda model: rehearse(model, [1], repeats=-1), LeafValueError, "repeats=-1"),
        (lambda model: rehearse(model, [1], device="cuda"), LeafValueError, "device='cuda'"),
        (lambda model: rehearse(model, [1], forward=3), LeafTypeError, "forward is a int"),
        (lambda model: rehearse(model, ["words"]), LeafRehearsalError, "the forward cannot run"),
        (lambda model: rehearse("model", [1]), LeafTypeError, "model is a str"),
        (lambda model: check(model, ["nowhere"], [1]), LeafNotFoundError, "nowhere"),
        (lambda model: check(model, [3], [1]), LeafTypeError, "leaves holds a int"),
        (lambda model: check(model, 3, [1]), LeafTypeError, "leaves is a int"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(nn.Linear(WIDTH, WIDTH))


def test_an_endless_loader_is_cut() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield torch.ones(1, WIDTH)

    plan = rehearse(nn.Linear(WIDTH, WIDTH), endless(), max_batches=3)
    assert plan.rehearsal is not None
    assert plan.rehearsal.passes == 3


def _rank_batches(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    torch.manual_seed(0)
    model = around(Mixture())
    mine = [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(rank))]
    plan = rehearse(model, mine)
    seen["mixture"] = names(plan), plan.leaves[0].reason
    text = torch.ones(1, WIDTH)
    both = Modalities()
    plan = rehearse(both, [{"text": text, "picture": text} if rank == 1 else {"text": text}])
    seen["modalities"] = names(plan), plan.notes
    try:
        check(both, [], [{"text": text, "picture": text} if rank == 1 else {"text": text}])
    except LeafOrderError as error:
        seen["check"] = str(error)
    dense = rehearse(nn.Linear(WIDTH, WIDTH), [torch.ones(rank + 1, WIDTH)] * (rank + 1))
    seen["dense"] = names(dense)
    torch.manual_seed(0)
    idle = rehearse(around(NamedMixture()), [torch.randn(64, WIDTH)] if rank == 0 else [])
    seen["idle"] = names(idle)
    return seen


def test_ranks_with_different_batches_get_the_same_plan() -> None:
    answers = run_ranks(_rank_batches, 3)
    assert answers[0]["mixture"] == answers[1]["mixture"] == answers[2]["mixture"]
    assert answers[0]["mixture"][0] == ["1"]
    assert "batch 0 of rank " in answers[0]["mixture"][1]
    assert [answer["modalities"][0] for answer in answers] == [[""]] * 3
    assert {answer["check"] for answer in answers} == {
        "after 'text' batch 0 of rank 0 goes on with nothing more, batch 0 of rank 1 with 'picture' in the model "
        "itself; no leaves are given: add the model itself (Modalities)"
    }
    assert [answer["dense"] for answer in answers] == [[]] * 3
    assert [answer["idle"] for answer in answers] == [["1"]] * 3  # two ranks have no batches


def _rank_fails(rank: int) -> list[str]:
    texts = []
    for make, batches in (
        (lambda: nn.Linear(WIDTH, WIDTH), [torch.ones(1, WIDTH + rank)]),
        (lambda: nn.Linear(WIDTH, WIDTH + rank), [torch.ones(1, WIDTH)]),
        (lambda: nn.Linear(WIDTH, WIDTH), 3 if rank else [torch.ones(1, WIDTH)]),
    ):
        try:
            rehearse(make(), batches)  # type: ignore[arg-type]
        except (LeafRehearsalError, LeafTypeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_every_rank_raises_when_one_fails() -> None:
    first, second = run_ranks(_rank_fails, 2)
    assert first[0] == second[0]
    assert "the forward cannot run: rank 1 fails with RuntimeError" in first[0]
    assert first[1] == second[1]
    assert "ranks have different models: rank 0 has" in first[1]
    assert "rank 1 fails with LeafTypeError: batches is a int" in first[2]
    assert second[2].startswith("LeafTypeError: batches is a int")


def _rank_arguments(rank: int) -> list[str]:
    batches, model = [torch.ones(1, WIDTH)], around(nn.Linear(WIDTH, WIDTH))
    some = dist.new_group([0, 1])
    calls: list[Callable[[], Any]] = [
        lambda: rehearse(model, batches, device="model" if rank else None),
        lambda: check(model, ["0", "1"] if rank else ["0"], batches),
        lambda: check(model, ["nowhere"] if rank else ["0"], batches),
        lambda: rehearse(model, batches, group=some),
    ]
    texts = []
    for call in calls:
        try:
            call()
            texts.append("")
        except LeafError as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_arguments_that_differ_between_ranks_are_named() -> None:
    answers = run_ranks(_rank_arguments, 3)
    device = "LeafRehearsalError: ranks have different arguments: device is None on rank 0 and 'model' on rank 1"
    leaves = "LeafRehearsalError: ranks have different arguments: leaves is ['0'] on rank 0 and ['0', '1'] on rank 1"
    assert all(answer[0].startswith(device) for answer in answers)
    assert all(answer[1].startswith(leaves) for answer in answers)
    assert "rank 1 fails with LeafNotFoundError" in answers[0][2]
    assert answers[1][2].startswith("LeafNotFoundError")
    assert [answer[3] for answer in answers] == [
        "",
        "",
        "LeafValueError: rank 2 is not in the group: call it on the ranks of the group only",
    ]


class Either(nn.Module):
    """Calls one of two layers, and may return no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, other: bool, detached: bool) -> torch.Tensor:
        out: torch.Tensor = (self.other if other else self.one)(x)
        return out.detach() if detached else out


def _one_rank_goes_back(rank: int) -> list[str]:
    x = torch.ones(1, WIDTH)
    batches = [(x, False, rank == 0), (x, rank == 1, False)]  # the first has no backward on rank 0
    plan = rehearse(
        nn.Sequential(Either()), batches, forward=lambda model, batch: model[0](*batch), across_batches=False
    )
    return names(plan)


def test_a_pass_without_a_backward_hides_no_other_pass() -> None:
    assert run_ranks(_one_rank_goes_back, 2) == [["0"], ["0"]]


def test_a_leaf_that_is_called_twice_is_noted() -> None:
    torch.manual_seed(0)
    block = Mixture()
    plan = rehearse(nn.Sequential(block, block), drawn(8))
    assert names(plan) == ["0"]
    assert "leaf '0' (Mixture) is called 2 times in a forward: ZeRO-3 cannot train it as a leaf" in plan.notes[0]
