"""`FlatPartition`: fp32 slices of a parameter group, and the life of their gradients."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, get_local, iter_full
from ds_fragment.engines.flat import link_of
from ds_fragment.errors import InvalidValueError, UnlinkedParameterError
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
)
from fragment_oracle import (
    assert_same,
    from_every_rank,
    ragged,
    raised,
    set_gradients,
    slices_of_flat,
    snapshot,
    unchanged,
    whole_numbers,
)
from ranks import run_ranks
from torch import nn


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _slices(rank: int, ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _slices_of(rank, ranks, dtype)


def _slices_of(rank: int, ranks: int, dtype: torch.dtype) -> None:
    model = ragged(dtype)
    before = [param.detach().clone() for param in model.parameters()]
    partition = FlatPartition(model.parameters())
    params = trained(model)
    assert partition.params == params  # frozen and tied ones are left out
    total = sum(param.numel() for param in params)
    assert partition.numel == total
    assert partition.partition_size == -(-total // ranks)
    assert partition.hp_param.dtype == torch.float32
    assert partition.hp_param.requires_grad
    flats = from_every_rank(partition.hp_param)
    assert all(flat.shape == (partition.partition_size,) for flat in flats)
    assert torch.cat(flats)[total:].abs().sum() == 0  # the padding
    for param, piece in zip(params, slices_of_flat(flats, [p.shape for p in params]), strict=True):
        assert_same(piece, param.detach().float())
        assert_same(safe_get_full_fp32_param(param), param.detach().float())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert f"rank {rank} of {ranks}" in repr(partition)
    assert not hasattr(model.frozen, "_hp_mapping")
    assert_same(safe_get_full_fp32_param(model.frozen), model.frozen.detach().float())


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_each_rank_has_its_slice_in_fp32(ranks: int) -> None:
    run_ranks(_slices, ranks, ranks)


def _mean(rank: int, ranks: int) -> None:
    """The mean over the ranks, exactly: the gradients are whole numbers, and their sum is divided once."""
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    params = trained(model)
    for turn in range(3):
        set_gradients(params, seed=100 * turn + rank)
        everybodys = [set_gradients(trained(ragged(torch.bfloat16)), seed=100 * turn + other) for other in range(ranks)]
        means = [sum(grads[i].float() for grads in everybodys) / ranks for i in range(len(params))]
        partition.reduce_gradients()
        assert all(param.grad is None for param in params)
        assert partition.hp_param.grad.dtype == torch.float32
        for (_, got), expected in zip(iter_full(params, "grad"), means, strict=True):
            assert_same(got, expected)
        pieces = slices_of_flat(from_every_rank(partition.hp_param.grad), [p.shape for p in params])
        for piece, expected in zip(pieces, means, strict=True):
            assert_same(piece, expected)
        partition.publish()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_gradient_is_the_mean_over_the_ranks(ranks: int) -> None:
    run_ranks(_mean, ranks, ranks)


def _scaled(rank: int) -> None:
    model = ragged(torch.float16)
    partition = FlatPartition(model.parameters())
    (mine,) = set_gradients([model.long], seed=rank)
    for _ in range(2):  # backward passes pile up locally
        model.long.grad = (model.long.grad + mine * 31) if model.long.grad is not mine else mine
    expected = sum(set_gradients([model.long], seed=other)[0].float() * 64 for other in range(2)) / 2 / 1024
    model.long.grad = mine * 64
    partition.reduce_gradients(scale=1024.0)
    assert_same(safe_get_full_grad(model.long), expected)
    model.long.grad = mine * 64
    partition.reduce_gradients(scale=1024, accumulate=True)
    assert_same(safe_get_full_grad(model.long), expected * 2)
    model.long.grad = mine * 64
    partition.reduce_gradients(scale=1024)  # replaces
    assert_same(safe_get_full_grad(model.long), expected)


def test_scale_and_accumulate() -> None:
    run_ranks(_scaled, 2)


def _gradients(params: list[nn.Parameter], rank: int, turn: int, scale: float) -> list[torch.Tensor | None]:
    """A rank's lp gradients of a turn: all that it used, times the scale. The last rank alone uses the tiny one."""
    generator = torch.Generator().manual_seed(10 * turn + rank)
    grads = [(torch.randn(p.shape, generator=generator) * scale).to(p.dtype) for p in params]
    last = dist.get_world_size() - 1
    left_out = {(6,), *([] if rank == last else [(1,)]), *([(7, 11)] if turn else [])}  # by shape
    return [None if tuple(grad.shape) in left_out else grad for grad in grads]


