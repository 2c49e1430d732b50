"""Mixture-of-experts blocks under FSDP2 whose ranks use different experts: they train, and as one process would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ds_z3leaf import find_leaf_candidates, fully_shard_leaves, mark_leaves
from ds_z3leaf.errors import LeafNotFoundError, LeafShardError, LeafTypeError
from ranks import run_ranks
from torch import nn

STEPS, WIDTH, EXPERTS = 3, 6, 6
METHOD = "set_reduce_scatter_unused_params"


class Moe(nn.Module):
    """Sends every row to one expert; an expert that no row goes to is not called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.as_tuple = False

    def forward(self, x: torch.Tensor) -> Any:
        chances = self.router(x).softmax(-1)
        best, choice = chances.max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[index](x[rows]) * best[rows].unsqueeze(-1))
        return (choice, {"out": out}) if self.as_tuple else out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Moe() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            out = block(x)
            x = x + (out[1]["out"] if isinstance(out, tuple) else out)
        return self.head(x).square().mean()


def make(as_tuple: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for block in model.blocks:
        block.as_tuple = as_tuple
    return model


def batch(rank: int, step: int) -> torch.Tensor:
    """As many rows as the rank's number, plus one: the ranks use different experts, and different numbers of them."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return 2 * torch.randn(rank + 1, WIDTH, dtype=torch.float64, generator=generator)


def choices(model: Net, x: torch.Tensor) -> list[set[int]]:
    """Which experts each block uses."""
    found: list[set[int]] = []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, args, out: found.append(set(out.argmax(-1).tolist())))
    model(x)
    return found


def reference(world_size: int) -> dict[str, torch.Tensor]:
    """One process, plain PyTorch: the mean of all ranks' losses."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for rank in range(world_size):
            (model(batch(rank, step)) / world_size).backward()
        for param in model.parameters():  # FSDP2 gives unused parameters a zero gradient: so does the reference
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def train(rank: int, as_tuple: bool, marked: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = make(as_tuple)
    if marked:
        mark_leaves(model, classes=Moe)
        units = fully_shard_leaves(model)
    else:
        units = fully_shard_leaves(model, [candidate.module for candidate in find_leaf_candidates(model)])
    assert units == list(model.blocks)
    assert all(isinstance(unit, FSDPModule) for unit in units)
    assert not any(isinstance(part, FSDPModule) for unit in units for part in list(unit.modules())[1:])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(rank, step)).backward()
        optimizer.step()
    return {name: param.full_tensor().tolist() for name, param in model.named_parameters()}


def train_on_both_torches(rank: int) -> list[dict[str, Any]]:
    from torch.distributed.fsdp import FSDPModule

    with_method = [train(rank, False, True), train(rank, True, False)] if hasattr(FSDPModule, METHOD) else []
    if with_method:
        delattr(FSDPModule, METHOD)  # torch before it had the method
    return [*with_method, train(rank, False, True), train(rank, True, False)]


def test_ranks_that_use_different_experts_train_as_one_process_would() -> None:
    used = [choices(make(), batch(rank, 0)) for rank in range(2)]
    assert all(a != b for a, b in zip(*used, strict=True)), (
        "the ranks must use different experts for this to mean anything"
    )
    assert any(set(range(EXPERTS)) - a - b for a, b in zip(*used, strict=True)), "and one expert must be used by none"
    expected = reference(2)
    for results in run_ranks(train_on_both_torches, 2):
        assert len(results) in (2, 4)
        for found in results:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), value, rtol=1e-9, atol=1e-12)


def shard_every_expert(rank: int) -> tuple[float, float]:
    from torch.distributed.fsdp import fully_shard

    x = batch(rank, 0)[:1]  # one expert each: no hang, for the gathers of different experts pair up
    model = make()
    expected = model(x).item()
    for block in model.blocks:
        for expert in block.experts:
            fully_shard(expert)
    fully_shard(model)
    return model(x).item(), expected


def test_a_unit_for_each_expert_mixes_them_up() -> None:
    """The reason for all this, and a check that the model above can tell."""
    results = run_ranks(shard_every_expert, 2)
    assert any(abs(found - expected) > 1e-6 for found, expected in results), results


def refuse(rank: int) -> list[str]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    said = []

    def note(error: type[Exception], call: Any) -> None:
        try:
            call()
        except error as caught:
            said.append(str(caught))
        else:
            raise RuntimeError("nothing was raised")

    model = make()
    note(LeafNotFoundError, lambda: fully_shard_leaves(model))
    note(LeafNotFoundError, lambda: fully_shard_leaves(model, nn.Linear(1, 1)))
    note(LeafTypeError, lambda: fully_shard_leaves(model, ["blocks.0"]))
    note(LeafTypeError, lambda: fully_shard_leaves(model, model.blocks[0], reshard=True))
    note(LeafShardError, lambda: fully_shard_leaves(model, [model.blocks[0], model.blocks[1].experts]))
    assert not any(isinstance(part, FSDPModule) for part in model.modules())
    fully_shard(model.blocks[0].experts[1])
    note(LeafShardError, lambda: fully_shard_leaves(model, model.blocks[0]))
    fully_shard(model)
    note(LeafShardError, lambda: fully_shard_leaves(model, model.blocks[1]))
    return said


def test_what_cannot_be_sharded_is_refused_and_nothing_is_changed() -> None:
    expected = [
        "leaves is None and Net has no flagged modules: flag some by mark_leaves() first",
        "1 of 1 selectors matches nothing in Net: module of class 'Linear'",
        "modules holds a str",
        "torch's fully_shard does not take these keywords: got an unexpected keyword argument 'reshard'",
        "leaf 'blocks.1.experts' (ModuleList) is never called itself",
        "leaf 'blocks.0' (Moe): 'blocks.0.experts.1' is sharded already",
        "'' (FSDPNet) is sharded already and holds the leaf 'blocks.1'",
    ]
    for said in run_ranks(refuse, 2):
        assert len(said) == len(expected)
        for text, start in zip(said, expected, strict=True):
            assert text.startswith(start)


def pass_keywords(rank: int) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    # A leaf inside a leaf goes with it.
    units = fully_shard_leaves(model, [model.blocks[1], model.blocks[1].experts[0]], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    seen = []
    model.blocks[1].router.register_forward_hook(lambda module, args, out: seen.append(str(out.dtype)))
    with torch.no_grad():
        model(batch(rank, 0))
    return [len(units), *seen]


def test_keywords_reach_fully_shard_and_nested_leaves_are_one_unit() -> None:
    assert run_ranks(pass_keywords, 2) == [[1, "torch.float32"]] * 2
