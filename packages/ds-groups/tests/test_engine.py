"""Attributes that DeepSpeed's module has too, with a stand-in for that module; no process group is needed."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from ds_groups import parallel_state as groups
from ds_groups._engine import deepspeed_groups

NAME = "deepspeed.utils.groups"
UNSET = {"mpu": None, "mesh_device": None, "expert_tensor_parallel_world_size": 1}
OVERRIDES = {
    "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE": groups.set_tensor_model_parallel_world_size,
    "_MPU_TENSOR_MODEL_PARALLEL_RANK": groups.set_tensor_model_parallel_rank,
}


@pytest.fixture(autouse=True)
def nothing_assigned():
    yield
    for name, value in UNSET.items():
        setattr(groups, name, value)
    for assign in OVERRIDES.values():
        assign(None)


def load(monkeypatch):
    module = ModuleType(NAME)
    vars(module).update(UNSET)
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


def test_which_module_is_live(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    assert deepspeed_groups() is None
    module = load(monkeypatch)
    assert deepspeed_groups() is module
    module.__spec__ = ModuleSpec(NAME, None)
    module.__spec__._initializing = True
    assert deepspeed_groups() is None  # half imported
    module.__spec__._initializing = False
    assert deepspeed_groups() is module
    monkeypatch.setitem(sys.modules, NAME, groups)  # as under ds_train_utils.install()
    assert deepspeed_groups() is None
    groups.mpu = "ours"
    assert groups.mpu == "ours"


@pytest.mark.parametrize("name", UNSET)
def test_the_engine_s_value_is_read(name, monkeypatch):
    module = load(monkeypatch)
    assert getattr(groups, name) == UNSET[name]
    marker = object()
    setattr(module, name, marker)
    assert getattr(groups, name) is marker
    assert getattr(importlib.import_module("ds_groups.parallel_state"), name) is marker


@pytest.mark.parametrize("name", UNSET)
def test_assigning_sets_both(name, monkeypatch):
    module = load(monkeypatch)
    marker = object()
    with monkeypatch.context() as patch:
        patch.setattr(groups, name, marker)
        assert getattr(groups, name) is getattr(module, name) is vars(groups)[name] is marker
    assert getattr(groups, name) == getattr(module, name) == UNSET[name]
    setattr(groups, name, marker)
    setattr(module, name, UNSET[name])  # the engine lets go of it
    assert getattr(groups, name) == UNSET[name]


@pytest.mark.parametrize("name", UNSET)
def test_assigned_before_deepspeed_is_imported(name, monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    first, second = object(), object()
    setattr(groups, name, first)
    module = load(monkeypatch)
    assert getattr(groups, name) is first
    assert getattr(module, name) == UNSET[name]
    setattr(module, name, second)
    assert getattr(groups, name) is second


@pytest.mark.parametrize("name", UNSET)
def test_a_deepspeed_without_the_variable(name, monkeypatch):
    module = load(monkeypatch)
    delattr(module, name)
    assert getattr(groups, name) == UNSET[name]
    setattr(groups, name, "assigned")
    assert getattr(groups, name) == "assigned"


def test_functions_see_what_the_engine_was_given(monkeypatch):
    module = load(monkeypatch)

    class Mpu:
        def get_model_parallel_world_size(self):
            return 6

        def get_sequence_parallel_world_size(self):
            return 7

    module.mpu = Mpu()
    module.expert_tensor_parallel_world_size = 9
    assert groups._get_model_parallel_world_size() == 6
    assert groups._get_sequence_parallel_world_size() == 7
    assert groups._get_expert_model_parallel_world_size() == 9


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_of_size_and_rank(name, monkeypatch):
    module = load(monkeypatch)
    OVERRIDES[name](4)
    assert getattr(module, name) == getattr(groups, name) == 4
    setattr(module, name, 3)
    assert getattr(groups, name) == 3
    groups.destroy_groups()  # the engine's own stays
    assert getattr(groups, name) == getattr(module, name) == 3
    OVERRIDES[name](2)
    groups.destroy_groups()
    assert getattr(groups, name) is getattr(module, name) is None