def _statistics(rank: int, ranks: int, dtype: torch.dtype) -> None:
    """Beside a dense float64 oracle, with every element that is not written poisoned."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    model = ragged(dtype)
    partition = FlatPartition(model.parameters())
    params, scale = trained(model), 64.0
    shapes = [param.shape for param in params]
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for turn in range(2):
        for param, grad in zip(params, _gradients(params, rank, turn, scale), strict=True):
            param.grad = grad
        for other in range(ranks):
            for total, grad in zip(expected, _gradients(params, other, turn, scale), strict=True):
                total += 0 if grad is None else grad.double() / ranks / scale
        stats = partition.reduce_gradients(scale=scale, accumulate=turn > 0)
        flats = from_every_rank(partition.hp_param.grad)
        for got, dense in zip(slices_of_flat(flats, shapes), expected, strict=True):
            torch.testing.assert_close(got.double(), dense, rtol=1e-6, atol=1e-6)
        assert torch.cat(flats)[partition.numel :].abs().sum() == 0  # the padding
        norm = torch.cat([dense.flatten() for dense in expected]).norm()
        assert (stats.norm.dtype, stats.nonfinite.dtype) == (torch.float32, torch.int64)
        torch.testing.assert_close(stats.norm.double(), norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.sum_squares, norm.square(), rtol=1e-6, atol=0)
        assert stats.nonfinite == 0
        for theirs in from_every_rank(stats.values):
            assert_same(theirs, stats.values)
        assert why(model.long) == why(model.tiny) == "there is one"  # of an earlier turn, and of the last rank
        assert "no rank used the parameter" in why(model.unused)
    torch.nn.utils.clip_grads_with_norm_([partition.hp_param], 0.5, stats.norm)
    clipped = torch.cat(from_every_rank(partition.hp_param.grad)).double().norm()
    torch.testing.assert_close(clipped.item(), 0.5, rtol=1e-5, atol=0)
    partition.publish()
    assert partition.reduce_gradients().values.tolist() == [0.0, 0.0]  # nobody used anything
    assert partition.hp_param.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_statistics_are_those_of_the_dense_gradient(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(_statistics, ranks, ranks, dtype)


def _not_finite(rank: int, ranks: int, dtype: torch.dtype) -> None:
    """Infinities and NaN in one rank's gradients are everybody's, and stay while they are added to."""
    model = ragged(dtype)
    partition = FlatPartition(model.parameters())
    last = rank == ranks - 1
    for bad, norm in ([float("inf")], "inf"), ([float("-inf"), float("nan")], "nan"):
        set_gradients(partition.params, seed=rank)
        if last:
            model.long.grad.view(-1)[5 : 5 + len(bad)] = torch.tensor(bad, dtype=dtype)
        stats = partition.reduce_gradients()
        assert stats.nonfinite == len(bad)
        assert str(stats.norm.item()) == norm
        broken = ~safe_get_full_grad(model.long).isfinite().view(-1)
        assert broken.nonzero().flatten().tolist() == list(range(5, 5 + len(bad)))
        set_gradients([model.weight], seed=rank)
        stats = partition.reduce_gradients(accumulate=True)
        assert stats.nonfinite == len(bad)
        assert str(stats.norm.item()) == norm
    if dtype == torch.float16:  # what overflows when it is unscaled, though each gradient was finite
        return
    set_gradients(partition.params, seed=rank)
    if last:
        model.tiny.grad.fill_(3e38)
    assert partition.reduce_gradients(scale=2.0**-9).nonfinite == 1
    set_gradients(partition.params, seed=rank)
    assert partition.reduce_gradients().nonfinite == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_not_finite_on_one_rank_is_counted_on_every_rank(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(_not_finite, ranks, ranks, dtype)


def _memory(rank: int) -> None:
    """No lp gradient is kept, and a reduced one that somebody keeps is not written to."""
    for group in (dist.new_group([0]), dist.new_group([1]), None):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            continue
        model = ragged(torch.bfloat16)
        partition = FlatPartition(model.parameters(), group)
        set_gradients(partition.params, seed=rank)
        grads = [weakref.ref(param.grad) for param in partition.params]
        partition.reduce_gradients()
        assert not any(grad() is not None for grad in grads)
        kept = partition.hp_param.grad
        before = kept.clone()
        set_gradients(partition.params, seed=5 + rank)
        partition.reduce_gradients()
        assert_same(kept, before)
        partition.publish()
        assert partition.hp_param.grad is None


def test_gradients_live_no_longer_than_they_must() -> None:
    run_ranks(_memory, 2)


def why(param: torch.Tensor) -> str:
    found = raised(lambda: list(iter_full([param], "grad")))
    if found is None:
        return "there is one"
    if found[0] == "UnusedGradientError":
        assert safe_get_full_grad(param) is None
    else:
        assert found[0] == "GradientUnavailableError"
        assert found == raised(lambda: safe_get_full_grad(param))
    assert found == raised(lambda: safe_set_full_grad(param, torch.ones(param.shape)))
    return found[1]


def _life(rank: int) -> list[str]:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.SGD([partition.hp_param], lr=0.5)
    attach(model, optimizer)
    weight, unused = model.weight, model.unused
    told = [why(weight)]  # before any backward pass
    weight.grad = torch.ones_like(weight)
    told.append(why(weight))  # not reduced
    partition.reduce_gradients()
    told += [why(weight), why(unused)]  # reduced, and no rank used the other one
    weight.grad = torch.ones_like(weight)
    told.append(why(weight))  # a backward pass later: half of it is not reduced
    partition.reduce_gradients(accumulate=True)
    told.append(why(weight))
    assert_same(safe_get_full_grad(weight), torch.full((5, 3), 2.0))
    optimizer.step()
    told.append(why(weight))  # still there until it is consumed
    partition.publish()
    told.append(why(weight))
    partition.publish()
    told.append(why(weight))  # consumed stays consumed
    if rank == 1:
        unused.grad = torch.ones_like(unused)
    told.append(why(unused))  # neither rank has one, for different reasons: the lower one's is told
    partition.reduce_gradients()
    told.append(why(unused))
    if rank == 1:
        unused.grad = torch.ones_like(unused)
    told.append(why(unused))  # unreduced on one rank alone
    unused.grad = None
    told.append(why(unused))  # the other counted as zero
    assert_same(safe_get_full_grad(unused), torch.full((6,), 0.5))
    told.append(why(weight))
    partition.reduce_gradients()  # no rank used anything
    told.append(why(unused))
    unused.grad = torch.ones_like(unused)
    partition.reduce_gradients()
    optimizer.zero_grad()  # throws the gradient away
    told.append(why(unused))
    weight.grad = torch.ones_like(weight)
    partition.reduce_gradients(accumulate=True)  # there is nothing to add to
    told += [why(weight), why(unused)]
    return told


def test_every_stage_says_what_it_is() -> None:
    (told, other) = run_ranks(_life, 2)
    assert told == other
    words = [
        "no backward pass was reduced yet",
        "it is not reduced yet: call reduce_gradients() on every rank",
        "there is one",
        "no rank used the parameter in this backward pass",
        "it is not reduced yet",
        "there is one",
        "there is one",
        "it was consumed by the last step: read it between reduce_gradients() and publish()",
        "it was consumed by the last step",
        "rank 0: parameter 'unused' has no gradient to read: it was consumed",
        "there is one",
        "rank 1: parameter 'unused' has no gradient to read: it is not reduced yet",
        "there is one",
        "no rank used the parameter",
        "no rank used the parameter",
        "it was consumed by the last step",
        "there is one",
        "no rank used the parameter",
    ]
    assert len(told) == len(words)
    for text, word in zip(told, words, strict=True):
        assert word in text


def _groups(rank: int) -> None:
    """Two parameter groups, and each over another set of ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = ragged(torch.bfloat16, seed=rank // 2)  # each pair has a model of its own
    dense, experts = [model.weight, model.bias, model.scalar], [model.long, model.tiny]
    pair = pairs[rank // 2]
    first, second = FlatPartition(dense, pair), FlatPartition(experts, pair, index=1)
    optimizer = torch.optim.SGD([{"params": [first.hp_param]}, {"params": [second.hp_param], "lr": 0.25}], lr=0.5)
    attach(model, optimizer)
    for param in [*dense, *experts]:
        assert_same(safe_get_full_fp32_param(param), param.detach().float())
    whole_numbers(model, seed=rank // 2)
    for param in [*dense, *experts]:
        safe_set_full_fp32_param(param, param.detach().float())
    before = [param.detach().float() for param in [*dense, *experts]]
    set_gradients(dense, seed=rank)
    set_gradients(experts, seed=50 + rank)
    of = ragged(torch.bfloat16)
    lists = [[of.weight, of.bias, of.scalar], [of.long, of.tiny]]
    everybodys = [
        [*set_gradients(lists[0], seed=r), *set_gradients(lists[1], seed=50 + r)]
        for r in (rank // 2 * 2, rank // 2 * 2 + 1)
    ]
    first.reduce_gradients()
    second.reduce_gradients()
    means = [(a.float() + b.float()) / 2 for a, b in zip(*everybodys, strict=True)]
    for (_, got), expected in zip(iter_full([*dense, *experts], "grad"), means, strict=True):
        assert_same(got, expected)
    optimizer.step()
    first.publish()
    second.publish()
    rates = [0.5] * 3 + [0.25] * 2
    for param, old, mean, rate in zip([*dense, *experts], before, means, rates, strict=True):
        assert_same(safe_get_full_fp32_param(param), old - rate * mean)
        assert_same(param.detach(), (old - rate * mean).bfloat16())


def test_several_partitions_over_groups_of_ranks() -> None:
    run_ranks(_groups, 4)


def _not_a_member(rank: int) -> tuple[str, str] | None:
    group = dist.new_group([0])
    return raised(lambda: FlatPartition(ragged().parameters(), group))


def test_a_rank_outside_of_the_group_is_told_so() -> None:
    member, other = run_ranks(_not_a_member, 2)
    assert member is None
    assert other is not None
    assert other[0] == "InvalidValueError"
    assert "a process group that this rank is a member of" in other[1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params is empty, or all of it is frozen"),
        ([nn.Parameter(torch.zeros(2), requires_grad=False)], "params is empty, or all of it is frozen"),
        (
            [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 3).t())],
            r"params\[1\] of shape \(3, 2\) is not contig",
        ),
        ([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], r"params\[0\] has dtype torch.complex64"),
        ([("weight", nn.Parameter(torch.zeros(2)))], r"params\[0\] is a tuple, expected a parameter"),
        (
            [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))],
            r"params\[1\] is on meta and params\[0\] on cpu",
        ),
    ],
)
def test_parameters_that_cannot_be_linked(params: list[Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        FlatPartition(params)
    assert not any(hasattr(param, "_hp_mapping") for param in params)


def _bad_on_one_rank(rank: int) -> list[Any]:
    good = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    bad = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 3).t())]
    longer = [*good, nn.Parameter(torch.zeros(1))]
    other = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    found = [raised(lambda mine=mine: FlatPartition(mine if rank else good)) for mine in (bad, longer, other, [])]
    assert not any(hasattr(param, "_hp_mapping") for param in [*good, *bad, *longer, *other])
    return found


