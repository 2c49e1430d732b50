"""Submodules by their dotted paths."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from ds_fragment.errors import FragmentError
from ds_fragment.module_utils import ModulePathError, recursive_getattr, recursive_setattr
from torch import nn


def model() -> nn.Module:
    inner = nn.Module()
    inner.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    whole = nn.Module()
    whole.encoder = inner
    whole.heads = nn.ModuleDict({"lm": nn.Linear(3, 4)})
    return whole


def test_parameters_are_deepspeeds() -> None:
    assert list(inspect.signature(recursive_getattr).parameters) == ["model", "module_name"]
    assert list(inspect.signature(recursive_setattr).parameters) == ["model", "module_name", "module"]


def test_every_path_of_named_modules_and_parameters_is_read() -> None:
    whole = model()
    for name, module in whole.named_modules():
        if name:
            assert recursive_getattr(whole, name) is module
    for name, parameter in whole.named_parameters():
        assert recursive_getattr(whole, name) is parameter
    assert recursive_getattr(whole, "heads.lm.out_features") == 4


@pytest.mark.parametrize("name", ["encoder", "encoder.layers", "encoder.layers.0", "encoder.layers.1", "heads.lm"])
def test_every_module_is_replaced_in_its_place(name: str) -> None:
    whole, new = model(), nn.Identity()
    order = [key for key, _ in recursive_getattr(whole, name.rpartition(".")[0] or "encoder").named_children()]
    recursive_setattr(whole, name, new)
    assert dict(whole.named_modules())[name] is new
    if "." in name:
        assert [key for key, _ in recursive_getattr(whole, name.rpartition(".")[0]).named_children()] == order


def test_a_parameter_is_replaced_and_stays_one() -> None:
    whole, new = model(), nn.Parameter(torch.ones(2, 2))
    recursive_setattr(whole, "encoder.layers.0.weight", new)
    assert dict(whole.named_parameters())["encoder.layers.0.weight"] is new
    with pytest.raises(TypeError, match="cannot assign"):
        recursive_setattr(whole, "encoder.layers.0.weight", torch.ones(2, 2))


def test_a_last_part_that_is_new_is_added() -> None:
    whole = model()
    recursive_setattr(whole, "encoder.norm", nn.LayerNorm(2))
    assert "encoder.norm.weight" in dict(whole.named_parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder", "module_name='decoder': the model is a Module and has no 'decoder'"),
        ("encoder.layer.0", "module_name='encoder.layer.0': 'encoder' is a Module and has no 'layer'"),
        ("encoder.layers.2", "module_name='encoder.layers.2': 'encoder.layers' is a ModuleList and has no '2'"),
        ("encoder.layers.0.bias.x", "'encoder.layers.0.bias' is a Parameter and has no 'x'"),
    ],
)
def test_a_missing_part_is_named(name: str, message: str) -> None:
    whole = model()
    before = list(whole.named_modules())
    with pytest.raises(ModulePathError) as error:
        recursive_getattr(whole, name)
    assert message in str(error.value)
    with pytest.raises(ModulePathError) as error:
        recursive_setattr(whole, f"{name}.more", nn.Identity())
    assert f"has no {name.rpartition('.')[2]!r}" in str(error.value) or "has no 'layer'" in str(error.value)
    assert list(whole.named_modules()) == before


@pytest.mark.parametrize("name", ["", ".", "encoder.", ".encoder", "encoder..layers", None, 3, b"encoder"])
def test_what_is_no_path_is_refused(name: Any) -> None:
    whole = model()
    before = list(whole.named_modules())
    for call in (lambda: recursive_getattr(whole, name), lambda: recursive_setattr(whole, name, nn.Identity())):
        with pytest.raises(ModulePathError, match="is no path: give names with dots between them") as error:
            call()
        assert f"module_name={name!r}" in str(error.value)
    assert list(whole.named_modules()) == before


def test_the_error_is_an_attribute_error_and_one_of_this_package() -> None:
    assert issubclass(ModulePathError, AttributeError)
    assert issubclass(ModulePathError, FragmentError)


def test_the_error_inside_a_property_is_kept() -> None:
    class Broken(nn.Module):
        @property
        def head(self) -> nn.Module:
            raise AttributeError("inside of the property")

    with pytest.raises(ModulePathError) as error:
        recursive_getattr(Broken(), "head.weight")
    assert error.value.__cause__ is not None
