"""`link_hp_params` with DeepSpeed's signature and attributes."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import describe, get_local, set_many
from ds_fragment.engines.flat import link_of
from ds_fragment.errors import InvalidValueError, StateNotReadyError, UnlinkedParameterError
from ds_fragment.mixed_precision_linkage import (
    lazy_init_hp_params_optimizer_state,
    link_hp_params,
    unlink_hp_params,
)
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_optimizer_state
from fragment_oracle import assert_same, raised
from ranks import run_ranks
from torch import nn

SHAPES = [(3,), (2, 4), (0, 5), (1,), (), (4, 3), (0,), (2,)]
ATTRIBUTES = {
    "_hp_mapping",
    "_dp_group",
    "_index_in_param_group",
    "get_full_hp_param",
    "get_full_hp_grad",
    "set_full_hp_param",
    "set_full_hp_grad",
}


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def link(params: list[nn.Parameter], flat: torch.Tensor, gradients: Any = None, **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "lp_param_list": params,
        "flat_hp_partition": flat,
        "gradient_dict": gradients,
        "offload_gradient_dict": None,
        "use_offload": False,
        "param_group_index": 0,
        "partition_start": 0,
        "partition_size": flat.numel(),
        "dp_group": None,
    }
    link_hp_params(**{**arguments, **changed})


def _attributes_on_every_rank(rank: int, ranks: int) -> None:
    """The index counts the parameters that begin in the partition or reach into it, empty ones included."""
    params = parameters()
    total = sum(param.numel() for param in params)
    size = -(-total // ranks)
    begin, end = rank * size, (rank + 1) * size
    flat = torch.arange(begin, end, dtype=torch.float32)
    link(params, flat, partition_start=begin, partition_size=size, dp_group=dist.group.WORLD)
    offset, expected = 0, 0
    for param in params:
        last = offset + param.numel()
        mine = [number for number in range(offset, last) if begin <= number < end]
        assert param._dp_group is dist.group.WORLD
        assert (param._hp_mapping is not None) == bool(mine)
        if mine:
            assert param._hp_mapping.hp_fragment.tolist() == mine
            assert param._hp_mapping.lp_fragment_address.start == mine[0] - offset
        if begin <= offset < end or (offset < begin < last):
            assert param._index_in_param_group == expected
            expected += 1
        else:
            assert not hasattr(param, "_index_in_param_group")
        whole = torch.arange(offset, last, dtype=torch.float32).view(param.shape)
        assert_same(param.get_full_hp_param(), whole)
        assert_same(safe_get_full_fp32_param(param), whole)
        offset = last


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_attributes_on_every_rank(ranks: int) -> None:
    run_ranks(_attributes_on_every_rank, ranks, ranks)


def test_parameters_are_named_as_deepspeed_names_them() -> None:
    names = ["lp_param_list", "flat_hp_partition", "gradient_dict", "offload_gradient_dict", "use_offload"]
    names += ["param_group_index", "partition_start", "partition_size", "dp_group"]
    names += ["param_offsets"]
    assert list(inspect.signature(link_hp_params).parameters) == names
    lazy = list(inspect.signature(lazy_init_hp_params_optimizer_state).parameters)
    assert lazy == ["lp_param_list", "flat_hp_partition", "optimizer_state"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"partition_start": 4}, r"offset 0 has 3 elements, of which the ranks' partitions hold 0: .*\[\(4, 31\)\]"),
        ({"partition_start": -1}, "partition_start is -1 and partition_size 27, expected 0 or more"),
        ({"partition_size": 26}, r"offset 25 has 2 elements, of which the ranks' partitions hold 1: .*\[\(0, 26\)\]"),
        ({"param_offsets": [0, 3]}, r"param_offsets is \[0, 3\] for 8 parameters"),
        ({"param_offsets": [0, 3, 11, 11, 12, 13, 25, -2]}, "give each the element at which it begins, 0 or more"),
        ({"param_offsets": [0, 2, 11, 11, 12, 13, 25, 25]}, "overlap: one parameter has the elements 0 to 3, an"),
        ({"flat_hp_partition": torch.zeros(26)}, r"flat_hp_partition has shape \(26,\), expected 1-D with at least 27"),
        ({"flat_hp_partition": torch.zeros(27, 1)}, r"flat_hp_partition has shape \(27, 1\)"),
        (
            {"lp_param_list": [nn.Parameter(torch.zeros(2, 3).t())]},
            r"lp_param_list\[0\] of shape \(3, 2\) is not contig",
        ),
    ],
)
def test_bad_input_links_nothing(changed: dict[str, Any], message: str) -> None:
    params = parameters()
    assert sum(param.numel() for param in params) == 27
    with pytest.raises(InvalidValueError, match=message):
        link(params, torch.zeros(27), **changed)
    assert not any(ATTRIBUTES & set(vars(param)) for param in [*params, *changed.get("lp_param_list", [])])
    assert all(link_of(param) is None for param in params)


def test_bad_input_leaves_an_earlier_link() -> None:
    params, flat = parameters(), torch.arange(27.0)
    link(params, flat)
    with pytest.raises(InvalidValueError):
        link(params, torch.zeros(5))
    assert_same(params[1].get_full_hp_param(), torch.arange(3.0, 11.0).view(2, 4))


def test_a_padded_partition_may_be_shorter_than_its_size() -> None:
    params, flat = parameters(), torch.arange(27.0)
    link(params, flat, partition_size=40)
    assert params[-1].get_full_hp_param().tolist() == [25, 26]


def test_the_four_methods_of_a_parameter() -> None:
    params, flat, gradient = parameters(), torch.arange(27.0), torch.arange(27.0) * 2
    table = {0: [gradient[0:3], gradient[3:11], gradient[11:11], gradient[11:12], gradient[12:13]]}
    link(params, flat, table)
    weight, optimizer = params[1], {flat: {"exp_avg": torch.arange(27.0) * 3}}
    lazy_init_hp_params_optimizer_state(params, flat, optimizer)
    assert_same(weight.get_full_hp_param(), torch.arange(3.0, 11.0).view(2, 4))
    assert_same(weight.get_full_hp_param("exp_avg"), torch.arange(3.0, 11.0).view(2, 4) * 3)
    assert_same(weight.get_full_hp_param(optim_state_key="exp_avg"), torch.arange(3.0, 11.0).view(2, 4) * 3)
    assert_same(weight.get_full_hp_grad(), torch.arange(3.0, 11.0).view(2, 4) * 2)
    weight.set_full_hp_param(torch.full((2, 4), 5.0))
    weight.set_full_hp_param(torch.full((2, 4), 6.0), "exp_avg")
    weight.set_full_hp_grad(torch.full((2, 4), 7.0))
    assert flat[2:12].tolist() == [2, *[5] * 8, 11]
    assert weight.detach().float().unique().tolist() == [5]  # the lp weights follow at once
    assert optimizer[flat]["exp_avg"][2:12].tolist() == [6, *[6] * 8, 33]
    assert gradient[2:12].tolist() == [4, *[7] * 8, 22]


def test_nothing_is_linked_before_the_first_step_and_nothing_is_put_into_the_state() -> None:
    params, flat = parameters(), nn.Parameter(torch.zeros(27))
    link(params, flat)
    optimizer = torch.optim.AdamW([flat])
    lazy_init_hp_params_optimizer_state(params, flat, optimizer.state)
    assert len(optimizer.state) == 0
    with pytest.raises(StateNotReadyError):
        safe_get_full_optimizer_state(params[0], "exp_avg")
    flat.grad = torch.ones(27)
    optimizer.step()
    lazy_init_hp_params_optimizer_state(params, flat, optimizer.state)
    assert safe_get_full_optimizer_state(params[1], "exp_avg").shape == (2, 4)
    assert torch.equal(
        safe_get_full_optimizer_state(params[1], "exp_avg"), optimizer.state[flat]["exp_avg"][3:11].view(2, 4)
    )


def test_state_of_a_parameter_that_was_never_linked() -> None:
    params, flat = parameters(), torch.zeros(27)
    link(params, flat)
    other = nn.Parameter(torch.zeros(3, 1))
    with pytest.raises(UnlinkedParameterError, match=r"shape \(3, 1\) is not linked: call link_hp_params"):
        lazy_init_hp_params_optimizer_state([*params, other], flat, {flat: {"exp_avg": torch.zeros(27)}})
    with pytest.raises(StateNotReadyError):
        safe_get_full_optimizer_state(params[0], "exp_avg")  # nothing was linked for the others either


def test_unlink_takes_everything_away_and_is_harmless_twice() -> None:
    params, before = parameters(), [set(vars(param)) for param in parameters()]
    link(params, torch.zeros(27))
    unlink_hp_params(params)
    unlink_hp_params(params)
    assert [set(vars(param)) - {"_ds_fragment"} for param in params] == before
    assert all(link_of(param) is None for param in params)
    assert_same(safe_get_full_fp32_param(params[0]), torch.zeros(3))  # a plain parameter again


def test_linking_again_reads_the_new_partition() -> None:
    params, first, second = parameters(), torch.zeros(27), torch.ones(27)
    link(params, first)
    safe_get_full_fp32_param(params[0])
    link(params, second)
    assert_same(safe_get_full_fp32_param(params[0]), torch.ones(3))
    third = torch.arange(27.0)
    link(params[::-1], third)  # in another order
    assert params[-1].get_full_hp_param().tolist() == [0, 1]


def test_a_deleted_partition_says_so() -> None:
    params, flat = parameters(), torch.zeros(27)
    link(params, flat)
    del flat
    with pytest.raises(UnlinkedParameterError, match="partition that was deleted"):
        params[0].get_full_hp_param()


def test_the_methods_keep_neither_parameter_nor_partition_alive() -> None:
    params, flat = parameters(), torch.zeros(27)
    link(params, flat)
    gone = [weakref.ref(param) for param in params] + [weakref.ref(flat)]
    gc.disable()
    try:
        del params, flat
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_methods_of_an_unlinked_parameter() -> None:
    from ds_fragment import tensor_fragment as module

    plain = nn.Parameter(torch.zeros(3))
    for call in (
        lambda: module.get_full_hp_param(plain),
        lambda: module.get_full_hp_grad(plain),
        lambda: module.set_full_hp_param(plain, torch.zeros(3)),
        lambda: module.set_full_hp_grad(plain, torch.zeros(3)),
    ):
        assert raised(call) == (
            "UnlinkedParameterError",
            "a parameter of shape (3,) is not linked to a flat fp32 partition: call link_hp_params or make a "
            "FlatPartition",
        )


def _random_links(rank: int, ranks: int, seed: int) -> None:
    """Random offsets with gaps, in any order, and slices of random sizes, against a dense buffer."""
    draw = torch.Generator().manual_seed(seed)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=draw))

    numels = [pick(9) for _ in range(8)]
    gaps = [pick(4) for _ in range(8)]
    order = torch.randperm(8, generator=draw).tolist()
    offsets, position = [0] * 8, 0
    for i in order:
        position += gaps[i]
        offsets[i] = position
        position += numels[i]
    cuts = sorted(pick(position + 1) for _ in range(ranks - 1))
    begin, end = [0, *cuts, position + pick(3)][rank : rank + 2]
    dense = torch.randn(position + 3, generator=draw)
    params = [nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16)) for numel in numels]
    flat = dense[begin:end].clone()
    link(
        params,
        flat,
        partition_start=begin,
        partition_size=end - begin,
        dp_group=dist.group.WORLD,
        param_offsets=offsets,
    )
    for param, offset, numel in zip(params, offsets, numels, strict=True):
        assert_same(safe_get_full_fp32_param(param), dense[offset : offset + numel])
    values = [torch.randn(numel, generator=draw) for numel in numels]
    set_many(list(zip(params, values, strict=True)))
    for param, offset, numel, value in zip(params, offsets, numels, values, strict=True):
        dense[offset : offset + numel] = value
        assert_same(param.detach(), value.bfloat16())
    assert_same(flat, dense[begin:end])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_offsets_in_any_order_and_slices_of_any_size(ranks: int, seed: int) -> None:
    run_ranks(_random_links, ranks, ranks, seed)


def _bad_slices(rank: int) -> list[Any]:
    group, found = dist.group.WORLD, []
    for start, size, offsets in ((2 * rank, 3, None), (3 * rank, 2, None), (3 * rank, 3, [rank])):
        param = nn.Parameter(torch.zeros(5))
        flat = torch.zeros(6)
        link(
            [param],
            flat,
            partition_start=start,
            partition_size=size,
            dp_group=group,
            param_offsets=offsets,
        )
        assert get_local(param).dtype == torch.float32
        found.append(raised(lambda param=param: describe(param)))
        found.append(raised(lambda param=param: safe_get_full_fp32_param(param)))
        found.append(raised(lambda param=param: set_many([(param, torch.ones(5))])))
        assert param.tolist() == [0] * 5
    return found


def test_slices_that_do_not_cut_the_parameters_are_refused_on_every_rank() -> None:
    mine, other = run_ranks(_bad_slices, 2)
    assert mine == other
    for number, (kind, text) in enumerate(
        (
            ("InvalidValueError", "partitions overlap"),
            ("InvalidValueError", "of which the ranks' partitions hold 4"),
            ("RankMismatchError", "pass the same lp_param_list and param_offsets"),
        )
    ):
        unknown, read, write = mine[3 * number : 3 * number + 3]
        assert unknown[0] == "FragmentError"
        assert "before the first collective read" in unknown[1]
        assert read == write
        assert read[0] == kind
        assert text in read[1]


@pytest.mark.parametrize("use_offload", [False, True])
def test_gradients_of_a_partition_with_gaps(use_offload: bool) -> None:
    """The list has an entry for each gap before a parameter, but for an offloaded optimizer."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    pieces = [torch.full((2,), float(i)) for i in range(3)]
    gap = torch.zeros(3)
    table = {0: pieces if use_offload else [gap, pieces[0], pieces[1], gap, pieces[2], gap]}
    arguments = {"gradient_dict": None if use_offload else table, "offload_gradient_dict": table}
    flat = torch.zeros(14)
    link(params, flat, **arguments, use_offload=use_offload, param_offsets=[3, 5, 10])
    for param, piece in zip(params, pieces, strict=True):
        assert_same(param.get_full_hp_grad(), piece)