def test_parameters_that_differ_between_ranks_are_everybodys_error() -> None:
    mine, other = run_ranks(_bad_on_one_rank, 2)
    assert mine == other
    kinds, texts = zip(*mine, strict=True)
    assert kinds == ("InvalidValueError", "RankMismatchError", "RankMismatchError", "InvalidValueError")
    assert texts[0].startswith("rank 1: params[1]")
    assert "[2, 3]" in texts[1]
    assert "the shape of params[1]" in texts[2]


def _bad_reduce(rank: int) -> list[Any]:
    model = ragged()
    partition = FlatPartition(model.parameters())
    params = trained(model)
    set_gradients(params, seed=rank)
    partition.reduce_gradients()
    set_gradients(params, seed=rank)
    before = snapshot(model, partition.hp_param, partition.hp_param.grad)
    found = []
    for scale in (0, -1.0, float("inf"), float("nan"), "1", 1e-40):
        found.append(raised(lambda scale=scale: partition.reduce_gradients(scale=scale if rank else 1.0)))
    found.append(raised(lambda: partition.reduce_gradients(scale=1.0 + rank)))
    found.append(raised(lambda: partition.reduce_gradients(accumulate=bool(rank))))
    dense = model.weight.grad
    model.weight.grad = dense.to_sparse() if rank else dense
    found.append(raised(partition.reduce_gradients))
    model.weight.grad = dense
    assert unchanged(before, model, partition.hp_param, partition.hp_param.grad)
    return found


