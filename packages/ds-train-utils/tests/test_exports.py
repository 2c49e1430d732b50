"""The list of exports against the seven packages, the stub that type checkers read, and what a frozen app holds."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import ds_train_utils
import pytest
from ds_train_utils import _exports
from ds_train_utils._exports import EXPORTS, MODULES

SOURCE = Path(ds_train_utils.__file__).parent
SHADOWED = {"tensor_fragment", "z3_leaf_module"}
SEVEN = ["ds_logging", "ds_groups", "ds_ondevice", "ds_fragment", "ds_z3leaf", "ds_loader", "ds_numa"]


@pytest.mark.parametrize("name", EXPORTS)
def test_export_is_the_home_s_own_object(name: str) -> None:
    module, inner = EXPORTS[name]
    home = importlib.import_module(module)
    assert getattr(ds_train_utils, name) is (home if inner is None else getattr(home, inner))
    if inner is not None and name != "__version__":
        assert name in getattr(home, "__all__", vars(home))


def test_a_name_is_listed_once() -> None:
    names = [name for names in _exports._NAMES.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) & set(MODULES) == SHADOWED


def test_everything_public_in_groups_is_exported() -> None:
    groups = importlib.import_module("ds_groups.parallel_state")
    public = {n for n in groups.__all__ if not n.startswith("_") and inspect.isfunction(getattr(groups, n))}
    assert {name for name, (home, inner) in EXPORTS.items() if home == groups.__name__ and inner} == public


def test_nothing_leaks() -> None:
    for module in pkgutil.iter_modules([str(SOURCE)]):
        if module.name != "__main__":
            importlib.import_module(f"ds_train_utils.{module.name}")
    names = [name for name in dir(ds_train_utils) if not name.startswith("_")]
    assert set(names) <= set(ds_train_utils.__all__) == set(EXPORTS)
    assert all(hasattr(ds_train_utils, name) for name in ds_train_utils.__all__)


@pytest.mark.parametrize("package", SEVEN)
def test_the_seven_leak_nothing_and_export_their_errors(package: str) -> None:
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__, f"{package}."):
        if not module.name.endswith("__main__") and ".lib" not in module.name:
            importlib.import_module(module.name)
    assert {name for name in dir(found) if not name.startswith("_")} <= set(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)
    errors = vars(importlib.import_module(f"{package}.errors"))
    own = {name for name, value in errors.items() if inspect.isclass(value) and value.__module__ == f"{package}.errors"}
    assert own
    assert own <= set(found.__all__)


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Each (module, name) that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or ".", alias.name) for alias in node.names}
    return found


def test_the_stub_lists_the_same() -> None:
    stub = {
        name: ("ds_train_utils" if module == "." else module) for module, name in imports_of(SOURCE / "__init__.pyi")
    }
    expected = {name: home if inner else "ds_train_utils" for name, (home, inner) in EXPORTS.items()}
    assert stub == expected


def test_a_frozen_application_finds_every_module() -> None:
    """Tools that freeze one follow import statements, not strings."""
    imported = imports_of(SOURCE / "_exports.py")
    named = {module for module, _ in imported} | {f"{module}.{name}" for module, name in imported}
    for name, home in MODULES.items():
        assert f"ds_train_utils.{name}" in named
        assert (home, "") in imports_of(SOURCE / f"{name}.py")
    for home, _ in EXPORTS.values():
        assert home in named or home in MODULES.values() or home == "ds_train_utils.__about__", home


@pytest.mark.parametrize("submodule", MODULES)
def test_submodule_is_the_package_s_own_module(submodule: str) -> None:
    home = importlib.import_module(MODULES[submodule])
    assert importlib.import_module(f"ds_train_utils.{submodule}") is home
    namespace: dict[str, object] = {}
    exec(f"import ds_train_utils.{submodule} as m", namespace)
    if submodule not in SHADOWED:
        assert namespace["m"] is home
        assert getattr(ds_train_utils, submodule) is home


@pytest.mark.parametrize("submodule", MODULES)
def test_submodule_s_stub_names_its_home(submodule: str) -> None:
    first, *rest = ast.parse((SOURCE / f"{submodule}.pyi").read_text()).body
    assert ast.unparse(first) == f"from {MODULES[submodule]} import *"
    home = importlib.import_module(MODULES[submodule])
    for node in rest:  # what users take from the module though its __all__ does not have it
        assert isinstance(node, ast.ImportFrom)
        assert node.module == MODULES[submodule]
        assert all(alias.name == alias.asname and hasattr(home, alias.name) for alias in node.names)
        assert not {alias.name for alias in node.names} & set(getattr(home, "__all__", ()))


def test_every_submodule_file_is_an_alias() -> None:
    assert {path.stem for path in SOURCE.glob("*.py") if not path.name.startswith("_")} == set(MODULES)


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
