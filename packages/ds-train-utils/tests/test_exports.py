"""The list of exports in ``__init__.pyi`` against the seven packages."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import ds_train_utils
import pytest
from ds_train_utils._lazy import Export, read_stub

STUB = Path(ds_train_utils.__file__).with_suffix(".pyi")
EXPORTS = read_stub("ds_train_utils", STUB.read_text())
HOMES = {
    "logging": "ds_logging.logging",
    "comms_logging": "ds_logging.comms_logging",
    "nvtx": "ds_logging.nvtx",
    "groups": "ds_groups.parallel_state",
    "init_on_device": "ds_ondevice.init_on_device",
    "tensor_fragment": "ds_fragment.tensor_fragment",
    "mixed_precision_linkage": "ds_fragment.mixed_precision_linkage",
    "z3_leaf_module": "ds_z3leaf.leaf",
    "numa": "ds_numa.numactl",
    "dataloader": "ds_loader.dataloader",
}
SHADOWED = {"tensor_fragment", "z3_leaf_module"}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_is_the_home_s_own_object(name: str) -> None:
    export = EXPORTS[name]
    submodule = export.module.rpartition(".")[2]
    home = importlib.import_module(HOMES.get(submodule, export.module))
    expected = home if export.name is None else getattr(home, export.name)
    assert getattr(ds_train_utils, name) is expected


@pytest.mark.parametrize("name", [name for name, export in EXPORTS.items() if export.name and name != "__version__"])
def test_export_is_public_in_its_home(name: str) -> None:
    home = importlib.import_module(HOMES[EXPORTS[name].module.rpartition(".")[2]])
    assert name in getattr(home, "__all__", vars(home))


def test_everything_public_in_groups_is_exported() -> None:
    groups = importlib.import_module("ds_groups.parallel_state")
    public = {n for n in groups.__all__ if not n.startswith("_") and inspect.isfunction(getattr(groups, n))}
    assert {
        name for name, export in EXPORTS.items() if export.module == "ds_train_utils.groups" and export.name
    } == public


def test_all_is_the_stub() -> None:
    assert list(ds_train_utils.__all__) == sorted(EXPORTS)
    assert set(EXPORTS) <= set(dir(ds_train_utils))


@pytest.mark.parametrize("submodule", HOMES)
def test_submodule_is_the_package_s_own_module(submodule: str) -> None:
    home = importlib.import_module(HOMES[submodule])
    assert importlib.import_module(f"ds_train_utils.{submodule}") is home
    namespace: dict[str, object] = {}
    exec(f"import ds_train_utils.{submodule} as m", namespace)
    if submodule not in SHADOWED:
        assert namespace["m"] is home
        assert getattr(ds_train_utils, submodule) is home


@pytest.mark.parametrize("submodule", HOMES)
def test_submodule_s_stub_names_its_home(submodule: str) -> None:
    first, *rest = ast.parse(STUB.with_name(f"{submodule}.pyi").read_text()).body
    assert ast.unparse(first) == f"from {HOMES[submodule]} import *"
    home = importlib.import_module(HOMES[submodule])
    for node in rest:  # what users take from the module though its __all__ does not have it
        assert isinstance(node, ast.ImportFrom)
        assert node.module == HOMES[submodule]
        assert all(alias.name == alias.asname and hasattr(home, alias.name) for alias in node.names)
        assert not {alias.name for alias in node.names} & set(getattr(home, "__all__", ()))


def test_every_submodule_file_is_an_alias() -> None:
    files = {path.stem for path in STUB.parent.glob("*.py") if not path.name.startswith("_")}
    assert files == set(HOMES)
    assert files - SHADOWED == {name for name, export in EXPORTS.items() if export.name is None}
    assert Export("ds_train_utils.tensor_fragment", "tensor_fragment") in EXPORTS.values()


@pytest.mark.parametrize("submodule", sorted(SHADOWED))
def test_importing_a_module_does_not_replace_the_export_of_that_name(submodule: str) -> None:
    before = getattr(ds_train_utils, submodule)
    module = importlib.import_module(f"ds_train_utils.{submodule}")
    assert isinstance(module, ModuleType)
    assert not isinstance(before, ModuleType)
    assert getattr(ds_train_utils, submodule) is before is getattr(module, submodule)


def test_module_state_exists_once(monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module("ds_groups.parallel_state")
    marker = object()
    monkeypatch.setattr(ds_train_utils.groups, "mpu", marker)
    assert home.mpu is marker