def test_bad_input_to_reduce_changes_nothing_on_any_rank() -> None:
    mine, other = run_ranks(_bad_reduce, 2)
    assert mine == other
    kinds = [kind for kind, _ in mine]
    assert kinds == ["InvalidValueError"] * 6 + ["RankMismatchError"] * 2 + ["InvalidValueError"]
    assert "scale is nan" in mine[3][1]
    assert "scale is 1e-40" in mine[5][1]
    assert "different values for scale" in mine[6][1]
    assert "different values for accumulate" in mine[7][1]
    assert "layout torch.sparse_coo" in mine[8][1]


def test_unlink_and_link_anew() -> None:
    model = ragged(torch.bfloat16)
    params = trained(model)
    first = FlatPartition(params)
    second = FlatPartition(params)
    safe_set_full_fp32_param(model.weight, torch.ones(5, 3))
    assert link_of(model.weight).flat() is second.hp_param
    first.unlink()  # what a later partition took over stays with it
    assert_same(safe_get_full_fp32_param(model.weight), torch.ones(5, 3))
    for call in (first.publish, first.reduce_gradients):
        with pytest.raises(UnlinkedParameterError, match=r"params\[0\], .*is not linked to this partition any more"):
            call()
    second.unlink()
    second.unlink()
    assert not any(hasattr(param, "_hp_mapping") for param in params)
    assert safe_get_full_fp32_param(model.weight).dtype == torch.float32
    third = FlatPartition(params)
    assert_same(safe_get_full_fp32_param(model.weight), model.weight.detach().float())
    del third


