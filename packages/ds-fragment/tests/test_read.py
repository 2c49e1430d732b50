"""`iter_full` and what it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_fragment import FlatPartition, attach, iter_full
from ds_fragment.engines.model import named
from ds_fragment.engines.shards import Shards
from ds_fragment.errors import FragmentError, InvalidValueError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param
from fragment_oracle import assert_same, ragged, raised
from ranks import run_ranks
from torch import nn


def test_named_takes_a_module_parameters_or_pairs() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    params = list(model.parameters())
    for given in (model, model.named_parameters(), list(model.named_parameters())):
        names, tensors = named(given)
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert all(mine is theirs for mine, theirs in zip(tensors, params, strict=True))
    for plain in (params, iter(params), model.parameters()):
        names, tensors = named(plain)
        assert names is None
        assert all(mine is theirs for mine, theirs in zip(tensors, params, strict=True))
    assert named([]) == (None, [])
    assert named([("_orig_mod._fsdp_wrapped_module.weight", params[0])])[0] == ["weight"]


@pytest.mark.parametrize("things", [[3], ["weight"], [("weight", 3)], [torch.ones(1), ("weight", torch.ones(1))]])
def test_what_is_no_parameter_is_named(things: list[Any]) -> None:
    with pytest.raises(TypeError, match=r"params holds a .*, expected parameters"):
        iter_full(things)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes is 0, expected a positive number"),
        ({"bucket_bytes": -5}, ValueError, "bucket_bytes is -5"),
        ({"dst": 1}, ValueError, r"dst is 1, expected a global rank in \[0, 1\)"),
        ({"dst": -1}, ValueError, "dst is -1"),
        ({"what": ""}, InvalidValueError, "what is '', expected 'value', 'grad' or the key"),
        ({"what": None}, InvalidValueError, "what is None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        iter_full([torch.ones(2)], **arguments)  # at once, not at the first tensor


def _everything(rank: int, ranks: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    attach(model)
    expected = {name: param.detach().float() for name, param in model.named_parameters()}
    assert "tied" not in expected  # tied weights come once
    for bucket_bytes in (1, 64, 300, 1 << 20):
        got = dict(iter_full(model, bucket_bytes=bucket_bytes))
        assert list(got) == list(expected)
        for name, whole in expected.items():
            # The frozen one has no master: it comes as it is.
            assert_same(got[name], whole if name != "frozen" else whole.bfloat16())
    for (param, got), mine in zip(iter_full(model.parameters()), model.parameters(), strict=True):
        assert param is mine
        assert got.shape == mine.shape
    twice = list(iter_full([model.weight, model.weight]))
    assert_same(twice[0][1], twice[1][1])
    assert twice[0][1].data_ptr() != twice[1][1].data_ptr()
    for dst in range(ranks):
        got = dict(iter_full(model, dst=dst, bucket_bytes=100))
        assert list(got) == (list(expected) if rank == dst else [])
        assert all(torch.equal(got[name].float(), expected[name]) for name in got)
    for name, got in iter_full(model, dtype=torch.float64, device="cpu"):
        assert_same(got, expected[name].double())
    for _, got in iter_full(model, device="meta"):
        assert got.is_meta
    del partition


@pytest.mark.parametrize("ranks", [1, 3])
def test_iter_full(ranks: int) -> None:
    run_ranks(_everything, ranks, ranks)


def _what_is_yielded_is_the_callers(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    kept = []
    for _, tensor in iter_full(partition.params, bucket_bytes=50):
        kept.append(tensor.clone())
        tensor.fill_(float("nan"))
    for (_, again), first in zip(iter_full(partition.params), kept, strict=True):
        assert_same(again, first)


def test_what_is_yielded_is_the_callers_own() -> None:
    run_ranks(_what_is_yielded_is_the_callers, 2)


def test_a_parameter_that_changes_hands_is_found_in_the_new_ones() -> None:
    model = ragged(torch.bfloat16)
    attach(model)
    before = dict(iter_full([model.weight, model.bias]))
    partition = FlatPartition([model.weight, model.bias])
    with torch.no_grad():
        partition.hp_param.fill_(3.0)
    for _ in range(2):
        assert all(bool((tensor == 3.0).all()) for _, tensor in iter_full([model.weight, model.bias]))
    partition.unlink()
    for param, tensor in iter_full([model.weight, model.bias]):
        assert_same(tensor, before[param])


def _alone(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    attach(model)
    for param in partition.params:
        whole = safe_get_full_fp32_param(param)
        assert whole.untyped_storage().nbytes() == whole.nbytes


def test_what_is_read_alone_is_alone_in_its_storage() -> None:
    run_ranks(_alone, 4)


def test_nothing_at_all() -> None:
    assert list(iter_full([])) == []
    assert list(iter_full(nn.Identity(), "grad")) == []
    assert list(iter_full([], "exp_avg")) == []


def test_a_piece_of_the_wrong_size_names_the_parameter() -> None:
    model = nn.Linear(3, 2)
    attach(model)
    shards = Shards([model.weight], "value")
    model.weight.data = torch.zeros(5)
    with pytest.raises(FragmentError, match="parameter 'weight': 5 elements are here where its layout says 6"):
        shards.local(0)


def _two_states_on_two_ranks(rank: int) -> Any:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(model, optimizer)
    partition.hp_param.grad = torch.ones_like(partition.hp_param)
    optimizer.step()
    return raised(lambda: list(iter_full([model.weight, model.long], "exp_avg" if rank else "exp_avg_sq")))


def test_two_ranks_that_ask_for_different_states() -> None:
    mine, other = run_ranks(_two_states_on_two_ranks, 2)
    assert mine == other
    assert mine[0] == "RankMismatchError"
    assert "the state asked of parameter 'weight', the state asked of parameter 'long'" in mine[1]
