"""Norms, counts and availability, computed on the shards, against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from ds_fragment import FlatPartition, attach, available, count_nonfinite, iter_full, norms
from ds_fragment.errors import FragmentError, GradientUnavailableError
from ranks import run_ranks
from torch import nn


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 3), "unused": nn.Linear(2, 2)}).bfloat16()


def _against_dense(rank: int, world_size: int) -> dict[str, float]:
    model = _model()
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.Adam([partition.hp_param])
    attach(model, optimizer)
    model["b"](model["a"](torch.ones(2, 5).bfloat16())).sum().backward()
    partition.reduce_gradients()
    used = available(model)
    assert [name for name, _ in used] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    with pytest.raises(GradientUnavailableError, match="no rank used"):
        norms(model, "grad")
    for what, params in (("value", list(model.named_parameters())), ("grad", used)):
        dense = dict(iter_full(params, what))
        two, largest = norms(params, what), norms(params, what, ord=math.inf)
        for name, tensor in dense.items():
            assert two[name] == pytest.approx(tensor.double().norm().item(), rel=1e-12)
            assert largest[name] == tensor.abs().max().item()
    optimizer.step()
    assert norms(model, "step") == dict.fromkeys(dict(model.named_parameters()), 1.0)
    with torch.no_grad():
        flat = partition.hp_param
        start = rank * partition.partition_size
        for position, value in ((3, math.nan), (4, math.inf), (40, -math.inf)):  # a.weight twice, a.bias or b.weight
            if start <= position < start + partition.partition_size:
                flat[position - start] = value
    counts = count_nonfinite(model)
    dense = dict(iter_full(model))
    assert counts == {name: int((~tensor.isfinite()).sum()) for name, tensor in dense.items()}
    assert sum(counts.values()) == 3
    assert math.isnan(norms(model)["a.weight"])
    assert math.isnan(norms(model, ord=math.inf)["a.weight"])
    return {name: norm for name, norm in norms(used, "value").items() if norm == norm}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_against_dense_float64(world_size: int) -> None:
    found = run_ranks(_against_dense, world_size, world_size)
    assert all(norm == found[0] for norm in found), "the same bits on every rank"


def test_unnamed_parameters_are_the_keys() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert norms([weight]) == {weight: 5.0}
    assert available([weight]) == []
    weight.grad = torch.ones(2)
    assert available([weight]) == [weight]


def test_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ord is 1, expected 2 or float\('inf'\)"):
        norms([], ord=1)


def _failing_on_one(rank: int) -> str:
    model = _model()
    partition = FlatPartition(model.parameters())
    if rank == 1:
        model["unused"].weight._hp_mapping.hp_fragment = torch.zeros(1)
    with pytest.raises(FragmentError) as caught:
        norms(model)
    assert partition.rank == rank
    return str(caught.value)


def test_a_piece_that_is_missing_on_one_rank_is_everybodys_error() -> None:
    told = run_ranks(_failing_on_one, 2)
    assert told[0] == told[1]
    assert told[0].startswith("rank 1: ")