def test_a_model_of_empty_parameters_and_one_smaller_than_the_ranks() -> None:
    run_ranks(_small, 4)


def _small(rank: int) -> None:
    for shapes in ([(0,), (0, 3)], [(2,)], [(1,), (0,), (1,)]):
        params = [nn.Parameter(torch.full(shape, 3.0, dtype=torch.bfloat16)) for shape in shapes]
        partition = FlatPartition(params)
        optimizer = torch.optim.Adam([partition.hp_param], lr=1.0)
        attach(None, optimizer)
        for param in params:
            param.grad = torch.ones_like(param)
        partition.reduce_gradients()
        for param in params:
            assert_same(safe_get_full_grad(param), torch.ones(param.shape))
            assert get_local(param, "grad").numel() <= 1
        optimizer.step()
        partition.publish()
        for param in params:
            assert_same(param.detach(), torch.full(param.shape, 2.0, dtype=torch.bfloat16))
            assert_same(safe_get_full_optimizer_state(param, "exp_avg"), torch.full(param.shape, 1.0) * (1 - 0.9))
            assert safe_get_full_optimizer_state(param, "step") == 1


def test_without_a_process_group() -> None:
    assert not dist.is_initialized()
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    assert partition.group is None
    assert partition.world_size == 1
    optimizer = torch.optim.SGD([partition.hp_param], lr=1.0)
    attach(model, optimizer)
    whole_numbers(model)
    for param in partition.params:
        safe_set_full_fp32_param(param, param.detach().float())
    before = [param.detach().float() for param in partition.params]
    grads = set_gradients(partition.params, seed=1)
    stats = partition.reduce_gradients()
    assert stats.sum_squares == sum(grad.double().square().sum() for grad in grads)
    assert stats.nonfinite == 0
    optimizer.step()
    partition.publish()
    for param, old, grad in zip(partition.params, before, grads, strict=True):
        assert_same(safe_get_full_fp32_param(param), old - grad.float())
        assert_same(param.detach(), (old - grad.float()).bfloat16())
