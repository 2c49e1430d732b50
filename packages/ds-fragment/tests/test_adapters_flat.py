"""Flat partitions as an engine sees them: by attributes alone, by lazily linked state, over a gradient table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, get_local, iter_full, set_local, set_many, state_keys
from ds_fragment.engines import adapter_of
from ds_fragment.errors import FragmentError, InvalidValueError, StateKeyError, UnlinkedParameterError
from ds_fragment.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from fragment_oracle import assert_same, ragged, raised, set_gradients
from ranks import run_ranks
from torch import nn

SHAPES = [(4,), (3, 3), (2,)]  # over two ranks: 8 + 7, the (3, 3) in both


def _an_engine_of_its_own(rank: int) -> list[Any]:
    """An engine like ZeRO-1: its own flat buffer, its own gradient table, state linked after the step."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    flat = nn.Parameter(torch.arange(rank * 8.0, min(rank * 8.0 + 8, 15)))
    table: dict[int, list[torch.Tensor]] = {}
    link_hp_params(params, flat, table, None, False, 3, rank * 8, 8, dist.group.WORLD)
    assert adapter_of(params[0]).name == "flat partition"
    everything = torch.arange(15.0)
    expected = [everything[0:4], everything[4:13].view(3, 3), everything[13:15]]
    for (param, value), whole in zip(iter_full(params), expected, strict=True):
        assert_same(value, whole)
        assert adapter_of(param).master(param) == "fp32"

    found: list[Any] = [raised(lambda: safe_get_full_grad(params[1]))]
    table[3] = [torch.full((4,), 1.0), torch.full((4,), 2.0)] if rank == 0 else [torch.full((5,), 3.0), torch.ones(2)]
    assert safe_get_full_grad(params[1]).flatten().tolist() == [2] * 4 + [3] * 5

    found.append(raised(lambda: safe_get_full_optimizer_state(params[0], "exp_avg")))
    found.append(raised(lambda: state_keys(params[1])))
    optimizer = torch.optim.AdamW([flat], lr=1.0)
    flat.grad = torch.cat(table[3])
    optimizer.step()
    lazy_init_hp_params_optimizer_state(params, flat, optimizer.state)
    assert state_keys(params[1]) == ["exp_avg", "exp_avg_sq", "step"]
    moment = safe_get_full_optimizer_state(params[1], "exp_avg")
    torch.testing.assert_close(moment.flatten(), torch.tensor([0.2] * 4 + [0.3] * 5))
    found.append(raised(lambda: safe_get_full_optimizer_state(params[1], "nope")))
    found.append(raised(lambda: safe_get_full_optimizer_state(params[1], "step")))  # not on ranks without a part
    attach(None, optimizer)
    assert safe_get_full_optimizer_state(params[0], "step") == 1
    safe_set_full_optimizer_state(params[1], torch.full((3, 3), 5.0), "exp_avg")
    assert_same(
        optimizer.state[flat]["exp_avg"][-3:] if rank == 0 else optimizer.state[flat]["exp_avg"][:5],
        torch.full((3,) if rank == 0 else (5,), 5.0),
    )
    return found


def test_an_engine_that_links_its_own_partition() -> None:
    mine, other = run_ranks(_an_engine_of_its_own, 2)
    assert [mine[i] for i in (0, 1, 3, 4)] == [other[i] for i in (0, 1, 3, 4)]
    assert mine[0][0] == "GradientUnavailableError"
    assert mine[1][0] == "StateNotReadyError"
    assert mine[2][0] == other[2][0] == "StateNotReadyError"  # state_keys is local
    assert mine[3][0] == StateKeyError.__name__
    assert mine[4][0] == InvalidValueError.__name__
    assert "call attach(model, optimizer) on every rank" in mine[4][1]


def _local(rank: int, ranks: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(model, optimizer)
    set_gradients(partition.params, seed=rank)
    partition.reduce_gradients()
    optimizer.step()
    offset = 0
    for param in partition.params:
        begin, end = rank * partition.partition_size, (rank + 1) * partition.partition_size
        mine = slice(max(offset, begin) - begin, max(max(offset, begin), min(offset + param.numel(), end)) - begin)
        for got, flat in (
            (safe_get_local_fp32_param(param), partition.hp_param),
            (safe_get_local_grad(param), partition.hp_param.grad),
            (safe_get_local_optimizer_state(param, "exp_avg"), optimizer.state[partition.hp_param]["exp_avg"]),
        ):
            assert_same(got, flat.detach()[mine])
            assert got.numel() == 0 or got.data_ptr() == flat[mine].data_ptr()
            assert not got.requires_grad
        offset += param.numel()
        piece = torch.full((mine.stop - mine.start,), 1.0 + rank)
        safe_set_local_fp32_param(param, piece)
        safe_set_local_grad(param, piece + 10)
        safe_set_local_optimizer_state(param, piece + 20, "exp_avg")
        set_local(param, piece + 30, "exp_avg_sq")
        assert_same(safe_get_local_fp32_param(param), piece)
        assert_same(safe_get_local_grad(param), piece + 10)
        assert_same(safe_get_local_optimizer_state(param, "exp_avg"), piece + 20)
        assert_same(get_local(param, "exp_avg_sq"), piece + 30)
        assert_same(param.detach(), safe_get_full_fp32_param(param).bfloat16())  # lp follows, on every rank


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_local_pieces(ranks: int) -> None:
    run_ranks(_local, ranks, ranks)


def _stale_or_fresh_weights(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    old = model.long.detach().clone()
    set_many([(model.long, torch.ones(7, 11))], refresh_lp=False)
    assert_same(model.long.detach(), old)
    assert_same(safe_get_full_fp32_param(model.long), torch.ones(7, 11))
    partition.publish()
    assert_same(model.long.detach(), torch.ones(7, 11, dtype=torch.bfloat16))
    rounded = torch.full((7, 11), 1.00390625)  # half-way: to the even one
    safe_set_full_fp32_param(model.long, rounded)
    assert_same(model.long.detach(), torch.ones(7, 11, dtype=torch.bfloat16))
    assert_same(safe_get_full_fp32_param(model.long), rounded)


def test_weights_follow_at_once_unless_told() -> None:
    run_ranks(_stale_or_fresh_weights, 2)


def test_a_linked_parameter_without_a_layout_says_so() -> None:
    param = nn.Parameter(torch.zeros(3))
    param._hp_mapping = None  # type: ignore[attr-defined]  (some engine's)
    with pytest.raises(UnlinkedParameterError, match=r"call attach\(.* on every rank first|no rank's layout is known"):
        safe_get_full_fp32_param(param)


def test_state_in_lower_precision_is_read_exactly_and_in_another_kind_refused() -> None:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))]
    partition = FlatPartition(params)
    optimizer = torch.optim.SGD([partition.hp_param], momentum=0.9)
    half, count = torch.randn(8).bfloat16(), torch.arange(8)
    optimizer.state[partition.hp_param].update(half=half, count=count)
    attach(None, optimizer)
    assert_same(safe_get_full_optimizer_state(params[1], "half"), half[3:].float())
    safe_set_full_optimizer_state(params[1], torch.ones(5), "half")
    assert half[3:].tolist() == [1] * 5
    with pytest.raises(FragmentError, match=r"'count' of .* has dtype torch.int64"):
        safe_get_full_optimizer_state(params[1], "count")
