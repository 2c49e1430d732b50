"""The compiled library: the installed one, else one compiled for a single architecture where nvcc is found."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from ds_fragment.kernels import library as _library

PACKAGE = Path(__file__).parents[2]


def build_module() -> ModuleType:
    """hatch_build.py, which is no part of the installed package."""
    spec = importlib.util.spec_from_file_location("hatch_build", PACKAGE / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build() -> ModuleType:
    return build_module()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, build: ModuleType) -> _library.Loaded:
    if _library.loaded().library is not None:
        return _library.loaded()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs the compiled library, or nvcc")
    out = tmp_path_factory.mktemp("library") / "libds_fragment.so"
    before = os.environ.get("DS_FRAGMENT_CUDA_ARCHS")
    os.environ["DS_FRAGMENT_CUDA_ARCHS"] = "90"
    try:
        build.compile_library(PACKAGE, out, nvcc)
    finally:
        del os.environ["DS_FRAGMENT_CUDA_ARCHS"]
        if before is not None:
            os.environ["DS_FRAGMENT_CUDA_ARCHS"] = before
    found = _library.load(out)
    assert found.library is not None, found.reason
    return found
