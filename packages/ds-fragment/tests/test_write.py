"""`set_many`, `set_local` and `update_many`: all or nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from ds_fragment import FlatPartition, attach, get_local, iter_full, set_local, set_many, update_many
from ds_fragment.errors import FragmentError, InvalidValueError, UnlinkedParameterError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_grad
from fragment_oracle import assert_same, from_every_rank, ragged, set_gradients
from ranks import run_ranks
from torch import nn


def _random_writes(rank: int, ranks: int, rounds: int) -> None:
    """Any mixture of writes against a table of dense tensors."""
    chance, generator = random.Random(ranks), torch.Generator().manual_seed(ranks)
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(model, optimizer)
    params = partition.params
    set_gradients(params, seed=0)
    partition.reduce_gradients()
    optimizer.step()
    kinds = ("value", "grad", "exp_avg", "exp_avg_sq")
    table = {what: [tensor.clone() for _, tensor in iter_full(params, what)] for what in kinds}

    def some(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for _ in range(rounds):
        what = chance.choice(list(table))
        chosen = chance.sample(range(len(params)), chance.randint(0, len(params)))
        kind = chance.choice(["many", "update", "local"])
        if kind == "many":
            values = [some(params[i].shape) for i in chosen]
            odd = [value.double() if chance.random() < 0.2 else value for value in values]
            odd = [value.t().contiguous().t() if value.dim() == 2 and chance.random() < 0.5 else value for value in odd]
            set_many([(params[i], value) for i, value in zip(chosen, odd, strict=True)], what)
            for i, value in zip(chosen, values, strict=True):
                table[what][i] = value
        elif kind == "update":
            factors = {i: chance.choice([None, 2.0, -0.5]) for i in chosen}
            order = iter(chosen)

            def fn(param: Any, whole: torch.Tensor, order: Any = order, factors: Any = factors) -> torch.Tensor | None:
                factor = factors[next(order)]
                return None if factor is None else whole.mul_(factor)

            update_many([params[i] for i in chosen], fn, what, bucket_bytes=chance.choice([1, 100, 1 << 20]))
            for i, factor in factors.items():
                table[what][i] = table[what][i] if factor is None else table[what][i] * factor
        elif chosen:
            i = chosen[0]
            lengths = torch.cat(from_every_rank(torch.tensor([get_local(params[i], what).numel()])))
            pieces = [some(torch.Size([length])) for length in lengths.tolist()]
            set_local(params[i], pieces[rank], what)
            table[what][i] = torch.cat(pieces).view(params[i].shape)
    for what, wholes in table.items():
        for (_, got), expected in zip(iter_full(params, what), wholes, strict=True):
            assert_same(got, expected, what)
    for param, value in zip(params, table["value"], strict=True):
        assert_same(param.detach(), value.bfloat16())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_random_writes(ranks: int) -> None:
    run_ranks(_random_writes, ranks, ranks, 60)


def test_all_or_nothing_in_one_process() -> None:
    model = nn.Linear(3, 2)
    attach(model)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(InvalidValueError, match=r"value for parameter 'bias' has shape \(3,\), expected \(2,\)"):
        set_many([(model.weight, torch.ones(2, 3)), (model.bias, torch.ones(3))])
    calls = []

    def fails_late(name: str, whole: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        if name == "bias":
            raise KeyError("late")
        return whole * 0

    with pytest.raises(FragmentError, match="KeyError: 'late'") as caught:
        update_many(model, fails_late)
    assert isinstance(caught.value.__cause__, KeyError)
    assert calls == ["weight", "bias"]
    with pytest.raises(InvalidValueError, match="result of fn for parameter 'weight' is a int"):
        update_many(model, lambda name, whole: 3)  # type: ignore[arg-type,return-value]
    for param, old in zip(model.parameters(), before, strict=True):
        assert_same(param.detach(), old)


def test_update_may_leave_parameters_alone_and_use_names() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    update_many(model, lambda name, whole: whole.zero_() if name == "bias" else None)
    assert_same(model.weight.detach(), weight)
    assert model.bias.abs().sum() == 0
    seen = []
    update_many(model.parameters(), lambda param, whole: seen.append(param))  # type: ignore[func-returns-value]
    assert seen[0] is model.weight


def test_the_value_that_was_given_is_not_kept() -> None:
    model = nn.Linear(3, 2)
    value = torch.ones(2, 3)
    set_many([(model.weight, value)])
    value.zero_()
    assert_same(model.weight.detach(), torch.ones(2, 3))
    kept: list[torch.Tensor] = []

    def keep(name: str, whole: torch.Tensor) -> torch.Tensor:
        kept.append(whole)
        return whole

    update_many([model.weight], keep)
    kept[0].zero_()
    assert_same(model.weight.detach(), torch.ones(2, 3))


def test_values_by_parameter_or_in_pairs_and_nothing_else() -> None:
    model = nn.Linear(3, 2)
    for values in (
        {model.weight: torch.ones(2, 3)},
        [(model.weight, torch.ones(2, 3))],
        iter([[model.weight, torch.ones(2, 3)]]),
    ):
        with torch.no_grad():
            model.weight.zero_()
        set_many(values)
        assert torch.equal(model.weight, torch.ones(2, 3))
    for wrong in ([model.weight], [(model.weight,)], ["ab"]):
        with pytest.raises(TypeError, match=r"values holds a \w+, expected \(parameter, value\) pairs, or a dict"):
            set_many(wrong)  # type: ignore[arg-type,list-item]
    with pytest.raises(TypeError, match="values has a int for a key, expected a parameter or its name"):
        set_many({3: torch.ones(2, 3)})  # type: ignore[dict-item]


def test_values_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    set_many({"0.weight": torch.ones(2, 3), "_orig_mod.0.bias": torch.ones(2)}, model=model)
    assert torch.equal(model[0].weight, torch.ones(2, 3))
    with pytest.raises(InvalidValueError, match=r"'0\.weight' is the name of 0 parameters of the attached models"):
        set_many({"0.weight": torch.ones(2, 3)})
    attach(model, None)
    set_many({"0.weight": torch.zeros(2, 3)})
    assert not model[0].weight.any()
    other = nn.Sequential(nn.Linear(3, 2))
    attach(other, None)
    with pytest.raises(InvalidValueError, match=r"'0\.weight' is the name of 2 parameters of the attached models"):
        set_many({"0.weight": torch.ones(2, 3)})
    with pytest.raises(InvalidValueError, match="'weight' is the name of 0 parameters of the model, expected 1"):
        set_many({"weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, model=model)


def test_nothing_to_write() -> None:
    set_many([])
    update_many([], lambda name, whole: whole)


def test_a_local_write_checks_shape_and_type() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InvalidValueError, match=r"this rank's piece for .* has shape \(6,\), expected \(2, 3\)"):
        set_local(model.weight, torch.ones(6), "value")
    with pytest.raises(InvalidValueError, match="is a list, expected a tensor"):
        set_local(model.weight, [1.0], "value")  # type: ignore[arg-type]
    with pytest.raises(UnlinkedParameterError):
        set_local(model.weight, torch.ones(2, 3), "exp_avg")


def _meta_and_other_devices(rank: int) -> None:
    params = [nn.Parameter(torch.zeros(5))]
    partition = FlatPartition(params)
    with pytest.raises(FragmentError):
        set_many([(params[0], torch.ones(5, device="meta"))])
    assert_same(safe_get_full_fp32_param(params[0]), torch.zeros(5))
    params[0].grad = torch.ones(5)
    partition.reduce_gradients()
    update_many(params, lambda _, grad: grad * 3, "grad")
    assert_same(safe_get_full_grad(params[0]), torch.full((5,), 3.0))


def test_a_value_without_data_changes_nothing() -> None:
    run_ranks(_meta_and_other_devices, 2)
