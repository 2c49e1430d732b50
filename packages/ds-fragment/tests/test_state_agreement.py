"""The ranks agree on where optimizer state is before the first read of it, and not again as long as that is so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, iter_full, norms
from ds_fragment.api.single import read_one
from ds_fragment.engines import shards
from ds_fragment.tensor_fragment import safe_get_full_optimizer_state
from fragment_oracle import assert_same, ragged, raised
from ranks import run_ranks
from torch import nn

KEY = "exp_avg"


def stepped(kind: str) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
    """Parameters, their optimizer, and the tensor that the state belongs to; it keeps the partition alive."""
    model: nn.Module = ragged(torch.bfloat16 if kind == "flat" else torch.float32, fsdp2=kind == "fsdp2")
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        params = [param for param in model.parameters() if param.requires_grad]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW(params)
        owned = params[1]
    else:
        partition = FlatPartition(model.parameters())
        for param in partition.params:
            param.grad = torch.ones_like(param)
        partition.reduce_gradients()
        params, owned = partition.params, partition.hp_param
        optimizer = torch.optim.AdamW([owned])
        optimizer.kept = (partition, model)  # type: ignore[attr-defined]
    attach(model, optimizer)
    optimizer.step()
    return params, optimizer, owned


def counted_agreements() -> list[int]:
    """A list that grows by one at every agreement from now on."""
    agree, calls = shards.agree, []

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        agree(*args, **kwargs)

    shards.agree = counted
    return calls


def _once(rank: int, kind: str) -> list[int]:
    params, optimizer, _ = stepped(kind)
    calls = counted_agreements()
    counts = []
    for _ in range(3):
        dict(iter_full(params, KEY))
        counts.append(len(calls))
    for param in params:  # each by itself, which is known by now too
        safe_get_full_optimizer_state(param, KEY)
    dict(iter_full(params[::-1], KEY))
    counts.append(len(calls))
    dict(iter_full(params, "exp_avg_sq"))
    counts.append(len(calls))
    attach(None, optimizer)  # nothing that the ranks agreed on has changed
    dict(iter_full(params, KEY))
    counts.append(len(calls))
    return counts


@pytest.mark.parametrize("kind", ["flat", "fsdp2"])
def test_the_ranks_agree_once(kind: str) -> None:
    for counts in run_ranks(_once, 2, kind):
        assert counts == [1, 1, 1, 1, 2, 2]


def _one_rank_loses_it(rank: int, kind: str) -> list[Any]:
    params, optimizer, owned = stepped(kind)
    expected = [tensor.clone() for _, tensor in iter_full(params, KEY)]
    state = dict(optimizer.state[owned])
    found = []
    for at_once in (True, False):
        for change in ("gone", "dtype"):
            if rank == 1:
                if change == "gone":
                    optimizer.state[owned].clear()
                else:
                    optimizer.state[owned][KEY] = state[KEY].to(torch.bfloat16)
            for _ in range(2):  # the second time the ranks agree anew, and find it again
                if at_once:
                    found.append(raised(lambda: list(iter_full(params, KEY))))
                else:
                    found.append(raised(lambda: [safe_get_full_optimizer_state(param, KEY) for param in params]))
            optimizer.state[owned].update(state)
            for param, dense in zip(params, expected, strict=True):
                assert_same(safe_get_full_optimizer_state(param, KEY), dense)
    return found


def test_a_rank_that_lost_it_later_is_everybodys_error() -> None:
    mine, other = run_ranks(_one_rank_loses_it, 2, "fsdp2")
    assert mine == other
    kinds = [kind for kind, _ in mine]
    assert kinds == ["StateNotReadyError", "StateNotReadyError", "StateKeyError", "RankMismatchError"] * 2
    assert all(text.startswith("rank 1: ") for kind, text in mine if kind != "RankMismatchError")
    assert "then torch.float32" in mine[2][1]
    assert "now torch.bfloat16" in mine[2][1]


def _one_rank_loses_what_all_hold_whole(rank: int, what: str) -> list[Any]:
    params, optimizer, _ = stepped("fsdp2")
    last = params[-1]
    full: nn.Module = nn.Linear(3, 2)  # of no group, read together with those of one
    optimizer.add_param_group({"params": list(full.parameters())})
    attach(full, optimizer)
    full(torch.ones(3)).sum().backward()
    optimizer.step()
    if what == "mixed":
        params, last, key = [*params, full.bias], full.bias, KEY
    else:
        key = what
    read = {
        "all": lambda: list(iter_full(params, key)),
        "one bucket each": lambda: list(iter_full(params, key, bucket_bytes=1)),
        "one": lambda: safe_get_full_optimizer_state(params[0], key) if what == "mixed" else read_one(last, key),
        "norms": lambda: norms(params, what=key),
    }
    found = []
    for name, call in read.items():
        assert raised(call) is None
        lost = optimizer.state[last].pop(key) if rank == 1 else None
        for _ in range(2):
            found.append((name, raised(call)))
            total = torch.ones(())
            dist.all_reduce(total)  # nobody is anywhere else
            assert total == 2
        if lost is not None:
            optimizer.state[last][key] = lost
        assert raised(call) is None
    return found


@pytest.mark.parametrize("what", ["step", "mixed"])
def test_a_rank_that_lost_what_all_hold_whole_is_everybodys_error(what: str) -> None:
    mine, other = run_ranks(_one_rank_loses_what_all_hold_whole, 2, what)
    assert mine == other
    errors = [error for name, error in mine if what == "step" or name != "one"]
    assert {kind for kind, _ in errors} == {"StateKeyError"}
    assert all(text.startswith("rank 1: ") for _, text in errors)


def _all_ranks_change_it(rank: int) -> list[Any]:
    params, optimizer, owned = stepped("fsdp2")
    dict(iter_full(params, KEY))
    half = optimizer.state[owned][KEY].to(torch.bfloat16)
    optimizer.state[owned][KEY] = half
    found = [raised(lambda: list(iter_full(params, KEY)))]
    read = dict(zip(params, (tensor for _, tensor in iter_full(params, KEY)), strict=True))
    assert_same(read[owned], half.full_tensor())
    return found


def _norms_of_what_all_changed(rank: int) -> list[Any]:
    params, optimizer, owned = stepped("fsdp2")
    norms(params, KEY)
    half = optimizer.state[owned][KEY].to(torch.bfloat16)
    optimizer.state[owned][KEY] = half
    found = [raised(lambda: norms(params, KEY))]
    assert norms(params, KEY)[owned] == pytest.approx(half.full_tensor().double().norm().item(), rel=1e-12)
    return found


def test_norms_of_state_of_another_dtype_are_told_after_the_ranks_agreed_anew() -> None:
    mine, other = run_ranks(_norms_of_what_all_changed, 2)
    assert mine == other
    assert mine[0][0] == "StateKeyError"


def test_state_of_another_dtype_is_read_after_the_ranks_agreed_anew() -> None:
    mine, other = run_ranks(_all_ranks_change_it, 2)
    assert mine == other
    assert mine[0][0] == "StateKeyError"
    assert "call again" in mine[0][1]


def _linked_anew(rank: int) -> None:
    model = ragged(torch.bfloat16)
    for turn, ranks in enumerate(([0, 1, 2], [0, 1, 2], [0, 1])):
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        partition = FlatPartition(model.parameters(), group)
        optimizer = torch.optim.AdamW([partition.hp_param])
        attach(model, optimizer)
        for param in partition.params:
            param.grad = torch.full_like(param, turn + 1.0)
        partition.reduce_gradients()
        optimizer.step()
        for _ in range(2):
            for param, moment in iter_full(partition.params, KEY):
                assert_same(moment, torch.full(param.shape, 0.1 * (turn + 1.0)))
        partition.publish()


def test_state_of_a_new_partition_over_new_ranks_is_read_at_once() -> None:
    run_ranks(_linked_anew, 3)


def _mixed(rank: int) -> list[int]:
    """Sharded parameters and one that every rank holds whole."""
    params, optimizer, _ = stepped("fsdp2")
    plain = nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    optimizer.add_param_group({"params": [plain]})
    attach(None, optimizer)
    optimizer.step()
    calls = counted_agreements()
    counts = []
    for _ in range(3):
        read = dict(iter_full([*params, plain], KEY))
        assert_same(read[plain], optimizer.state[plain][KEY])
        counts.append(len(calls))
    return counts


def test_the_ranks_agree_once_where_some_parameters_are_not_sharded() -> None:
    assert run_ranks(_mixed, 2) == [[1, 1, 1]] * 2
