"""`install` where there is no DeepSpeed; with one, tests-integration/dropin has its tests."""

from __future__ import annotations

import sys
from types import ModuleType

import ds_train_utils
import pytest
from ds_train_utils import _install


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"deepspeed": _install.VERIFIED[-1]}
    monkeypatch.setattr(_install.importlib.metadata, "version", found.__getitem__)
    return found


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise _install.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_install.importlib.metadata, "version", missing)
    with pytest.raises(ds_train_utils.InstallError, match="DeepSpeed is not installed"):
        ds_train_utils.install()


def test_after_deepspeed_was_imported(version: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    before = list(sys.meta_path)
    with pytest.raises(ds_train_utils.InstallError, match=r"imported already .*install\(\) before the first"):
        ds_train_utils.install()
    assert sys.meta_path == before


def test_another_version_is_named(version: dict[str, str]) -> None:
    version["deepspeed"] = "99.1.0"
    with pytest.warns(UserWarning, match="verified on DeepSpeed .*, not on the 99.1.0") as caught:
        ds_train_utils.install()
    assert caught[0].filename == __file__


def test_a_second_call_does_nothing(version: dict[str, str]) -> None:
    ds_train_utils.install()
    after = list(sys.meta_path)
    ds_train_utils.install()
    assert sys.meta_path == after
    finder = sys.meta_path[0]
    assert finder.find_spec("deepspeed.utils.types", None) is None
    assert finder.find_spec("deepspeed", None) is None
    assert finder.find_spec("deepspeed.utils.groups", None) is not None


def test_the_docstring_names_the_versions() -> None:
    text = " ".join((ds_train_utils.install.__doc__ or "").split())
    *first, last = _install.VERIFIED
    assert f"({', '.join(first)} and {last})" in text
