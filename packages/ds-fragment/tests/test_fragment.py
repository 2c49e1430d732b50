"""`tensor_fragment`, and where `get_hp_fragment_mapping` says that it is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ds_fragment.errors import (
    GradientUnavailableError,
    StateKeyError,
    StateNotReadyError,
    UnlinkedParameterError,
)
from ds_fragment.tensor_fragment import (
    fragment_address,
    get_hp_fragment_mapping,
    map_to_flat_opt_states,
    tensor_fragment,
)
from fragment_oracle import assert_same, bits
from torch import nn


def mapped(
    lp: torch.Tensor, lp_start: int, flat: torch.Tensor, partition_start: int, gradients: object = None
) -> tensor_fragment | None:
    return get_hp_fragment_mapping(lp, lp_start, flat, gradients, None, False, 0, partition_start, flat.numel())


def test_address_is_numel_then_start() -> None:
    assert fragment_address(3, 5) == fragment_address(numel=3, start=5)
    assert fragment_address(3, 5) != fragment_address(5, 3)


def test_every_position_of_a_parameter_against_every_partition() -> None:
    for numel in range(1, 7):
        for lp_start in range(6):
            for partition_start in range(0, 12, 2):
                for size in range(1, 6):
                    lp = nn.Parameter(torch.arange(100, 100 + numel, dtype=torch.bfloat16))
                    flat = torch.arange(partition_start, partition_start + size, dtype=torch.float32)
                    where = sorted(
                        set(range(lp_start, lp_start + numel)) & set(range(partition_start, partition_start + size))
                    )
                    found = mapped(lp, lp_start, flat, partition_start)
                    if not where:
                        assert found is None
                        continue
                    assert found is not None
                    assert found.hp_fragment.tolist() == where  # the flat buffer is numbered by itself
                    assert found.lp_fragment.tolist() == [100 + number - lp_start for number in where]
                    assert found.lp_fragment_address == fragment_address(len(where), where[0] - lp_start)
                    assert found.get_hp_fragment_address() == fragment_address(len(where), where[0] - partition_start)


def test_fragments_are_views() -> None:
    lp, flat = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16)), torch.zeros(4)
    found = mapped(lp, 0, flat, 2)
    assert found is not None
    found.hp_fragment.fill_(3.0)
    found.lp_fragment.fill_(5.0)
    assert flat.tolist() == [3, 3, 3, 3]
    assert lp.detach().flatten().tolist() == [0, 0, 5, 5, 5, 5]
    assert found.get_hp_fragment().data_ptr() == flat.data_ptr()


def test_update_hp_and_update_lp_round_to_nearest_even() -> None:
    lp, flat = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), torch.tensor([1.00390625, 1.01171875, -0.0])
    found = mapped(lp, 0, flat, 0)
    assert found is not None
    found.update_lp()
    assert bits(lp).tolist() == [0x3F80, 0x3F82, -0x8000]
    found.update_hp()
    assert_same(flat, torch.tensor([1.0, 1.015625, -0.0]))


def test_an_assigned_tensor_is_held_as_it_is() -> None:
    lp, flat = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    found = mapped(lp, 0, flat, 0)
    assert found is not None
    mine = torch.ones(3)
    found.hp_fragment, found.lp_fragment = mine, mine
    assert found.hp_fragment is mine
    assert found.lp_fragment is mine


def test_a_fragment_made_by_hand_has_the_fields_of_its_arguments() -> None:
    lp, hp, table = torch.zeros(2), torch.ones(2), {0: [torch.ones(2)]}
    made = tensor_fragment(lp, fragment_address(2, 1), hp, fragment_address(2, 3), table, None, False, 0)
    assert made.lp_fragment is lp
    assert made.hp_fragment is hp
    assert made.gradient_dict is table
    assert made.offload_gradient_dict is None
    assert made.use_offload is False
    assert made.param_group_index == 0
    assert made.optim_fragment is None
    assert "start=3" in repr(made)


def test_the_model_does_not_keep_the_partition_nor_the_fragment_the_model() -> None:
    lp, flat = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    found = mapped(lp, 0, flat, 0)
    assert found is not None
    lp._hp_mapping = found  # type: ignore[attr-defined]
    gone = weakref.ref(flat)
    del flat
    assert gone() is None  # by reference counting alone
    with pytest.raises(UnlinkedParameterError, match="flat fp32 partition of this fragment is gone"):
        _ = found.hp_fragment
    gone_lp = weakref.ref(lp)
    del lp
    assert gone_lp() is None
    with pytest.raises(UnlinkedParameterError, match="low-precision parameter of this fragment is gone"):
        _ = found.lp_fragment


def test_state_before_the_first_step_says_so() -> None:
    found = mapped(nn.Parameter(torch.zeros(3)), 0, torch.zeros(3), 0)
    assert found is not None
    for ask in (found.get_optim_state_keys, lambda: found.get_optim_state_fragment("exp_avg")):
        with pytest.raises(StateNotReadyError, match="take one optimizer step"):
            ask()


def test_state_is_cut_where_it_is_as_long_as_the_partition() -> None:
    flat = torch.zeros(6)
    found = mapped(nn.Parameter(torch.zeros(3)), 2, flat, 0)
    assert found is not None
    average, step = torch.arange(6.0), torch.tensor(7.0)
    found.set_optim_state_fragment(flat, {"exp_avg": average, "step": step, "count": 4})
    assert sorted(found.get_optim_state_keys()) == ["count", "exp_avg", "step"]
    assert found.get_optim_state_fragment("exp_avg").tolist() == [2, 3, 4]
    assert found.get_hp_fragment("exp_avg").data_ptr() == average[2:].data_ptr()
    assert found.get_optim_state_fragment("step") is step
    assert found.get_optim_state_fragment("count") == 4
    with pytest.raises(StateKeyError, match=r"'nope' is not kept.*\['count', 'exp_avg', 'step'\]"):
        found.get_optim_state_fragment("nope")


@pytest.mark.parametrize("table", [None, {}, {0: []}, {0: [None]}, {1: [torch.ones(3)]}])
def test_a_gradient_that_is_not_in_the_table(table: object) -> None:
    found = mapped(nn.Parameter(torch.zeros(3)), 0, torch.zeros(3), 0, table)
    assert found is not None
    with pytest.raises(GradientUnavailableError, match="parameter 0 of group 0"):
        found.get_lp_grad_fragment(0)


def test_a_gradient_table_that_is_gone() -> None:
    class Table(dict):  # type: ignore[type-arg]
        pass

    table = Table({0: [torch.ones(3)]})
    found = mapped(nn.Parameter(torch.zeros(3)), 0, torch.zeros(3), 0, weakref.proxy(table))
    assert found is not None
    assert found.get_lp_grad_fragment(0).tolist() == [1, 1, 1]
    del table
    gc.collect()
    with pytest.raises(GradientUnavailableError):
        found.get_lp_grad_fragment(0)


def test_offload_reads_the_other_table() -> None:
    lp, flat = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    found = get_hp_fragment_mapping(lp, 0, flat, {2: [torch.ones(3)]}, {2: [torch.zeros(3)]}, True, 2, 0, 3)
    assert found is not None
    assert found.get_lp_grad_fragment(0).tolist() == [0, 0, 0]
    found.use_offload = False
    assert found.get_lp_grad_fragment(0).tolist() == [1, 1, 1]


def test_state_by_fragment_is_put_back_into_flat_tensors() -> None:
    flat = torch.zeros(8)
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(9))]
    starts = [-1, 2, 40]  # one begins before the partition, one inside, one is wholly elsewhere
    for param, start in zip(params, starts, strict=True):
        param._hp_mapping = mapped(param, start, flat, 0)  # type: ignore[attr-defined]
    first, second = params[0]._hp_mapping, params[1]._hp_mapping  # type: ignore[attr-defined]
    first.optim_fragment = {"exp_avg": torch.tensor([1.0, 2.0]), "step": torch.tensor(3.0)}
    second.optim_fragment = {"exp_avg": torch.tensor([5.0, 6.0])}
    state: dict[object, dict[str, object]] = {flat: {"step": torch.tensor(3.0)}}
    map_to_flat_opt_states(flat, params, state, ["exp_avg"])
    assert state[flat]["exp_avg"].tolist() == [1, 2, 5, 6, 0, 0, 0, 0]  # type: ignore[attr-defined]
    assert set(state[flat]) == {"exp_avg", "step"}
    state[flat]["exp_avg"].fill_(9.0)  # type: ignore[attr-defined]
    assert first.get_optim_state_fragment("exp_avg").tolist() == [9, 9]  # linked to the flat tensor now

    with pytest.raises(StateKeyError):
        map_to_flat_opt_states(flat, params, state, ["exp_avg", "step"])  # the second fragment has no step
    assert set(state[flat]) == {"exp_avg", "step"}
    assert first.optim_fragment["exp_avg"].data_ptr() == state[flat]["exp_avg"].data_ptr()  # type: ignore[attr-defined]
