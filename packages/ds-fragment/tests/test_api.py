"""The names that users of `deepspeed.utils` know: parameters in that order, and no silence."""

from __future__ import annotations

import inspect
from typing import Any

import ds_fragment
import pytest
import torch
from ds_fragment import FlatPartition, attach, get_local, mixed_precision_linkage, state_keys, tensor_fragment
from ds_fragment.errors import FragmentError, GradientUnavailableError, InvalidValueError, UnlinkedParameterError
from fragment_oracle import assert_same, ragged, set_gradients
from ranks import run_ranks
from torch import nn

SIGNATURES = {
    "safe_get_full_fp32_param": ["param"],
    "safe_set_full_fp32_param": ["param", "value"],
    "safe_get_full_optimizer_state": ["param", "optim_state_key"],
    "safe_set_full_optimizer_state": ["param", "value", "optim_state_key"],
    "safe_get_full_grad": ["param"],
    "safe_set_full_grad": ["param", "value"],
    "safe_get_local_fp32_param": ["param"],
    "safe_set_local_fp32_param": ["param", "value"],
    "safe_get_local_grad": ["param"],
    "safe_set_local_grad": ["param", "value"],
    "safe_get_local_optimizer_state": ["param", "optim_state_key"],
    "safe_set_local_optimizer_state": ["param", "value", "optim_state_key"],
    "safe_update_full_grad_vectorized": ["param_list", "update_func"],
    "get_full_hp_param": ["self", "optim_state_key"],
    "set_full_hp_param": ["self", "value", "optim_state_key"],
    "get_full_hp_grad": ["self"],
    "set_full_hp_grad": ["self", "value"],
    "map_to_flat_opt_states": ["flat_hp_tensor", "lp_tensors", "optim_state", "opt_keys"],
    "get_hp_fragment_mapping": [
        "lp_param",
        "lp_start",
        "flat_hp_partition",
        "gradient_dict",
        "offload_gradient_dict",
        "use_offload",
        "param_group_index",
        "partition_start",
        "partition_size",
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_in_deepspeeds_order(name: str) -> None:
    parameters = inspect.signature(getattr(tensor_fragment, name)).parameters
    assert list(parameters) == SIGNATURES[name]
    assert name in tensor_fragment.__all__
    if "optim_state_key" in parameters and name.endswith("hp_param"):
        assert parameters["optim_state_key"].default is None


def test_everything_public_is_listed_and_documented() -> None:
    for module in (ds_fragment, tensor_fragment, mixed_precision_linkage):
        for name in module.__all__:
            thing = getattr(module, name)
            assert name == "__version__" or inspect.getdoc(thing), name
    assert sorted(tensor_fragment.__all__) == list(tensor_fragment.__all__)


def _whole_family(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param], lr=0.5)
    attach(model, optimizer)
    set_gradients(partition.params, seed=0)
    partition.reduce_gradients()
    optimizer.step()
    weight = model.weight
    value = torch.arange(15.0).view(5, 3)
    t = tensor_fragment
    t.safe_set_full_fp32_param(weight, value)
    assert_same(t.safe_get_full_fp32_param(weight), value)
    assert_same(t.get_full_hp_param(weight), value)
    t.safe_set_full_grad(weight, value + 1)
    assert_same(t.safe_get_full_grad(weight), value + 1)
    assert_same(t.get_full_hp_grad(weight), value + 1)
    t.safe_set_full_optimizer_state(weight, value + 2, "exp_avg")
    assert_same(t.safe_get_full_optimizer_state(weight, "exp_avg"), value + 2)
    assert_same(t.get_full_hp_param(weight, "exp_avg"), value + 2)
    t.set_full_hp_param(weight, value + 3)
    t.set_full_hp_param(weight, value + 4, "exp_avg_sq")
    t.set_full_hp_grad(weight, value + 5)
    assert_same(t.safe_get_full_fp32_param(weight), value + 3)
    assert_same(t.safe_get_full_optimizer_state(weight, "exp_avg_sq"), value + 4)
    assert_same(t.safe_get_full_grad(weight), value + 5)
    assert state_keys(weight) == ["exp_avg", "exp_avg_sq", "step"]
    given = []
    t.safe_update_full_grad_vectorized(iter(model.parameters()), lambda grad, param: given.append(param) or grad * 2)
    assert [id(param) for param in given] == [id(param) for param in model.parameters() if param.requires_grad]
    assert_same(t.safe_get_full_grad(weight), (value + 5) * 2)


def test_the_whole_family_on_a_flat_partition() -> None:
    run_ranks(_whole_family, 3)


def test_nothing_is_silent_about_an_unlinked_parameter() -> None:
    plain = nn.Parameter(torch.zeros(3))
    t = tensor_fragment
    for call in (
        lambda: t.get_full_hp_param(plain),
        lambda: t.set_full_hp_param(plain, torch.ones(3)),
        lambda: t.get_full_hp_grad(plain),
        lambda: t.set_full_hp_grad(plain, torch.ones(3)),
        lambda: t.safe_get_full_optimizer_state(plain, "exp_avg"),
        lambda: t.safe_set_full_optimizer_state(plain, torch.ones(3), "exp_avg"),
        lambda: t.safe_get_local_optimizer_state(plain, "exp_avg"),
        lambda: t.safe_set_local_optimizer_state(plain, torch.ones(3), "exp_avg"),
        lambda: state_keys(plain),
    ):
        with pytest.raises(UnlinkedParameterError):
            call()
    for call in (
        lambda: t.safe_get_full_grad(plain),
        lambda: t.safe_set_full_grad(plain, torch.ones(3)),
        lambda: t.safe_get_local_grad(plain),
        lambda: t.safe_set_local_grad(plain, torch.ones(3)),
    ):
        with pytest.raises(GradientUnavailableError):
            call()
    assert plain.tolist() == [0, 0, 0]


@pytest.mark.parametrize("key", [None, 3, "", b"exp_avg"])
def test_a_key_that_is_none(key: Any) -> None:
    plain = nn.Parameter(torch.zeros(3))
    for call in (
        lambda: tensor_fragment.safe_get_full_optimizer_state(plain, key),
        lambda: tensor_fragment.safe_set_full_optimizer_state(plain, torch.ones(3), key),
        lambda: tensor_fragment.safe_get_local_optimizer_state(plain, key),
        lambda: get_local(plain, key),
    ):
        with pytest.raises(InvalidValueError, match="expected 'value', 'grad' or the key of an optimizer state"):
            call()


def test_every_error_can_be_caught_as_one() -> None:
    from ds_fragment import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), FragmentError)
    assert issubclass(errors.InvalidValueError, ValueError)
    assert issubclass(errors.StateNotReadyError, RuntimeError)
