"""The names and call signatures of ``deepspeed.utils``, held against the contract's own file.

``contract/deepspeed_surface.json`` is a copy of the project's contract; where the original lies beside the repository,
the copy must equal it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import ds_train_utils
import pytest

CONTRACT = Path(__file__).parent / "contract" / "deepspeed_surface.json"
ORIGINAL = Path(__file__).parents[2] / "shared" / "contract" / CONTRACT.name
SURFACE = json.loads(CONTRACT.read_text(encoding="utf-8"))
ENTRIES = [(module, name) for module, names in SURFACE["modules"].items() for name in names]
# As attributes of the package these two are the class and the function, though modules of the same names exist.
SHADOWING = {"tensor_fragment", "z3_leaf_module"}


def entry(module: str, name: str) -> dict[str, Any]:
    return SURFACE["modules"][module][name]


def found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"ds_train_utils.{module}"), name)


def of_kind(kind: str) -> list[tuple[str, str]]:
    return [(module, name) for module, name in ENTRIES if entry(module, name)["kind"].startswith(kind)]


def spelled(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name


def assert_takes(function: Any, wanted: list[str]) -> None:
    """The function takes exactly these parameters in this order; keyword-only ones with a default may follow."""
    parameters = list(inspect.signature(function).parameters.values())
    extra = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in extra if p.default is p.empty] == []
    taken = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [spelled(p) for p in taken] == [text.partition("=")[0] for text in wanted]
    for parameter, text in zip(taken, wanted, strict=True):
        default = text.partition("=")[2]
        if default:
            assert parameter.default == eval(default, {"logging": logging})


def test_copy_equals_the_original() -> None:
    if not ORIGINAL.exists():
        pytest.skip("the contract's original is not beside this repository")
    assert json.loads(ORIGINAL.read_text(encoding="utf-8")) == SURFACE


def test_every_kind_of_entry_is_checked() -> None:
    checked = [*of_kind("function"), *of_kind("class"), *of_kind("logger"), *of_kind("flag"), *of_kind("module state")]
    assert sorted(checked) == sorted(ENTRIES)


@pytest.mark.parametrize("name", SURFACE["namespace"])
def test_namespace_offers(name: str) -> None:
    value = getattr(ds_train_utils, name)
    homes = [module for module, names in SURFACE["modules"].items() if name in names]
    if homes:
        assert all(value is found(module, name) for module in homes)
    else:
        assert value is importlib.import_module(f"ds_train_utils.{name}")
    assert name in ds_train_utils.__all__
    assert name in dir(ds_train_utils)


@pytest.mark.parametrize(("module", "name"), of_kind("function"))
def test_function(module: str, name: str) -> None:
    function = found(module, name)
    assert callable(function)
    assert_takes(function, entry(module, name)["parameters"])


@pytest.mark.parametrize(("module", "name"), of_kind("class"))
def test_class(module: str, name: str) -> None:
    cls = found(module, name)
    assert inspect.isclass(cls)
    for member, wanted in entry(module, name)["members"].items():
        raw = inspect.getattr_static(cls, member)
        if isinstance(raw, staticmethod):
            assert "self" not in wanted
        assert_takes(getattr(cls, member), wanted)
    fields = entry(module, name).get("fields", [])
    assert list(inspect.signature(cls).parameters)[: len(fields)] == fields


def test_fragment_address_has_its_fields() -> None:
    address = found("tensor_fragment", "fragment_address")(7, 3)
    assert (address.numel, address.start) == (7, 3)


@pytest.mark.parametrize(("module", "name"), of_kind("logger"))
def test_logger(module: str, name: str) -> None:
    logger = found(module, name)
    assert isinstance(logger, logging.Logger)
    for member in entry(module, name)["members"]:
        assert hasattr(logger, member), member


@pytest.mark.parametrize(("module", "name"), [*of_kind("flag"), *of_kind("module state")])
def test_module_state_can_be_assigned(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module(f"ds_train_utils.{module}")
    marker = object()
    monkeypatch.setattr(home, name, marker)
    assert found(module, name) is marker
    assert vars(importlib.import_module(home.__name__))[name] is marker


class FakeMpu:
    """The part of Megatron's model-parallel unit that is asked here."""

    def get_data_parallel_world_size(self) -> int:
        return 12

    def get_data_parallel_group(self) -> str:
        return "the group of mpu"


def test_groups_sees_an_assigned_mpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_train_utils.groups import _get_data_parallel_group, _get_data_parallel_world_size

    monkeypatch.setattr(ds_train_utils.groups, "mpu", FakeMpu())
    assert (_get_data_parallel_world_size(), _get_data_parallel_group()) == (12, "the group of mpu")


def test_calls_with_the_flag_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @ds_train_utils.instrument_w_nvtx
    def double(x: int) -> int:
        return 2 * x

    for flag in (False, True):
        monkeypatch.setattr(ds_train_utils.nvtx, "enable_nvtx", flag)
        assert double(21) == 42


@pytest.mark.parametrize("name", sorted(SHADOWING))
def test_shadowing(name: str) -> None:
    module = importlib.import_module(f"ds_train_utils.{name}")
    assert isinstance(module, ModuleType)
    attribute = getattr(ds_train_utils, name)
    assert not isinstance(attribute, ModuleType)
    assert attribute is getattr(module, name)
    namespace: dict[str, Any] = {}
    exec(
        f"from ds_train_utils import {name} as attribute\nfrom ds_train_utils.{name} import {name} as inner", namespace
    )
    assert namespace["attribute"] is namespace["inner"] is attribute


@pytest.mark.parametrize("name", sorted(set(SURFACE["modules"]) - SHADOWING))
def test_submodule_is_an_attribute_too(name: str) -> None:
    assert getattr(ds_train_utils, name) is importlib.import_module(f"ds_train_utils.{name}")


def test_parallel_state_is_the_groups_module() -> None:
    import ds_groups.parallel_state

    assert ds_train_utils.groups is ds_groups.parallel_state
