from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ds_z3leaf
import pytest

README = Path(__file__).parents[1] / "README.md"
# Torch warns where there is no numpy, which it does not need.
PYTHON = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c"]
MODULES = [name for _, name, _ in pkgutil.iter_modules(ds_z3leaf.__path__, "ds_z3leaf.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 8


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_readme_examples_run(block: str) -> None:
    done = subprocess.run([*PYTHON, block], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_import_is_silent_and_does_not_load_fsdp() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import ds_z3leaf; "
        "print({name for name in set(sys.modules) - before if name.startswith('torch.distributed')})"
    )
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_every_exported_name_is_there() -> None:
    assert [name for name in ds_z3leaf.__all__ if not hasattr(ds_z3leaf, name)] == []
