"""`attach`: by identity, weakly, harmless when repeated."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ds_fragment import attach, state_keys
from ds_fragment.engines.model import clean_name
from ds_fragment.errors import InvalidValueError, StateNotReadyError, UnlinkedParameterError
from ds_fragment.record import registry
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from fragment_oracle import assert_same
from torch import nn


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def test_state_needs_an_optimizer_and_a_step() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UnlinkedParameterError, match="call attach"):
        state_keys(model.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer)
    with pytest.raises(StateNotReadyError, match="parameter 'weight' has no optimizer state yet: AdamW"):
        safe_get_full_optimizer_state(model.weight, "exp_avg")
    assert len(optimizer.state) == 0  # asking made no entry
    optimizer = stepped(model)
    attach(model, optimizer)
    assert state_keys(model.weight) == ["exp_avg", "exp_avg_sq", "step"]


def test_attaching_twice_is_harmless() -> None:
    model = nn.Linear(3, 2)
    optimizer = stepped(model)
    for _ in range(3):
        attach(model, optimizer)
    assert_same(safe_get_full_optimizer_state(model.bias, "exp_avg"), optimizer.state[model.bias]["exp_avg"])
    other = stepped(model)
    attach(model, other)  # the later optimizer is asked
    other.state[model.bias]["exp_avg"].fill_(7.0)
    assert_same(safe_get_full_optimizer_state(model.bias, "exp_avg"), torch.full((2,), 7.0))


def test_parameters_are_told_apart_by_identity() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    attach(one, stepped(one))
    with pytest.raises(UnlinkedParameterError):
        state_keys(other.weight)


def test_nothing_is_kept_alive() -> None:
    model = nn.Linear(3, 2)
    optimizer = stepped(model)
    attach(model, optimizer)
    moment = weakref.ref(optimizer.state[model.weight]["exp_avg"])
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        gc.collect()  # a torch optimizer is in cycles of its own
        assert gone() is None
        assert moment() is None
        with pytest.raises(UnlinkedParameterError):
            state_keys(model.weight)
        weight = weakref.ref(model.weight)
        del model
        gc.collect()
        assert weight() is None
    finally:
        gc.enable()


def test_names_lose_the_prefixes_of_wrappers() -> None:
    assert clean_name("_fsdp_wrapped_module._orig_mod.layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"
    assert clean_name("module_orig_mod.weight") == "module_orig_mod.weight"
    model = nn.Sequential(nn.Linear(2, 2))
    assert registry.name_of(model[0].weight) == "a parameter of shape (2, 2)"
    attach(model)
    assert registry.name_of(model[0].weight) == "parameter '0.weight'"
    attach(None, torch.optim.SGD(model.parameters()))
    assert registry.name_of(model[0].weight) == "parameter '0.weight'"


def test_masters_are_the_value_the_state_and_what_writes_go_to() -> None:
    model = nn.Linear(3, 2).bfloat16()
    masters = [nn.Parameter(torch.randn_like(param, dtype=torch.float32)) for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    for master in masters:
        master.grad = torch.randn_like(master)
    attach(model, optimizer, masters=zip(model.parameters(), masters, strict=True))
    assert_same(safe_get_full_grad(model.weight), masters[0].grad)
    optimizer.step()
    assert_same(safe_get_full_fp32_param(model.weight), masters[0].detach())
    assert_same(safe_get_full_optimizer_state(model.bias, "exp_avg"), optimizer.state[masters[1]]["exp_avg"])
    value = torch.randn(2, 3)
    safe_set_full_fp32_param(model.weight, value)
    assert_same(masters[0].detach(), value)
    assert_same(model.weight.detach(), value.bfloat16())


def test_a_master_of_another_shape_records_nothing() -> None:
    model = nn.Linear(3, 2)
    good, bad = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(InvalidValueError, match=r"a master of shape \(3,\) for .* of shape \(2,\)"):
        attach(model, masters=[(model.weight, good), (model.bias, bad)])
    assert registry.master_of(model.weight) is None
    assert registry.name_of(model.weight) == "a parameter of shape (2, 3)"


def test_a_master_is_held_weakly() -> None:
    model = nn.Linear(3, 2)
    master = torch.zeros(2, 3)
    attach(model, masters=[(model.weight, master)])
    assert safe_get_full_fp32_param(model.weight).abs().sum() == 0
    gone = weakref.ref(master)
    del master
    assert gone() is None
