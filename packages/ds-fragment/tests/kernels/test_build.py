"""hatch_build.py: what goes into the wheel, and what it is called."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FAKE = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf 'sm_80\\nsm_90\\nsm_100\\nsm_120\\n'; exit 0; fi
while [ "$1" != -o ]; do shift; done
printf 'GLIBC_2.4 GLIBC_2.28 GLIBC_2.9' > "$2"; echo "$@" > "$2.log"
{end}
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a file."""
    path = tmp_path / "nvcc"
    path.write_text(FAKE.replace("{end}", "exit 0"))
    path.chmod(0o755)
    monkeypatch.setenv("NVCC", str(path))
    monkeypatch.delenv("DS_FRAGMENT_BUILD_CUDA", raising=False)
    monkeypatch.delenv("DS_FRAGMENT_CUDA_ARCHS", raising=False)
    return path


def hook(build: ModuleType, root: Path) -> tuple[Any, list[str]]:
    said: list[str] = []

    class Hook(build.CudaBuildHook):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            pass

        app = SimpleNamespace(display_info=said.append, display_warning=said.append)

    Hook.root = str(root)
    return Hook(), said


def run(build: ModuleType, root: Path) -> tuple[dict[str, Any], list[str]]:
    it, said = hook(build, root)
    data: dict[str, Any] = {"pure_python": True, "force_include": {}}
    it.initialize("standard", data)
    data["present"] = {Path(path).is_file() for path in data["force_include"]}
    it.finalize("standard", data, "")
    assert not any(Path(path).exists() for path in data["force_include"])
    return data, said


def test_with_nvcc_the_wheel_is_for_this_platform(build: ModuleType, fake_nvcc: Path, tmp_path: Path) -> None:
    data, said = run(build, tmp_path)
    assert data["pure_python"] is False
    assert data["tag"] == f"py3-none-manylinux_2_28_{os.uname().machine}"
    assert list(data["force_include"].values()) == ["ds_fragment/kernels/libds_fragment.so"]
    assert data["present"] == {True}
    assert said == [f"compiled the CUDA kernels with {fake_nvcc} for sm_80 sm_90 sm_100 sm_120 compute_120"]


@pytest.mark.usefixtures("fake_nvcc")
def test_zero_makes_a_pure_wheel(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_FRAGMENT_BUILD_CUDA", "0")
    data, said = run(build, tmp_path)
    assert data["pure_python"] is True
    assert "tag" not in data
    assert said == ["DS_FRAGMENT_BUILD_CUDA=0: a pure wheel"]


def test_without_nvcc_it_is_pure_or_an_error(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.delenv("DS_FRAGMENT_BUILD_CUDA", raising=False)
    data, said = run(build, tmp_path)
    assert data["pure_python"] is True
    assert "nvcc was not found" in said[0]
    monkeypatch.setenv("DS_FRAGMENT_BUILD_CUDA", "1")
    with pytest.raises(build.BuildError, match=r"DS_FRAGMENT_BUILD_CUDA=1 but nvcc was not found: put it on the PATH"):
        run(build, tmp_path)
    monkeypatch.setenv("DS_FRAGMENT_BUILD_CUDA", "yes")
    with pytest.raises(build.BuildError, match=r"DS_FRAGMENT_BUILD_CUDA='yes', expected 0, 1 or nothing"):
        run(build, tmp_path)


def test_code_that_does_not_compile_is_a_warning_unless_asked_for(
    build: ModuleType, fake_nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc.write_text(FAKE.replace("{end}", "echo no such header >&2; exit 2"))
    data, said = run(build, tmp_path)
    assert data["pure_python"] is True
    assert "did not compile" in said[0]
    assert "no such header" in said[0]
    monkeypatch.setenv("DS_FRAGMENT_BUILD_CUDA", "1")
    with pytest.raises(build.BuildError, match="nvcc failed with code 2"):
        run(build, tmp_path)


def test_architectures_are_those_asked_for_that_nvcc_knows(
    build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.architectures(str(fake_nvcc)) == [80, 90, 100, 120]
    monkeypatch.setenv("DS_FRAGMENT_CUDA_ARCHS", "8.0;90")
    assert build.architectures(str(fake_nvcc)) == [80, 90]
    monkeypatch.setenv("DS_FRAGMENT_CUDA_ARCHS", "80 75")
    with pytest.raises(build.BuildError, match=r"names \[75\], which .* does not know"):
        build.architectures(str(fake_nvcc))


def test_an_editable_install_compiles_into_the_source_tree(build: ModuleType, fake_nvcc: Path, tmp_path: Path) -> None:
    (tmp_path / "src/ds_fragment/kernels").mkdir(parents=True)
    it, _ = hook(build, tmp_path)
    data: dict[str, Any] = {"pure_python": True, "force_include": {}}
    it.initialize("editable", data)
    it.finalize("editable", data, "")
    assert data["force_include"] == {}
    assert (tmp_path / "src/ds_fragment/kernels/libds_fragment.so").is_file()
